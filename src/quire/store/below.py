"""What running sequences have of the memory below the device's: a loan from the host tier, and the tiers themselves.

The prefix cache's blocks in the host tier give way to it: they can be computed again, and nobody waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from time import monotonic
from typing import TYPE_CHECKING, Any

from quire.store.arena import Arena
from quire.store.cold import Staging
from quire.store.pace import Pace
from quire.store.store import BlockStore
from quire.store.tiers.contract import Block, Outcome
from quire.store.tiers.host import HostTier
from quire.store.tiers.moving import Mover
from quire.store.tiers.recipe import TiersConfig
from quire.store.tiers.stack import TierStack

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Below"]

STORE_S = 30.0


class Below:
    """Room below one arena.

    Args:
        arena: of the sequences.
        stack: the tiers, of which the first may be host memory.
        config: what they may be used for.
        pace: the time that a step has for copies; default: one of its own.
    """

    def __init__(
        self, arena: Arena, stack: TierStack, config: TiersConfig, pace: Pace | None = None
    ) -> None:
        self.stack, self.config = stack, config
        self.pace = pace or Pace()
        self.mover = Mover(arena)
        first = stack.levels[0].tier
        self.host = first if isinstance(first, HostTier) else None
        self.used_bytes = 0
        levels = range(0 if self.host is None else 1, len(stack.levels))
        self.level = levels[0] if config.offload and levels else None
        """Of the stack, for what host memory has no room for."""
        self._staging: Staging | None = None

    def staging(self, store: BlockStore) -> Staging:
        """The frames of the arena that cold blocks are read in."""
        if self._staging is None:
            self._staging = Staging(store)
        return self._staging

    @property
    def capacity_bytes(self) -> int:
        """What live sequences may have at most; a disk keeps a tenth for its slots' headers and remainders."""
        behind = 0
        if self.level is not None:
            behind = sum(t.capacity_bytes for t in self.config.tiers[self.level : self.level + 1])
        host = 0 if self.host is None else self.host.capacity_bytes
        return host + behind * 9 // 10

    # -- the tier behind host memory -----------------------------------------------------------------------------

    def keep(self, names: Sequence[bytes], data: Sequence[np.ndarray]) -> bool:
        """Stores bytes in the tier behind host memory and waits; False, and nothing kept, where it lacks room."""
        assert self.level is not None
        blocks = [Block(n, n, b"", d) for n, d in zip(names, data, strict=True)]
        out = self.stack.ask(
            self.stack.store_at(self.level, blocks, monotonic() + STORE_S), 2 * STORE_S
        )
        if all(o is Outcome.STORED for o in out):
            return True
        self.forget(names)
        return False

    def fetch(self, block: Block, deadline: float) -> Future[Any]:
        """Fills a block from there; its outcome, in a list, later."""
        assert self.level is not None
        return self.stack.begin(self.stack.load([block], [self.level], deadline))

    def forget(self, names: Sequence[bytes]) -> None:
        """Drops what lies there under these names."""
        if self.level is not None:
            self.stack.start(self.stack.drop_at(self.level, names))

    # -- host memory ---------------------------------------------------------------------------------------------

    def borrow(self, n_bytes: int) -> bool:
        """Host memory for live sequences; False where there is not so much."""
        if self.host is None or not self.host.borrow(n_bytes):
            return False
        self.used_bytes += n_bytes
        self.stack.start(self.host.trim())
        return True

    def give_back(self, n_bytes: int) -> None:
        """Ends a loan, or a part of it."""
        if self.host is not None and n_bytes:
            self.host.give_back(n_bytes)
            self.used_bytes -= n_bytes
