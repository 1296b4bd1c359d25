"""`snapkv`: what the last queries of the prompt look at.

Idea: the end of a prompt asks for what the answer will need; the tokens that its last queries pay most attention to,
and their neighbours, are those that generated tokens will read. Pooling keeps phrases whole.
Source: SnapKV (Li et al., arXiv 2404.14469), section 4, with the released code's average pooling.
Differs: query heads of a KV head are averaged before anything is stored. Tokens go again after every `every` generated
    ones, by the last queries then.
Cost: 64 queries' probabilities once more at the prompt's end. Answers a question only if the prompt ends with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from quire.retention.contract import Scored, Seen

if TYPE_CHECKING:
    import torch

QUERIES = 64
POOL = 5


@dataclass(frozen=True)
class Policy(Scored):
    """`Scored`'s parameters; the `window` is as wide as what is observed."""

    window: int = QUERIES
    name: ClassVar[str] = "snapkv"
    queries: ClassVar[int | Literal["all"] | None] = QUERIES

    def score(self, seen: Seen) -> torch.Tensor:
        import torch

        assert seen.mass is not None
        mean = seen.mass / QUERIES
        observed = seen.positions >= seen.length - QUERIES
        before = mean.masked_fill(observed, 0.0)  # neighbours of the window get nothing from it
        pooled = torch.nn.functional.avg_pool1d(before, POOL, stride=1, padding=POOL // 2)
        return torch.where(observed, mean, pooled)
