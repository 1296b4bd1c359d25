"""`pyramid(...)`: lower layers keep more tokens than higher ones (PyramidKV).

Idea: lower layers gather from everywhere, higher ones look at few tokens; so a layer's share of the budget falls
evenly from the first layer to the last.
Source: PyramidKV (Cai et al., arXiv 2406.02069): of B - w tokens for each layer on average the last gets
    (B - w) / `beta`, and the first 2 (B - w) less that; beta = 20.
Differs: it wraps any policy that scores. Where the first layer has fewer tokens than it would get, the slope is made
    less steep, so that nothing of the budget is lost. Layers whose caches are stored in different forms
    (`bf16;skip_layers=0`) are each a pyramid of their own.
Cost: layers keep different numbers of tokens, each number a chain of blocks of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quire.retention.contract import Wrapper, check_number
from quire.spec import Coord

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Policy(Wrapper):
    """Parameter `beta`: the average over it is what the last layer keeps, beside what is protected."""

    beta: float = 20.0
    name: ClassVar[str] = "pyramid"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.name, "beta", self.beta, 1, float("inf"))

    def allocate(
        self, scores: Mapping[Coord, torch.Tensor], tokens: int, length: int
    ) -> dict[Coord, int]:
        out: dict[Coord, int] = {}
        for coords, n in self._layers({c: len(s) for c, s in scores.items()}, tokens):
            out |= self.inner.allocate({c: scores[c] for c in coords}, n, length)
        return out

    def expect(self, free: Mapping[Coord, int], tokens: int, length: int) -> dict[Coord, int]:
        out: dict[Coord, int] = {}
        for coords, n in self._layers(free, tokens):
            out |= self.inner.expect({c: free[c] for c in coords}, n, length)
        return out

    def _layers(self, free: Mapping[Coord, int], tokens: int) -> Iterator[tuple[list[Coord], int]]:
        """Each layer's heads, and what they keep on average."""
        layers = sorted({layer for layer, _ in free})
        most = min(n for c, n in free.items() if c[0] == layers[0])
        tokens = min(tokens, most)
        low = tokens / self.beta
        high = 2 * tokens - low
        if high > most:
            high, low = float(most), 2 * tokens - most
        step = (high - low) / max(1, len(layers) - 1)
        for i, layer in enumerate(layers):
            n = tokens if len(layers) == 1 else int(high - i * step)
            yield [c for c in free if c[0] == layer], n
