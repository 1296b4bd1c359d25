"""A folder as a tier: blocks in slots of segment files, found again after a restart by their headers.

    lookup   the index, in memory: (ns, key) -> segment, slot
    load     header and data with one read each block, in threads; checked; what does not fit is dropped
    store    header and data with one write; the longest unused leaf of the same size makes room

What is promised: a block that `load` gives is what was stored under that name. What is not: that a block stays. After
`kill -9` everything written is there but what was being written; after a power failure perhaps not what was written
since the last `fdatasync`, which comes after each batch with sync="batch" and at the end with sync="close".
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Literal, TypeVar

import numpy as np

from quire.errors import ConfigError
from quire.store.tiers.contract import Block, Outcome, TierCaps, TierHealth
from quire.store.tiers.envelope import HEADER_BYTES, Header, check, read_header, seal
from quire.store.tiers.order import Order
from quire.store.tiers.slots import (
    PAGE,
    SEGMENT_BYTES,
    Segment,
    SlotFiles,
    buffer_of,
    in_pages,
    slot_bytes_for,
)

__all__ = ["DiskTier"]

T = TypeVar("T")
Place = tuple[int, int]
"""(segment, slot)."""
THREADS = 4
"""System calls at a time."""


_THREAD = threading.local()


def _spare(n_bytes: int) -> np.ndarray:
    """A page-aligned buffer of this thread's, good until it asks again: fresh pages cost more than a copy."""
    kept = vars(_THREAD)
    found: np.ndarray | None = kept.get(f"of_{n_bytes}")
    if found is None:
        found = kept[f"of_{n_bytes}"] = buffer_of(n_bytes)
    return found


