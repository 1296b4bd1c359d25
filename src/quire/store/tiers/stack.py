"""Tiers one below the other, driven by an event loop in a thread of its own.

    engine's thread                      this thread
    fetch(keys) ──────────────────────>  where is it?  load, level by level, until the deadline
    fetch.done  <──────────────────────  verified bytes, or why not
    put(blocks) ── bounded queue ─────>  a writer per level; what the host gives up goes on to the next level

Nothing here makes the engine wait: what does not fit the queues is dropped and counted, a tier that keeps failing is
left alone for a while, and one that hangs is given up by whoever waits.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from quire.store.tiers.contract import Block, Outcome, Tier, TierHealth

__all__ = ["Level", "TierStack"]

logger = logging.getLogger(__name__)

QUEUE_BYTES = 64 << 20
"""Of blocks on their way down, per level."""
BATCH_BLOCKS, MOST_BLOCKS = 16, 64
"""Stored at a time; more where the tier wants more bytes together."""
STORE_S = 30.0
"""A batch of stores that takes longer is given up."""
GRACE_S = 0.25
"""How much later than its deadline a tier may answer."""
TRIES = 3
"""Failures in a row after which a tier is left alone."""
PAUSE_S = 2.0
"""For how long at first; doubled with each further failure, up to a minute."""


@dataclass
class Level:
    """One tier, its queue, and what it has done.

    Args:
        label: its name, with its number where two have the same.
        counts: blocks by outcome of loads (hit, miss, corrupt, timeout, error) and of stores (stored, rejected,
            store_timeout, store_error); dropped: that found no room in the queue, or a tier left alone.
    """

    tier: Tier
    label: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    loaded_bytes: int = 0
    stored_bytes: int = 0
    health: TierHealth = field(default_factory=lambda: TierHealth(ok=True))
    queue: deque[Block] = field(default_factory=deque)
    queued_bytes: int = 0
    failures: int = 0
    paused_until: float = 0.0

    @property
    def resting(self) -> bool:
        """Whether it has failed so often that it is left alone for now."""
        return monotonic() < self.paused_until

    def judge(self, *, well: bool) -> None:
        """After a call."""
        if well:
            self.failures = 0
            return
        self.failures += 1
        self.counts["failures"] += 1
        if self.failures >= TRIES:
            pause = min(60.0, PAUSE_S * 2 ** (self.failures - TRIES))
            self.paused_until = monotonic() + pause
            logger.warning(
                "tier %s failed %d times in a row; left alone for %g s",
                self.tier.name,
                self.failures,
                pause,
            )

    def report(self) -> dict[str, Any]:
        """As plain data."""
        loads = ("hit", "miss", "corrupt", "timeout", "error", "failures")
        stores = ("stored", "rejected", "dropped", "store_timeout", "store_error")
        return {
            "tier": self.label or self.tier.name,
            "ok": self.health.ok and not self.resting,
            "why": self.health.why,
            "blocks": self.health.blocks,
            "used_bytes": self.health.used_bytes,
            "capacity_bytes": self.health.capacity_bytes,
            "queued_bytes": self.queued_bytes,
            "loaded_bytes": self.loaded_bytes,
            "stored_bytes": self.stored_bytes,
            **{k: self.counts[k] for k in (*loads, *stores)},
        }


class TierStack:
    """Several tiers as one.

    Args:
        tiers: the fastest first.
        ns: 32 bytes that all names here belong to.
        queue_bytes: of blocks on their way down, per level.
    """

    def __init__(self, tiers: Sequence[Tier], ns: bytes, *, queue_bytes: int = QUEUE_BYTES) -> None:
        self.ns = ns
        self.queue_bytes = queue_bytes
        names = [t.name for t in tiers]
        self.levels = [
            Level(t, t.name if names.count(t.name) == 1 else f"{t.name}{i}")
            for i, t in enumerate(tiers)
        ]
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="quire-tiers", daemon=True)
        self._writers: list[asyncio.Task[None]] = []
        self._wake: list[asyncio.Event] = []
        self._unkicked = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False
        for at, level in enumerate(self.levels[:-1]):
            if hasattr(level.tier, "given_up"):
                level.tier.given_up = self._handing_on(at + 1)
        self._thread.start()
        self.ask(self._start())

    # -- from the engine's thread --------------------------------------------------------------------------------

    def ask(self, work: Coroutine[Any, Any, Any], timeout_s: float = 60.0) -> Any:
        """Runs a coroutine in the tiers' loop and waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def begin(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Runs a coroutine in the tiers' loop; its result, later."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs a coroutine in the tiers' loop; nobody waits."""
        self._loop.call_soon_threadsafe(self._keep, work)

    def put(self, block: Block, level: int = 0) -> bool:
        """Queues a block until `kick`; False where the queue is full, or the tier left alone: dropped, and counted."""
        at = self.levels[level]
        with self._lock:
            if self._closed or at.resting or at.queued_bytes + len(block.data) > self.queue_bytes:
                at.counts["dropped"] += 1
                return False
            at.queue.append(block)
            at.queued_bytes += len(block.data)
        self._unkicked = True
        return True

    def kick(self) -> None:
        """Lets the writers look at their queues: once a step, for each crossing costs the engine's thread its turn."""
        if self._unkicked and not self._closed:
            self._unkicked = False
            self._loop.call_soon_threadsafe(self._wake_all)

    def _wake_all(self) -> None:
        for wake in self._wake:
            wake.set()

    def room(self, level: int, n_bytes: int) -> bool:
        """Whether `put` would take so many bytes now."""
        at = self.levels[level]
        return not at.resting and at.queued_bytes + n_bytes <= self.queue_bytes

    @property
    def lasting(self) -> int | None:
        """The first level that outlives the process."""
        return next((i for i, at in enumerate(self.levels) if at.tier.caps.persistent), None)

    def secret(self) -> bytes | None:
        """What tenants' names depend on: of a tier that others share, so that they find the same; else of the first."""
        for at in sorted(self.levels, key=lambda at: not at.tier.caps.shared):
            keeps = getattr(at.tier, "secret", None)
            if keeps is not None:
                return bytes(keeps())
        return None

    @property
    def queued_bytes(self) -> int:
        """On their way, all levels together."""
        return sum(at.queued_bytes for at in self.levels)

    def drain(self, deadline: float) -> bool:
        """Waits until all queues are empty; whether they are."""
        self.kick()
        while self.queued_bytes and monotonic() < deadline:
            threading.Event().wait(0.005)
        return not self.queued_bytes

    def close(self, timeout_s: float = 30.0) -> None:
        """Writes what is queued, and what only memory holds to the first level that lasts; then closes. Idempotent."""
        if self._closed:
            return
        deadline = monotonic() + timeout_s
        self._hand_down(deadline)
        self.drain(deadline)
        with self._lock:
            self._closed = True
        try:
            self.ask(self._stop(), max(1.0, deadline - monotonic()) + 5.0)
        except (TimeoutError, asyncio.CancelledError):
            logger.warning("tiers did not close within %g s", timeout_s)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)

    def _hand_down(self, deadline: float) -> None:
        last = self.lasting
        for at in self.levels[:last] if last else []:
            held = getattr(at.tier, "oldest_first", None)
            for _, block in held() if held is not None and last is not None else []:
                while last is not None and not self.room(last, len(block.data)):
                    self.kick()
                    if monotonic() > deadline or self.levels[last].resting:
                        return
                    threading.Event().wait(0.002)
                if last is not None:
                    self.put(block, last)

    # -- in the tiers' loop --------------------------------------------------------------------------------------

    async def locate(self, keys: Sequence[bytes], *, far: bool = True) -> list[int | None]:
        """The level where each key is, as far as the tiers say; of remote ones a run from the first key on.

        Args:
            far: ask also those that a question costs a round trip.
        """
        out: list[int | None] = [None] * len(keys)
        for number, at in enumerate(self.levels):
            left = [i for i, found in enumerate(out) if found is None]
            if at.resting or not left or not (far or at.tier.caps.local):
                continue
            asked = [[i] for i in left] if at.tier.caps.local else [left]
            for run in asked:
                n = await self._lookup(at, [keys[i] for i in run])
                for i in run[:n]:
                    out[i] = number
        return out

    async def load(
        self, wanted: Sequence[Block], levels: Sequence[int], deadline: float
    ) -> list[Outcome]:
        """Fills the blocks from the levels where they are; what one level cannot give the next ones are asked for."""
        out = [Outcome.MISS] * len(wanted)
        for number, at in enumerate(self.levels):
            batch = [i for i, o in enumerate(out) if o is not Outcome.HIT and levels[i] <= number]
            if not batch or at.resting:
                continue
            found = await self._load(at, [wanted[i] for i in batch], deadline)
            for i, outcome in zip(batch, found, strict=True):
                if levels[i] == number or outcome is not Outcome.MISS:
                    at.counts[outcome.value] += 1
                    out[i] = outcome
                if outcome is Outcome.HIT:
                    at.loaded_bytes += len(wanted[i].data)
            bad = at.counts["corrupt"]
            if Outcome.CORRUPT in found and not bad & (bad - 1):  # the first, and each doubling
                logger.warning(
                    "tier %s: %d corrupt blocks so far; they are computed", at.label, bad
                )
        return out

    async def store_at(self, level: int, blocks: Sequence[Block], deadline: float) -> list[Outcome]:
        """Stores in one level, past its queue, for who waits for it."""
        at = self.levels[level]
        call = at.tier.store(self.ns, blocks, deadline=deadline)
        found = await self._guard(at, call, deadline - monotonic() + GRACE_S)
        self._count(at, list(blocks), found)
        return [found] * len(blocks) if isinstance(found, Outcome) else list(found)

    async def drop_at(self, level: int, keys: Sequence[bytes]) -> None:
        """Forgets what one level has under these names."""
        at = self.levels[level]
        await self._guard(at, at.tier.drop(self.ns, keys), 1.0)

    async def touch(self, keys: Sequence[bytes]) -> None:
        """A prefix was of use."""
        for at in self.levels:
            if not at.resting:
                await self._guard(at, at.tier.touch(self.ns, keys), 1.0)

    async def _lookup(self, at: Level, keys: list[bytes]) -> int:
        n = await self._guard(at, at.tier.lookup(self.ns, keys), 1.0)
        if not isinstance(n, int):
            return 0
        if not at.health.ok:  # it answers again
            self._keep(self._look_after(at))
        return n

    async def _load(self, at: Level, wanted: list[Block], deadline: float) -> list[Outcome]:
        left = deadline - monotonic()
        if left <= 0:
            return [Outcome.TIMEOUT] * len(wanted)
        call = at.tier.load(self.ns, wanted, deadline=deadline)
        found = await self._guard(at, call, left + GRACE_S)
        if isinstance(found, Outcome):
            return [found] * len(wanted)
        if len(found) != len(wanted):
            return [Outcome.ERROR] * len(wanted)
        at.judge(well=not {Outcome.TIMEOUT, Outcome.ERROR} & set(found))
        return list(found)

    async def _guard(self, at: Level, call: Awaitable[Any], limit_s: float) -> Any:
        """What a tier answers; TIMEOUT or ERROR where it does not."""
        try:
            return await asyncio.wait_for(call, limit_s)
        except TimeoutError:
            at.judge(well=False)
            return Outcome.TIMEOUT
        except Exception as e:  # noqa: BLE001 - whatever a tier raises: it cannot give the block
            logger.warning("tier %s: %s", at.tier.name, e)
            at.judge(well=False)
            return Outcome.ERROR

    async def _start(self) -> None:
        self._wake = [asyncio.Event() for _ in self.levels]
        self._writers = [
            asyncio.create_task(self._write(number)) for number in range(len(self.levels))
        ]
        for at in self.levels:
            await self._look_after(at)

    async def _stop(self) -> None:
        for writer in self._writers:
            writer.cancel()
        for at in self.levels:
            await self._guard(at, at.tier.close(), 30.0)

    async def _write(self, number: int) -> None:
        """Empties one level's queue, for as long as it lives."""
        at, wake = self.levels[number], self._wake[number]
        while True:
            await wake.wait()
            wake.clear()
            while at.queue:
                batch = self._batch(at)
                n_bytes = sum(len(b.data) for b in batch)
                if at.resting:
                    at.counts["dropped"] += len(batch)
                else:
                    call = at.tier.store(self.ns, batch, deadline=monotonic() + STORE_S)
                    found = await self._guard(at, call, STORE_S + GRACE_S)
                    self._count(at, batch, found)
                with self._lock:  # only now: what is on its way counts
                    for _ in batch:
                        at.queue.popleft()
                    at.queued_bytes -= n_bytes
            await self._look_after(at)

    def _batch(self, at: Level) -> list[Block]:
        """What is stored next."""
        batch: list[Block] = []
        n_bytes, wanted = 0, at.tier.caps.batch_bytes
        with self._lock:
            for block in at.queue:
                if len(batch) >= (BATCH_BLOCKS if n_bytes >= wanted else MOST_BLOCKS):
                    break
                batch.append(block)
                n_bytes += len(block.data)
        return batch

    def _count(self, at: Level, batch: list[Block], found: Any) -> None:
        if isinstance(found, Outcome) or len(found) != len(batch):
            found = [found if isinstance(found, Outcome) else Outcome.ERROR] * len(batch)
        else:
            at.judge(well=not {Outcome.TIMEOUT, Outcome.ERROR} & set(found))
        for block, outcome in zip(batch, found, strict=True):
            failed = outcome in (Outcome.TIMEOUT, Outcome.ERROR)
            at.counts[f"store_{outcome.value}" if failed else outcome.value] += 1
            if outcome is Outcome.STORED:
                at.stored_bytes += len(block.data)

    async def _look_after(self, at: Level) -> None:
        health = await self._guard(at, at.tier.health(), 1.0)
        at.health = (
            health if isinstance(health, TierHealth) else TierHealth(ok=False, why="no answer")
        )

    def _handing_on(self, level: int) -> Callable[[bytes, Block], None]:
        """What the host calls with what it gives up."""

        def hand_on(ns: bytes, block: Block) -> None:
            if ns == self.ns and self.put(block, level):
                self._wake[level].set()

        return hand_on

    def _keep(self, work: Coroutine[Any, Any, Any]) -> None:
        """Holds a task until it ends, which the loop does not."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
