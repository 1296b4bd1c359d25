"""Segment files of fixed slots: where blocks lie on a disk. Knows places and bytes, not what is worth keeping.

    DIR/quire-tier.json     format, written once
    DIR/lock                held by the one process that writes
    DIR/0000106496-00000003.seg        slots of 106,496 bytes: |header 4096|data, padded to 4096| ...

Slots are written in place, whole, with one system call. Nothing else says what is in them: an index is made by reading
headers, and a slot that was half-written when the process died has a checksum that does not fit.

`O_DIRECT` where the file system has it, else through the page cache. Memory for it is aligned to pages.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from quire.errors import ConfigError
from quire.store.tiers.envelope import HEADER_BYTES

__all__ = ["Segment", "SlotFiles", "buffer_of", "in_pages", "slot_bytes_for"]

FORMAT = 1
PAGE = 4096
SEGMENT_BYTES = 1 << 30
MARK = "quire-tier.json"


def slot_bytes_for(data_bytes: int) -> int:
    """A slot that holds so many bytes behind their header."""
    return HEADER_BYTES + -(-data_bytes // PAGE) * PAGE


def buffer_of(n_bytes: int) -> np.ndarray:
    """`[n_bytes] uint8` that begins at a page, as direct reads and writes want it; what it holds is not defined.

    From the allocator: a mapping for each would meet the system's limit of 65,530 with 8 GiB of small blocks.
    """
    whole = np.empty(n_bytes + PAGE - 1, np.uint8)
    start = -whole.ctypes.data % PAGE
    return whole[start : start + n_bytes]


def in_pages(data: np.ndarray) -> bool:
    """Whether it begins and ends with a page, so that it needs no other buffer."""
    return len(data) % PAGE == 0 and data.ctypes.data % PAGE == 0


class Segment:
    """One file of slots, open for reading and writing."""

    def __init__(self, path: Path, slot_bytes: int, slots: int, *, direct: bool) -> None:
        self.path, self.slot_bytes, self.slots = path, slot_bytes, slots
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self.direct = False
        if direct and hasattr(os, "O_DIRECT"):
            with suppress(OSError):
                self.fd = os.open(path, flags | os.O_DIRECT, 0o600)
                self.direct = True
        if not self.direct:
            self.fd = os.open(path, flags, 0o600)

    def read(self, slot: int, *into: np.ndarray) -> int:
        """Reads the slot's first bytes into page-aligned buffers; returns how many there were."""
        return os.preadv(self.fd, [x.data for x in into], slot * self.slot_bytes)

    def write(self, slot: int, *buffers: np.ndarray) -> None:
        """Writes a slot from page-aligned buffers with one call. Raises OSError."""
        done = os.pwritev(self.fd, [x.data for x in buffers], slot * self.slot_bytes)
        if done != sum(map(len, buffers)):
            raise OSError(f"{done} bytes written to {self.path.name}, which is not all")

    def sync(self) -> None:
        """Until the disk has what was written."""
        os.fdatasync(self.fd)

    def close(self) -> None:
        """Closes the file."""
        os.close(self.fd)


