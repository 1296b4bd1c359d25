"""Looking through a disk tier's folder: every slot read whole and verified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.errors import ConfigError
from quire.store.tiers.envelope import HEADER_BYTES, read_header, whole
from quire.store.tiers.slots import Segment, SlotFiles, buffer_of

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Fsck", "fsck"]


@dataclass
class Fsck:
    """What was found.

    Args:
        files, slots: looked through; `empty` were never written, `good` hold a block.
        bad: (file, slot, why) of the others.
        dropped: of the bad ones, emptied.
        good_bytes: of the good blocks' data.
        namespaces: blocks of each, by the first 8 bytes in hex.
    """

    files: int = 0
    slots: int = 0
    empty: int = 0
    good: int = 0
    bad: list[tuple[str, int, str]] = field(default_factory=list)
    dropped: int = 0
    good_bytes: int = 0
    namespaces: dict[str, int] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As plain data."""
        found = dict(vars(self))
        found["bad"] = [{"file": f, "slot": s, "why": why} for f, s, why in self.bad]
        return found


def fsck(
    folder: str | Path, *, drop: bool = False, seen: Callable[[int, int], None] | None = None
) -> Fsck:
    """Verifies every slot.

    Args:
        folder: a disk tier's, which nobody is using.
        drop: empty the bad slots; they would be misses anyway.
        seen: told how many slots were looked at, of how many.

    Raises:
        ConfigError: no such folder, no tier, or one in use.

    Cost: every byte of it, once.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}")
    files = SlotFiles(folder, make=False)
    found = Fsck(files=len(files.segments))
    total = sum(s.slots for s in files.segments.values())
    try:
        for segment in files.segments.values():
            buffer = buffer_of(segment.slot_bytes)
            rest = segment.path.stat().st_size % segment.slot_bytes
            if rest:
                found.bad.append((segment.path.name, segment.slots, f"cut off after {rest} bytes"))
            for slot in range(segment.slots):
                _look(segment, slot, buffer, found, drop=drop)
                if seen is not None:
                    seen(found.slots, total)
        if drop:
            files.sync()
    finally:
        files.close()
    return found


def _look(segment: Segment, slot: int, buffer: np.ndarray, found: Fsck, *, drop: bool) -> None:
    found.slots += 1
    why = ""
    try:
        n = segment.read(slot, buffer)
    except OSError as e:
        n, why = 0, f"cannot be read: {e.strerror or e}"
    header = read_header(buffer[:HEADER_BYTES].tobytes()) if n >= HEADER_BYTES else None
    if not why and header is None:
        if n >= HEADER_BYTES and not buffer[:HEADER_BYTES].any():
            found.empty += 1
            return
        why = "its header is damaged"
    elif header is not None:
        data = buffer[HEADER_BYTES : min(n, HEADER_BYTES + header.data_bytes)]
        if whole(header, data):
            found.good += 1
            found.good_bytes += len(data)
            ns = header.ns[:8].hex()
            found.namespaces[ns] = found.namespaces.get(ns, 0) + 1
            return
        why = "its data does not match its header"
    found.bad.append((segment.path.name, slot, why))
    if drop:
        buffer[:] = 0
        segment.write(slot, buffer)
        found.dropped += 1
