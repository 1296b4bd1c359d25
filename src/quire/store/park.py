"""A sequence whose blocks lie in host memory for a while, bit for bit: how a preempted one is swapped out and back in.

    chain     |####|####|....|##..|      held, GONE behind a window, partly filled; private, shared or named
    host      |####|####|    |##..|      a copy of what was held; lengths, keeper and compacted rows stay with the table
    chain     |####|####|....|##..|      blocks of its own again, or those that the prefix cache still has

Nothing is encoded, decoded or computed on the way: raw tails, codes, recurrent states and rows that a policy has
compacted come back as they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quire.errors import CapacityError, InvariantError
from quire.store.chain import GONE
from quire.store.index import TOKEN_BYTES, packed

if TYPE_CHECKING:
    from quire.store.table import BlockTable
    from quire.store.tiers.moving import Mover

__all__ = ["Parked"]


class Parked:
    """A table without its blocks, made by copying them out and giving them back.

    Args:
        table: its last tokens may be reserved and not computed: they are forgotten.
        mover: of the table's arena.

    Cost: each held block is read once; on the way back written once.
    """

    def __init__(self, table: BlockTable, mover: Mover) -> None:
        self.table, self.mover = table, mover
        table.unreserve()
        self._own: list[list[tuple[int, int]]] | None = None  # (row of bytes, block) to be filled
        self._filled = False
        self._copy()
        if table.path is not None:
            table.path.withdraw()
        self._give_back()

    def _copy(self) -> None:
        """What is held now, as it is now."""
        chains = self.table.chains
        self._held = [np.flatnonzero(c.ids[: c.count] != GONE) for c in chains]
        self._bytes = [
            self.mover.space(len(held), c.group.block_bytes)
            for held, c in zip(self._held, chains, strict=True)
        ]
        self.n_bytes = sum(b.nbytes for b in self._bytes)
        for chain, held, rows in zip(chains, self._held, self._bytes, strict=True):
            for row, entry in enumerate(held):
                self.mover.read_into(chain.pool, int(chain.ids[entry]), rows[row])

    def take(self) -> None:
        """Blocks for everything that was held, without their bytes yet. Raises CapacityError; nothing changes then."""
        if self._own is not None:
            raise InvariantError("a parked table takes its blocks once")
        own: list[list[tuple[int, int]]] = [[] for _ in self.table.chains]
        try:
            for at, (chain, held) in enumerate(zip(self.table.chains, self._held, strict=True)):
                for row, entry in enumerate(held):
                    block = self._cached(at, int(entry))
                    if block < 0:
                        block = chain.pool.take()
                        own[at].append((row, block))
                    chain.ids[entry] = block
                    chain.held += 1
        except CapacityError:
            self._give_back()
            raise
        self._own = own

    def leave(self) -> None:
        """Gives the blocks back once more, after all; a policy may have compacted them meanwhile."""
        self.table.unreserve()
        if self._filled:
            self._copy()
        self._own, self._filled = None, False
        self._give_back()

    def fill(self) -> None:
        """Writes the bytes into the blocks that were taken: the table is as it was. Idempotent."""
        if self._own is None:
            raise InvariantError("a parked table takes blocks before they are filled")
        for chain, rows, own in zip(self.table.chains, self._bytes, self._own, strict=True):
            for row, block in own:
                self.mover.write(chain.pool, block, rows[row])
            own.clear()
        if self.table.path is not None and not self._filled:
            self.table.path.done = 0  # what was evicted meanwhile is named anew by the next commit
        self._filled = True

    def drop(self) -> None:
        """The sequence is over, or computed anew: its table ends without leaving anything."""
        self.table.leave()
        self.table.release()

    def _cached(self, at: int, entry: int) -> int:
        """The block that the prefix cache still has for an entry, held once more; -1 where it has none."""
        path = self.table.path
        if path is None:
            return -1
        sharing = path.sharing
        per = sharing.grain // self.table.chains[at].group.block_tokens
        chunk, j = divmod(entry, per)
        if chunk >= min(path.done, len(path.names) - 1):
            return -1
        tokens = packed(path.tokens[chunk * sharing.grain : (chunk + 1) * sharing.grain])
        node = sharing.index.find(path.names[chunk + 1], tokens)
        if node < 0 or len(tokens) < sharing.grain * TOKEN_BYTES:
            return -1
        block = sharing.index.block(sharing.index.columns.index((at, j)), node)
        if block >= 0:
            pool = self.table.chains[at].pool
            pool.hold(block)
            pool.found(block)
        return block

    def _give_back(self) -> None:
        """Every block that the chains hold, later ones first."""
        for chain in self.table.chains:
            for entry in range(chain.count - 1, -1, -1):
                block = int(chain.ids[entry])
                if block != GONE:
                    chain.ids[entry] = GONE
                    chain.pool.release(block)
            chain.held = 0
