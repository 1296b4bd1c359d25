"""`rkv`: attention minus redundancy, for long chains of thought that repeat themselves.

Idea: a model that reasons says the same thing many times; all copies are attended to, and one would do. A token is
worth what the last queries pay it, less how much its key is like all other keys. Of keys alike the newest is spared.
Source: R-KV (Cai et al., arXiv 2505.24133): lambda * attention - (1 - lambda) * redundancy, lambda = 0.1; the last 8
    queries, the largest of the query heads of a KV head, max pooling over 7; redundancy is the softmax over tokens of
    the mean cosine with the others, in which each token leaves out the newest that it is alike to (above 0.5).
Differs: probabilities are those over all tokens, recent ones included. Tokens go at the prompt's end, too.
Cost: 8 queries' probabilities; T x T cosines per KV head when tokens are dropped, some rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from quire.retention.contract import Scored, Seen, check_number

if TYPE_CHECKING:
    import torch

QUERIES = 8
POOL = 7
ROWS = 256
"""Of the matrix of cosines at once."""


@dataclass(frozen=True)
class Policy(Scored):
    """`Scored`'s parameters; `mix`: lambda; `alike`: the cosine above which two keys say the same."""

    mix: float = 0.1
    alike: float = 0.5
    name: ClassVar[str] = "rkv"
    queries: ClassVar[int | Literal["all"] | None] = QUERIES
    fold: ClassVar[Literal["mean", "max"]] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.name, "mix", self.mix, 0, 1)
        check_number(self.name, "alike", self.alike, -1, 1)

    def score(self, seen: Seen) -> torch.Tensor:
        import torch

        assert seen.mass is not None
        mean = seen.mass / QUERIES
        paid = torch.nn.functional.max_pool1d(mean, POOL, stride=1, padding=POOL // 2)
        return self.mix * paid - (1 - self.mix) * self._redundancy(seen.read("k"))

    def _redundancy(self, k: torch.Tensor) -> torch.Tensor:
        """`[H, T, D]` to `[H, T]`, which sum to one."""
        import torch

        k = torch.nn.functional.normalize(k, dim=-1)
        n = k.shape[1]
        total = k.new_zeros(k.shape[:2])
        at = torch.arange(n, device=k.device)
        for first in range(0, n, ROWS):
            cosine = k[:, first : first + ROWS] @ k.transpose(1, 2)
            own = at[first : first + ROWS, None] == at
            cosine = cosine.masked_fill(own, 0.0)
            newest = torch.where(cosine > self.alike, at, -1).amax(-1, keepdim=True)
            total += cosine.masked_fill(at == newest, 0.0).sum(1)
        return (total / n).softmax(-1)
