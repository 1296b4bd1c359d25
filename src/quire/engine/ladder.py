"""What happens when memory runs short, by cost; each step is counted. No torch.

    drop        idle blocks that nobody asked for lately       the pools, by what they are worth (`store/evict.py`)
    demote      the same, to a tier                            `store/tiering.py`
    recode      older blocks of a request that allows it, in a smaller codec: while there is room for the codes
    evict       tokens of a request that allows it, by the policy it names: while there is room for what is kept
    offload     cold blocks of a sequence larger than the arena; they are read from where they lie (`store/cold.py`)
    swap        a preempted sequence goes to host memory       here, where copying costs less than computing
    recompute   a preempted sequence is computed again         `growth.py`
    queue       who finds no room waits in its seat            `admission.py`

Whether a swap pays is measured, not assumed: the bytes that it moves, there and back, at the rate of the copies so far,
against its tokens at the rate of the prefills so far. The first copies are a trial on the victim's own blocks.

A swap takes as many steps as its bytes need, each within the time that a step has for copies (`store/pace.py`). Who
leaves waits already, and gives its blocks back as they are copied; who needs room takes them as they come, and nobody
else is preempted before the last has left. Who comes back has all of its blocks, and runs when they are filled. A block
moves in every step in which somebody waits for one, so that all of this ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.store.cold import Cold
from quire.store.park import Parked

if TYPE_CHECKING:
    from quire.engine.request import Sample
    from quire.store.below import Below

__all__ = ["Ladder", "LadderStats", "Rates"]

KEEP = 0.75
"""Share of an old rate in the new one."""
LEAST_TOKENS = 8
"""Forwards of fewer tokens say nothing of a prefill."""
TRIAL_BYTES = 1 << 20
EASE = 0.15
"""With a smaller share of the arena free, tokens go of those who allow it: what is kept is copied first."""


@dataclass(slots=True)
class LadderStats:
    """Counters since the start, from the cheapest step to the dearest.

    Args:
        dropped_blocks: idle ones given up for good.
        demoted_blocks: idle ones that went to a tier.
        recoded: sequences whose older blocks went into the smaller codec that they allow.
        yielded: sequences that went under the policy that they allow; `yielded_bytes` were free then, of both.
        offloaded_bytes: of cold blocks that went to the host or to a tier while their sequence ran.
        lost: sequences computed anew because such a block did not come back.
        swapped: sequences that went to host memory when they were preempted; `swapped_bytes` of them.
        returned: of them, those that were let in again; the others were cancelled, or computed anew after all.
        recomputed: preempted sequences that are computed again.
        swap_dearer: of them, those of which the copy would have taken longer; `swap_no_room`: the host tier was full.
        queued: samples that found no room when it was their turn, each counted once per wait.
        copy_bytes_per_s, prefill_tokens_per_s: as measured; 0: not yet.
        parked, parked_bytes: in host memory now, or on their way there or back.
    """

    dropped_blocks: int = 0
    demoted_blocks: int = 0
    recoded: int = 0
    yielded: int = 0
    yielded_bytes: int = 0
    offloaded_bytes: int = 0
    lost: int = 0
    swapped: int = 0
    swapped_bytes: int = 0
    returned: int = 0
    recomputed: int = 0
    swap_dearer: int = 0
    swap_no_room: int = 0
    queued: int = 0
    copy_bytes_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    parked: int = 0
    parked_bytes: int = 0


class Rates:
    """How fast this machine copies and computes, as seen so far."""

    def __init__(self) -> None:
        self.copy_bytes_per_s = 0.0
        self.prefill_tokens_per_s = 0.0

    def copied(self, n_bytes: int, seconds: float) -> None:
        """So many bytes were moved."""
        self.copy_bytes_per_s = _mean(self.copy_bytes_per_s, n_bytes, seconds)

    def computed(self, n_tokens: int, seconds: float) -> None:
        """A forward of so many tokens took so long."""
        if n_tokens >= LEAST_TOKENS:
            self.prefill_tokens_per_s = _mean(self.prefill_tokens_per_s, n_tokens, seconds)

    def swap_pays(self, n_bytes: int, n_tokens: int) -> bool:
        """Whether moving bytes out and in takes less than computing tokens; False where a rate is not known."""
        if not self.copy_bytes_per_s or not self.prefill_tokens_per_s:
            return False
        return 2 * n_bytes / self.copy_bytes_per_s < n_tokens / self.prefill_tokens_per_s


def _mean(old: float, n: int, seconds: float) -> float:
    now = n / max(seconds, 1e-9)
    return KEEP * old + (1 - KEEP) * now if old else now


class Ladder:
    """The steps that need more than the scheduler's books.

    Args:
        room: the runner; its `below` is where sequences are swapped to, where it has one.
        clock: seconds, real ones: what is compared are durations on this machine.
    """

    def __init__(self, room: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        below: Below | None = getattr(room, "below", None)
        self.below = below if below is not None and below.config.swaps else None
        self.cellar = below if below is not None and below.config.offload else None
        """Where cold blocks of running sequences go."""
        self.sharing: Any = getattr(room, "sharing", None)
        self.room = room
        self.yielding = False
        """Whether any request ever allowed it."""
        self.rates, self.clock = Rates(), clock
        self.stats = LadderStats()
        self.leaving: list[Sample] = []
        """Who waits, and has blocks that are still to be copied and given back; the first goes first."""
        self._moved = [False, False]  # out, in: at least one block each in this step

    def begin_step(self, *, alone: bool) -> None:
        """Copies may take their share of this step, where no prefix cache says so."""
        if self.below is not None:
            self.below.pace.begin_step(alone=alone)

    def begin_schedule(self) -> None:
        """One block may move each way, whatever time is left."""
        self._moved = [False, False]

    def ease(self, running: Sequence[Sample]) -> None:
        """Before a step, while there is room for the copies: if memory is short, somebody who allows it gives way."""
        if self.yielding:
            usage = self.room.usage()
            if usage.free_bytes + usage.cached_bytes < EASE * usage.total_bytes:
                self.give_way(running)

    def give_way(self, running: Sequence[Sample]) -> bool:
        """The last who allows it gives something up; whether somebody did."""
        if not self.yielding:
            return False
        for sample in reversed(running):
            table: Any = sample.table
            if sample.request.yields is None or table is None or table.keeper or table.cold:
                continue
            if sample.parked is not None:
                continue
            if sample.item is not None or sample.computed < sample.prompt_tokens:
                continue
            before = table.held_bytes()
            if sample.request.yields.apply(table):
                if sample.request.yields.kind == "recode":
                    self.stats.recoded += 1
                else:
                    self.stats.yielded += 1
                self.stats.yielded_bytes += before - table.held_bytes()
                return True
        return False

    def stage(self, sample: Sample, table: Any) -> bool:
        """Frames for a sample that will have cold blocks, or has; False where there is no room for them."""
        if not sample.request.oversize or self.cellar is None:
            return True
        if table.cold is None:
            table.cold = Cold(table, self.cellar)
        return bool(table.cold.stage())

    def cool(self, running: Sequence[Sample]) -> bool:
        """Lets the oldest blocks of a sequence that is larger than the arena go; whether there is more room now."""
        if self.cellar is None:
            return False
        for sample in reversed(running):
            table: Any = sample.table
            if sample.parked is not None:
                continue
            if sample.request.oversize and table is not None and table.cold is not None:
                arena = table.store.arena
                freed = table.cold.grow(max(2 * arena.slab_bytes, arena.total_bytes // 8))
                self.stats.offloaded_bytes += freed
                if freed:
                    return True
        return False

    def swap_out(self, sample: Sample) -> bool:
        """Sends a preempted sample's table to host memory; False where it is cheaper to compute, or has no place."""
        below, table = self.below, sample.table
        if below is None or not hasattr(table, "unreserve") or not sample.computed:
            return False
        if sample.parked is not None:  # it was not back yet
            self.leave(sample)
            sample.table = None
            self.stats.swapped += 1
            return True
        n_bytes = table.held_bytes()  # type: ignore[union-attr]
        if below.config.swap != "always" and not self._pays(below, table, n_bytes, sample.computed):
            self.stats.swap_dearer += 1
            return False
        if not below.borrow(n_bytes):
            self.stats.swap_no_room += 1
            return False
        sample.parked = parked = Parked(table, below.mover)  # type: ignore[arg-type]
        if parked.table.cold is not None:
            parked.table.cold.unstage()
        below.give_back(n_bytes - parked.n_bytes)  # reserved and not computed
        sample.table = None
        stats = self.stats
        stats.swapped += 1
        stats.swapped_bytes += parked.n_bytes
        stats.parked += 1
        stats.parked_bytes += parked.n_bytes
        self._leaves(sample)
        return True

    def drain(self, without: Sample | None = None) -> bool:
        """Those who leave go on leaving, as far as this step's time goes.

        Returns:
            Whether there is more room now; what `without` took and gave back is none.
        """
        freed = 0
        while self.leaving and (least := self._may_move(0)) >= 0:
            sample = self.leaving[0]
            parked = sample.parked
            assert parked is not None
            assert self.below is not None
            began = self.clock()
            n_bytes = parked.out(self.below.pace.left_s, least)
            freed += 0 if sample is without else n_bytes
            self.below.pace.spent(self.clock() - began)
            if not parked.leaving:
                self.leaving.pop(0)
                self._measured(parked)
        return freed > 0

    def take(self, sample: Sample) -> None:
        """A parked sample's table has blocks again, whose bytes are still to come. Raises CapacityError."""
        assert sample.parked is not None
        sample.parked.take()
        if sample in self.leaving:
            self.leaving.remove(sample)

    def settle(self, sample: Sample) -> bool:
        """A sample that was let in again gets bytes back, as far as this step's time goes; whether it has them all."""
        parked = sample.parked
        assert parked is not None
        if not parked.filled and not self._fill(parked):
            return False
        self._forget(sample)
        return True

    def returned(self, sample: Sample) -> None:
        """A parked sample is let in again."""
        sample.request.figures.swaps += 1
        self.stats.returned += 1

    def appends(self, sample: Sample) -> bool:
        """Whether a sample's table may grow: what a policy may compact then must be back before, as `settle` has it.

        The host keeps its memory, for one that may have to leave again.
        """
        parked = sample.parked
        if parked is None or parked.table.keeper is None:
            return True
        return parked.filled or self._fill(parked)

    def leave(self, sample: Sample) -> None:
        """There is no room after all for a parked sample that took its blocks."""
        parked = sample.parked
        assert parked is not None
        before = parked.n_bytes
        parked.leave()
        if parked.table.cold is not None:
            parked.table.cold.unstage()
        self.stats.parked_bytes += parked.n_bytes - before
        if self.below is not None:
            self.below.give_back(before - parked.n_bytes)
        self._leaves(sample)

    def drop(self, sample: Sample) -> None:
        """A sample that is over, or will be computed anew, needs its copy no longer, nor what it has of its table."""
        if sample.parked is not None:
            sample.parked.drop()
            self._forget(sample)

    def snapshot(self) -> LadderStats:
        """The counters as they are now."""
        stats, sharing = self.stats, self.sharing
        now = LadderStats(**{n: getattr(stats, n) for n in LadderStats.__slots__})
        now.copy_bytes_per_s = self.rates.copy_bytes_per_s
        now.prefill_tokens_per_s = self.rates.prefill_tokens_per_s
        if sharing is not None:
            if sharing.tiering is not None:
                now.demoted_blocks = sharing.tiering.stats.demoted_blocks
            now.dropped_blocks = sharing.stats.evicted_blocks - now.demoted_blocks
        return now

    def _pays(self, below: Below, table: Any, n_bytes: int, n_tokens: int) -> bool:
        if not self.rates.copy_bytes_per_s:
            self._try_copies(below, table)
        return self.rates.swap_pays(n_bytes, n_tokens)

    def _try_copies(self, below: Below, table: Any) -> None:
        """Reads some of a table's blocks and throws them away."""
        for chain in table.chains:
            some = chain.live()[: max(1, TRIAL_BYTES // chain.group.block_bytes)]
            rows = below.mover.space(len(some), chain.group.block_bytes)
            began = self.clock()
            for row, block in zip(rows, some, strict=True):
                below.mover.read_into(chain.pool, int(block), row)
            if len(some):
                self.rates.copied(rows.nbytes, self.clock() - began)

    def _leaves(self, sample: Sample) -> None:
        """It is among those who leave, if anything of it is still to go."""
        assert sample.parked is not None
        if sample.parked.leaving and sample not in self.leaving:
            self.leaving.append(sample)

    def _fill(self, parked: Parked) -> bool:
        least = self._may_move(1)
        if least < 0:
            return False
        assert self.below is not None
        began = self.clock()
        done = parked.fill(self.below.pace.left_s, least)
        self.below.pace.spent(self.clock() - began)
        if done:
            self._measured(parked)
        return done

    def _may_move(self, way: int) -> int:
        """How many blocks may move out (0) or in (1) whatever the time: 1 for a step's first; -1: none any more."""
        assert self.below is not None
        if not self._moved[way]:
            self._moved[way] = True
            return 1
        return 0 if self.below.pace.left_s > 0 else -1

    def _measured(self, parked: Parked) -> None:
        """A move is over: how fast it was."""
        if parked.moved_bytes:
            self.rates.copied(parked.moved_bytes, parked.moved_s)
            parked.moved_bytes, parked.moved_s = 0, 0.0

    def _forget(self, sample: Sample) -> None:
        assert sample.parked is not None
        if sample in self.leaving:
            self.leaving.remove(sample)
        n_bytes = sample.parked.n_bytes
        sample.parked = None
        self.stats.parked -= 1
        self.stats.parked_bytes -= n_bytes
        if self.below is not None:
            self.below.give_back(n_bytes)
