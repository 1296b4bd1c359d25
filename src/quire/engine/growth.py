"""Room for the next tokens of those who run, and who gives way for it.

Before somebody is preempted the cheaper steps of the ladder are tried; then who runs takes from those behind it, the
last first. A preempted sample goes to host memory, or is computed anew, and waits in its seat. Going takes as many
steps as it needs; who wants its room has it as it comes, or stalls until then. One that finds no room and has nobody
behind it stalls with what it holds: preempting itself would only cost a recomputation.
"""

from __future__ import annotations

from quire.engine.chunks import Chunks
from quire.engine.ladder import Ladder
from quire.engine.request import Sample
from quire.engine.schedule import Plan, SchedulerStats
from quire.engine.seats import Seats
from quire.errors import CapacityError

__all__ = ["Growth"]


class Growth:
    """Reserves, and preempts where that needs it.

    Args:
        seats: who runs, and who is behind whom.
        chunks: how small a chunk may be.
        ladder: what is tried when memory runs short.
        counters: preemptions and stalls are counted here.
    """

    def __init__(
        self, seats: Seats, chunks: Chunks, ladder: Ladder, counters: SchedulerStats
    ) -> None:
        self.seats, self.chunks, self.ladder, self.counters = seats, chunks, ladder, counters

    def reserve(self, sample: Sample, n_tokens: int, plan: Plan) -> int:
        """Room for a running sample's next tokens, taken from those behind it.

        Returns:
            How many tokens were reserved: fewer when it is alone and the pool is small, 0 when it must stall.
        """
        table, running = sample.table, self.seats.running
        assert table is not None
        while True:
            try:
                table.append(n_tokens)
            except CapacityError:
                last = running[-1]
                if self.ladder.drain():
                    continue
                if self.ladder.leaving:
                    self.counters.stalls += 1
                    return 0
                if self.ladder.give_way(running) or self.ladder.cool(running):
                    continue
                if last is not sample:
                    self.preempt(last, plan)
                elif sample.request.oversize and self._forgo():
                    continue
                elif len(running) == 1 and (fewer := self.chunks.fewer_tokens(sample, n_tokens)):
                    n_tokens = fewer
                else:
                    self.counters.stalls += 1
                    return 0
            else:
                return n_tokens

    def preempt(self, victim: Sample, plan: Plan) -> None:
        """Swap a sample's table out, or release it, and put it back among the waiting, where its seat is."""
        plan.take_back(victim)
        assert victim.table is not None
        victim.need_bytes = victim.table.held_bytes()
        self.seats.leave(victim)
        if self.ladder.swap_out(victim):
            self.seats.account(victim, 0)
        else:
            self.ladder.stats.recomputed += 1
            self.seats.release(victim)
            victim.computed, victim.fetched = 0, -1
        victim.request.figures.preemptions += 1
        self.counters.preemptions += 1
        self.seats.wait(victim)

    def _forgo(self) -> bool:
        """The last of those in host memory is computed anew, so that cold blocks of who runs have its room."""
        parked = [s for s in self.seats.waiting if s.parked is not None]
        if not parked:
            return False
        self.ladder.drop(parked[-1])
        self.ladder.stats.recomputed += 1
        parked[-1].computed, parked[-1].fetched = 0, -1
        return True
