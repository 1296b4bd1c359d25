"""What running sequences have of the memory below the device's: a loan from the host tier, and the tiers themselves.

The prefix cache's blocks in the host tier give way to it: they can be computed again, and nobody waits for them.
"""

from __future__ import annotations

from quire.store.arena import Arena
from quire.store.tiers.host import HostTier
from quire.store.tiers.moving import Mover
from quire.store.tiers.recipe import TiersConfig
from quire.store.tiers.stack import TierStack

__all__ = ["Below"]


class Below:
    """Room below one arena.

    Args:
        arena: of the sequences.
        stack: the tiers, of which the first may be host memory.
        config: what they may be used for.
    """

    def __init__(self, arena: Arena, stack: TierStack, config: TiersConfig) -> None:
        self.stack, self.config = stack, config
        self.mover = Mover(arena)
        first = stack.levels[0].tier
        self.host = first if isinstance(first, HostTier) else None
        self.used_bytes = 0

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
