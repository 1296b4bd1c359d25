"""Who runs in the next step. No tensor, no torch, no clock of its own: an engine or a simulator drives it alike.

**One total order.** A sample's seat is `(arrival_s - priority * priority_step_s, arrival number, index)`. The effective
priority, `priority + waited_s / priority_step_s`, rises for all at the same rate, so the order of any two never
changes: it is first come first served within a priority, one level of priority is worth `priority_step_s` seconds of
waiting, and nobody can be passed for ever. Everything follows the seats: who is scheduled first, who is admitted first,
and, from the other end, who gives way when the pool is full (the youngest of the lowest effective priority).

**Why all finish.** The first seat among the unfinished can take the room of every other running sample, and alone it
fits (checked at the door, see `intake`), so it advances in every step in which it is in the batch; it waits for a row
only behind samples that end by themselves. When it is done another is first. Only finitely many later arrivals can
outrank a seat, because priorities are bounded and time passes.

**Why it does not thrash.** A sample that finds no room and has nobody behind it stalls with what it holds; it is
preempted only when somebody before it needs the room. Nobody enters behind a stalled sample, nor below the watermark,
nor a preempted one before as much is free as it held. The waiting are admitted in seat order; none is skipped, but
those who wait for one before them to compute the prefix that they share, or for a tier to bring it.

A step, from its token budget: first one token for each decoding sample, then chunks of prompts, running and waiting
ones merged in seat order, each as large as what is left.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from operator import attrgetter

from quire.engine.ladder import Ladder
from quire.engine.request import Request, Sample, State
from quire.engine.runner import Item, Room, Table
from quire.engine.schedule import Plan, SchedulerConfig, SchedulerStats
from quire.errors import CapacityError, InvariantError

__all__ = ["Scheduler"]

Seat = tuple[float, int, int]
_seat = attrgetter("seat")


class Scheduler:
    """Queues, admission, chunks, preemption and the books of who holds what.

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
        self.room = room
        self.ladder = ladder or Ladder(room)
        self.opener = opener or (lambda _: room.open())
        self.config = config or SchedulerConfig()
        self.clock = clock
        self.cut = cut
        self.restart_tokens = restart_tokens
        self.max_rows = min(
            self.config.max_running,
            self.config.step_tokens,
            room.max_rows or self.config.max_running,
        )
        self.counters = SchedulerStats()
        self._running: list[Sample] = []  # sorted by seat
        self._waiting: list[tuple[Seat, Sample]] = []  # heap; stale entries are skipped
        self._n_waiting = 0
        self._aside: list[Sample] = []  # of the waiting: who follows another, during a step
        self._loading: dict[Sample, None] = {}
        self._rows = 0
        self._arrivals = 0
        self._grow_bytes = 0  # most that one more token was seen to take

    # ---- what callers ask -------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request's first sample; the others fork from it, see `fork`."""
        config, first = self.config, request.samples[0]
        virtual_s = request.arrival_s - request.priority * config.priority_step_s
        for sample in request.samples:
            sample.seat = (virtual_s, self._arrivals, sample.index)
        self._arrivals += 1
        self.ladder.yielding |= request.yields is not None
        first.rows = min(len(request.samples), self.max_rows)
        self._wait(first)

    def finish(self, sample: Sample) -> None:
        """Take a sample out, wherever it is, and give everything back that it holds."""
        if sample.state is State.FINISHED:
            return
        if sample.state is State.RUNNING:
            self._leave(sample)
        elif sample.state is State.WAITING:
            self._n_waiting -= 1
            self._sweep()
        elif sample.state is State.LOADING:
            del self._loading[sample]
        sample.state = State.FINISHED
        sample.item = None
        self.ladder.drop(sample)
        request = sample.request
        if sample.table is not None:
            held = sample.table.held_bytes()
            request.figures.kv_bytes_end += held
            used = getattr(sample.table, "used_bytes", None)
            request.figures.kv_bytes_used_end += held if used is None else used()
            self._release(sample)
        request.unfinished -= 1

    def fork(self, first: Sample, siblings: list[Sample]) -> None:
        """Let siblings of `first`, each with its own first token, go on from its committed prompt.

        One that finds no row or no room for the copied tail waits like a preempted sample and recomputes.
        """
        if first.table is None:
            raise InvariantError("a sample can be forked only while it runs")
        self._rows -= first.rows - 1
        first.rows = 1
        for sample in siblings:
            sample.most_computed = first.computed
            if self._rows < self.max_rows:
                try:
                    sample.table = first.table.fork()
                except CapacityError:
                    pass
                else:
                    follow = getattr(sample.table, "follow", None)
                    if follow is not None:
                        follow(sample.tokens)
                    sample.computed = first.computed
                    self._enter(sample)
                    self._account(sample)
                    self.counters.forks += 1
                    continue
            self._wait(sample)

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
        self._leave(sample)
        self._release(sample)
        sample.computed, sample.fetched = 0, -1
        sample.lost += 1
        self.ladder.stats.lost += 1
        self._wait(sample)

    def stats(self) -> SchedulerStats:
        """A snapshot; later steps do not change it."""
        now = SchedulerStats(**{n: getattr(self.counters, n) for n in SchedulerStats.__slots__})
        now.running, now.waiting = len(self._running), self._n_waiting
        now.loading = len(self._loading)
        return now

    @property
    def unfinished(self) -> bool:
        """Is anything running, waiting or loading?"""
        return bool(self._running) or self._n_waiting > 0 or bool(self._loading)

    @property
    def running(self) -> tuple[Sample, ...]:
        """Samples with a table, in seat order."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Sample, ...]:
        """Samples without, in seat order."""
        return tuple(sorted((s for _, s in self._waiting if s.state is State.WAITING), key=_seat))

    @property
    def loading(self) -> tuple[Sample, ...]:
        """Samples that were next, and wait for a tier."""
        return tuple(self._loading)

    def next_waiting(self, n: int) -> list[Sample]:
        """About the first `n` of the waiting: the front of the heap."""
        return [s for _, s in self._waiting[:n] if s.state is State.WAITING]

    def loaded(self, sample: Sample) -> None:
        """Its prefix has come, or will not: it waits in its seat again."""
        del self._loading[sample]
        self._wait(sample)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """Choose the next step and reserve its room; see the module's text for the rules.

        Every sample placed must be advanced (after the forward) or finished before the next call.
        """
        self.ladder.ease(self._running)
        plan = Plan(self.config.step_tokens)
        placed = plan.samples
        prefills: list[Sample] = []
        stalled: Sample | None = None
        for sample in self._running.copy():
            if sample.state is not State.RUNNING:
                continue  # preempted just now for one before it
            self._restart(sample)
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
                if not self._reserve(sample, 1, plan):
                    stalled = stalled or sample
                    continue
            sample.item = Item(table, sample.tokens, start, start + 1, 1)
            placed.append(sample)
            plan.budget -= 1
            held = table.held_bytes()
            if held != sample.held_bytes:
                self._grow_bytes = max(self._grow_bytes, held - sample.held_bytes)
                self._account(sample, held)
        if placed and self.config.beside_tokens is not None:
            plan.budget = min(plan.budget, self.config.beside_tokens)
        if plan.budget > 0 and (prefills or self._n_waiting):
            try:
                self._prefill(plan, prefills, stalled)
            finally:
                for sample in self._aside:
                    heappush(self._waiting, (sample.seat, sample))
                self._aside.clear()
        if not placed:
            self._unstick(plan)
        return plan

    def _prefill(self, plan: Plan, prefills: list[Sample], stalled: Sample | None) -> None:
        """Spend what is left of the budget on prompts: running and waiting ones merged in seat order."""
        admitting, next_one = True, 0
        while plan.budget > 0:
            if next_one < len(prefills) and prefills[next_one].state is not State.RUNNING:
                next_one += 1
                continue
            sample = prefills[next_one] if next_one < len(prefills) else None
            head = self._head() if admitting else None
            if head is not None and (sample is None or head.seat < sample.seat):
                blocked = stalled is not None and stalled.seat < head.seat
                admitted = not blocked and self._admit(head, plan)
                if admitted is None:
                    self._set_aside(heappop(self._waiting)[1])
                else:
                    admitting = admitted
            elif sample is not None:
                next_one += 1
                assert sample.table is not None
                n_tokens = self._chunk(sample, sample.table, plan)
                if n_tokens and (n_tokens := self._reserve(sample, n_tokens, plan)):
                    self._place(sample, n_tokens, plan)
                elif stalled is None or sample.seat < stalled.seat:
                    stalled = sample
            else:
                break

    def _set_aside(self, sample: Sample) -> None:
        """It follows somebody before it, or its prefix is on the way: those behind it may pass."""
        if sample.fetch is None:
            self._aside.append(sample)
        else:
            sample.state = State.LOADING
            self._n_waiting -= 1
            self._loading[sample] = None

    def _chunk(self, sample: Sample, table: Table, plan: Plan) -> int:
        """Tokens of this sample to compute next; 0: not in this step."""
        start, end = sample.computed, len(sample.tokens)
        if not self.room.chunked_prefill:
            return 0 if plan.prefills else end - start
        stop = min(end, start + plan.budget)
        if sample.unscored:
            stop = min(stop, start + self.config.logits_tokens)
        if self.cut is not None:
            stop = self.cut(table, start, stop)
        return max(stop - start, self._least(sample))

    def _least(self, sample: Sample) -> int:
        """The smallest chunk that is of use: of a sequence that must be computed anew, all up to where it changed."""
        past = self.restart_tokens
        return 1 if past is None or sample.computed or len(sample.tokens) <= past else past + 1

    def _restart(self, sample: Sample, table: Table | None = None) -> None:
        """Forget what a sample has computed (or found in `table`) if its next token turns it into something else."""
        table = table or sample.table
        if table is not None and self._changes(sample):
            table.truncate(0)
            sample.computed = 0

    def _changes(self, sample: Sample) -> bool:
        """Whether a sample's next token turns what it has computed into something else."""
        past = self.restart_tokens
        return past is not None and 0 < sample.computed <= past < len(sample.tokens)

    def _reserve(self, sample: Sample, n_tokens: int, plan: Plan) -> int:
        """Room for a running sample's next tokens, taken from those behind it.

        Returns:
            How many tokens were reserved: fewer when it is alone and the pool is small, 0 when it must stall.
        """
        table, least = sample.table, self._least(sample)
        assert table is not None
        while True:
            try:
                table.append(n_tokens)
            except CapacityError:
                last = self._running[-1]
                if self.ladder.give_way(self._running) or self.ladder.cool(self._running):
                    continue
                if last is not sample:
                    self._preempt(last, plan)
                elif sample.request.oversize and self._forgo():
                    continue
                elif len(self._running) == 1 and n_tokens > least and self.room.chunked_prefill:
                    n_tokens = max(least, n_tokens // 2)
                else:
                    self.counters.stalls += 1
                    return 0
            else:
                return n_tokens

    def _admit(self, sample: Sample, plan: Plan) -> bool | None:
        """Let the first of the waiting in, if its next chunk fits without touching anyone before it.

        Returns:
            None when somebody before it computes what it shares, or a tier brings it: who comes behind may be let in.
        """
        if self._rows + sample.rows > self.max_rows:
            return False
        if not self.room.chunked_prefill and plan.prefills:
            return False  # one whole prompt a step
        if not self._worth_trying(sample) and not self.ladder.cool(self._running):
            return self._queue(sample)
        while True:
            found = self._try(sample, plan)
            if found is not False:
                return found
            if self.ladder.cool(self._running):
                continue
            last = self._running[-1] if self._running else None
            if last is None and sample.parked is not None:
                self.ladder.drop(sample)  # even alone: it is computed anew, in chunks that fit
                sample.computed = 0
            elif last is None or last.seat < sample.seat:
                return self._queue(sample)
            else:
                self._preempt(last, plan)

    def _queue(self, sample: Sample) -> bool:
        """It stays where it is, for want of room."""
        if not sample.queued:
            sample.queued = True
            self.ladder.stats.queued += 1
        return False

    def _try(self, sample: Sample, plan: Plan) -> bool | None:
        """Open a table for a waiting sample, reserve its next chunk and let it in; None: see `_admit`.

        Returns:
            False where there is no room: nothing has changed.
        """
        if sample.parked is not None and self._changes(sample):
            self.ladder.drop(sample)
        parked = sample.parked
        if parked is None:
            table = self.opener(sample)
            if table is None:
                return None
        else:
            try:
                parked.take()
            except CapacityError:
                return False
            table = parked.table
            if parked.table.keeper is not None:
                parked.fill()  # what it appends may compact what is there
        done = 0 if parked is None else sample.computed
        try:
            if parked is None:
                sample.computed = table.length
            self._restart(sample, table)
            if not self.ladder.stage(sample, table):
                return False
            n_tokens, least = self._chunk(sample, table, plan), self._least(sample)
            while n_tokens:
                if self._take(table, n_tokens):
                    self._let_in(sample, table, n_tokens, plan)
                    return True
                alone = not self._running and self.room.chunked_prefill and n_tokens > least
                n_tokens = max(least, n_tokens // 2) if alone else 0  # as little as need be
        finally:  # an interrupt may come anywhere, and nobody else knows this table yet
            if sample.table is not table:
                sample.computed = done
                if parked is None:
                    table.release()
                else:
                    self.ladder.leave(sample)
        return False

    def _forgo(self) -> bool:
        """The last of those in host memory is computed anew, so that cold blocks of who runs have its room."""
        parked = [s for s in self.waiting if s.parked is not None]
        if not parked:
            return False
        self.ladder.drop(parked[-1])
        self.ladder.stats.recomputed += 1
        parked[-1].computed, parked[-1].fetched = 0, -1
        return True

    def _let_in(self, sample: Sample, table: Table, n_tokens: int, plan: Plan) -> None:
        heappop(self._waiting)
        self._n_waiting -= 1
        sample.table = table
        sample.queued = False
        figures = sample.request.figures
        if sample.parked is not None:
            figures.swaps += 1
            self.ladder.settle(sample)
        self._enter(sample)
        if figures.admitted_s is None:
            figures.admitted_s = self.clock()
            figures.cached_tokens = sample.computed
            figures.miss = getattr(getattr(table, "path", None), "miss", None)
        self.counters.admissions += 1
        self._place(sample, n_tokens, plan)

    def _worth_trying(self, sample: Sample) -> bool:
        """Could room for it be made? Exact for what is free; for those behind it, at most what they reference."""
        if not self._running:
            return True
        usage = self.room.usage()
        if not usage.total_bytes:
            return True
        room_bytes = usage.free_bytes + usage.cached_bytes
        for other in reversed(self._running):
            if other.seat < sample.seat:
                break
            room_bytes += other.held_bytes
        return room_bytes >= min(
            sample.need_bytes + self._watermark(usage.total_bytes), usage.total_bytes
        )

    def _take(self, table: Table, n_tokens: int) -> bool:
        """Reserve on a fresh table and see that the running keep room for their next tokens."""
        try:
            table.append(n_tokens)
        except CapacityError:
            return False
        if not self._running:
            return True
        usage = self.room.usage()
        free = usage.free_bytes + usage.cached_bytes
        return not usage.total_bytes or free >= self._watermark(usage.total_bytes)

    def _watermark(self, total_bytes: int) -> int:
        """Bytes to leave free: the configured share, or one more block for each that runs, as far as seen."""
        share = int(self.config.watermark * total_bytes)
        return max(share, len(self._running) * self._grow_bytes) if self.config.watermark else 0

    def _unstick(self, plan: Plan) -> None:
        """Nothing could be placed: the first seat cannot run even alone. Say so instead of waiting for ever."""
        first = self._running[0] if self._running else None
        head = self._head()
        if head is not None and (first is None or head.seat < first.seat):
            first = head
        if first is not None:
            plan.failed.append(first)

    # ---- the books --------------------------------------------------------------------------------------------------

    def _place(self, sample: Sample, n_tokens: int, plan: Plan) -> None:
        start = sample.computed
        stop = start + n_tokens
        end = len(sample.tokens)
        logits = 1 if stop == end else 0
        first = sample.unscored
        if first:
            first = max(start, first - 1)
            if first < min(stop, sample.prompt_tokens - 1):
                logits = stop - first
        assert sample.table is not None
        sample.item = Item(sample.table, sample.tokens, start, stop, logits)
        plan.samples.append(sample)
        plan.budget -= n_tokens
        plan.prefills += n_tokens > 1 or sample.computed == 0
        self._account(sample)

    def _preempt(self, victim: Sample, plan: Plan) -> None:
        """Swap a sample's table out, or release it, and put it back among the waiting, where its seat is."""
        if victim.item is not None:
            plan.samples.remove(victim)
            plan.budget += victim.item.stop - victim.item.start
            plan.prefills -= victim.item.stop - victim.item.start > 1 or victim.item.start == 0
            victim.item = None
        assert victim.table is not None
        victim.need_bytes = victim.table.held_bytes()
        self._leave(victim)
        if self.ladder.swap_out(victim):
            self._account(victim, 0)
        else:
            self.ladder.stats.recomputed += 1
            self._release(victim)
            victim.computed = 0
            victim.fetched = -1
        victim.request.figures.preemptions += 1
        self.counters.preemptions += 1
        self._wait(victim)

    def _release(self, sample: Sample) -> None:
        assert sample.table is not None
        sample.table.release()
        sample.table = None
        self._account(sample, 0)

    def _account(self, sample: Sample, held: int | None = None) -> None:
        """Book what a sample holds now, and its request's peak."""
        if held is None:
            held = 0 if sample.table is None else sample.table.held_bytes()
        figures = sample.request.figures
        figures.kv_bytes_held += held - sample.held_bytes
        sample.held_bytes = held
        figures.kv_bytes_peak = max(figures.kv_bytes_peak, figures.kv_bytes_held)

    def _enter(self, sample: Sample) -> None:
        sample.state = State.RUNNING
        insort(self._running, sample, key=_seat)
        self._rows += sample.rows

    def _leave(self, sample: Sample) -> None:
        del self._running[bisect_left(self._running, sample.seat, key=_seat)]
        self._rows -= sample.rows

    def _wait(self, sample: Sample) -> None:
        sample.state = State.WAITING
        heappush(self._waiting, (sample.seat, sample))
        self._n_waiting += 1

    def _head(self) -> Sample | None:
        waiting = self._waiting
        while waiting and waiting[0][1].state is not State.WAITING:
            heappop(waiting)
        return waiting[0][1] if waiting else None

    def _sweep(self) -> None:
        """Forget cancelled entries before they outnumber the live ones."""
        if len(self._waiting) > 2 * self._n_waiting + 64:
            self._waiting = [entry for entry in self._waiting if entry[1].state is State.WAITING]
            heapify(self._waiting)
