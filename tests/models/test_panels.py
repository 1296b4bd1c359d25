"""Weights in panels: every product is the plain one, whatever the shape, the level, the rows beside it, the layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quire.errors import InvariantError
from quire.kernels import native
from quire.models.panels import (
    Laid,
    PanelWeight,
    blocks_of,
    from_panels,
    laid_out,
    multiplier,
    panel_forward,
    to_panels,
)
from quire.models.rounded import GROUP, from_lines, to_int4, to_int8, to_lines

LIBRARY = native.load()
needs_kernels = pytest.mark.skipif(
    LIBRARY is None, reason="the CPU kernels were not built here (no C++ compiler)"
)
LEVELS = [
    x for x in range(1, 9) if LIBRARY is not None and (x == LIBRARY.isa or 1 < x < LIBRARY.isa)
]
sizes = st.integers(1, 200)


def near(got: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Within one rounding to bfloat16 and the sums' own roundings of the product in float64."""
    want, most = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    if bias is not None:
        want, most = want + bias.double(), most + bias.double().abs()
    room = 2**-8 * want.abs() + 2**-20 * most
    assert ((got.double() - want).abs() <= room).all()


def laid(
    panels: torch.Tensor,
    n: int,
    k: int,
    scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> Laid:
    words, panel = panels.shape[1:3]
    bits = 8 * panels.element_size()
    return Laid(panels.data_ptr(), panels, n, k, words, panel, scales, bias, bits)


def alone(layer: Laid, isa: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    multiply = multiplier(layer, isa=isa)
    return lambda x: multiply(x)[0]


@needs_kernels
@given(
    rows=st.one_of(st.integers(1, 40), st.integers(90, 200)),
    n=sizes,
    k=sizes,
    panel=st.sampled_from([16, 32, 48, 64]),
    more_words=st.sampled_from([0, 0, 5]),
    bias=st.booleans(),
    isa=st.sampled_from(LEVELS or [0]),
    seed=st.integers(0, 99),
)
def test_the_kernel_is_the_product(
    rows: int, n: int, k: int, panel: int, more_words: int, bias: bool, isa: int, seed: int
) -> None:
    """The rows of a batch are, bit for bit, the rows alone."""
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=random).bfloat16()
    x = torch.randn(rows, k, generator=random).bfloat16()
    b = torch.randn(n, generator=random).bfloat16() if bias else None
    panels = to_panels(w, panel, (k + 1) // 2 + more_words)
    assert torch.equal(from_panels(panels, n, k), w)
    multiply = alone(laid(panels, n, k, bias=b), isa)
    got = multiply(x)
    near(got, x, w, b)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(multiply(x[row : row + 1]), got[row : row + 1])
    assert torch.equal(multiply(x[: rows // 2]), got[: rows // 2])


@needs_kernels
@given(
    rows=st.one_of(st.integers(1, 17), st.integers(90, 110)),
    n=sizes,
    k=sizes,
    bias=st.booleans(),
    isa=st.sampled_from(LEVELS or [0]),
    seed=st.integers(0, 99),
)
def test_eight_bits_are_multiplied_as_they_decode(
    rows: int, n: int, k: int, bias: bool, isa: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    w = (
        torch.randn(n, k, generator=random).bfloat16()
        * torch.rand(n, 1, generator=random).bfloat16()
    )
    x = torch.randn(rows, k, generator=random).bfloat16()
    b = torch.randn(n, generator=random).bfloat16() if bias else None
    codes, scales = to_int8(w)
    decoded = codes.double() * scales.double()[:, None]
    assert ((decoded - w.double()).abs() <= 0.501 * scales[:, None]).all()
    panels = to_panels(codes)
    multiply = alone(laid(panels, n, k, scales, b), isa)
    got = multiply(x)
    near(got, x, decoded, b)
    assert torch.equal(multiply(x[:1]), got[:1])


@needs_kernels
@given(
    rows=st.one_of(st.integers(1, 17), st.integers(90, 110)),
    n=sizes,
    k=sizes,
    bias=st.booleans(),
    isa=st.sampled_from(LEVELS or [0]),
    seed=st.integers(0, 99),
)
def test_four_bits_are_multiplied_as_they_decode(
    rows: int, n: int, k: int, bias: bool, isa: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=random).bfloat16()
    x = torch.randn(rows, k, generator=random).bfloat16()
    b = torch.randn(n, generator=random).bfloat16() if bias else None
    codes, scales = to_int4(w)
    decoded = (codes.double() * scales.double().repeat_interleave(GROUP, 1))[:, :k]
    weight = PanelWeight.of(w, 4)
    assert torch.equal(weight.plain(), decoded.bfloat16())
    multiply = alone(laid_out(weight, b), isa)
    got = multiply(x)
    near(got, x, decoded, b)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(multiply(x[row : row + 1]), got[row : row + 1])


@given(n=sizes, k=sizes, seed=st.integers(0, 99), spread=st.sampled_from([0.0, 1.0, 4.0]))
def test_four_bits_round_no_worse_than_to_the_nearest_of_fifteen_steps(
    n: int, k: int, seed: int, spread: float
) -> None:
    """Squared error of each group against plain rounding, whose scale reaches the largest weight on both sides."""
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=random) * torch.exp(
        spread * torch.randn(n, 1, generator=random)
    )
    w = w.bfloat16()
    w[n // 2] = 0
    codes, scales = to_int4(w)
    assert torch.equal(from_lines(to_lines(codes), *codes.shape), codes)
    padded = torch.zeros(codes.shape, dtype=torch.float64)
    padded[:, :k] = w.double()
    groups = padded.view(n, -1, GROUP)
    step = groups.abs().amax(-1, keepdim=True) / 7
    plain = (groups / step.clamp_min(1e-30)).round() * step
    decoded = codes.view(groups.shape).double() * scales.double()[..., None]
    assert (codes[:, k:] == 0).all()
    assert (decoded[n // 2] == 0).all()

    def error(of: torch.Tensor) -> torch.Tensor:
        return (of - groups).square().sum(-1)

    assert (error(decoded) <= error(plain) + 2**-16 * groups.square().sum(-1)).all()


@needs_kernels
@given(
    rows=st.one_of(st.integers(1, 17), st.integers(90, 110)),
    widths=st.lists(sizes, min_size=2, max_size=4),
    k=sizes,
    panels=st.lists(st.sampled_from([16, 32, 64]), min_size=4, max_size=4),
    bits=st.lists(st.sampled_from([16, 8, 4]), min_size=4, max_size=4),
    isa=st.sampled_from(LEVELS or [0]),
    seed=st.integers(0, 99),
)
def test_layers_of_one_input_are_each_the_layer_alone(
    rows: int,
    widths: list[int],
    k: int,
    panels: list[int],
    bits: list[int],
    isa: int,
    seed: int,
) -> None:
    """Bit for bit, with and without a bias, 16, 8 and 4 bits side by side."""
    words = -(-k // GROUP) * GROUP // 2 if 4 in bits[: len(widths)] else (k + 1) // 2
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=random).bfloat16()
    layers = []
    for i, n in enumerate(widths):
        w, scales = torch.randn(n, k, generator=random).bfloat16(), None
        bias = torch.randn(n, generator=random).bfloat16() if i % 2 else None
        if bits[i] == 4:
            layers.append(laid_out(PanelWeight.of(w, 4), bias))
            continue
        if bits[i] == 8:
            w, scales = to_int8(w)
        layers.append(laid(to_panels(w, panels[i], words), n, k, scales, bias))
    got = multiplier(*layers, isa=isa)(x)
    for layer, out in zip(layers, got, strict=True):
        assert torch.equal(out, alone(layer, isa)(x))
    with pytest.raises(InvariantError, match="not the kernel's"):
        multiplier(layers[0], laid(to_panels(torch.randn(5, k + 2).bfloat16()), 5, k + 2))
    if bits[0] == 4:
        short = dataclasses.replace(layers[0], words=layers[0].words - 1)
        with pytest.raises(InvariantError, match="what it does not serve"):
            multiplier(short)(x)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_work_and_change_nothing(threads: int) -> None:
    w, x = torch.randn(300, 520).bfloat16(), torch.randn(200, 520).bfloat16()
    panels = to_panels(w)
    multiply = alone(laid(panels, 300, 520))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = multiply(x)
        torch.set_num_threads(threads)
        assert torch.equal(multiply(x), want)
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_infinities_and_nan_stay_in_their_rows() -> None:
    w, x = torch.randn(70, 33).bfloat16(), torch.randn(8, 33).bfloat16()
    x[3, 32], x[5, 0] = float("inf"), float("nan")
    got = panel_forward(PanelWeight(to_panels(w), 70, 33), None)(x)
    assert got[5].isnan().all()
    assert got[3].isinf().all()
    clean = torch.tensor([0, 1, 2, 4, 6, 7])
    near(got[clean], x[clean], w, None)


@needs_kernels
def test_shapes_are_a_linear_layers() -> None:
    w = torch.randn(20, 33).bfloat16()
    forward = panel_forward(PanelWeight(to_panels(w), 20, 33), None)
    wide = torch.randn(2, 3, 66).bfloat16()
    near(forward(wide[..., :33]), wide[..., :33], w, None)  # not contiguous
    assert forward(wide[:, :0, :33]).shape == (2, 0, 20)
    assert forward(wide[0, 0, :33]).shape == (20,)
    with pytest.raises(RuntimeError, match="a layer of 33 inputs is given 66"):
        forward(wide)
    with pytest.raises(RuntimeError, match="dtype"):
        forward(wide[..., :33].float())


@needs_kernels
def test_a_bias_of_another_kind_is_refused() -> None:
    panels = to_panels(torch.randn(20, 33).bfloat16())
    bias = torch.randn(20)
    with pytest.raises(InvariantError, match="not the kernel's"):
        multiplier(laid(panels, 20, 33, bias=bias))


@pytest.mark.parametrize("panel", [64, 48, 32, 16])
def test_blocks_are_recognised_by_their_bits(panel: int) -> None:
    plain = torch.randn(130, 70).bfloat16()
    held = to_panels(plain, panel, 48)
    n_bytes = held.numel() * 2
    assert blocks_of(held.data_ptr(), n_bytes, plain) == (panel, 48)
    held.view(-1)[7] += 1
    assert blocks_of(held.data_ptr(), n_bytes, plain) is None
    assert blocks_of(plain.data_ptr(), plain.numel() * 2, plain) is None


def test_a_packed_weight_reads_as_the_plain_one() -> None:
    plain = torch.randn(37, 21).bfloat16()
    weight = nn.Parameter(PanelWeight(to_panels(plain), 37, 21), requires_grad=False)
    assert isinstance(weight, PanelWeight)
    assert weight.shape == plain.shape
    assert weight.dtype == plain.dtype
    assert torch.equal(weight.clone(), plain)
    assert torch.equal(weight.float(), plain.float())
    assert torch.equal(weight.detach().reshape(-1), plain.reshape(-1))
    for product in (lambda: weight.T, lambda: nn.functional.linear(plain, weight)):
        with pytest.raises(TypeError, match="only its own layer multiplies"):
            product()
