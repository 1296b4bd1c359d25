"""Linear layers in bfloat16 over weights, of 16, 8 or 4 bits, that lie in panels, multiplied by the compiled kernel.

    plain   [n, k]
    panels  [ceil(n / 16), ceil(k / 2), 16, 2]   sixteen outputs of two inputs are one cache line; zeros at the edges
            [ceil(n / 16), k / 8, 16]            of 4 bits: sixteen outputs of eight inputs, see `rounded`

One copy of the weight serves one row and thousands: nothing is unpacked but in registers. Sums are float32 and add up
in the order of k, so that a row's result depends neither on the rows beside it nor on the number of threads. Where
oneDNN's own blocks are found to be panels (of 64 outputs, say), the same kernel reads them in place.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils import _pytree as pytree

from quire.errors import InvariantError
from quire.kernels import native
from quire.kernels.native import LinearArgs, LinearLayer
from quire.models.rounded import (
    GROUP,
    LINE,
    PANEL,
    from_lines,
    to_int4,
    to_int8,
    to_lines,
    to_scale_lines,
)

__all__ = [
    "PANEL",
    "Laid",
    "PanelWeight",
    "blocks_of",
    "laid_out",
    "multiplier",
    "panel_forward",
    "to_panels",
]


def to_panels(weight: Tensor, panel: int = PANEL, words: int = 0) -> Tensor:
    """`[n, k]` to `[ceil(n / panel), words, panel, 2]`; words: at least `ceil(k / 2)`, which is the default.

    Cost: one copy of the weight beside it.
    """
    n, k = weight.shape
    words = words or (k + 1) // 2
    whole = -(-n // panel) * panel
    if (whole, 2 * words) != (n, k):
        padded = weight.new_zeros(whole, 2 * words)
        padded[:n, :k] = weight
        weight = padded
    return weight.view(whole // panel, panel, words, 2).transpose(1, 2).contiguous()


def from_panels(panels: Tensor, n: int, k: int) -> Tensor:
    """The weight that `to_panels` was given, bit for bit."""
    count, words, panel, _ = panels.shape
    return panels.transpose(1, 2).reshape(count * panel, 2 * words)[:n, :k].contiguous()


_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("linear", "matmul", "mm", "addmm", "bmm", "t", "transpose", "permute")
)


class PanelWeight(Tensor):
    """A weight `[n, k]` held in panels. What looks at it gets a plain copy; only its layer multiplies with it.

    Raises:
        TypeError: from products. A copy made for each of them would be slow and go unnoticed.
    """

    panels: Tensor
    """`bfloat16`, `int8`, or lines of 4 bits in `int32`."""
    scales: Tensor | None
    """Of 8 bits `[n] float32`, of 4 as `to_scale_lines` lays them; None: the panels hold the weight itself."""

    @staticmethod
    def __new__(cls, panels: Tensor, n: int, k: int, scales: Tensor | None = None) -> Self:
        """Wraps panels as the weight that they hold."""
        made: Self = Tensor._make_wrapper_subclass(
            cls, (n, k), dtype=torch.bfloat16, device=panels.device
        )
        made.panels, made.scales = panels, scales
        return made

    @classmethod
    def of(cls, weight: Tensor, bits: int = 16) -> Self:
        """A weight `[n, k] bfloat16` in panels, rounded to 8 or 4 bits where so asked."""
        if bits == 4:
            codes, scales = to_int4(weight)
            return cls(to_lines(codes), *weight.shape, to_scale_lines(scales))  # type: ignore[call-arg]
        if bits == 8:
            codes, scales = to_int8(weight)
            return cls(to_panels(codes), *weight.shape, scales)  # type: ignore[call-arg]
        return cls(to_panels(weight), *weight.shape)

    @property
    def bits(self) -> int:
        """Of a weight: 16, 8 or 4."""
        return {torch.int32: 4, torch.int8: 8}.get(self.panels.dtype, 16)

    def plain(self) -> Tensor:
        """`[n, k] bfloat16`, a copy; rounded where the panels hold 8 or 4 bits."""
        n, k = self.shape
        if self.scales is None:
            return from_panels(self.panels, n, k)
        if self.bits == 8:
            return (from_panels(self.panels, n, k) * self.scales[:, None]).bfloat16()
        codes = from_lines(self.panels, n, k)
        scales = self.scales.transpose(1, 2).reshape(-1, self.scales.shape[1])[:n]
        return (codes * scales.repeat_interleave(GROUP, 1)[:, :k].float()).bfloat16()

    @property
    def held_bytes(self) -> int:
        """Of panels and scales."""
        return self.panels.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Hands plain copies on; only a detached twin stays in panels."""
        if func is torch.ops.aten.detach.default:
            w = args[0]
            return cls(w.panels, *w.shape, w.scales)  # type: ignore[call-arg]
        if func.overloadpacket in _PRODUCTS:
            raise TypeError(f"{func} on a packed weight, which only its own layer multiplies with")
        args, kwargs = pytree.tree_map_only(cls, cls.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def blocks_of(address: int, n_bytes: int, plain: Tensor) -> tuple[int, int] | None:
    """How a weight lies at an address, where it lies in panels: outputs of a panel and words of k; None: otherwise.

    Cost: one comparison with the plain weight, bit for bit.
    """
    n, k = plain.shape
    found = torch.frombuffer(native.memory(address, n_bytes), dtype=torch.uint8)
    for panel in (64, 48, 32, 16):
        whole = -(-n // panel) * panel
        words, rest = divmod(n_bytes, 4 * whole)
        if rest or not (k + 1) // 2 <= words <= (k + 127) // 2:
            continue
        expected = to_panels(plain.detach(), panel, words).view(torch.uint8)
        if torch.equal(expected.view(-1), found):
            return panel, words
    return None


@dataclass(frozen=True)
class Laid:
    """A layer as the kernel finds it.

    Args:
        weight: the address of its panels.
        held: what they live in.
        n, k: its outputs and inputs.
        words: of k, in a panel.
        panel: outputs of a panel.
        scales: where the panels hold 8 or 4 bits, as `PanelWeight` says.
        bias: `[n] bfloat16`.
        bits: of a weight.
    """

    weight: int
    held: Tensor
    n: int
    k: int
    words: int
    panel: int = PANEL
    scales: Tensor | None = None
    bias: Tensor | None = None
    bits: int = 16

    def for_kernel(self) -> LinearLayer:
        """As the kernel is told."""
        scales, bias = (None if x is None else x.data_ptr() for x in (self.scales, self.bias))
        return LinearLayer(self.weight, scales, bias, None, self.n, self.n, self.panel, self.bits)


def laid_out(weight: PanelWeight, bias: Tensor | None) -> Laid:
    """Of a layer with a packed weight."""
    panels, (n, k) = weight.panels, weight.shape
    words, panel = panels.shape[1:3]
    if weight.bits == 4:
        words *= LINE // 2
    return Laid(panels.data_ptr(), panels, n, k, words, panel, weight.scales, bias, weight.bits)


def multiplier(*layers: Laid, isa: int = 0) -> Callable[[Tensor], list[Tensor]]:
    """`x: [..., k] bfloat16` to `[..., n] bfloat16` of every layer, by one call of the kernel.

    Raises:
        InvariantError: there is no library, a bias is not a row of bfloat16, or the layers' inputs differ.
    """
    library = native.load()
    k, words = layers[0].k, layers[0].words
    biases = [x.bias for x in layers if x.bias is not None]
    alike = all((x.k, x.words) == (k, words) for x in layers)
    if library is None or not alike or not all(_served(b) and b.is_contiguous() for b in biases):
        raise InvariantError("these layers are not the kernel's")
    run, widths, count = library.linear, [x.n for x in layers], len(layers)
    array = LinearLayer * count
    copy, common = array.from_buffer_copy, bytes(array(*(x.for_kernel() for x in layers)))
    threads_now = torch.get_num_threads

    def multiply(x: Tensor) -> list[Tensor]:
        *lead, width = x.shape
        if width != k:
            raise RuntimeError(f"a layer of {k} inputs is given {width}")
        if not x.is_contiguous():
            x = x.contiguous()
        outs = [x.new_empty(*lead, n) for n in widths]
        rows = x.numel() // k
        if rows:
            here = copy(common)
            for i in range(len(layers)):  # whose weights live as long as this function
                here[i].out = outs[i].data_ptr()
            run(
                LinearArgs(
                    addressof(here), x.data_ptr(), k, count, rows, k, words, threads_now(), isa
                )
            )
        return outs

    return multiply


def panel_forward(weight: PanelWeight, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`F.linear` over panels; over a plain copy where gradients are wanted or the input is of another kind."""
    multiply = multiplier(laid_out(weight, bias))

    def forward(input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name
        if not _served(input) or (
            torch.is_grad_enabled()
            and (input.requires_grad or (bias is not None and bias.requires_grad))
        ):
            return linear(input, weight.plain(), bias)
        return multiply(input)[0]

    return forward


def _served(x: Tensor) -> bool:
    return x.dtype is torch.bfloat16 and x.is_cpu
