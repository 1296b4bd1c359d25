"""Who runs, waits and loads, in one total order, and what each of them holds: the scheduler's books.

**One total order.** A sample's seat is `(arrival_s - priority * priority_step_s, arrival number, index)`. The effective
priority, `priority + waited_s / priority_step_s`, rises for all at the same rate, so the order of any two never
changes: it is first come first served within a priority, one level of priority is worth `priority_step_s` seconds of
waiting, and nobody can be passed for ever. Everything follows the seats: who is scheduled first, who is admitted first,
and, from the other end, who gives way when the pool is full (the youngest of the lowest effective priority).

    wait           pop, enter           remove
    ----> WAITING ------------> RUNNING -----> FINISHED       from everywhere
          |     ^ <------------------+
          |     |    leave, wait                              preempted, or part of it was lost
          v     | loaded
          LOADING                                             step_aside: a tier brings its prefix
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heapify, heappop, heappush
from operator import attrgetter

from quire.engine.request import Request, Sample, State

__all__ = ["Seats"]

Seat = tuple[float, int, int]
_seat = attrgetter("seat")


class Seats:
    """The queues and the books.

    Args:
        max_rows: most rows of a batch.

    Cost: O(running) moves to enter and leave, a memmove; O(log waiting) to wait and to be popped.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.rows = 0
        """Taken by those who run."""
        self.running: list[Sample] = []
        """Samples with a table, in seat order."""
        self.loading: dict[Sample, None] = {}
        """Samples that were next, and wait for a tier."""
        self.n_waiting = 0
        self.grow_bytes = 0
        """Most that one more token was seen to take."""
        self._waiting: list[tuple[Seat, Sample]] = []  # heap; stale entries are skipped
        self._aside: list[Sample] = []  # of the waiting: who follows another, during a step
        self._arrivals = 0

    # ---- who is where -----------------------------------------------------------------------------------------------

    def assign(self, request: Request, priority_step_s: float) -> None:
        """Give every sample of a request its seat, for good."""
        virtual_s = request.arrival_s - request.priority * priority_step_s
        for sample in request.samples:
            sample.seat = (virtual_s, self._arrivals, sample.index)
        self._arrivals += 1

    def wait(self, sample: Sample) -> None:
        """It waits, in its seat."""
        sample.state = State.WAITING
        heappush(self._waiting, (sample.seat, sample))
        self.n_waiting += 1

    def enter(self, sample: Sample) -> None:
        """It runs."""
        sample.state = State.RUNNING
        insort(self.running, sample, key=_seat)
        self.rows += sample.rows

    def leave(self, sample: Sample) -> None:
        """It runs no longer; where it goes is the caller's to say."""
        del self.running[bisect_left(self.running, sample.seat, key=_seat)]
        self.rows -= sample.rows

    def loaded(self, sample: Sample) -> None:
        """Its prefix has come, or will not: it waits in its seat again."""
        del self.loading[sample]
        self.wait(sample)

    def remove(self, sample: Sample) -> None:
        """It is finished, wherever it was."""
        if sample.state is State.RUNNING:
            self.leave(sample)
        elif sample.state is State.WAITING:
            self.n_waiting -= 1
            self._sweep()
        elif sample.state is State.LOADING:
            del self.loading[sample]
        sample.state = State.FINISHED

    # ---- the waiting ------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> tuple[Sample, ...]:
        """All of them in seat order, but those who stepped aside; O(n log n)."""
        return tuple(sorted((s for _, s in self._waiting if s.state is State.WAITING), key=_seat))

    def next_waiting(self, n: int) -> list[Sample]:
        """About the first `n`: the front of the heap."""
        return [s for _, s in self._waiting[:n] if s.state is State.WAITING]

    def head(self) -> Sample | None:
        """The first of them."""
        waiting = self._waiting
        while waiting and waiting[0][1].state is not State.WAITING:
            heappop(waiting)
        return waiting[0][1] if waiting else None

    def pop(self) -> Sample:
        """Take the head out, to let it in."""
        sample = heappop(self._waiting)[1]
        self.n_waiting -= 1
        return sample

    def step_aside(self) -> None:
        """The head follows somebody before it, or its prefix is on the way: those behind it may pass."""
        sample = heappop(self._waiting)[1]
        if sample.fetch is None and sample.rising is None:
            self._aside.append(sample)
        else:
            sample.state = State.LOADING
            self.n_waiting -= 1
            self.loading[sample] = None

    def step_back(self) -> None:
        """The step is planned: who stepped aside is in its seat again."""
        for sample in self._aside:
            heappush(self._waiting, (sample.seat, sample))
        self._aside.clear()

    def _sweep(self) -> None:
        """Forget cancelled entries before they outnumber the live ones."""
        if len(self._waiting) > 2 * self.n_waiting + 64:
            self._waiting = [entry for entry in self._waiting if entry[1].state is State.WAITING]
            heapify(self._waiting)

    # ---- who holds what ---------------------------------------------------------------------------------------------

    def account(self, sample: Sample, held: int | None = None) -> None:
        """Book what a sample holds now (bytes; default: its table is asked), and its request's peak."""
        if held is None:
            held = 0 if sample.table is None else sample.table.held_bytes()
        figures = sample.request.figures
        figures.kv_bytes_held += held - sample.held_bytes
        sample.held_bytes = held
        figures.kv_bytes_peak = max(figures.kv_bytes_peak, figures.kv_bytes_held)

    def grew(self, sample: Sample, held: int) -> None:
        """Book what a sample holds with one more token."""
        self.grow_bytes = max(self.grow_bytes, held - sample.held_bytes)
        self.account(sample, held)

    def release(self, sample: Sample) -> None:
        """Give a sample's table back."""
        assert sample.table is not None
        sample.table.release()
        sample.table = None
        self.account(sample, 0)
