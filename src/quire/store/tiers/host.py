"""Host memory as a tier: a budget of bytes, of which the longest unused leaf goes first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import monotonic

import numpy as np

from quire.errors import ConfigError
from quire.store.tiers.contract import Block, Outcome, TierCaps, TierHealth
from quire.store.tiers.envelope import HEADER_BYTES, check, seal
from quire.store.tiers.order import Order

__all__ = ["HostTier"]


class HostTier:
    """Blocks in this process's memory.

    Args:
        capacity_bytes: of blocks and their headers together.

    Blocks are kept as they are given, without a copy. Raises ConfigError where there is no capacity.
    """

    name = "host"

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes < 1:
            raise ConfigError(f"a host tier of {capacity_bytes} bytes holds nothing; give it more")
        self.caps = TierCaps(max_block_bytes=capacity_bytes - HEADER_BYTES)
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.borrowed_bytes = 0
        """Of the capacity, what live sequences have for themselves."""
        self._lock = threading.Lock()
        self.given_up: Callable[[bytes, Block], None] | None = None
        """Told of what makes room for others, before it is forgotten."""
        self._order: Order[tuple[bytes, Block]] = Order()

    async def lookup(self, ns: bytes, keys: Sequence[bytes]) -> int:
        """See `Tier`."""
        return self._order.leading(ns, keys)

    async def load(self, ns: bytes, wanted: Sequence[Block], *, deadline: float) -> list[Outcome]:
        """See `Tier`."""
        out = []
        for want in wanted:
            found = self._order.get((ns, want.key))
            if found is None:
                out.append(Outcome.MISS)
            elif monotonic() > deadline:
                out.append(Outcome.TIMEOUT)
            elif len(found[1].data) != len(want.data):
                out.append(Outcome.CORRUPT)
            else:
                np.copyto(want.data, found[1].data)
                out.append(check(ns, want, found[0], want.data))
        await self.drop(
            ns, [w.key for w, o in zip(wanted, out, strict=True) if o is Outcome.CORRUPT]
        )
        self._order.touch(ns, [w.key for w, o in zip(wanted, out, strict=True) if o is Outcome.HIT])
        return out

    async def store(self, ns: bytes, blocks: Sequence[Block], *, deadline: float) -> list[Outcome]:
        """See `Tier`."""
        out = []
        for block in blocks:
            if (ns, block.key) in self._order:
                out.append(Outcome.STORED)
            elif len(block.data) > self.caps.max_block_bytes - self.borrowed_bytes:
                out.append(Outcome.REJECTED)
            elif monotonic() > deadline:
                out.append(Outcome.TIMEOUT)
            else:
                self._make_room(HEADER_BYTES + len(block.data))
                self._order.put((ns, block.key), block.parent, (seal(ns, block), block))
                self.used_bytes += HEADER_BYTES + len(block.data)
                out.append(Outcome.STORED)
        return out

    async def touch(self, ns: bytes, keys: Sequence[bytes]) -> None:
        """See `Tier`."""
        self._order.touch(ns, keys)

    async def drop(self, ns: bytes, keys: Sequence[bytes]) -> None:
        """See `Tier`."""
        for key in keys:
            self._forget((ns, key))

    async def health(self) -> TierHealth:
        """See `Tier`."""
        return TierHealth(
            ok=True,
            blocks=len(self._order),
            used_bytes=self.used_bytes,
            capacity_bytes=self.capacity_bytes,
        )

    async def close(self) -> None:
        """See `Tier`; what it holds is gone with it."""
        self._order = Order()
        self.used_bytes = 0

    def borrow(self, n_bytes: int) -> bool:
        """Takes a part of the capacity for something else, from any thread; False where so much is not left.

        Cached blocks give way: at once where `trim` is called, at the next store otherwise.
        """
        with self._lock:
            if self.borrowed_bytes + n_bytes > self.capacity_bytes:
                return False
            self.borrowed_bytes += n_bytes
            return True

    def give_back(self, n_bytes: int) -> None:
        """Ends a loan, or a part of it; from any thread."""
        with self._lock:
            self.borrowed_bytes -= n_bytes

    async def trim(self) -> None:
        """Gives up what lies in borrowed room."""
        self._make_room(0)

    def oldest_first(self) -> list[tuple[bytes, Block]]:
        """(ns, block) of everything, what was used longest ago first."""
        return [(ns, found[1]) for ns, key in self._order if (found := self._order.get((ns, key)))]

    # -- within --------------------------------------------------------------------------------------------------

    def _make_room(self, n_bytes: int) -> None:
        while self.used_bytes + n_bytes > self.capacity_bytes - self.borrowed_bytes:
            name = self._order.oldest()
            if name is None:
                return
            found = self._forget(name)
            if self.given_up is not None and found is not None:
                self.given_up(name[0], found)

    def _forget(self, name: tuple[bytes, bytes]) -> Block | None:
        found = self._order.pop(name)
        if found is None:
            return None
        self.used_bytes -= HEADER_BYTES + len(found[1].data)
        return found[1]
