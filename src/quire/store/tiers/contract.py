"""What a tier is: memory below the device's, in which blocks lie under their names as bytes.

    key     32 bytes: the block's name, SHA-256 over everything that its bytes depend on
    ns      32 bytes: digest of the weights and the layout; of another one nothing is ever a hit
    block   what is stored: key, the key before it, the tokens, and the bytes

A tier may lose blocks, refuse them, be slow or be gone. What it may not do is answer with other bytes than those that
were stored under that name: **a bad block is a miss, never an answer**. `load` therefore verifies (`envelope.check`),
and what third parties write is verified once more by whoever asks them (`checked.Checked`).

All calls are coroutines of one event loop, which is not the engine's; a call that blocks belongs into a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Block", "Outcome", "Tier", "TierCaps", "TierHealth"]


class Outcome(Enum):
    """What became of one block.

    Loads: HIT (verified, in its buffer), MISS (not there), CORRUPT (there, and not what was stored), TIMEOUT, ERROR.
    Stores: STORED (or there already), REJECTED (no room, or not wanted), TIMEOUT, ERROR.
    """

    HIT = "hit"
    MISS = "miss"
    CORRUPT = "corrupt"
    TIMEOUT = "timeout"
    ERROR = "error"
    STORED = "stored"
    REJECTED = "rejected"


@dataclass(frozen=True)
class TierCaps:
    """What a tier can do.

    Args:
        persistent: its blocks outlive the process.
        shared: other processes see them, too.
        local: asking whether a block is there costs microseconds, not a round trip.
        max_block_bytes: of one block; larger ones are rejected.
        align_bytes: buffers that begin at multiples of it are filled without a copy.
        batch_bytes: it likes to be given so many together, however small the blocks are.
    """

    persistent: bool = False
    shared: bool = False
    local: bool = True
    max_block_bytes: int = 1 << 40
    align_bytes: int = 1
    batch_bytes: int = 0


@dataclass(frozen=True)
class TierHealth:
    """How a tier is.

    Args:
        ok: it answers.
        blocks, used_bytes, capacity_bytes: of what it holds; capacity 0: unknown.
        why: one line, where it is not well.
    """

    ok: bool
    blocks: int = 0
    used_bytes: int = 0
    capacity_bytes: int = 0
    why: str = ""


@dataclass(frozen=True)
class Block:
    """A block on its way.

    Args:
        key: its name, 32 bytes.
        parent: the name of the block before it in its chain; need not be there.
        tokens: packed token ids of its chunk, 4 bytes each.
        data: `[block_bytes] uint8`. Not to be changed by anybody any more.
    """

    key: bytes
    parent: bytes
    tokens: bytes
    data: np.ndarray


@runtime_checkable
class Tier(Protocol):
    """See the module's text. `deadline` is a reading of `time.monotonic()`; what is not done by then is a TIMEOUT."""

    name: str
    caps: TierCaps

    async def lookup(self, ns: bytes, keys: Sequence[bytes]) -> int:
        """How many of the first keys are there, in a row. Advisory: `load` decides."""
        ...

    async def load(self, ns: bytes, wanted: Sequence[Block], *, deadline: float) -> list[Outcome]:
        """Fills `data` of each wanted block, of which key, tokens and size are given, with verified bytes.

        What is not a HIT may have been written to in part.
        """
        ...

    async def store(self, ns: bytes, blocks: Sequence[Block], *, deadline: float) -> list[Outcome]:
        """Keeps them: `data` will not change. Others may give way: least recently used first, leaves before roots."""
        ...

    async def touch(self, ns: bytes, keys: Sequence[bytes]) -> None:
        """The blocks of a prefix, root first, were of use: they stay longer, the root the longest."""
        ...

    async def drop(self, ns: bytes, keys: Sequence[bytes]) -> None:
        """Forgets them."""
        ...

    async def health(self) -> TierHealth:
        """Now."""
        ...

    async def close(self) -> None:
        """Finishes what it has taken. Nothing is asked of it afterwards."""
        ...
