"""A prefix cache over tiers: what a request lacks is brought up, what eviction drops goes down.

    device    |== found ==|                       the index: blocks under their names
    tiers                 |-- located --|         the same names; loaded, verified, then bound in the index
    request   |== found ==|== loaded ===| computed

A block's key is SHA-256 of its chunk's name and of its place in the chunk, so it follows from the tokens. What is
loaded ends, like every hit, at the largest boundary whose needs every group has, here or there. A block that is bad,
late or gone cuts the prefix short: the rest is computed, and counted by reason.

Bytes go up in parts of `PART_BYTES`, so that staging stays small; each part must lengthen the prefix, or none follows.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any

from quire import __version__
from quire.errors import CapacityError
from quire.store.fetching import Fetch, Fetcher, block_key
from quire.store.index import TOKEN_BYTES, chunk_name, packed
from quire.store.pace import Pace
from quire.store.tiers.contract import Block
from quire.store.tiers.moving import Mover
from quire.store.tiers.stack import TierStack
from quire.store.whole_tiers import WholeTiers

if TYPE_CHECKING:
    import numpy as np

    from quire.store.path import Path
    from quire.store.pool import BlockPool
    from quire.store.sharing import Sharing

__all__ = ["Tiering", "TieringStats"]

WRITE_BACK_USES = 3
"""Made, found, and found again: worth a disk's write."""
MOST_A_STEP = 256
"""Blocks written back in one step, whatever its time."""


@dataclass(slots=True)
class TieringStats:
    """Counters since the start.

    Args:
        fetches: requests for which tiers were asked.
        loaded_tokens, loaded_blocks: bound in the index.
        truncated: prefixes cut short, by reason: corrupt, timeout, error, miss, no room, abandoned.
        demoted_blocks: sent down when they were evicted; `written_back` when they were found again.
        dropped_blocks: evicted and not sent: no time in that step, or no room in the queue.
        bind_s, demote_s: spent in the engine's thread on copies; `worst_s`: most of one step, of those of swapped
            sequences too.
    """

    fetches: int = 0
    loaded_tokens: int = 0
    loaded_blocks: int = 0
    truncated: Counter[str] = field(default_factory=Counter)
    demoted_blocks: int = 0
    written_back: int = 0
    dropped_blocks: int = 0
    bind_s: float = 0.0
    demote_s: float = 0.0
    worst_s: float = 0.0


