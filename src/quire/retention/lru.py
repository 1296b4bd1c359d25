"""`lru`: the tokens that were used last. A baseline.

Idea: what every cache does: a token is used when a query pays it one of its `k` largest probabilities, and the ones
whose last use is longest ago go. A token's arrival is its first use.
Source: least recently used; the rule for "used" is the top-k of attention, as in sparse decoding.
Differs: nothing is learned of how much was paid, only when. Query heads of a KV head are averaged before the choice.
Cost: one number per token, layer and head; prefill reads the keys twice more, and looks for each query's largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from quire.retention.contract import Scored, Seen, check_tokens

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Policy(Scored):
    """`Scored`'s parameters, and `k`: how many tokens a query uses."""

    k: int = 8
    name: ClassVar[str] = "lru"
    queries: ClassVar[int | Literal["all"] | None] = "all"
    over: ClassVar[Literal["sum", "max", "latest"]] = "latest"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens(self.name, "k", self.k, 1)

    @property
    def top(self) -> int:
        return self.k

    def score(self, seen: Seen) -> torch.Tensor:
        assert seen.mass is not None
        return seen.mass.maximum((seen.positions + 1).to(seen.mass.dtype))
