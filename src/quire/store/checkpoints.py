"""Checkpoints of recurrent state: copies of what a sequence had reached, under the name of the prefix that led there.

    blocks    |=====|=====|=====|=====|=====|=====|==            of all tokens
    states                x           x           x              copies, idle from the start: anybody's memory
                          every       branch      end, then moving along while tokens are generated

A prefix is resumed at the largest boundary that has its blocks and a state. States are made at *marks*, where what is
computed of a prompt at once ends: every so many tokens, at the last whole chunk, and where it leaves what others have
computed, for whoever begins like these. While tokens are generated the last whole chunk has one: it moves along.

Source: states at branches, Marconi (MLSys 2025, arXiv 2411.19379). Differs: a branch is also seen among those who wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quire.errors import CapacityError
from quire.store.chain import Chain
from quire.store.table import BlockTable

if TYPE_CHECKING:
    from quire.store.path import Path
    from quire.store.sharing import Sharing

__all__ = ["EVERY_TOKENS", "ONE_BY_ONE", "STATE", "Checkpoints", "common_tokens"]

EVERY_TOKENS = 1024
"""Tokens between checkpoints of a long prompt; more where one takes more bytes than so many tokens do."""
ONE_BY_ONE = 16
"""Where tokens behind a state are computed one by one: so many times as many must lie before it as behind."""
STATE = b"state"
"""Before the name of a chunk: the promise of a state instead of blocks."""


class Checkpoints:
    """The states of one prefix cache.

    Args:
        sharing: whose index has columns for them.
        one_by_one: this model computes whole prompts, or one token at a time (Mamba-1 kinds).
    """

    def __init__(self, sharing: Sharing, *, one_by_one: bool = False) -> None:
        self.sharing, self.one_by_one = sharing, one_by_one
        self.grain = sharing.grain
        spec = sharing.store.spec
        per_token = spec.bytes_per_token
        outweighs = spec.bytes_per_sequence / per_token if per_token else 0.0
        self.every = -(-int(max(EVERY_TOKENS, outweighs)) // self.grain) * self.grain
        """Tokens between them, in a prompt."""
        self._orphans: dict[bytes, None] = {}

    def resumes(self, boundary: int, n_tokens: int) -> bool:
        """Whether a sequence of so many tokens gains by going on from there."""
        return not self.one_by_one or (n_tokens - boundary) * ONE_BY_ONE <= boundary

    def marks(self, found: int, known: int, n_tokens: int) -> list[int]:
        """Where states are to be made, ascending.

        Args:
            found: tokens that are there with a state.
            known: tokens that are there with or without.
            n_tokens: of the prompt.
        """
        last = (n_tokens - 1) // self.grain * self.grain
        marks = {known, last}
        if not self.one_by_one:
            marks.update(range((found // self.every + 1) * self.every, last, self.every))
        return sorted(m for m in marks if found < m <= last and self.resumes(m, n_tokens))

    # -- made --------------------------------------------------------------------------------------------------------

    def keep(self, table: BlockTable, path: Path, name: bytes, parent: bytes, chunk: bytes) -> bool:
        """Copies the states that a table has now under the name of the chunk that it has reached.

        Returns:
            Whether it made some: not where others had, nor where there is no room.

        Cost: the states are read and written once.
        """
        sharing, index = self.sharing, self.sharing.index
        self.tidy()
        node = index.named(name)
        lacking = [c for c in index.states if node < 0 or index.block(c, node) < 0]
        taken: list[tuple[int, int]] = []
        try:
            for column in lacking:
                taken.append((column, index.pools[column].take()))  # noqa: PERF401 - one of them may fail
        except CapacityError:
            for column, block in taken:
                index.pools[column].release(block)
            return False
        node = index.add(name, parent, chunk)  # what was taken may have pushed the node out
        for column, block in taken:
            pool = index.pools[column]
            if node >= 0:
                own = int(table.chains[index.columns[column][0]].ids[0])
                sharing.store.arena.copy(
                    pool.byte_offset(own), pool.byte_offset(block), pool.block_bytes
                )
                index.attach(column, node, block)
                sharing.stats.stored_states += 1
                if path.hints is not None:
                    sharing.hint(column, block, path.hints)
            pool.release(block)
        return node >= 0 and bool(taken)

    def drop(self, name: bytes) -> None:
        """Gives up the states of a chunk that nobody has found."""
        index = self.sharing.index
        node = index.named(name)
        for column in index.states if node >= 0 else ():
            block, pool = index.block(column, node), index.pools[column]
            if block >= 0 and not pool.refs(block) and pool.uses[block] == 1:
                pool.unname(block)

    # -- found -------------------------------------------------------------------------------------------------------

    def load(self, table: BlockTable, node: int, path: Path) -> bool:
        """Gives an empty table a copy of a node's states; False where there is no room, and nothing has changed."""
        sharing, index = self.sharing, self.sharing.index
        places: list[tuple[Chain, int, int]] = []
        for column in index.states:
            chain, block = table.chains[index.columns[column][0]], index.block(column, node)
            chain.pool.hold(block)
            places.append((chain, column, block))
        try:
            for chain, _, _ in places:
                chain.push(chain.pool.take())
        except CapacityError:
            for chain, _, block in places:
                chain.pool.release(block)
                while chain.count:
                    chain.pop()
            return False
        for chain, column, block in places:
            chain.pool.found(block)
            if path.hints is not None:
                sharing.hint(column, block, path.hints)
            if sharing.tiering is not None:
                sharing.tiering.found(column, node, block)
        sharing.store.copy_blocks([(c.pool, block, int(c.ids[0])) for c, _, block in places])
        return True

    # -- given up ----------------------------------------------------------------------------------------------------

    def orphaned(self, node: int) -> None:
        """A block of a chunk is being given up: its state, if it has one, leads nowhere and goes with the next `tidy`.

        Not at once: a pool that clears a slab takes blocks out of it one by one.
        """
        index = self.sharing.index
        if any(index.block(c, node) >= 0 for c in index.states):
            self._orphans[index.name(node)] = None

    def tidy(self) -> None:
        """Gives up states whose own chunk has lost its blocks, and that nobody reads just now."""
        sharing, index = self.sharing, self.sharing.index
        while self._orphans:
            name = next(iter(self._orphans))
            del self._orphans[name]
            node = index.named(name)
            if node < 0 or all(index.block(c, node) >= 0 for c in sharing.full_columns):
                continue
            for column in index.states:
                block, pool = index.block(column, node), index.pools[column]
                if block >= 0 and not pool.refs(block):
                    pool.unname(block)  # with the last of them the node may go
                    if index.named(name) != node:
                        break


def common_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """In how many tokens two sequences agree from the start. Cost: a comparison of both, twice."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
