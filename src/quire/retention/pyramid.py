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

from collections.abc import Mapping
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
        layers = sorted({layer for layer, _ in scores})
        most = min(len(s) for c, s in scores.items() if c[0] == layers[0])
        tokens = min(tokens, most)
        low = tokens / self.beta
        high = 2 * tokens - low
        if high > most:
            high, low = float(most), 2 * tokens - most
        step = (high - low) / max(1, len(layers) - 1)
        out: dict[Coord, int] = {}
        for i, layer in enumerate(layers):
            mine = {c: s for c, s in scores.items() if c[0] == layer}
            n = tokens if len(layers) == 1 else int(high - i * step)
            out |= self.inner.allocate(mine, n, length)
        return out
