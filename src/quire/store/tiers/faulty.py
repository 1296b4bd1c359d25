"""A tier with faults, for tests of tiers and of whatever stands on them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from time import monotonic

import numpy as np

from quire.store.tiers.contract import Block, Outcome, Tier, TierHealth

__all__ = ["FaultyTier"]


class FaultyTier:
    """Passes everything on, and spoils some of it. It lies: what it spoils it still calls a HIT.

    Args:
        inner: the tier that it stands before.
        flip: share of loaded blocks in which one bit is turned.
        swap: share of loads in which two blocks get each other's bytes.
        cut: share of loaded blocks of which the second half never came.
        fail: share of calls that raise OSError.
        bytes_per_s: no faster than this; 0: as fast as it goes.
        full: stores are rejected.
        seed: of the choice.
    """

    def __init__(
        self,
        inner: Tier,
        *,
        flip: float = 0.0,
        swap: float = 0.0,
        cut: float = 0.0,
        fail: float = 0.0,
        bytes_per_s: float = 0.0,
        full: bool = False,
        seed: int = 0,
    ) -> None:
        self.inner, self.name, self.caps = inner, inner.name, inner.caps
        self.flip, self.swap, self.cut, self.fail = flip, swap, cut, fail
        self.bytes_per_s, self.full = bytes_per_s, full
        self.spoilt = 0
        """Blocks that were made wrong, and calls that failed."""
        self._draw = random.Random(seed)
        self._free_at = 0.0

    async def lookup(self, ns: bytes, keys: Sequence[bytes]) -> int:
        """See `Tier`."""
        self._maybe_fail()
        return await self.inner.lookup(ns, keys)

    async def load(self, ns: bytes, wanted: Sequence[Block], *, deadline: float) -> list[Outcome]:
        """See `Tier`."""
        self._maybe_fail()
        slow = await self._wait(wanted, deadline)
        out = list(await self.inner.load(ns, wanted[:slow], deadline=self._extended(deadline)))
        hits = [w for w, o in zip(wanted, out, strict=False) if o is Outcome.HIT]
        for want in hits:
            if self._hits(self.flip):
                bit = self._draw.randrange(8 * len(want.data))
                want.data[bit // 8] ^= 1 << bit % 8
            if self._hits(self.cut):
                want.data[len(want.data) // 2 :] = 0
        if len(hits) > 1 and len(hits[0].data) == len(hits[1].data) and self._hits(self.swap):
            hold = hits[0].data.copy()
            np.copyto(hits[0].data, hits[1].data)
            np.copyto(hits[1].data, hold)
        return out + [Outcome.TIMEOUT] * (len(wanted) - slow)

    async def store(self, ns: bytes, blocks: Sequence[Block], *, deadline: float) -> list[Outcome]:
        """See `Tier`."""
        self._maybe_fail()
        if self.full:
            return [Outcome.REJECTED] * len(blocks)
        slow = await self._wait(blocks, deadline)
        out = list(await self.inner.store(ns, blocks[:slow], deadline=self._extended(deadline)))
        return out + [Outcome.TIMEOUT] * (len(blocks) - slow)

    async def touch(self, ns: bytes, keys: Sequence[bytes]) -> None:
        """See `Tier`."""
        await self.inner.touch(ns, keys)

    async def drop(self, ns: bytes, keys: Sequence[bytes]) -> None:
        """See `Tier`."""
        await self.inner.drop(ns, keys)

    async def health(self) -> TierHealth:
        """See `Tier`."""
        self._maybe_fail()
        return await self.inner.health()

    async def close(self) -> None:
        """See `Tier`."""
        await self.inner.close()

    def _hits(self, share: float) -> bool:
        hit = share > 0 and self._draw.random() < share
        self.spoilt += hit
        return hit

    def _maybe_fail(self) -> None:
        if self._hits(self.fail):
            raise OSError("a fault that was asked for")

    def _extended(self, deadline: float) -> float:
        """For what has come through the line in time."""
        return deadline + 1.0 if self.bytes_per_s else deadline

    async def _wait(self, blocks: Sequence[Block], deadline: float) -> int:
        """Takes as long as a slow line would; how many blocks got through before the deadline."""
        if not self.bytes_per_s:
            return len(blocks)
        for at, block in enumerate(blocks):
            self._free_at = max(self._free_at, monotonic()) + len(block.data) / self.bytes_per_s
            if self._free_at > deadline:
                self._free_at = deadline
                await asyncio.sleep(max(0.0, deadline - monotonic()))
                return at
            await asyncio.sleep(max(0.0, self._free_at - monotonic()))
        return len(blocks)