class DiskTier:
    """Blocks in files.

    Args:
        folder: its own; one process at a time.
        capacity_bytes: of segment files together.
        sync: when the disk must have what was written, see the module's text.
        direct: past the page cache, where the file system lets us.
        segment_bytes: of a file; at most an eighth of the capacity is taken at a time.

    Raises:
        ConfigError: no capacity, or the folder cannot be used.

    Cost: making the index reads a page a slot.
    """

    name = "disk"

    def __init__(
        self,
        folder: str | Path,
        capacity_bytes: int,
        *,
        sync: Literal["batch", "close"] = "close",
        direct: bool = True,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        if capacity_bytes < 2 * PAGE:
            raise ConfigError(f"a disk tier of {capacity_bytes} bytes holds nothing; give it more")
        self.caps = TierCaps(
            persistent=True, max_block_bytes=capacity_bytes - HEADER_BYTES - PAGE, align_bytes=PAGE
        )
        self.capacity_bytes, self.sync = capacity_bytes, sync
        self.files = SlotFiles(
            Path(folder),
            direct=direct,
            segment_bytes=max(2 * PAGE, min(segment_bytes, capacity_bytes // 8)),
        )
        self.used_bytes = 0
        self.bad_slots = 0
        """Slots whose header or data did not fit, since the start."""
        self._order: dict[int, Order[Place]] = {}  # by slot size
        self._size: dict[tuple[bytes, bytes], int] = {}
        self._free: dict[int, list[Place]] = {}
        self._busy: dict[Place, int] = {}  # slots that are being read or written
        self._sequence = 0
        self._why = ""
        self._closed = False
        self._growing = asyncio.Lock()
        self._threads = ThreadPoolExecutor(THREADS, "quire-disk")
        self._scan()

    def secret(self) -> bytes:
        """32 bytes that belong to the folder: what names depend on that others must not guess."""
        return self.files.secret()

    # -- asked ---------------------------------------------------------------------------------------------------

    async def lookup(self, ns: bytes, keys: Sequence[bytes]) -> int:
        """See `Tier`."""
        size = self._size
        return next((i for i, key in enumerate(keys) if (ns, key) not in size), len(keys))

    async def load(self, ns: bytes, wanted: Sequence[Block], *, deadline: float) -> list[Outcome]:
        """See `Tier`."""
        out = list(await asyncio.gather(*(self._load(ns, want, deadline) for want in wanted)))
        await self.touch(ns, [w.key for w, o in zip(wanted, out, strict=True) if o is Outcome.HIT])
        return out

    async def store(self, ns: bytes, blocks: Sequence[Block], *, deadline: float) -> list[Outcome]:
        """See `Tier`."""
        out = list(await asyncio.gather(*(self._store(ns, block, deadline) for block in blocks)))
        if self.sync == "batch" and Outcome.STORED in out:
            await self._thread(self.files.sync)
        return out

    async def touch(self, ns: bytes, keys: Sequence[bytes]) -> None:
        """See `Tier`."""
        for order in self._order.values():
            order.touch(ns, keys)

    async def drop(self, ns: bytes, keys: Sequence[bytes]) -> None:
        """See `Tier`."""
        for key in keys:
            self._forget((ns, key))

    async def health(self) -> TierHealth:
        """See `Tier`."""
        return TierHealth(
            not self._why, len(self._size), self.used_bytes, self.capacity_bytes, self._why
        )

    async def close(self) -> None:
        """See `Tier`."""
        if not self._closed:
            self._closed = True
            await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)
            try:
                self.files.sync()
            except OSError as e:
                self._why = str(e)
            self.files.close()

    # -- one block -----------------------------------------------------------------------------------------------

    async def _load(self, ns: bytes, want: Block, deadline: float) -> Outcome:
        name = ns, want.key
        place = self._place(name)
        if place is None:
            return Outcome.MISS
        segment = self.files.segments[place[0]]
        if slot_bytes_for(len(want.data)) != segment.slot_bytes:
            return Outcome.CORRUPT
        self._busy[place] = self._busy.get(place, 0) + 1
        job = self._submit(self._read, ns, want, segment, place[1], deadline)
        job.add_done_callback(lambda done: self._read_done(done, place))
        try:
            found = await asyncio.wait_for(asyncio.shield(job), max(0.0, deadline - monotonic()))
        except TimeoutError:
            return Outcome.TIMEOUT
        except OSError as e:
            self._why = str(e)
            found = Outcome.ERROR
        if found is Outcome.CORRUPT:
            self.bad_slots += 1
        if found in (Outcome.CORRUPT, Outcome.ERROR) and self._place(name) == place:
            self._forget(name)
        return found

    @staticmethod
    def _read(ns: bytes, want: Block, segment: Segment, slot: int, deadline: float) -> Outcome:
        if monotonic() > deadline:
            return Outcome.TIMEOUT
        if in_pages(want.data):  # straight to where it is wanted
            head, data = _spare(HEADER_BYTES), want.data
            n = segment.read(slot, head, data)
        else:
            buffer = _spare(segment.slot_bytes)
            n = segment.read(slot, buffer)
            head, data = buffer[:HEADER_BYTES], buffer[HEADER_BYTES : HEADER_BYTES + len(want.data)]
        if n < HEADER_BYTES + len(data):
            return Outcome.CORRUPT
        found = check(ns, want, head.tobytes(), data)
        if found is Outcome.HIT and data is not want.data:
            np.copyto(want.data, data)
        return found

    async def _store(self, ns: bytes, block: Block, deadline: float) -> Outcome:
        name = ns, block.key
        if name in self._size:
            return Outcome.STORED
        if len(block.data) > self.caps.max_block_bytes or self._closed:
            return Outcome.REJECTED
        if monotonic() > deadline:
            return Outcome.TIMEOUT
        slot_bytes = slot_bytes_for(len(block.data))
        place = await self._room(slot_bytes)
        if place is None:
            return Outcome.REJECTED
        self._sequence += 1
        self._busy[place] = 1
        job = self._submit(
            self._write, ns, block, self.files.segments[place[0]], place[1], self._sequence
        )
        try:
            await (
                job
            )  # a slot that is being written is nobody's until it is, however long that takes
        except OSError as e:
            self._why = str(e)
            self._settled(place)
            self._free.setdefault(slot_bytes, []).append(place)
            return Outcome.ERROR
        self._settled(place)
        self._why = ""
        self._enter(name, block.parent, slot_bytes, place)
        return Outcome.STORED

    @staticmethod
    def _write(ns: bytes, block: Block, segment: Segment, slot: int, sequence: int) -> None:
        sealed = np.frombuffer(seal(ns, block, sequence), np.uint8)
        if in_pages(block.data):
            head = _spare(HEADER_BYTES)
            head[:] = sealed
            segment.write(slot, head, block.data)
            return
        buffer, end = _spare(segment.slot_bytes), HEADER_BYTES + len(block.data)
        buffer[:HEADER_BYTES], buffer[HEADER_BYTES:end], buffer[end:] = sealed, block.data, 0
        segment.write(slot, buffer)

    # -- places --------------------------------------------------------------------------------------------------

    async def _room(self, slot_bytes: int) -> Place | None:
        """A slot to write to: free, of a new segment, or of the block of that size that was used longest ago."""
        free = self._free.setdefault(slot_bytes, [])
        async with self._growing:
            if not free:
                await self._grow(slot_bytes, free)
        order = self._order.get(slot_bytes)
        while not free and order:
            name = order.oldest()
            if name is None:
                break
            self._forget(name)
            if not free:  # it is being read: its slot comes later
                return None
        return free.pop() if free else None

    async def _grow(self, slot_bytes: int, free: list[Place]) -> None:
        left = self.capacity_bytes - self.files.file_bytes
        if left < slot_bytes and not self._order.get(slot_bytes):
            left += self._clear_one()
        if left < slot_bytes:
            return
        try:
            number = await self._thread(partial(self.files.grow, slot_bytes, left))
        except OSError as e:
            self._why = str(e)
            return
        free.extend((number, slot) for slot in reversed(range(self.files.segments[number].slots)))

    def _clear_one(self) -> int:
        """Deletes a segment of another size, the one that is used least; how many bytes that gives."""
        used: dict[int, int] = dict.fromkeys(self.files.segments, 0)
        names: dict[int, list[tuple[bytes, bytes]]] = {n: [] for n in used}
        for order in self._order.values():
            for age, name in enumerate(order):
                place = order.get(name)
                if place is not None:
                    used[place[0]] += age
                    names[place[0]].append(name)
        busy = {number for number, _ in self._busy}
        number = min((n for n in used if n not in busy), key=used.__getitem__, default=None)
        if number is None:
            return 0
        segment = self.files.segments[number]
        for name in names[number]:
            self._forget(name)
        free = self._free.get(segment.slot_bytes, [])
        free[:] = [place for place in free if place[0] != number]
        self.files.remove(number)
        return segment.slots * segment.slot_bytes

    def _place(self, name: tuple[bytes, bytes]) -> Place | None:
        size = self._size.get(name)
        return None if size is None else self._order[size].get(name)

    def _enter(
        self, name: tuple[bytes, bytes], parent: bytes, slot_bytes: int, place: Place
    ) -> None:
        if name in self._size:  # another wrote it meanwhile
            self._free.setdefault(slot_bytes, []).append(place)
            return
        self._order.setdefault(slot_bytes, Order()).put(name, parent, place)
        self._size[name] = slot_bytes
        self.used_bytes += slot_bytes

    def _forget(self, name: tuple[bytes, bytes]) -> None:
        size = self._size.pop(name, None)
        if size is None:
            return
        place = self._order[size].pop(name)
        self.used_bytes -= size
        if place is not None:
            if self._busy.get(place):
                self._busy[place] = -abs(self._busy[place])  # free once its readers are done
            else:
                self._free.setdefault(size, []).append(place)

    def _read_done(self, job: asyncio.Future[Outcome], place: Place) -> None:
        """However long it took: nobody may be waiting any more."""
        if not job.cancelled():
            job.exception()
        self._settled(place)

    def _settled(self, place: Place) -> None:
        """One reader or writer less."""
        n = self._busy.get(place, 0)
        left = n - 1 if n > 0 else n + 1
        if left:
            self._busy[place] = left
            return
        self._busy.pop(place, None)
        if n < 0 and place[0] in self.files.segments:
            self._free.setdefault(self.files.segments[place[0]].slot_bytes, []).append(place)

    # -- within --------------------------------------------------------------------------------------------------

    def _submit(self, call: Callable[..., T], *args: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, call, *args)

    async def _thread(self, call: Callable[[], T]) -> T:
        return await self._submit(call)

    def _scan(self) -> None:
        """Makes the index from the headers, older blocks first."""
        found: list[tuple[int, Header, int, Place]] = []
        numbers = list(self.files.segments)
        read = self._threads.map(lambda n: list(self.files.headers(n)), numbers)
        for number, heads in zip(numbers, read, strict=True):
            segment, written = self.files.segments[number], {}
            for slot, head in heads:
                header = read_header(head)
                if header is None or slot_bytes_for(header.data_bytes) != segment.slot_bytes:
                    self.bad_slots += 1
                    continue
                written[slot] = header
                found.append((header.sequence, header, segment.slot_bytes, (number, slot)))
            self._free.setdefault(segment.slot_bytes, []).extend(
                (number, slot) for slot in reversed(range(segment.slots)) if slot not in written
            )
        found.sort(key=lambda entry: -entry[0])
        kept = []
        seen: set[tuple[bytes, bytes]] = set()
        for entry in found:  # the newest of each name
            name = entry[1].ns, entry[1].key
            if name in seen:
                self._free[entry[2]].append(entry[3])
            else:
                seen.add(name)
                kept.append(entry)
        for sequence, header, slot_bytes, place in reversed(kept):
            self._enter((header.ns, header.key), header.parent, slot_bytes, place)
            self._sequence = max(self._sequence, sequence)
