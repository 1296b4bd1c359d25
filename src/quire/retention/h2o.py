"""`h2o`: heavy hitters, the tokens that all queries so far have paid most attention to.

Idea: a few tokens gather most of the attention, and go on doing so. Every query's probabilities are added up per token;
the recent window stays, and beside it the heaviest.
Source: H2O (Zhang et al., arXiv 2306.14048).
Differs: the paper drops one token per step; here tokens are dropped at fixed lengths (the prompt's end, then `every` so
    many), down to the budget, so that memory is freed by the block and a request computed anew keeps the same tokens.
    Query heads of a KV head are averaged. `age=true` divides by the number of queries that could have paid: without it
    early tokens win by their age.
Cost: one number per token, layer and head; prefill reads the keys once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from quire.retention.contract import Scored, Seen

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Policy(Scored):
    """`Scored`'s parameters, and `age`: divide by how many queries a token has met."""

    age: bool = False
    name: ClassVar[str] = "h2o"
    queries: ClassVar[int | Literal["all"] | None] = "all"

    def score(self, seen: Seen) -> torch.Tensor:
        assert seen.mass is not None
        return seen.mass / (seen.length - seen.positions) if self.age else seen.mass
