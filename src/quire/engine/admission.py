"""Letting the first of the waiting in: a table, and room for its next chunk, without touching anyone before it.

    worth trying?  ->  open a table, or take a parked one's blocks  ->  reserve a chunk  ->  watermark left?  ->  in
         |                           |                                        |                    |
         +---- no room: those behind it who run give way, the last first; when there are none it stays queued

A parked one that is let in runs when its bytes are back; it is in the step's plan at once where that is in this step.
Nobody enters below the watermark, nor a preempted one before as much is free as it held. None of the waiting is
skipped, but those who wait for one before them to compute the prefix that they share, or for a tier to bring it.
"""

from __future__ import annotations

from collections.abc import Callable

from quire.engine.growth import Growth
from quire.engine.request import Sample
from quire.engine.runner import Room, Table
from quire.engine.schedule import Plan
from quire.errors import CapacityError

__all__ = ["Admission"]


class Admission:
    """The door.

    Args:
        room: where there is room or not.
        growth: how those who run give way; its books, chunks, ladder and counters are used here too.
        opener: gives a waiting sample its table, or None while it must wait for another.
        watermark: share of the pool that must stay free while others run.
        clock: seconds; when a request was first let in.

    Cost: O(log waiting) Python each, beside the table's own `append`; O(running) where there is no room.
    """

    def __init__(
        self,
        room: Room,
        growth: Growth,
        opener: Callable[[Sample], Table | None],
        watermark: float,
        clock: Callable[[], float],
    ) -> None:
        self.room, self.growth, self.opener = room, growth, opener
        self.watermark, self.clock = watermark, clock
        self.seats, self.chunks, self.ladder = growth.seats, growth.chunks, growth.ladder
        self.counters = growth.counters

    def admit(self, sample: Sample, plan: Plan) -> bool | None:
        """Let the first of the waiting in, if its next chunk fits without touching anyone before it.

        Returns:
            None when somebody before it computes what it shares, or a tier brings it: who comes behind may be let in.
        """
        running = self.seats.running
        if self.seats.rows + sample.rows > self.seats.max_rows:
            return False
        if not self.room.chunked_prefill and plan.prefills:
            return False  # one whole prompt a step
        if not self._worth_trying(sample) and not self.ladder.cool(running):
            return self._queue(sample)
        while True:
            found = self._try(sample, plan)
            if found is not False:
                return found
            if self.ladder.drain(sample) or (not self.ladder.leaving and self.ladder.cool(running)):
                continue
            if self.ladder.leaving and self.ladder.leaving != [sample]:
                return self._queue(sample)  # what others leave behind comes first
            last = running[-1] if running else None
            if last is None and sample.parked is not None:
                self.ladder.drop(sample)  # even alone: it is computed anew, in chunks that fit
                sample.computed = 0
            elif last is None or last.seat < sample.seat:
                return self._queue(sample)
            else:
                self.growth.preempt(last, plan)

    def _queue(self, sample: Sample) -> bool:
        """It stays where it is, for want of room."""
        if not sample.queued:
            sample.queued = True
            self.ladder.stats.queued += 1
        return False

    def _try(self, sample: Sample, plan: Plan) -> bool | None:
        """Open a table for a waiting sample, reserve its next chunk and let it in; None: see `admit`.

        Returns:
            False where there is no room: nothing has changed.
        """
        if sample.parked is not None and self.chunks.changes(sample):
            self.ladder.drop(sample)
        parked = sample.parked
        if parked is None:
            table = self.opener(sample)
            if table is None:
                return None
        else:
            try:
                self.ladder.take(sample)
            except CapacityError:
                return False
            table = parked.table
        done = 0 if parked is None else sample.computed
        try:
            if parked is None:
                sample.computed = table.length
            self.chunks.restart(sample, table)
            if not self.ladder.stage(sample, table):
                return False
            if not self.ladder.appends(sample):
                return self._roomy() and self._let_in(sample, table, 0, plan)
            n_tokens = self.chunks.next_tokens(sample, table, plan)
            while n_tokens:
                if self._take(table, n_tokens):
                    return self._let_in(sample, table, n_tokens, plan)
                alone = not self.seats.running  # as little as need be
                n_tokens = self.chunks.fewer_tokens(sample, n_tokens) if alone else 0
        finally:  # an interrupt may come anywhere, and nobody else knows this table yet
            if sample.table is not table:
                sample.computed = done
                if parked is None:
                    table.release()
                else:
                    self.ladder.leave(sample)
        return False

    def _let_in(self, sample: Sample, table: Table, n_tokens: int, plan: Plan) -> bool:
        """It runs, in this step where nothing of it is still on its way; True."""
        self.seats.pop()
        sample.table = table
        sample.queued = False
        figures, here = sample.request.figures, True
        if sample.parked is not None:
            self.ladder.returned(sample)
            here = self.ladder.settle(sample)
            if not here:
                sample.parked.table.unreserve()
        self.seats.enter(sample)
        if figures.admitted_s is None:
            figures.admitted_s = self.clock()
            figures.cached_tokens = sample.computed
            figures.miss = getattr(getattr(table, "path", None), "miss", None)
        self.counters.admissions += 1
        if here:
            plan.place(sample, n_tokens)
        self.seats.account(sample)
        return True

    def _worth_trying(self, sample: Sample) -> bool:
        """Could room for it be made? Exact for what is free; for those behind it, at most what they reference."""
        if not self.seats.running:
            return True
        usage = self.room.usage()
        if not usage.total_bytes:
            return True
        room_bytes = usage.free_bytes + usage.cached_bytes
        for other in reversed(self.seats.running):
            if other.seat < sample.seat:
                break
            room_bytes += other.held_bytes
        return room_bytes >= min(
            sample.need_bytes + self._watermark_bytes(usage.total_bytes), usage.total_bytes
        )

    def _take(self, table: Table, n_tokens: int) -> bool:
        """Reserve on a fresh table and see that the running keep room for their next tokens."""
        try:
            table.append(n_tokens)
        except CapacityError:
            return False
        return self._roomy()

    def _roomy(self) -> bool:
        """Whether as much is free as the running need."""
        if not self.seats.running:
            return True
        usage = self.room.usage()
        free = usage.free_bytes + usage.cached_bytes
        return not usage.total_bytes or free >= self._watermark_bytes(usage.total_bytes)

    def _watermark_bytes(self, total_bytes: int) -> int:
        """Bytes to leave free: the configured share, or one more block for each that runs, as far as seen."""
        if not self.watermark:
            return 0
        seats = self.seats
        return max(int(self.watermark * total_bytes), len(seats.running) * seats.grow_bytes)
