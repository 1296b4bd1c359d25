"""How blocks lie in a Redis server: names, segments, and what is said of them. Plain functions; `redis.py` asks.

quire:1:NS:s:ID     hash, a segment: KEY -> header and data of a block, or a part of a large one
quire:1:NS:b:KEY    where a block lies: (ID, bytes, blocks) of each segment that has a part of it
quire:1:lru         sorted set: NS ID bytes blocks -> when that segment was last of use
quire:1:used        hash: bytes and blocks of them all
quire:1:secret      32 random bytes: what tenants' names depend on, the same for all who share the server
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from quire.store.tiers.contract import Block, Outcome
from quire.store.tiers.envelope import HEADER_BYTES, check, lengthen, seal, shorten

__all__ = [
    "BATCH_BYTES",
    "LRU",
    "PART",
    "SECRET",
    "SEGMENT_BYTES",
    "USED",
    "Pointer",
    "batches",
    "block_name",
    "contents_of",
    "count",
    "divide",
    "part_of",
    "segment_name",
    "unpack",
    "use",
]

SEGMENT_BYTES = 4 << 20
"""Of one value's blocks at most; a larger block is divided."""
BATCH_BYTES = 1 << 20
"""Of small blocks, so many together make a segment."""
ENTRY_BYTES = 256
"""What the server keeps for a block beside its bytes, about."""
ROOT = b"quire:1:"
LRU, USED, SECRET = ROOT + b"lru", ROOT + b"used", ROOT + b"secret"
PART = struct.Struct("<16sIH")
"""Segment, its bytes, its blocks."""

Pointer = list[bytes]
"""Packed `PART`s of a block, in the order of its bytes."""


def _home(ns: bytes) -> bytes:
    return ROOT + ns[:16].hex().encode()


def segment_name(ns: bytes, part: bytes) -> bytes:
    """Of the segment that a packed `PART` is about."""
    return _home(ns) + b":s:" + part[:16]


def block_name(ns: bytes, key: bytes) -> bytes:
    """Under which is said where a block lies."""
    return _home(ns) + b":b:" + key


def contents_of(ns: bytes, blocks: Sequence[Block]) -> list[dict[bytes, bytes]]:
    """Segments for blocks that lie together in one, or for one block, in as many as it needs.

    Cost: a checksum and two copies.
    """
    sealed = [shorten(seal(ns, b)) + b.data.tobytes() for b in blocks]
    if len(blocks) > 1:
        return [{b.key: value for b, value in zip(blocks, sealed, strict=True)}]
    key, whole = blocks[0].key, sealed[0]
    return [{key: whole[at : at + SEGMENT_BYTES]} for at in range(0, len(whole), SEGMENT_BYTES)]


def part_of(ns: bytes, number: int, content: dict[bytes, bytes]) -> bytes:
    """What is said of a segment wherever it is named; who stores the same stores it under the same name."""
    digest = sha256(ns + number.to_bytes(4, "little") + b"".join(content)).digest()[:16]
    n_bytes = sum(map(len, content.values())) + ENTRY_BYTES * len(content)
    return PART.pack(digest, n_bytes, len(content) if number == 0 else 0)


def divide(value: object) -> Pointer:
    """What is said of a block's place; [] of none, and of what makes no sense."""
    if not isinstance(value, bytes) or not value or len(value) % PART.size:
        return []
    return [value[at : at + PART.size] for at in range(0, len(value), PART.size)]


def count(pipe: Any, part: bytes, sign: int) -> None:
    """A segment more, or less."""
    _, n_bytes, blocks = PART.unpack(part)
    pipe.hincrby(USED, "bytes", sign * n_bytes)
    pipe.hincrby(USED, "blocks", sign * blocks)


def use(pipe: Any, ns: bytes, parts: Sequence[bytes], *, new: bool = False) -> None:
    """These segments are of use now; the first of them, of a prefix the root's, the longest."""
    now = time.time()
    for at, part in enumerate(parts):
        pipe.zadd(LRU, {ns + part: now - 1e-6 * at}, xx=not new)


def batches(chosen: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Blocks that lie together: as many as a segment holds; a larger one alone."""
    batch: list[int] = []
    room = 0
    for i in chosen:
        size = sizes[i] + HEADER_BYTES
        if batch and size > room:
            yield batch
            batch = []
        if not batch:
            room = SEGMENT_BYTES
        batch.append(i)
        room -= size
    if batch:
        yield batch


def unpack(ns: bytes, want: Block, values: Sequence[bytes | None]) -> Outcome:
    """Puts what came into the block, if it is what was stored."""
    pieces = [value for value in values if isinstance(value, bytes)]
    if len(pieces) < len(values):
        return Outcome.MISS
    head, rest = lengthen(memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces)))
    data = np.frombuffer(rest, np.uint8)
    found = check(ns, want, head, data) if len(data) == len(want.data) else Outcome.CORRUPT
    if found is Outcome.HIT:
        np.copyto(want.data, data)
    return found
