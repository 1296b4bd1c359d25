"""Which idle block is given up first: policies over a pool's queues, O(1) a block.

    lru     one queue: the block idle the longest
    cost    a queue for each doubling of a block's uses, one for what was asked to stay
            worth = uses / (how long it has been idle) * tokens to recompute, per byte

Within a queue the oldest is worth least, so only the queues' heads are compared: frequency and recency weigh against
each other without a heap, and without anything being touched when time passes. A scan fills the lowest queue and leaves
the others alone. A table gives its blocks back last to first, and whoever uses a block uses those before it: a parent
is therefore in no lower a queue than its child and no older, so leaves go first.

Hints are soft. A priority moves a block up or down by queues; "keep for" puts it into a queue that is taken from when
all others are empty, until its time is over. Nothing is pinned: a pool in which every block is kept still serves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from quire.errors import ConfigError
from quire.share import EVICTIONS

if TYPE_CHECKING:
    from quire.store.pool import BlockPool

__all__ = ["LRU", "CostAware", "Eviction", "make_eviction"]

MAX_PRIORITY = 3
"""Hints lie within -3..3; a step is worth a doubling of the uses."""


class Eviction:
    """What a pool asks of a policy. One policy serves one pool."""

    queues = 1
    hints = False
    """Whether `hint` means anything; where not, whoever hands hints in is refused."""

    def queue(self, pool: BlockPool, block: int) -> int:
        """The queue that a block joins now that it is idle."""
        return 0

    def victim(self, pool: BlockPool) -> int:
        """The idle block to give up; at least one is cached."""
        raise NotImplementedError

    def block_worth(self, pool: BlockPool, block: int) -> float:
        """What an idle block is worth, in the same measure as `slab_worth`."""
        raise NotImplementedError

    def slab_worth(self, pool: BlockPool, uses: int, since: int) -> float:
        """What the idle blocks of a slab are worth: their uses together, and when the last of them became idle."""
        raise NotImplementedError

    def hint(self, block: int, priority: int, keep_for_s: float) -> None:
        """A wish for a block that is held; of several the strongest counts."""
        raise NotImplementedError

    def forget(self, block: int) -> None:
        """The block is given up: its hints are nobody's."""


class LRU(Eviction):
    """Least recently used: the baseline."""

    def victim(self, pool: BlockPool) -> int:
        """See `Eviction.victim`."""
        return pool.first[0]

    def block_worth(self, pool: BlockPool, block: int) -> float:
        """See `Eviction.block_worth`."""
        return pool.since[block] / pool.per_slab

    def slab_worth(self, pool: BlockPool, uses: int, since: int) -> float:
        """See `Eviction.slab_worth`."""
        return float(since)


class CostAware(Eviction):
    """Uses over age, per byte; see the module's text.

    Args:
        block_tokens: what one block of the pool saves when it is found.
        clock: seconds, for "keep for".

    Source: frequency over age is hyperbolic caching (Blankstein et al., USENIX ATC 2017). Differs: uses in doublings,
    so that heads of queues are compared instead of a random sample; age since the last use instead of the first.
    """

    levels = 16
    queues = levels + 1
    hints = True

    def __init__(self, block_tokens: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.block_tokens = block_tokens
        self.clock = clock
        self._hints: dict[int, tuple[int, float]] = {}  # block -> priority, keep until
        self._kept: list[
            tuple[float, int]
        ] = []  # heap of (until, block); stale entries are skipped
        self._listed: dict[int, float] = {}  # block -> its entry of the heap

    def hint(self, block: int, priority: int, keep_for_s: float) -> None:
        """See `Eviction.hint`."""
        old_priority, old_until = self._hints.get(block, (-MAX_PRIORITY, 0.0))
        until = self.clock() + keep_for_s if keep_for_s > 0 else 0.0
        self._hints[block] = max(priority, old_priority), max(until, old_until)

    def forget(self, block: int) -> None:
        """See `Eviction.forget`."""
        self._hints.pop(block, None)

    def queue(self, pool: BlockPool, block: int) -> int:
        """See `Eviction.queue`."""
        level = pool.uses[block].bit_length() + MAX_PRIORITY - 1
        if self._hints:
            priority, until = self._hints.get(block, (0, 0.0))
            level = max(0, level + priority)
            if until > self.clock():
                if self._listed.get(block) != until:
                    self._listed[block] = until
                    heappush(self._kept, (until, block))
                return self.levels
        return min(level, self.levels - 1)

    def victim(self, pool: BlockPool) -> int:
        """See `Eviction.victim`."""
        if self._kept:
            self._expire(pool)
        now, best, least = pool.arena.clock + 1, -1, 0.0
        for level in range(self.levels):
            block = pool.first[level]
            if block >= 0:
                worth = (1 << level) / (now - pool.since[block])
                if best < 0 or worth < least:
                    best, least = block, worth
        return best if best >= 0 else pool.first[self.levels]

    def _expire(self, pool: BlockPool) -> None:
        """Blocks whose time is over join the queue of their uses."""
        now = self.clock()
        while self._kept and self._kept[0][0] <= now:
            until, block = heappop(self._kept)
            if self._listed.get(block) == until:
                del self._listed[block]
                if pool.idle_in(block, self.levels):
                    pool.moved(block, self.queue(pool, block))

    def block_worth(self, pool: BlockPool, block: int) -> float:
        """See `Eviction.block_worth`."""
        return self.block_tokens * pool.uses[block] / (pool.arena.clock + 1 - pool.since[block])

    def slab_worth(self, pool: BlockPool, uses: int, since: int) -> float:
        """See `Eviction.slab_worth`."""
        return self.block_tokens * uses / (pool.arena.clock + 1 - since)


def make_eviction(
    name: str, block_tokens: int = 1, clock: Callable[[], float] = time.monotonic
) -> Eviction:
    """The policy of that name, for one pool. Raises ConfigError."""
    if name == "lru":
        return LRU()
    if name == "cost":
        return CostAware(block_tokens, clock)
    raise ConfigError(f"unknown eviction {name!r}; known: {', '.join(EVICTIONS)}")
