"""`ada(...)`: heads share a layer's budget by their scores (Ada-KV).

Idea: heads that spread their attention need more tokens than those that look at few; the best scores of a layer, all
heads together, decide how many each keeps. Every head is sure of a `floor`.
Source: Ada-KV (Feng et al., arXiv 2407.11550), algorithm 1; floor 0.2.
Cost: heads keep different numbers of tokens, each number a chain of blocks of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quire.errors import ConfigError
from quire.retention.contract import Wrapper, check_number
from quire.spec import Coord

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Policy(Wrapper):
    """Parameter `floor`: the share of its even part that every head is sure of."""

    floor: float = 0.2
    name: ClassVar[str] = "ada"
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.name, "floor", self.floor, 0, 1)
        if self.inner.by_layer:
            raise ConfigError(
                f"ada({self.inner.name}): {self.inner.name} gives all heads of a layer the same scores, so they have "
                "nothing to share out; use it alone, or in pyramid"
            )

    def allocate(
        self, scores: Mapping[Coord, torch.Tensor], tokens: int, length: int
    ) -> dict[Coord, int]:
        import torch

        even = self.inner.allocate(scores, tokens, length)
        out: dict[Coord, int] = {}
        for layer in {layer for layer, _ in scores}:
            coords = [c for c in scores if c[0] == layer]
            sure = {c: min(int(self.floor * even[c]), len(scores[c])) for c in coords}
            rest = sum(even[c] for c in coords) - sum(sure.values())
            ordered = [scores[c].sort(descending=True).values[sure[c] :] for c in coords]
            every = torch.cat(ordered)
            owner = torch.cat([torch.full((len(x),), i) for i, x in enumerate(ordered)])
            best = owner[every.topk(min(rest, len(every))).indices.cpu()]
            more = torch.bincount(best, minlength=len(coords)).tolist()
            out |= {c: sure[c] + n for c, n in zip(coords, more, strict=True)}
        return out
