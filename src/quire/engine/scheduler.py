"""Who runs in the next step. No tensor, no torch, no clock of its own: an engine or a simulator drives it alike.

    Scheduler      what callers ask, and the plan of a step             here
    Admission      a waiting sample gets a table and its first room     `admission.py`
    Growth         a running one gets more, from those behind it        `growth.py`
    Chunks         how many tokens of a sample are next                 `chunks.py`
    Seats          the queues and the books, in one total order         `seats.py`

A step, from its token budget: first one token for each decoding sample, then chunks of prompts, running and waiting
ones merged in seat order, each as large as what is left.

**Why all finish.** The first seat among the unfinished can take the room of every other running sample, and alone it
fits (checked at the door, see `intake`), so it advances in every step in which it is in the batch; it waits for a row
only behind samples that end by themselves. When it is done another is first. Only finitely many later arrivals can
outrank a seat, because priorities are bounded and time passes.

**Why it does not thrash.** A sample that finds no room and has nobody behind it stalls with what it holds; it is
preempted only when somebody before it needs the room. Nobody enters behind a stalled sample, nor below the watermark,
nor a preempted one before as much is free as it held. The waiting are admitted in seat order; none is skipped, but
those who wait for one before them to compute the prefix that they share, or for a tier to bring it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from quire.engine.admission import Admission
from quire.engine.chunks import Chunks
from quire.engine.growth import Growth
from quire.engine.ladder import Ladder
from quire.engine.request import Request, Sample, State
from quire.engine.runner import Item, Room, Table
from quire.engine.schedule import Plan, SchedulerConfig, SchedulerStats
from quire.engine.seats import Seats
from quire.errors import CapacityError, InvariantError

__all__ = ["Scheduler"]


class Scheduler:
    """Plans steps, and knows of every sample from its arrival to its end.

    Args:
        room: where tables come from: a runner, or a model of one.
        config: sizes of a step.
        clock: seconds; virtual in a simulation.
        cut: `cut(table, start, stop) -> stop'` with start < stop' ≤ stop: where a chunk must end (compaction); default:
            anywhere.
        restart_tokens: a sequence that grows past so many is computed anew, at once up to there (LongRoPE).
        opener: gives a waiting sample its table, or None while it must wait for another; default: an empty one.
        ladder: what is tried when memory runs short; default: one over the room.

    Cost: O(samples in the step) Python, about a microsecond each beside the table's own `append`; admission adds
    O(log waiting).
    """

    def __init__(
        self,
        room: Room,
        config: SchedulerConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        cut: Callable[[Table, int, int], int] | None = None,
        restart_tokens: int | None = None,
        opener: Callable[[Sample], Table | None] | None = None,
        ladder: Ladder | None = None,
    ) -> None:
        self.config = config = config or SchedulerConfig()
        self.ladder = ladder or Ladder(room)
        self.counters = SchedulerStats()
        rows = (config.max_running, config.step_tokens, room.max_rows or config.max_running)
        self.seats = Seats(min(rows))
        self.chunks = Chunks(room, config.logits_tokens, cut, restart_tokens)
        self.growth = Growth(self.seats, self.chunks, self.ladder, self.counters)
        self.opener = opener or (lambda _: room.open())
        self.admission = Admission(room, self.growth, self.opener, config.watermark, clock)

    # ---- what callers ask -------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request's first sample; the others fork from it, see `fork`."""
        self.seats.assign(request, self.config.priority_step_s)
        self.ladder.yielding |= request.yields is not None
        first = request.samples[0]
        first.rows = min(len(request.samples), self.seats.max_rows)
        self.seats.wait(first)

    def finish(self, sample: Sample) -> None:
        """Take a sample out, wherever it is, and give everything back that it holds."""
        if sample.state is State.FINISHED:
            return
        self.seats.remove(sample)
        sample.item = None
        request = sample.request
        if sample.table is not None:
            held = sample.table.held_bytes()
            request.figures.kv_bytes_end += held
            used = getattr(sample.table, "used_bytes", None)
            request.figures.kv_bytes_used_end += held if used is None else used()
            finish = getattr(sample.table, "finish", None)
            if finish is not None and sample.finish_reason in ("stop", "length"):
                finish()
        self.ladder.drop(sample)
        if sample.table is not None:
            self.seats.release(sample)
        request.unfinished -= 1

    def fork(self, first: Sample, siblings: list[Sample]) -> None:
        """Let siblings of `first`, each with its own first token, go on from its committed prompt.

        One that finds no row or no room for the copied tail waits like a preempted sample and recomputes.
        """
        if first.table is None:
            raise InvariantError("a sample can be forked only while it runs")
        seats = self.seats
        seats.rows -= first.rows - 1
        first.rows = 1
        for sample in siblings:
            sample.most_computed = first.computed
            if seats.rows < seats.max_rows:
                try:
                    sample.table = first.table.fork()
                except CapacityError:
                    pass
                else:
                    follow = getattr(sample.table, "follow", None)
                    if follow is not None:
                        follow(sample.tokens)
                    sample.computed = first.computed
                    seats.enter(sample)
                    seats.account(sample)
                    self.counters.forks += 1
                    continue
            seats.wait(sample)

    def advance(self, sample: Sample, stop: int | None = None) -> None:
        """After the forward: [0, stop) is final (default: all that was computed; less when drafts were rejected)."""
        item, table = sample.item, sample.table
        if item is None or table is None:
            raise InvariantError("a sample advances once per step that it was placed in")
        if stop is None or stop == item.stop:
            stop = item.stop
        else:
            table.truncate(stop)
        table.commit(stop)
        figures, n_tokens = sample.request.figures, item.stop - item.start
        figures.computed_tokens += n_tokens
        if item.start < sample.most_computed:
            again = min(item.stop, sample.most_computed) - item.start
            figures.recomputed_tokens += again
            self.counters.recomputed_tokens += again
        if n_tokens == 1:
            self.counters.decode_tokens += 1
        else:
            self.counters.prefill_tokens += n_tokens
        sample.item = None
        sample.computed = stop
        sample.most_computed = max(sample.most_computed, stop)

    def lose(self, sample: Sample) -> None:
        """Part of what a sample has computed did not come back: all of it is computed anew."""
        assert sample.table is not None
        sample.item = None
        self.seats.leave(sample)
        self.seats.release(sample)
        sample.computed, sample.fetched = 0, -1
        sample.lost += 1
        self.ladder.stats.lost += 1
        self.seats.wait(sample)

    def loaded(self, sample: Sample) -> None:
        """Its prefix has come, or will not: it waits in its seat again."""
        self.seats.loaded(sample)

    def stats(self) -> SchedulerStats:
        """A snapshot; later steps do not change it."""
        now = SchedulerStats(**{n: getattr(self.counters, n) for n in SchedulerStats.__slots__})
        now.running, now.waiting = len(self.seats.running), self.seats.n_waiting
        now.loading = len(self.seats.loading)
        return now

    @property
    def unfinished(self) -> bool:
        """Is anything running, waiting or loading?"""
        seats = self.seats
        return bool(seats.running) or seats.n_waiting > 0 or bool(seats.loading)

    @property
    def running(self) -> tuple[Sample, ...]:
        """Samples with a table, in seat order."""
        return tuple(self.seats.running)

    @property
    def waiting(self) -> tuple[Sample, ...]:
        """Samples without, in seat order."""
        return self.seats.waiting

    @property
    def loading(self) -> tuple[Sample, ...]:
        """Samples that were next, and wait for a tier."""
        return tuple(self.seats.loading)

    def next_waiting(self, n: int) -> list[Sample]:
        """About the first `n` of the waiting."""
        return self.seats.next_waiting(n)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """Choose the next step and reserve its room; see the module's text for the rules.

        Every sample placed must be advanced (after the forward) or finished before the next call.
        """
        seats = self.seats
        self.ladder.begin_schedule()
        self.ladder.ease(seats.running)
        plan = Plan(self.config.step_tokens)
        prefills, stalled = self._decode(plan)
        if plan.samples and self.config.beside_tokens is not None:
            plan.budget = min(plan.budget, self.config.beside_tokens)
        if plan.budget > 0 and (prefills or seats.n_waiting):
            try:
                self._prefill(plan, prefills, stalled)
            finally:
                seats.step_back()
        self.ladder.drain()
        if not plan.samples and not self.moving and not getattr(self.opener, "put_off", False):
            self._unstick(plan)
        return plan

    @property
    def moving(self) -> bool:
        """Whether somebody is on the way to host memory or back: then a step may compute nothing and still be one."""
        return bool(self.ladder.leaving) or any(s.parked is not None for s in self.seats.running)

    def _decode(self, plan: Plan) -> tuple[list[Sample], Sample | None]:
        """One token for each running sample that wants just one.

        Returns:
            Those that want more, and the first that found no room; both in seat order.
        """
        seats, placed = self.seats, plan.samples
        prefills: list[Sample] = []
        stalled: Sample | None = None
        for sample in seats.running.copy():
            if sample.state is not State.RUNNING:
                continue  # preempted just now for one before it
            if sample.parked is not None and not self.ladder.settle(sample):
                continue  # it is not back yet
            self.chunks.restart(sample)
            start = sample.computed
            if len(sample.tokens) - start > 1:
                prefills.append(sample)
                continue
            if plan.budget < 1:
                break
            table = sample.table
            assert table is not None
            try:
                table.append(1)
            except CapacityError:
                if not self.growth.reserve(sample, 1, plan):
                    stalled = stalled or sample
                    continue
            sample.item = Item(table, sample.tokens, start, start + 1, 1)
            placed.append(sample)
            plan.budget -= 1
            held = table.held_bytes()
            if held != sample.held_bytes:
                seats.grew(sample, held)
        return prefills, stalled

    def _prefill(self, plan: Plan, prefills: list[Sample], stalled: Sample | None) -> None:
        """Spend what is left of the budget on prompts: running and waiting ones merged in seat order."""
        seats, admitting, next_one = self.seats, True, 0
        while plan.budget > 0:
            if next_one < len(prefills) and prefills[next_one].state is not State.RUNNING:
                next_one += 1
                continue
            sample = prefills[next_one] if next_one < len(prefills) else None
            head = seats.head() if admitting else None
            if head is not None and (sample is None or head.seat < sample.seat):
                blocked = stalled is not None and stalled.seat < head.seat
                admitted = not blocked and self.admission.admit(head, plan)
                if admitted is None:
                    seats.step_aside()
                    admitting = not getattr(
                        self.opener, "put_off", False
                    )  # who comes behind is, too
                else:
                    admitting = admitted
            elif sample is not None:
                next_one += 1
                assert sample.table is not None
                n_tokens = self.chunks.next_tokens(sample, sample.table, plan)
                if n_tokens and (n_tokens := self.growth.reserve(sample, n_tokens, plan)):
                    plan.place(sample, n_tokens)
                    seats.account(sample)
                elif stalled is None or sample.seat < stalled.seat:
                    stalled = sample
            else:
                break

    def _unstick(self, plan: Plan) -> None:
        """Nothing could be placed: the first seat cannot run even alone. Say so instead of waiting for ever."""
        first = self.seats.running[0] if self.seats.running else None
        head = self.seats.head()
        if head is not None and (first is None or head.seat < first.seat):
            first = head
        if first is not None:
            plan.failed.append(first)
