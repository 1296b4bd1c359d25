"""The reference mathematics against vectors that nobody here wrote, and against its own definitions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import ConfigError
from quire.ops import (
    Partial,
    attend,
    empty_partial,
    finish,
    hadamard,
    hadamard_width,
    merge,
    rope_angles,
    rotate_half,
    rotate_interleaved,
    sink_partial,
)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def array(shared: Path, name: str) -> torch.Tensor:
    path = shared / "data" / "ref" / "cs336" / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"needs {path.name} of the shared reference material")
    return torch.from_numpy(np.load(path)["array"])


# -- somebody else's vectors -------------------------------------------------------------------------------------


def test_attention_equals_the_reference_vector(shared: Path) -> None:
    q, k, v = randn(1, 4, 12, 64), randn(2, 4, 16, 64), randn(3, 4, 16, 64)
    mask = randn(5, 4, 12, 16) > 0.5
    want = array(shared, "scaled_dot_product_attention")
    got = attend(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), scale=64**-0.5, mask=mask)
    torch.testing.assert_close(got.out.squeeze(1), want, rtol=0, atol=1e-6)


def test_attention_over_heads_equals_the_reference_vector(shared: Path) -> None:
    q, k, v = (randn(s, 4, n, 64).view(2, 2, n, 64) for s, n in ((1, 12), (2, 16), (3, 16)))
    mask = (randn(5, 4, 12, 16) > 0.5).view(2, 2, 12, 16)
    want = array(shared, "4d_scaled_dot_product_attention")
    for head in range(2):
        part = (x[:, head : head + 1] for x in (q, k, v))
        got = attend(*part, scale=64**-0.5, mask=mask[:, head])
        torch.testing.assert_close(got.out.squeeze(1), want[:, head], rtol=0, atol=1e-6)
    same = torch.ones(2, 12, 16, dtype=torch.bool)
    whole, first = attend(q, k, v, scale=1.0, mask=same), attend(q, k, v, scale=1.0)
    assert torch.equal(whole.out, first.out)


def test_rope_equals_the_reference_vector(shared: Path) -> None:
    x = randn(4, 4, 12, 64)
    cos, sin = rope_angles(torch.arange(12), 64)
    want = array(shared, "rope")
    torch.testing.assert_close(rotate_interleaved(x, cos, sin), want, rtol=0, atol=1e-6)
    # the other pairing is the same rotation of reordered channels
    order = torch.cat([torch.arange(0, 64, 2), torch.arange(1, 64, 2)])
    torch.testing.assert_close(
        rotate_half(x[..., order], cos, sin), want[..., order], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("case", range(4))
def test_moving_a_key_turns_it_back_by_its_distance(shared: Path, case: int) -> None:
    path = shared / "data" / "ref" / "openvino-rotation" / f"case{case}.txt"
    if not path.is_file():
        pytest.skip(f"needs {path.name} of the shared reference material")
    numbers = iter(path.read_text().split())

    def take(n: int) -> list[float]:
        return [float(next(numbers)) for _ in range(n)]

    size, head, blocks, evicted = (int(x) for x in take(4))
    gone = {int(x) for x in take(evicted)}
    stays = [i for i in range(blocks) if i not in gone]
    moved = 0
    for _ in range(int(take(1)[0])):
        to = int(take(1)[0])
        sines, cosines = take(head // 2), take(head // 2)
        cos, sin = rope_angles(torch.tensor(-(stays[to] - to) * size), head, dtype=torch.float64)
        np.testing.assert_allclose(sin.numpy(), sines, atol=1e-3)
        np.testing.assert_allclose(cos.numpy(), cosines, atol=1e-3)
        moved += 1
    assert moved == sum(i != at for at, i in enumerate(stays))
    assert next(numbers, None) is None


# -- rotations ---------------------------------------------------------------------------------------------------


@given(
    a=st.integers(-(10**5), 10**5), b=st.integers(-(10**5), 10**5), dim=st.sampled_from([2, 8, 64])
)
def test_turns_add_up_and_products_depend_on_distance(a: int, b: int, dim: int) -> None:
    x, y = randn(1, dim).double(), randn(2, dim).double()
    for turn in (rotate_half, rotate_interleaved):

        def at(z: torch.Tensor, p: int, turn=turn) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return turn(z, *rope_angles(torch.tensor(p), dim, dtype=torch.float64))

        torch.testing.assert_close(at(at(x, a), b), at(x, a + b), rtol=0, atol=1e-9)
        torch.testing.assert_close(at(x, a) @ at(y, b), at(x, a - b) @ y, rtol=0, atol=1e-8)


@given(seed=st.integers(0, 999), width=st.integers(0, 8))
def test_hadamard_is_its_own_inverse_and_keeps_products(seed: int, width: int) -> None:
    x, y = randn(seed, 3, 1 << width).double(), randn(seed + 1, 3, 1 << width).double()
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        (hadamard(x) * hadamard(y)).sum(-1), (x * y).sum(-1), rtol=0, atol=1e-11
    )


def test_hadamard_is_the_matrix() -> None:
    h = torch.tensor([[1.0]])
    for _ in range(3):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    x = randn(0, 5, 8)
    torch.testing.assert_close(hadamard(x), x @ h / math.sqrt(8))
    assert hadamard(x.bfloat16()).dtype == torch.bfloat16
    x = randn(1, 5, 24)
    blocks = torch.cat([hadamard(part) for part in x.split(8, -1)], -1)
    assert torch.equal(hadamard(x), blocks)
    assert [hadamard_width(d) for d in (64, 80, 96, 128, 7)] == [64, 16, 32, 128, 1]
    with pytest.raises(ConfigError, match="and 7 is odd"):
        hadamard(torch.ones(7))


# -- attention ---------------------------------------------------------------------------------------------------


def dense(q, k, v, scale, mask, softcap, sinks=None) -> Partial:  # type: ignore[no-untyped-def]
    """One query and one key at a time, in Python floats."""
    heads, t, _ = q.shape
    share = heads // k.shape[0]
    out = torch.zeros(heads, t, v.shape[-1], dtype=torch.float64)
    lse = torch.full((heads, t), -math.inf, dtype=torch.float64)
    for h in range(heads):
        for i in range(t):
            seen = [j for j in range(k.shape[1]) if mask[i, j]]
            s = [float(q[h, i] @ k[h // share, j]) * scale for j in seen]
            s = [x if softcap is None else softcap * math.tanh(x / softcap) for x in s]
            every = s if sinks is None else [*s, float(sinks[h])]
            if every:
                top = max(every)
                total = sum(math.exp(x - top) for x in every)
                lse[h, i] = top + math.log(total)
                for x, j in zip(s, seen, strict=True):
                    out[h, i] += math.exp(x - top) / total * v[h // share, j]
    return Partial(out, lse)


@given(
    seed=st.integers(0, 10**6),
    kv_heads=st.integers(1, 2),
    share=st.integers(1, 3),
    t=st.integers(1, 4),
    n=st.integers(0, 7),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    softcap=st.sampled_from([None, 5.0]),
    sink=st.booleans(),
    seen=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_attend_is_the_definition(seed, kv_heads, share, t, n, scale, softcap, sink, seen) -> None:  # type: ignore[no-untyped-def]
    q = randn(seed, kv_heads * share, t, 6).double()
    k, v = randn(seed + 1, kv_heads, n, 6).double(), randn(seed + 2, kv_heads, n, 5).double()
    mask = torch.rand(t, n, generator=torch.Generator().manual_seed(seed)) < seen
    logits = randn(seed + 3, kv_heads * share).double() if sink else None
    got = attend(q, k, v, scale=scale, mask=mask, softcap=softcap)
    if logits is not None:
        got = merge(got, sink_partial(logits, got))
    want = dense(q, k, v, scale, mask, softcap, logits)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.out, want.out, rtol=1e-12, atol=1e-12)


def test_a_query_that_sees_nothing_gets_the_identity() -> None:
    q, k = randn(0, 2, 3, 4), randn(1, 1, 5, 4)
    none = attend(q, k, k, scale=1.0, mask=torch.zeros(3, 5, dtype=torch.bool))
    empty = empty_partial((2, 3), 4, torch.float32, q.device)
    assert torch.equal(none.out, empty.out)
    assert torch.equal(none.lse, empty.lse)
    assert torch.equal(finish(none, torch.bfloat16), torch.zeros(2, 3, 4, dtype=torch.bfloat16))


def test_scores_beyond_what_exp_can_hold() -> None:
    q, k, v = torch.full((1, 1, 4), 1e4), torch.full((1, 2, 4), 1e4), randn(0, 1, 2, 4)
    got = attend(q, k, v, scale=1.0)
    torch.testing.assert_close(got.out[0, 0], v[0].mean(0))
    low = attend(-q, k, v, scale=1.0)
    torch.testing.assert_close(low.out[0, 0], v[0].mean(0))
    both = merge(got, low)
    torch.testing.assert_close(both.out, got.out)


def test_half_precision_is_summed_in_float32() -> None:
    q, k, v = (randn(s, 2, 300, 8).bfloat16() for s in range(3))
    got = attend(q, k, v, scale=0.3)
    assert got.out.dtype == torch.float32
    want = attend(q.double(), k.double(), v.double(), scale=0.3)
    torch.testing.assert_close(got.out.double(), want.out, rtol=0, atol=1e-5)


def test_a_different_value_width_than_the_keys() -> None:
    q, k, v = randn(0, 4, 3, 6), randn(1, 2, 5, 6), randn(2, 2, 5, 9)
    assert attend(q, k, v, scale=1.0).out.shape == (4, 3, 9)