class Tiering:
    """One prefix cache's tiers; made once for a `Sharing`.

    Args:
        sharing: told of by its index when blocks go.
        stack: the tiers.
        deadline_s: that a request waits for its blocks, from when they are asked for.
        pace: the time that a step has for copies; default: one of its own.
    """

    def __init__(
        self,
        sharing: Sharing,
        stack: TierStack,
        deadline_s: float = 1.0,
        pace: Pace | None = None,
    ) -> None:
        self.sharing, self.stack, self.deadline_s = sharing, stack, deadline_s
        self.stats = TieringStats()
        self.arrived = threading.Event()
        """Set when a fetch has come to its end."""
        self.mover = Mover(sharing.store.arena)
        groups = sharing.store.spec.groups
        self._groups = [groups[g] for g, _ in sharing.index.columns]
        self._places = [f"/{groups[g].name}/{j}".encode() for g, j in sharing.index.columns]
        self._bytes = [g.block_bytes for g in self._groups]
        self.fetcher = Fetcher(
            sharing,
            stack,
            self._places,
            self._bytes,
            deadline_s,
            self.stats.truncated,
            self.arrived,
        )
        self._coming: dict[bytes, Fetch] = {}  # by the first chunk that it brings
        self.pace = pace or Pace()
        self._noted: dict[tuple[int, int], bytes] = {}
        self._owed: dict[tuple[int, int], bytes] = {}
        """(column, node) to the name: written back, or to be, and to be."""
        self._closed = False
        self._flushed = -1
        self.wholes = WholeTiers(self, __version__)
        sharing.tiering = self

    # -- a step --------------------------------------------------------------------------------------------------

    def begin_step(self, *, alone: bool = False) -> None:
        """See `Pace.begin_step`."""
        self.pace.begin_step(alone=alone)
        self.stats.worst_s = self.pace.worst_s

    def end_schedule(self) -> None:
        """What this step has given up goes on its way, and what is owed as far as there is time."""
        if self._owed:
            self.write_back()
        self.stack.kick()

    def wait(self, timeout_s: float) -> None:
        """Until some fetch has ended; for when there is nothing else to do."""
        self.arrived.wait(timeout_s)
        self.arrived.clear()

    # -- up ------------------------------------------------------------------------------------------------------

    def want(self, path: Path) -> Fetch | None:
        """Asks the tiers for what lies behind a prefix that was looked up; None where there is nothing to ask for."""
        sharing, grain = self.sharing, self.sharing.grain
        n = path.limit // grain
        if self._closed or not self.mover.there:
            return None
        width = grain * TOKEN_BYTES
        blob = packed(path.tokens[: path.limit])
        if path.found >= n:
            rest, index = blob[n * width :], sharing.index
            if not index.plain or not rest or index.nearest(path.parent(n), rest)[1]:
                return None
        names = path.ahead(n * grain)
        first = names[path.found] if path.found < n else b""
        coming = self._coming.get(first)
        if coming is not None:
            coming.users += 1
            return coming
        chunks = [blob[i * width : (i + 1) * width] for i in range(n)]
        index = sharing.index
        nodes = [index.find(name, chunk) for name, chunk in zip(names, chunks, strict=True)]
        here = [
            bytearray(node >= 0 and index.block(c, node) >= 0 for node in nodes)
            for c in range(len(self._places))
        ]
        fetch = Fetch(names, path.parents(names), chunks, blob[n * width :], path.found, here)
        fetch.least = sharing.least(path)
        if first:
            self._coming[first] = fetch
        self.stats.fetches += 1
        self.stack.start(self.fetcher.run(fetch))
        return fetch

    def ready(self, fetch: Fetch) -> bool:
        """Whether it has come to its end, or is to be waited for no longer."""
        if fetch.done.is_set() or fetch.abandoned:
            return True
        now = monotonic()
        fetch.asked_s = fetch.asked_s or now
        if now - fetch.asked_s > 3 * self.deadline_s + 1.0:
            self.stats.truncated["abandoned"] += 1
            fetch.abandoned = True
            self._finish(fetch)
            return True
        return False

    def abandon(self, fetch: Fetch) -> None:
        """One request less waits for it."""
        fetch.users -= 1
        if fetch.users:
            return
        fetch.abandoned = True
        self._finish(fetch)

    def bind(self, fetch: Fetch) -> bool:
        """Puts what has come into the index, as far as this step's time goes; whether all of it is there now.

        What was bound is cached like everything that nobody holds: the request takes it by looking again.
        """
        if fetch.abandoned or fetch.bound:
            return True
        began, first = monotonic(), fetch.at
        held: list[tuple[BlockPool, int]] = []
        try:
            self._hold_found(fetch, held)
            while fetch.at < fetch.boundary:
                if fetch.at > first and monotonic() - began > self.pace.left_s:
                    return False
                if not self._bind_chunk(fetch, fetch.at, held):
                    break
                fetch.at += 1
            else:
                self._bind_partial(fetch, held)
        finally:
            for pool, block in reversed(held):
                pool.release(block)
            self.pace.spent(monotonic() - began)
            self.stats.bind_s += monotonic() - began
        fetch.bound = True
        self.stats.loaded_tokens += max(0, fetch.at - fetch.found) * self.sharing.grain
        self._finish(fetch)
        return True

    def _finish(self, fetch: Fetch) -> None:
        if fetch.found < len(fetch.names):
            self._coming.pop(fetch.names[fetch.found], None)
        fetch.data.clear()
        fetch.partial = None
        if fetch.permits:
            self.stack.start(self.fetcher.give_permit(fetch))

    def _hold_found(self, fetch: Fetch, held: list[tuple[BlockPool, int]]) -> None:
        """Keeps what the request builds on from being evicted for what comes."""
        index = self.sharing.index
        for i in range(max(fetch.at, min(fetch.found, len(fetch.names)))):
            node = index.find(fetch.names[i], fetch.chunks[i])
            for c, pool in enumerate(index.pools if node >= 0 else ()):
                block = index.block(c, node)
                if block >= 0:
                    pool.hold(block)
                    held.append((pool, block))

    def _bind_chunk(self, fetch: Fetch, i: int, held: list[tuple[BlockPool, int]]) -> bool:
        blocks = {
            c: fetch.data.pop((c, i)) for c in range(len(self._places)) if (c, i) in fetch.data
        }
        return self._bind_node(
            fetch, fetch.names[i], fetch.parents[i], fetch.chunks[i], blocks, held
        )

    def _bind_partial(self, fetch: Fetch, held: list[tuple[BlockPool, int]]) -> None:
        if fetch.partial is not None:
            parent, tokens, data = fetch.partial
            self._bind_node(
                fetch, chunk_name(parent, tokens), parent, tokens, dict(enumerate(data)), held
            )

    def _bind_node(
        self,
        fetch: Fetch,
        name: bytes,
        parent: bytes,
        chunk: bytes,
        data: dict[int, np.ndarray],
        held: list[tuple[BlockPool, int]],
    ) -> bool:
        """A node with these blocks, held; False where there is no room for them, or the name is another's."""
        index = self.sharing.index
        taken: list[tuple[int, int]] = []
        node = index.find(name, chunk)
        for c, bytes_of in data.items():
            if node >= 0 and index.block(c, node) >= 0:
                continue  # computed meanwhile
            try:
                block = index.pools[c].take()
            except CapacityError:
                self.stats.truncated["no room"] += 1
                for other, mine in taken:
                    index.pools[other].release(mine)
                return False
            self.mover.write(index.pools[c], block, bytes_of)
            taken.append((c, block))
        node = index.add(name, parent, chunk) if taken else node
        for c, block in taken:
            if node < 0 or index.block(c, node) >= 0:
                index.pools[c].release(block)
                continue
            index.attach(c, node, block)
            held.append((index.pools[c], block))
            fetch.bound_blocks += 1
            self.stats.loaded_blocks += 1
        return node >= 0 or not data

    # -- down ----------------------------------------------------------------------------------------------------

    def evicted(self, node: int, column: int) -> None:
        """A block is about to be given up: its bytes go down, if this step has the time."""
        self._noted.pop((column, node), None)
        self._owed.pop((column, node), None)
        if self._closed or not self.mover.there:
            return
        if self.pace.left_s <= 0 or not self.stack.room(0, self._bytes[column]):
            self.stats.dropped_blocks += 1
            return
        began = monotonic()
        sent = self._send(node, column, 0)
        self.pace.spent(monotonic() - began)
        self.stats.demote_s += monotonic() - began
        self.stats.demoted_blocks += sent
        self.stats.dropped_blocks += not sent

    def found(self, column: int, node: int, block: int) -> None:
        """A block was found; from the second time on it is owed to a tier that lasts, once."""
        index = self.sharing.index
        if self.stack.lasting is None:
            return
        if index.pools[column].uses[block] < WRITE_BACK_USES or self._closed:
            return
        at, name = (column, node), index.name(node)
        if self._noted.get(at) != name and self.mover.there:
            self._noted[at] = self._owed[at] = name

    def write_back(self) -> None:
        """What is owed goes on its way, as far as this step's time and the queue go; the rest waits for the next.

        One block in every step that has time at all, so that this ends under any load.
        """
        index, level = self.sharing.index, self.stack.lasting
        if level is None or self.pace.left_s <= 0:
            return
        began = monotonic()
        for (column, node), name in list(islice(self._owed.items(), MOST_A_STEP)):
            if not self.stack.room(level, self._bytes[column]):
                break
            del self._owed[column, node]
            if index.named(name) == node and index.block(column, node) >= 0:
                self.stats.written_back += self._send(node, column, level)
            if self.pace.left_s <= 0:
                break
        self.pace.spent(monotonic() - began)

    def flush(self, timeout_s: float = 30.0) -> None:
        """Everything idle goes to the first tier that lasts, what would be evicted first first; waits for it.

        Nothing may be computed meanwhile. A second call writes nothing, if nothing became idle between.
        """
        level, clock = self.stack.lasting, self.sharing.store.arena.clock
        if self._closed or level is None or not self.mover.there or clock == self._flushed:
            return
        self._flushed = clock
        deadline, index = monotonic() + timeout_s, self.sharing.index
        for pool in dict.fromkeys(index.pools):
            for block in list(pool.idle()):
                if self.sharing.wholes.owns(pool, block):
                    continue  # it goes as a whole
                node, column = index.place(pool, block)
                while not self.stack.room(level, pool.block_bytes):
                    self.stack.kick()
                    if monotonic() > deadline or self.stack.levels[level].resting:
                        return
                    threading.Event().wait(0.002)
                self._send(node, column, level)
        self.wholes.flush(level, deadline)
        self.stack.drain(deadline)

    @property
    def usable(self) -> bool:
        """Whether there are bytes to move, and tiers to move them to."""
        return not self._closed and self.mover.there

    def close(self, timeout_s: float = 30.0) -> None:
        """Flushes, writes and closes. Idempotent."""
        if not self._closed:
            self.flush(timeout_s)
            self._closed = True
            self.stack.close(timeout_s)

    def secret(self) -> bytes | None:
        """Of the first tier that keeps one, one that is shared before all; None: names end with the process."""
        return self.stack.secret()

    def report(self) -> dict[str, Any]:
        """Counters as plain data."""
        stats = self.stats
        found = {name: getattr(stats, name) for name in TieringStats.__slots__}
        found["truncated"] = dict(stats.truncated)
        found["owed_blocks"] = len(self._owed)
        for name in ("bind_s", "demote_s", "worst_s"):
            found[name] = round(found[name], 6)
        levels = [level.report() for level in self.stack.levels]
        return {**found, "wholes": self.wholes.report(), "levels": levels}

    def _send(self, node: int, column: int, level: int) -> bool:
        index = self.sharing.index
        block, pool = index.block(column, node), index.pools[column]
        tokens = index.chunk(node)
        group = self._groups[column]
        n_tokens = min(len(tokens) // TOKEN_BYTES, group.block_tokens)
        data = self.mover.read(group, pool, block, n_tokens)
        place = self._places[column]
        above = index.parent_name(node)
        return self.stack.put(
            Block(block_key(index.name(node), place), block_key(above, place), tokens, data), level
        )