class SlotFiles:
    """The segment files of one folder, which one process at a time has.

    Args:
        folder: made where it is missing, readable by its owner alone.
        direct: past the page cache, where the file system lets us.
        segment_bytes: of a new file, about.
        make: False: it must be there already.

    Raises:
        ConfigError: another process has it, it holds something else, or it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        direct: bool = True,
        segment_bytes: int = SEGMENT_BYTES,
        make: bool = True,
    ) -> None:
        self.folder, self.direct, self.segment_bytes = folder, direct, segment_bytes
        self.segments: dict[int, Segment] = {}
        self._lock_fd = -1
        try:
            if make:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            elif not (folder / MARK).is_file():
                raise ConfigError(f"{folder} is no disk tier: it has no {MARK}")
            self._lock()
            self._check_mark()
            for path in sorted(folder.glob("*.seg")):
                self._open(path)
        except OSError as e:
            self.close()
            raise ConfigError(
                f"{folder}: {e.strerror or e}; name a folder that this process may write to"
            ) from e
        except ConfigError:
            self.close()
            raise

    @property
    def file_bytes(self) -> int:
        """Of all segments."""
        return sum(s.slots * s.slot_bytes for s in self.segments.values())

    def grow(self, slot_bytes: int, most_bytes: int) -> int:
        """A new segment of at most so many bytes; its number. Raises OSError where the disk has no room."""
        slots = max(1, min(self.segment_bytes, most_bytes) // slot_bytes)
        number = max(self.segments, default=-1) + 1
        path = self.folder / f"{slot_bytes:010d}-{number:08d}.seg"
        made = Segment(path, slot_bytes, slots, direct=self.direct)
        try:
            os.posix_fallocate(made.fd, 0, slots * slot_bytes)
        except OSError:
            made.close()
            path.unlink(missing_ok=True)
            raise
        self.segments[number] = made
        return number

    def remove(self, number: int) -> None:
        """Deletes a segment's file."""
        gone = self.segments.pop(number)
        gone.close()
        gone.path.unlink(missing_ok=True)

    def headers(self, number: int) -> Iterator[tuple[int, bytes]]:
        """(slot, `HEADER_BYTES`) of every slot that was ever written."""
        segment, buffer = self.segments[number], buffer_of(HEADER_BYTES)
        for slot in range(segment.slots):
            try:
                n = segment.read(slot, buffer)
            except OSError:
                continue
            if n == HEADER_BYTES and buffer[0]:
                yield slot, buffer.tobytes()

    def secret(self) -> bytes:
        """32 random bytes, made once, for its owner alone to read. Raises ConfigError."""
        path = self.folder / "secret"
        try:
            if not path.exists():
                half = path.with_suffix(".part")
                half.touch(0o600)
                half.write_bytes(secrets.token_bytes(32))
                half.replace(path)
            found = path.read_bytes()
        except OSError as e:
            raise ConfigError(f"{path}: {e.strerror or e}") from e
        if len(found) != 32:
            raise ConfigError(f"{path} is damaged; delete it, and the blocks of before are misses")
        return found

    def sync(self) -> None:
        """All segments."""
        for segment in list(self.segments.values()):
            segment.sync()

    def close(self) -> None:
        """Closes the files and lets the next process in. Idempotent."""
        for segment in self.segments.values():
            segment.close()
        self.segments = {}
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # -- within --------------------------------------------------------------------------------------------------

    def _lock(self) -> None:
        self._lock_fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ConfigError(
                f"{self.folder} is in use by another process; end it, or name another folder"
            ) from e

    def _check_mark(self) -> None:
        mark = self.folder / MARK
        half = mark.with_suffix(".part")
        if not mark.exists():
            if any(p.name not in ("lock", half.name) for p in self.folder.iterdir()):
                raise ConfigError(
                    f"{self.folder} holds files that are not a tier's; name an empty folder"
                )
            half.write_text(json.dumps({"format": FORMAT}))
            half.replace(mark)
            return
        try:
            form = json.loads(mark.read_text())["format"]
        except (ValueError, KeyError, TypeError) as e:
            raise ConfigError(f"{mark} is damaged; name another folder, or empty this one") from e
        if form != FORMAT:
            raise ConfigError(
                f"{self.folder} has format {form}, this version reads {FORMAT}; name another folder"
            )

    def _open(self, path: Path) -> None:
        width, _, number = path.stem.partition("-")
        if not (width.isdecimal() and number.isdecimal()):
            return
        slot_bytes = int(width)
        if slot_bytes < 2 * PAGE or slot_bytes % PAGE:
            return
        slots = path.stat().st_size // slot_bytes  # a truncated file has fewer
        self.segments[int(number)] = Segment(path, slot_bytes, slots, direct=self.direct)
