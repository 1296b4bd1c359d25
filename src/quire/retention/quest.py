"""`quest`: every token stays and few are read, so that memory is NOT freed (it takes a little more); bandwidth only.

Idea: what a query pays a block of tokens is bounded by the block's smallest and largest keys, channel by channel. These
    are kept beside each whole block; at each step a query asks them first, and reads the blocks that could matter, up
    to a budget. Nothing is lost: the next query may read what this one passed over.
Source: Quest (Tang et al., ICML 2024, arXiv 2406.10774): the sum over channels of max(q * min, q * max), the best
    pages, the first two layers whole.
Differs: pages are the cache's own blocks. The query heads of a KV head read the same blocks: one is worth the largest
    share that any of them could pay it, by its bound. What is not a whole block yet, and what a lossy codec still holds
    raw, is always read, and counts. Prompts are read whole.
Cost: the bounds, two keys per block and KV head in the model's dtype (1/32 of a plain cache in blocks of 32), written
    when a block is whole and read at every step. The CPU kernel reads the chosen blocks alone; on other backends all
    are read and masked. Generated tokens that are computed anew after a preemption come one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from quire.errors import ConfigError
from quire.retention.contract import Budget, check_tokens

_USUAL = Budget(tokens=1024)


@dataclass(frozen=True)
class Policy:
    """Parameters `budget`: tokens read per KV head, or a share of all; `skip`: first layers that read all."""

    budget: Any = _USUAL
    skip: int = 2
    name: ClassVar[str] = "quest"
    reads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Budget.parse(self.budget, f"{self.name}: budget"))
        check_tokens(self.name, "skip", self.skip, 0)
        if self.budget.bytes:
            raise ConfigError(
                f"quest: budget={self.budget} is in bytes, and no bytes are saved; 1024 is tokens, 0.125 a share"
            )

    def blocks(self, length: int, whole: int, block_tokens: int) -> int:
        """How many of its `whole` blocks the last query of `length` tokens reads; at least one where there is one."""
        rest = length - whole * block_tokens
        left = int(self.budget.tokens_of(length, 0)) - rest
        return min(whole, max(1, -(-left // block_tokens)))
