"""`tova`: the tokens that the newest query pays most attention to.

Idea: a decoder that keeps a fixed number of tokens is a recurrent model with as many states; which state to give up,
the last query says. A layer decides as a whole: the probabilities of all its heads are averaged.
Source: TOVA (Oren et al., arXiv 2401.06104), section 3: scores averaged over the heads of a layer.
Differs: the paper drops one token per step and lets nothing but the score decide; here tokens are dropped at fixed
    lengths, and sinks, the recent window and the prompt's end are protected.
Cost: one query's probabilities per layer, at fixed lengths only. All heads of a layer keep the same tokens, so `ada`
    has nothing to spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from quire.retention.contract import Scored, Seen

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Policy(Scored):
    """`Scored`'s parameters."""

    name: ClassVar[str] = "tova"
    queries: ClassVar[int | Literal["all"] | None] = 1
    by_layer: ClassVar[bool] = True

    def score(self, seen: Seen) -> torch.Tensor:
        assert seen.mass is not None
        return seen.mass.mean(0, keepdim=True).expand_as(seen.mass)
