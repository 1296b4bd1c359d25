"""Linear layers that multiply one input (queries', keys' and values'; gate and up): the first asked multiplies for all.

    q_proj(x) ── one call of the kernel: q, k, v ──> q
    k_proj(x) ── the same x? ──> k, which was kept for it        otherwise its own product, as ever
    v_proj(x) ── the same x? ──> v, the last: nothing is kept any more

At few rows a call costs about what reading a small weight costs, and in one call the threads share the outputs of all.
Every output adds up as it would alone: results are equal bit for bit. Modules, weights and names stay as they are, so
that hooks, adapters and state dicts see nothing of it.

Which layers are siblings is seen in a forward of the model, not read from names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Call", "join", "siblings", "watched"]

MISSES = 2
"""So many times in a row somebody did not come for what was kept; from then on each multiplies for itself."""

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """A layer's call in a forward that was watched: with what, and a copy of it as it was then."""

    layer: nn.Linear
    x: Tensor
    copy: Tensor


@contextmanager
def watched(layers: Sequence[nn.Linear]) -> Iterator[list[Call]]:
    """Notes the layers' calls, in their order."""
    calls: list[Call] = []

    def note(layer: Any, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            calls.append(Call(layer, args[0], args[0].clone()))

    hooks = [m.register_forward_pre_hook(note) for m in layers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def siblings(model: nn.Module, calls: Sequence[Call]) -> list[list[nn.Linear]]:
    """Layers of one module that were called once each, with one tensor that nobody changed between; in that order."""
    parents = {m: parent for parent in model.modules() for m in parent.children()}
    times = Counter(c.layer for c in calls)
    found: dict[tuple[int, int], list[Call]] = {}
    for c in calls:
        if times[c.layer] == 1:
            found.setdefault((id(parents[c.layer]), id(c.x)), []).append(c)
    return [
        [c.layer for c in group]
        for group in found.values()
        if len(group) > 1 and all(torch.equal(c.copy, group[0].copy) for c in group)
    ]


class _Kept:
    """What the first of some siblings multiplied for the others, until they come for it.

    Safe where several threads run one model: who does not find the very tensor that it was given multiplies itself.
    """

    def __init__(self, multiply: Callable[[Tensor], list[Tensor]], rows: range) -> None:
        self.multiply, self.rows = multiply, rows
        self.waiting: tuple[Tensor, int, dict[int, Tensor]] | None = None
        self.missed = 0

    def serves(self, x: Tensor) -> bool:
        """Whether the siblings' products are asked of the kernel at once."""
        return (
            self.missed < MISSES
            and x.dtype is torch.bfloat16
            and x.is_cpu
            and x.numel() // x.shape[-1] in self.rows
            and not torch.is_grad_enabled()
        )

    def first(self, x: Tensor) -> Tensor:
        """The first one's product; keeps the others'."""
        if self.waiting is not None:
            self.waiting = None
            self.missed += 1
        out, *others = self.multiply(x)
        self.waiting = x, _version(x), dict(enumerate(others, 1))
        return out

    def take(self, x: Tensor, place: int) -> Tensor | None:
        """The product of x that was kept for a place; None where there is none."""
        waiting = self.waiting
        if waiting is None or waiting[0] is not x or waiting[1] != _version(x):
            return None
        out = waiting[2].pop(place, None)
        if not waiting[2]:
            self.waiting, self.missed = None, 0
        return out


def _version(x: Tensor) -> int:
    """Counts changes in place; tensors of inference count none."""
    return 0 if x.is_inference() else x._version


def join(
    layers: Sequence[nn.Linear], multiply: Callable[[Tensor], list[Tensor]], rows: range
) -> list[tuple[nn.Linear, Forward]]:
    """Lets the first of the layers multiply for all where the rows of their input are few.

    Args:
        layers: siblings, in the order in which the model calls them.
        multiply: an input to the outputs of all.
        rows: how many may be multiplied so.

    Returns:
        The layers and the code that each had for itself.
    """
    kept = _Kept(multiply, rows)
    before: list[tuple[nn.Linear, Forward]] = []
    for place, layer in enumerate(layers):
        before.append((layer, layer.forward))
        made = _later(kept, place, layer.forward) if place else _first(kept, layer.forward)
        object.__setattr__(layer, "forward", made)
    return before


# Plain functions, not methods: a copied model keeps the code, and no copy of what it multiplies with is made.


def _first(kept: _Kept, own: Forward) -> Forward:
    def forward(input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name
        return kept.first(input) if kept.serves(input) else own(input)

    return forward


def _later(kept: _Kept, place: int, own: Forward) -> Forward:
    def forward(input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name
        found = kept.take(input, place)
        return own(input) if found is None else found

    return forward
