"""Invariants looked at while an engine runs: a few at a time, counted and exported, never fatal.

What they watch is what all else rests on: the pools' books, a sequence's references, the scheduler's order. A violation
is a bug of ours. It is counted by its name and logged once; requests go on, for most of what may be wrong here costs
memory or time and no answer. No torch.

Cost: microseconds, every `EVERY` steps: sums over the pools, and one running sequence.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from quire.engine.request import State
from quire.store.chain import GONE

if TYPE_CHECKING:
    from quire.engine.request import Sample
    from quire.engine.scheduler import Scheduler

__all__ = ["Checks"]

logger = logging.getLogger(__name__)

EVERY = 16
"""Steps from one look to the next."""
MOST_BLOCKS = 64
"""Of one sequence, whose references are looked at."""


class Checks:
    """Looks at a scheduler, its room and the tables in it.

    Args:
        room: a runner; what it lacks is not looked at.
        every: steps from one look to the next.
    """

    def __init__(self, room: Any, scheduler: Scheduler, every: int = EVERY) -> None:
        self.room, self.scheduler, self.every = room, scheduler, every
        self.done = 0
        """How often somebody looked."""
        self.violations: Counter[str] = Counter()
        self._steps = 0
        self._turn = 0

    def step(self) -> None:
        """After a step: looks, when it is time."""
        self._steps += 1
        if self._steps % self.every == 0:
            self.look()

    def look(self) -> None:
        """Looks now."""
        self.done += 1
        for name in self._found():
            if not self.violations[name]:
                logger.error("invariant violated: %s; please report this", name)
            self.violations[name] += 1

    def report(self) -> dict[str, Any]:
        """As plain data."""
        return {"looks": self.done, "violations": dict(self.violations)}

    def _found(self) -> Iterator[str]:
        yield from self._scheduler()
        yield from self._bytes()
        running = self.scheduler.running
        if running:
            self._turn += 1
            yield from self._sample(running[self._turn % len(running)])

    def _scheduler(self) -> Iterator[str]:
        """Seats ascend; nobody runs without a table, nor waits with one."""
        running, waiting = self.scheduler.running, self.scheduler.waiting
        seats = [s.seat for s in running]
        if seats != sorted(set(seats)):
            yield "running samples in the order of their seats"
        if any(s.table is None for s in running):
            yield "whoever runs has a table"
        back = [s for s in running if s.parked is not None]
        if any(s.parked.table is not s.table or s.item is not None for s in back if s.parked):
            yield "whoever is not back yet computes nothing"
        if any(s.parked is None or s.table is not None for s in self.scheduler.ladder.leaving):
            yield "whoever leaves waits"
        if any(s.table is not None or s.state is not State.WAITING for s in waiting):
            yield "whoever waits has none"

    def _bytes(self) -> Iterator[str]:
        """Free, cached and held bytes are all there are, and nobody holds any when nobody runs."""
        usage = self.room.usage()
        parts = (usage.free_bytes, usage.cached_bytes, usage.held_bytes)
        if min(parts) < 0 or sum(parts) != usage.total_bytes:
            yield "free, cached and held bytes are the total"
        stats, parked = self.scheduler.ladder.stats, 0
        for sample in (*self.scheduler.waiting, *self.scheduler.running):
            parked += 0 if sample.parked is None else sample.parked.n_bytes
        if parked != stats.parked_bytes:
            yield "host memory in use is that of parked sequences"
        store = getattr(getattr(self.room, "bridge", None), "store", None)
        if store is None:
            return
        if not self.scheduler.running and not len(store.tables) and usage.held_bytes:
            yield "nothing is held when nobody runs"
        for pool in store.pools.values():
            if not 0 <= pool.held + pool.cached <= pool.slabs * pool.per_slab <= pool.capacity:
                yield "a pool's blocks lie in its slabs"

    def _sample(self, sample: Sample) -> Iterator[str]:
        """What a sequence references is there, and its lengths agree."""
        table: Any = sample.table
        if table is None or not hasattr(table, "chains"):
            return
        if sample.item is None and sample.computed != table.committed:
            yield "what is computed is committed"
        if not table.committed <= table.accepted <= table.length:
            yield "committed, accepted and reserved tokens in this order"
        for chain in table.chains:
            ids = chain.ids[: chain.count]
            live = ids[ids != GONE]
            if len(live) != chain.held:
                yield "a chain counts the blocks that it holds"
            some = live if len(live) <= MOST_BLOCKS else live[:: len(live) // MOST_BLOCKS]
            if any(chain.pool.refs(int(b)) < 1 for b in some):
                yield "a block that a sequence holds is held"
            if chain.group.raw is None and len(np.unique(live)) != len(live):
                yield "a chain holds a block once"
