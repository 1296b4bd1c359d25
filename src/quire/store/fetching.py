"""The half of `store/tiering.py` that runs in the tiers' loop: where is what a request lacks, and let it come.

here      |1|1|1|0|0|0|0|        full attention: the first that is nowhere ends it
tiers           |1|1|1|.|
windows         |.|1|1|          what the furthest boundary needs, or a nearer one's; of a recurrent group its state
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from time import monotonic
from typing import TYPE_CHECKING

from quire.store.index import TOKEN_BYTES, chunk_name
from quire.store.tiers.contract import Block, Outcome
from quire.store.tiers.slots import buffer_of
from quire.store.tiers.stack import TierStack

if TYPE_CHECKING:
    import numpy as np

    from quire.store.sharing import Sharing

__all__ = ["Fetch", "Fetcher", "block_key"]

logger = logging.getLogger(__name__)

PART_BYTES = 64 << 20
"""Staged at a time for one request, where every group keeps everything; a window cannot be cut anywhere."""
AT_A_TIME = 4
"""Requests that are being loaded for."""
TRIED = 32
"""Boundaries that are tried for windows, from the furthest down."""


def block_key(name: bytes, place: bytes) -> bytes:
    """The name of one block of a chunk."""
    return sha256(name + place).digest()


@dataclass(eq=False)
class Fetch:
    """What one request lacks, and what has come of it.

    Args:
        names, chunks: of its chunks, from the first on.
        parents: what their names are made from, and one more for what comes behind them.
        rest: packed tokens behind the last of them.
        found: chunks that the device had when it was asked for.
        here: `[columns][chunks]`: whether the device has that block.
        asked_s: when somebody first had to wait for it; prefetched ones may lie in the queue for long.
        boundary: chunks that the request will find; settled when `done` is set.
        at: of them, those that are bound.
        data: (column, chunk) to the bytes that have come.
        partial: parent, tokens and bytes of a block that begins what comes next.
        permits: one while it stages bytes.
        more: the tiers have more than one part of the prefix.
        users: requests that wait for it.
        least: fewer tokens are of no use.
    """

    names: list[bytes]
    parents: list[bytes]
    chunks: list[bytes]
    rest: bytes
    found: int
    here: list[bytearray]
    asked_s: float = 0.0
    boundary: int = 0
    at: int = 0
    data: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    partial: tuple[bytes, bytes, list[np.ndarray]] | None = None
    done: threading.Event = field(default_factory=threading.Event)
    abandoned: bool = False
    bound: bool = False
    more: bool = False
    users: int = 1
    least: int = 0
    permits: list[None] = field(default_factory=list)
    bound_blocks: int = 0


class Fetcher:
    """Locates and loads for one prefix cache.

    Args:
        places: of each column, what tells its blocks from those of the others.
        sizes: of their blocks, in bytes.
        deadline_s: for the loads of one request.
        truncated: counts prefixes cut short, by reason.
        arrived: set when a fetch has come to its end.
    """

    def __init__(
        self,
        sharing: Sharing,
        stack: TierStack,
        places: list[bytes],
        sizes: list[int],
        deadline_s: float,
        truncated: Counter[str],
        arrived: threading.Event,
    ) -> None:
        self.sharing, self.stack, self.deadline_s = sharing, stack, deadline_s
        self.truncated, self.arrived = truncated, arrived
        self._places, self._bytes = places, sizes
        self._full = sorted(sharing.full_columns)
        self._permits = asyncio.Semaphore(AT_A_TIME)

    @property
    def free_permits(self) -> int:
        """Of `AT_A_TIME`."""
        return self._permits._value  # noqa: SLF001 - a count for whoever looks from outside

    async def run(self, fetch: Fetch) -> None:
        """One request's, from beginning to end. Never raises."""
        try:
            wanted = await self._locate(fetch)
            if wanted is None or fetch.abandoned:
                return
            if wanted:  # the part of a block alone stages next to nothing
                await self._permits.acquire()
                fetch.permits.append(None)
            if not fetch.abandoned:
                await self._load(fetch, wanted, monotonic() + self.deadline_s)
        except Exception:  # whatever it was: the request computes
            logger.exception("a fetch from the tiers broke")
            self.truncated["broken"] += 1
            fetch.boundary, fetch.partial = fetch.found, None
        finally:
            fetch.done.set()
            self.arrived.set()
            if fetch.abandoned:
                await self.give_permit(fetch)

    async def give_permit(self, fetch: Fetch) -> None:
        """Its staged bytes are gone."""
        with suppress(IndexError):
            fetch.permits.pop()
            self._permits.release()

    async def _locate(self, fetch: Fetch) -> dict[tuple[int, int], int] | None:
        """Where each block is that the request lacks, up to the furthest boundary; None where nothing is gained."""
        known: dict[tuple[int, int], int | None] = {}
        end = len(fetch.names)
        for c in self._full:
            lacking = [i for i in range(end) if not fetch.here[c][i]]
            await self._ask(fetch, [(c, i) for i in lacking], known)
            end = next((i for i in lacking if known[c, i] is None), end)
        boundary = await self._window_boundary(fetch, end, known)
        if boundary * self.sharing.grain < fetch.least:
            boundary = fetch.found
        wanted = {}
        if boundary > fetch.found:
            boundary = self._cut(fetch, boundary)
            everything = [(c, i) for i in range(boundary) for c in self._full]
            for c, i in [*everything, *self._needed(boundary)]:
                level = known.get((c, i))
                if not fetch.here[c][i] and level is not None:
                    wanted[c, i] = level
        fetch.boundary = boundary
        used = [(c, i) for i in range(boundary) for c in self._full] + self._needed(boundary)
        await self.stack.touch([block_key(fetch.names[i], self._places[c]) for c, i in used])
        return wanted or ({} if self.sharing.index.plain else None)

    async def _window_boundary(
        self, fetch: Fetch, end: int, known: dict[tuple[int, int], int | None]
    ) -> int:
        """The furthest boundary up to `end` whose needs every group has, here or in a tier."""
        candidates = list(range(end, fetch.found, -1))
        if self.sharing.states is not None:
            candidates = await self._with_states(fetch, candidates, known)
        for boundary in candidates[:TRIED]:
            needed = self._needed(boundary)
            await self._ask(
                fetch, [x for x in needed if x not in known and not fetch.here[x[0]][x[1]]], known
            )
            if all(fetch.here[c][i] or known[c, i] is not None for c, i in needed):
                return boundary
        return fetch.found

    async def _with_states(
        self, fetch: Fetch, boundaries: list[int], known: dict[tuple[int, int], int | None]
    ) -> list[int]:
        """Those behind which every recurrent group has a checkpoint, here or in a tier."""
        states, sharing = self.sharing.index.states, self.sharing
        assert sharing.states is not None
        total = len(fetch.names) * sharing.grain + len(fetch.rest) // TOKEN_BYTES
        worth = [b for b in boundaries if sharing.states.resumes(b * sharing.grain, total)]
        places = [(c, b - 1) for b in worth for c in states]
        await self._ask(fetch, [x for x in places if not fetch.here[x[0]][x[1]]], known)

        def there(c: int, i: int) -> bool:
            return bool(fetch.here[c][i]) or known[c, i] is not None

        return [b for b in worth if all(there(c, b - 1) for c in states)]

    def _cut(self, fetch: Fetch, boundary: int) -> int:
        """A nearer boundary, up to which the bytes fit one part."""
        if len(self._full) < len(self._places):
            return boundary
        room = PART_BYTES
        for i in range(boundary):
            room -= sum(n for n, here in zip(self._bytes, fetch.here, strict=True) if not here[i])
            if room < 0 and i > fetch.found:
                fetch.more = True
                return i
        return boundary

    def _needed(self, boundary: int) -> list[tuple[int, int]]:
        """(column, chunk) of what queries behind a boundary read in groups that do not keep everything."""
        sharing, out = self.sharing, []
        for c, (g, j) in enumerate(sharing.index.columns):
            if c not in self._full:
                per = sharing.index.per[g]
                entries = sharing.needed(g, boundary * sharing.grain)
                out += [(c, e // per) for e in entries if e % per == j]
        return out

    async def _ask(
        self, fetch: Fetch, asked: list[tuple[int, int]], known: dict[tuple[int, int], int | None]
    ) -> None:
        keys = [block_key(fetch.names[i], self._places[c]) for c, i in asked]
        known.update(zip(asked, await self.stack.locate(keys), strict=True))

    async def _load(
        self, fetch: Fetch, levels: dict[tuple[int, int], int], deadline: float
    ) -> None:
        """Loads, and settles the boundary by what has come."""
        asked = sorted(levels, key=lambda x: (x[1], x[0]))
        wanted = [
            Block(
                block_key(fetch.names[i], self._places[c]),
                fetch.parents[i],
                fetch.chunks[i],
                buffer_of(self._bytes[c]),
            )
            for c, i in asked
        ]
        out = await self.stack.load(wanted, [levels[x] for x in asked], deadline)
        reason = "miss"
        for x, block, outcome in zip(asked, wanted, out, strict=True):
            if outcome is Outcome.HIT:
                fetch.data[x] = block.data
            elif reason == "miss":
                reason = outcome.value
        boundary = self._boundary(fetch)
        if boundary < fetch.boundary:
            self.truncated[reason] += 1
        fetch.boundary = boundary
        await self._load_partial(fetch, deadline)

    def _boundary(self, fetch: Fetch) -> int:
        """The largest boundary behind which every group has what it needs."""

        def there(c: int, i: int) -> bool:
            return bool(fetch.here[c][i]) or (c, i) in fetch.data

        last = fetch.boundary
        end = next((i for i in range(last) if not all(there(c, i) for c in self._full)), last)
        for boundary in range(end, fetch.found, -1):
            if all(there(c, i) for c, i in self._needed(boundary)):
                return boundary
        return fetch.found

    async def _load_partial(self, fetch: Fetch, deadline: float) -> None:
        """The longest beginning of what comes next that a sequence left behind, where no codec needs blocks whole."""
        sharing, at = self.sharing, fetch.boundary
        if not sharing.index.plain:
            return
        parent, rest = fetch.parents[at], fetch.chunks[at] if at < len(fetch.chunks) else fetch.rest
        for n in range(min(len(rest) // TOKEN_BYTES, sharing.grain - 1), 0, -1):
            tokens = rest[: n * TOKEN_BYTES]
            name = chunk_name(parent, tokens)
            keys = [block_key(name, place) for place in self._places]
            found = await self.stack.locate(keys, far=False)  # each length is a question of its own
            levels = [x for x in found if x is not None]
            if len(levels) == len(keys):
                break
        else:
            return
        wanted = [
            Block(key, parent, tokens, buffer_of(size))
            for key, size in zip(keys, self._bytes, strict=True)
        ]
        out = await self.stack.load(wanted, levels, deadline)
        if all(o is Outcome.HIT for o in out):
            fetch.partial = parent, tokens, [w.data for w in wanted]
