"""How a block's bytes travel and lie: behind a header that says whose they are, with checksums over both.

    0        8       16      24     56    88     120       ...      4064      4096
    |magic   |form   |sizes  | ns   | key |parent| tokens  | zeros   | header's | data ...
                                                                      checksum

A header names the namespace, the block, its tokens and its data's checksum, so that a block in a foreign place, or a
half-written one, is recognised for what it is. The checksum is XXH3 where the package `xxhash` is installed (37 GB/s
where SHA-256 gives 0.9), else SHA-256; each header says which, and one that cannot be computed here is a miss.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.store.tiers.contract import Block, Outcome

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "ALGORITHM",
    "HEADER_BYTES",
    "Header",
    "check",
    "checksum",
    "lengthen",
    "read_header",
    "seal",
    "shorten",
    "whole",
]

MAGIC = b"QUIRETR\x01"
FORMAT = 1
HEADER_BYTES = 4096
SUM_BYTES = 16
_FIXED = struct.Struct("<8sHHIQQI32s32s32s32s16s")
"""magic, format, algorithm, tokens, data bytes, sequence, reserved, ns, key, parent, tokens' digest, data's sum."""
_SUM_AT = HEADER_BYTES - SUM_BYTES
INLINE_TOKENS = (_SUM_AT - _FIXED.size) // 4
"""Longer chunks are known by their digest alone."""


def _sha256(*parts: Any) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.digest()[:SUM_BYTES]


def _sums() -> dict[int, Callable[..., bytes]]:
    sums: dict[int, Callable[..., bytes]] = {1: _sha256}
    try:
        import xxhash
    except ImportError:
        return sums

    def xxh3(*parts: Any) -> bytes:
        found = xxhash.xxh3_128()
        for part in parts:
            found.update(part)
        return bytes(found.digest())

    sums[2] = xxh3
    return sums


_SUMS = _sums()
ALGORITHM = max(_SUMS)
"""What is written here: 1 is SHA-256, cut to 128 bits, 2 is XXH3 of 128 bits."""


def checksum(*parts: Any) -> bytes:
    """16 bytes over these bytes, by the best algorithm that is here."""
    return _SUMS[ALGORITHM](*parts)


@dataclass(frozen=True)
class Header:
    """What a header says; it was whole.

    Args:
        sequence: of two slots with one name the one with the higher number is newer.
        tokens: packed; b"" where they were too many to be kept.
    """

    ns: bytes
    key: bytes
    parent: bytes
    sequence: int
    n_tokens: int
    tokens: bytes
    tokens_digest: bytes
    data_bytes: int
    data_sum: bytes
    algorithm: int


def seal(ns: bytes, block: Block, sequence: int = 0) -> bytes:
    """The header of a block. Cost: its data once through the checksum."""
    n_tokens = len(block.tokens) // 4
    head = bytearray(HEADER_BYTES)
    _FIXED.pack_into(
        head,
        0,
        MAGIC,
        FORMAT,
        ALGORITHM,
        n_tokens,
        len(block.data),
        sequence,
        0,
        ns,
        block.key,
        block.parent,
        hashlib.sha256(block.tokens).digest(),
        checksum(block.data.data),
    )
    if n_tokens <= INLINE_TOKENS:
        head[_FIXED.size : _FIXED.size + len(block.tokens)] = block.tokens
    head[_SUM_AT:] = checksum(memoryview(head)[:_SUM_AT])
    return bytes(head)


def shorten(head: bytes) -> bytes:
    """A header without the zeros that fill its page, for where pages mean nothing."""
    body = head[:_SUM_AT].rstrip(b"\0")
    return len(body).to_bytes(2, "little") + body + head[_SUM_AT:]


def lengthen(data: memoryview) -> tuple[bytes, memoryview]:
    """The header that `shorten` made shorter, and what lies behind it; of other bytes, something that is no header."""
    n = int.from_bytes(data[:2], "little")
    end = 2 + n + SUM_BYTES
    head = bytes(data[2 : 2 + n]).ljust(_SUM_AT, b"\0") + bytes(data[2 + n : end])
    return head, data[end:]


def read_header(head: bytes | memoryview) -> Header | None:
    """What the header says, or None where it is none, is damaged, or is of another version."""
    if len(head) != HEADER_BYTES:
        return None
    head = bytes(head)
    magic, form, algorithm, n_tokens, data_bytes, sequence, _, ns, key, parent, digest, total = (
        _FIXED.unpack_from(head)
    )
    if magic != MAGIC or form != FORMAT or algorithm not in _SUMS:
        return None
    if _SUMS[algorithm](head[:_SUM_AT]) != head[_SUM_AT:]:
        return None
    kept = n_tokens if n_tokens <= INLINE_TOKENS else 0
    tokens = head[_FIXED.size : _FIXED.size + 4 * kept]
    return Header(ns, key, parent, sequence, n_tokens, tokens, digest, data_bytes, total, algorithm)


def whole(header: Header, data: np.ndarray) -> bool:
    """Whether the data is what the header says, whoever asks."""
    return (
        header.data_bytes == len(data)
        and _SUMS[header.algorithm](data.data) == header.data_sum
        and (
            len(header.tokens) != 4 * header.n_tokens
            or hashlib.sha256(header.tokens).digest() == header.tokens_digest
        )
    )


def check(ns: bytes, wanted: Block, head: bytes | memoryview, data: np.ndarray) -> Outcome:
    """HIT where header and data are what was stored under that name for these tokens; else CORRUPT.

    Args:
        wanted: key and tokens that are asked for.
        head: `HEADER_BYTES` as they were read.
        data: `[n] uint8` as it was read.
    """
    found = read_header(head)
    if (
        found is None
        or found.ns != ns
        or found.key != wanted.key
        or found.n_tokens * 4 != len(wanted.tokens)
        or found.tokens_digest != hashlib.sha256(wanted.tokens).digest()
        or (found.tokens and found.tokens != wanted.tokens)
        or not whole(found, data)
    ):
        return Outcome.CORRUPT
    return Outcome.HIT
