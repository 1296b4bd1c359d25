"""A tier of somebody else, held to the promise: what it returns is verified by us before anybody sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from quire.store.tiers.contract import Block, Outcome, Tier, TierHealth
from quire.store.tiers.envelope import HEADER_BYTES, check, seal

__all__ = ["Checked"]


class Checked:
    """Stores a block's header before its data, and believes nothing that comes back without it.

    Args:
        inner: any tier; it sees blocks that are `HEADER_BYTES` longer.

    Cost: a copy of each block, each way.
    """

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.name = inner.name
        caps = inner.caps
        self.caps = replace(
            caps, max_block_bytes=caps.max_block_bytes - HEADER_BYTES, align_bytes=1
        )

    async def lookup(self, ns: bytes, keys: Sequence[bytes]) -> int:
        """See `Tier`."""
        return await self.inner.lookup(ns, keys)

    async def load(self, ns: bytes, wanted: Sequence[Block], *, deadline: float) -> list[Outcome]:
        """See `Tier`."""
        whole = [
            Block(w.key, w.parent, w.tokens, np.zeros(HEADER_BYTES + len(w.data), np.uint8))
            for w in wanted
        ]
        out = list(await self.inner.load(ns, whole, deadline=deadline))
        for at, (want, got) in enumerate(zip(wanted, whole, strict=True)):
            if out[at] is Outcome.HIT:
                data = got.data[HEADER_BYTES:]
                out[at] = check(ns, want, got.data[:HEADER_BYTES].tobytes(), data)
                if out[at] is Outcome.HIT:
                    np.copyto(want.data, data)
        bad = [w.key for w, o in zip(wanted, out, strict=True) if o is Outcome.CORRUPT]
        if bad:
            await self.inner.drop(ns, bad)
        return out

    async def store(self, ns: bytes, blocks: Sequence[Block], *, deadline: float) -> list[Outcome]:
        """See `Tier`."""
        whole = [
            Block(
                b.key,
                b.parent,
                b.tokens,
                np.concatenate([np.frombuffer(seal(ns, b), np.uint8), b.data]),
            )
            for b in blocks
        ]
        return await self.inner.store(ns, whole, deadline=deadline)

    async def touch(self, ns: bytes, keys: Sequence[bytes]) -> None:
        """See `Tier`."""
        await self.inner.touch(ns, keys)

    async def drop(self, ns: bytes, keys: Sequence[bytes]) -> None:
        """See `Tier`."""
        await self.inner.drop(ns, keys)

    async def health(self) -> TierHealth:
        """See `Tier`."""
        return await self.inner.health()

    async def close(self) -> None:
        """See `Tier`."""
        await self.inner.close()
