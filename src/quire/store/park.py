"""A sequence whose blocks lie in host memory for a while, bit for bit: how a preempted one is swapped out and back in.

    chain     |####|####|....|##..|      held, GONE behind a window, partly filled; private, shared or named
    out       |####|####|    |    |      the last ones first, each copied and then given back: a few in each step
    host      |####|####|    |##..|      what was held; lengths, keeper and compacted rows stay with the table
    take      |----|----|....|##..|      blocks of its own again, or those that the prefix cache still has
    fill      |####|----|....|##..|      their bytes, a few in each step: then the table is as it was

Nothing is encoded, decoded or computed on the way: raw tails, codes, recurrent states and rows that a policy has
compacted come back as they were. It may turn round anywhere: what has not left yet need not come back, and what came
back is still in host memory when it must leave again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain as joined
from itertools import zip_longest
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from quire.errors import CapacityError, InvariantError
from quire.store.chain import GONE
from quire.store.index import TOKEN_BYTES, packed

if TYPE_CHECKING:
    from quire.store.table import BlockTable
    from quire.store.tiers.moving import Mover

__all__ = ["Parked"]

Place = tuple[int, int]
"""(chain, row): a block among those that the chain held."""


class Parked:
    """A table on its way to host memory, there, or on its way back.

    Args:
        table: its last tokens may be reserved and not computed: they are forgotten.
        mover: of the table's arena.

    Cost: each block that leaves is read once, each that comes back written once.
    """

    def __init__(self, table: BlockTable, mover: Mover) -> None:
        self.table, self.mover = table, mover
        self.taken = False
        """Whether the table has blocks again; their bytes may be still to come."""
        self.moved_bytes, self.moved_s = 0, 0.0
        """Copied so far, either way."""
        self._list()
        if table.path is not None:
            table.path.withdraw()

    def _list(self) -> None:
        """What is held now, none of it copied."""
        self.table.unreserve()
        chains = self.table.chains
        self._held = [np.flatnonzero(c.ids[: c.count] != GONE) for c in chains]
        self._bytes = [
            self.mover.space(len(held), c.group.block_bytes)
            for held, c in zip(self._held, chains, strict=True)
        ]
        self._copied = [np.zeros(len(held), bool) for held in self._held]
        self.n_bytes = sum(b.nbytes for b in self._bytes)
        lines = [[(at, row) for row in reversed(range(len(h)))] for at, h in enumerate(self._held)]
        self._out = deque(x for x in joined.from_iterable(zip_longest(*lines)) if x is not None)
        self._in: deque[Place] = deque()
        self._came = False

    @property
    def leaving(self) -> bool:
        """Whether some blocks are still where they were, and are to go."""
        return bool(self._out) and not self.taken

    @property
    def filled(self) -> bool:
        """Whether the table is as it was."""
        return self.taken and not self._in and not self._came

    def out(self, time_s: float = float("inf"), least: int = 1) -> int:
        """Copies blocks to host memory and gives them back, at least so many, until the time is up.

        Returns:
            Their bytes; 0 where nothing is left to go.
        """
        freed = 0
        for at, row in self._timed(self._out, time_s, least):
            chain, entry = self.table.chains[at], int(self._held[at][row])
            if chain.ids[entry] == GONE:
                continue  # an interrupt came before this was noted
            self.mover.read_into(chain.pool, int(chain.ids[entry]), self._bytes[at][row])
            self._copied[at][row] = True
            self._drop(at, entry)
            freed += chain.group.block_bytes
            self.moved_bytes += chain.group.block_bytes
        return freed

    def take(self) -> None:
        """Blocks for everything that left, without their bytes yet; what is still here stays.

        Raises CapacityError; nothing changes then.
        """
        if self.taken:
            raise InvariantError("a parked table takes its blocks once")
        cached, coming, got = self._cached(), deque[Place](), list[tuple[int, int]]()
        try:
            for at, (chain, held) in enumerate(zip(self.table.chains, self._held, strict=True)):
                for row, entry in enumerate(held.tolist()):
                    if chain.ids[entry] != GONE:
                        continue
                    block = cached(at, entry)
                    if block < 0:
                        block = chain.pool.take()
                        coming.append((at, row))
                    chain.ids[entry] = block
                    chain.held += 1
                    got.append((at, entry))
        except CapacityError:
            for at, entry in reversed(got):
                self._drop(at, entry)
            raise
        self._in, self.taken, self._came = coming, True, self._came or bool(got)

    def fill(self, time_s: float = float("inf"), least: int = 1) -> bool:
        """Writes bytes into the blocks that were taken, at least so many, until the time is up.

        Returns:
            Whether the table is as it was.
        """
        if not self.taken:
            raise InvariantError("a parked table takes blocks before they are filled")
        for at, row in self._timed(self._in, time_s, least):
            chain = self.table.chains[at]
            block = int(chain.ids[self._held[at][row]])
            self.mover.write(chain.pool, block, self._bytes[at][row])
            self.moved_bytes += chain.group.block_bytes
        if not self._in and self._came:
            self._came = False
            if self.table.path is not None:
                self.table.path.done = (
                    0  # what was evicted meanwhile is named anew by the next commit
                )
        return not self._in

    def leave(self) -> None:
        """The blocks are to go once more, after all; a policy may have compacted them meanwhile.

        Those that host memory still has are given back at once, the others by `out`.
        """
        if self.filled and self.table.keeper is not None:
            self._list()
        else:
            self.table.unreserve()
        for at, row in self._out_order():
            entry = int(self._held[at][row])
            if self._copied[at][row] and self.table.chains[at].ids[entry] != GONE:
                self._drop(at, entry)
        self._in.clear()
        self.taken = False

    def drop(self) -> None:
        """The sequence is over, or computed anew: its table ends without leaving anything."""
        self.table.leave()
        self.table.release()

    def _out_order(self) -> Iterator[Place]:
        for at, held in enumerate(self._held):
            for row in reversed(range(len(held))):
                yield at, row

    def _timed(self, places: deque[Place], time_s: float, least: int) -> Iterator[Place]:
        """Takes places off the list until the time is up."""
        began, n = perf_counter(), 0
        while places and (n < least or perf_counter() - began < time_s):
            yield places[0]
            places.popleft()
            n += 1
        self.moved_s += perf_counter() - began if n else 0.0

    def _cached(self) -> Callable[[int, int], int]:
        """Gives the block that the prefix cache still has for a chain's entry, held once more; -1 where it has none."""
        path = self.table.path
        if path is None:
            return lambda *_: -1
        sharing, tokens = path.sharing, path.tokens
        index, grain = sharing.index, sharing.grain
        columns = {place: column for column, place in enumerate(index.columns)}
        named = min(path.done, len(path.names) - 1)
        nodes: dict[int, int] = {}

        def find(at: int, entry: int) -> int:
            chain = self.table.chains[at]
            if chain.group.recurrent:
                return -1  # a state is written in place: none that is cached is where this one was
            chunk, j = divmod(entry, index.per[at])
            if chunk >= named:
                return -1
            if chunk not in nodes:
                text = packed(tokens[chunk * grain : (chunk + 1) * grain])
                whole = len(text) == grain * TOKEN_BYTES
                nodes[chunk] = index.find(path.names[chunk + 1], text) if whole else -1
            block = index.block(columns[at, j], nodes[chunk]) if nodes[chunk] >= 0 else -1
            if block >= 0:
                chain.pool.hold(block)
                chain.pool.found(block)
            return block

        return find

    def _drop(self, at: int, entry: int) -> None:
        """Gives one block back."""
        chain = self.table.chains[at]
        chain.pool.release(int(chain.ids[entry]))
        chain.ids[entry] = GONE
        chain.held -= 1
