"""From names to blocks: which prefixes lie in the pools, and in which blocks.

    node      one chunk of a prefix: `grain` tokens (fewer for the partial block that a sequence left behind)
    name      SHA-256 of the parent's name and the tokens; the first parent is a namespace
    column    one block of one group within a chunk; a chunk holds whole blocks of every group of tokens
    state     a column, too: what a recurrent group had reached when the chunk ended, where somebody kept that
    blocks    of each column the id, or -1 where it was never stored or is evicted

    root(namespace) ── chunk 0 ── chunk 1 ── chunk 2            names chain, so equal names mean equal prefixes
                          └── chunk 1' ── partial (11 tokens)

A node is a number; what belongs to it lies in flat columns, so that a million nodes give Python's collector nothing to
walk through. Finding a prefix costs one hash and one look-up per chunk of it, whatever else is stored. The tokens are
compared on every hit: a name alone is never believed.

A node without blocks and without children is forgotten; one with children stays as their parent.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from math import lcm

import numpy as np

from quire.errors import InvariantError
from quire.spec import DEFAULT_BLOCK_TOKENS, CacheGroup, CacheSpec
from quire.store.pool import BlockPool

__all__ = ["NONE", "PrefixIndex", "chunk_name", "packed"]

NONE = -1
NAME_BYTES = 32
TOKEN_BYTES = 4

LOOKED_AT = 16
"""Siblings that are compared when a chunk is not found whole: the newest ones."""


def packed(tokens: Sequence[int]) -> bytes:
    """Token ids as they go into names: little-endian, 4 bytes each."""
    ids = array("i", tokens)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def chunk_name(parent: bytes, chunk: bytes) -> bytes:
    """The name of a chunk behind a prefix: SHA-256, 32 bytes."""
    return sha256(parent + chunk).digest()


class PrefixIndex:
    """Nodes over the groups of one spec.

    Args:
        spec: the groups.
        pool_of: a group's pool. The index takes over their `on_evict`.
        on_evict: told the node and the column, before a block is forgotten.
        stateful_tokens: per chunk where all groups are recurrent, and no block says how many.
    """

    def __init__(
        self,
        spec: CacheSpec,
        pool_of: Callable[[CacheGroup], BlockPool],
        on_evict: Callable[[int, int], None] | None = None,
        stateful_tokens: int = DEFAULT_BLOCK_TOKENS,
    ) -> None:
        sizes = [g.block_tokens for g in spec.groups if not g.recurrent]
        self.grain = lcm(*sizes) if sizes else stateful_tokens
        """Tokens per chunk."""
        self.per = [1 if g.recurrent else self.grain // g.block_tokens for g in spec.groups]
        """Of each group, blocks in a chunk."""
        self.columns = tuple((g, j) for g, per in enumerate(self.per) for j in range(per))
        """(group, which of its blocks in a chunk)."""
        self.states = [c for c, (g, _) in enumerate(self.columns) if spec.groups[g].recurrent]
        """Columns of recurrent groups: the state behind the chunk, where there is one."""
        self.pools = [pool_of(spec.groups[g]) for g, _ in self.columns]
        self.plain = len(self.columns) == len(sizes) and all(g.raw is None for g in spec.groups)
        """Whether parts of a block can be copied: no codec and no state needs it whole, and a chunk is a block."""
        self.on_evict = on_evict
        self.live = 0
        """Nodes in use."""
        self.collisions = 0
        """Names that were found with other tokens. Each was a miss."""
        self._nodes: dict[bytes, int] = {}
        self._names: list[bytes | None] = []
        self._chunks: list[bytes] = []
        self._parent = array("i")
        self._first = array("i")  # newest child
        self._next, self._prev = array("i"), array("i")  # siblings, newest first
        self._count = array("i")  # blocks and children
        self._blocks = [array("i") for _ in self.columns]
        self._free = array("i")
        self._owners: dict[int, tuple[array[int], array[int]]] = {}
        for pool in self.pools:
            if id(pool) not in self._owners:
                owner = array("i", [NONE]) * pool.capacity, array("h", [0]) * pool.capacity
                self._owners[id(pool)] = owner
                pool.on_evict = partial(self._evicted, *owner)

    # -- finding -------------------------------------------------------------------------------------------------

    def find(self, name: bytes, chunk: bytes) -> int:
        """The node of that name and these tokens, or -1."""
        node = self._nodes.get(name, NONE)
        if node >= 0 and self._chunks[node] != chunk:
            self.collisions += bool(self._chunks[node])
            return NONE
        return node

    def block(self, column: int, node: int) -> int:
        """The block that a column has at a node, or -1."""
        return self._blocks[column][node]

    def whole(self, node: int) -> bool:
        """Whether every column has its block there."""
        return all(column[node] >= 0 for column in self._blocks)

    def name(self, node: int) -> bytes:
        """The node's name."""
        name = self._names[node]
        assert name is not None
        return name

    def tokens(self, node: int) -> np.ndarray:
        """`[n] int32`: the node's tokens."""
        return np.frombuffer(self._chunks[node], "<i4")

    def chunk(self, node: int) -> bytes:
        """The node's tokens, packed."""
        return self._chunks[node]

    def parent_name(self, node: int) -> bytes:
        """The name that the node's own was made from."""
        return self.name(self._parent[node])

    def children(self, name: bytes) -> Iterator[int]:
        """Nodes behind the prefix of that name, newest first, at most `LOOKED_AT`."""
        node = self._nodes.get(name, NONE)
        child = self._first[node] if node >= 0 else NONE
        for _ in range(LOOKED_AT):
            if child < 0:
                return
            yield child
            child = self._next[child]

    def nearest(self, name: bytes, rest: bytes, *, whole: bool = True) -> tuple[int, int]:
        """The child that agrees longest with `rest`, and in how many tokens: (-1, 0) where none does.

        Args:
            name: of the prefix behind which is looked.
            rest: packed tokens.
            whole: only nodes of which every column has its block.
        """
        best, longest = NONE, 0
        for child in self.children(name):
            if whole and not self.whole(child):
                continue
            n = _common(self._chunks[child], rest)
            if n > longest:
                best, longest = child, n
        return best, longest

    # -- filling -------------------------------------------------------------------------------------------------

    def add(self, name: bytes, parent: bytes, chunk: bytes) -> int:
        """The node of that name, made if need be; -1 where the name has other tokens."""
        node = self._nodes.get(name, NONE)
        if node >= 0 and self._chunks[node]:
            return self.find(name, chunk)
        above = self._nodes.get(parent, NONE)
        if above < 0:  # a namespace, or a part that a window has moved away from
            above = self._new(parent, b"")
        if node < 0:
            node = self._new(name, chunk)
        self._chunks[node] = chunk
        self._link(node, above)
        return node

    def attach(self, column: int, node: int, block: int) -> None:
        """Gives a held block its name: the node's, in that column."""
        blocks, pool = self._blocks[column], self.pools[column]
        if blocks[node] >= 0 or pool.named(block):
            raise InvariantError(f"node {node} or block {block} is named already")
        nodes, columns = self._owners[id(pool)]
        nodes[block], columns[block] = node, column
        blocks[node] = block
        self._count[node] += 1
        pool.name(block)

    def settle(self, node: int) -> None:
        """Forgets the node if nothing was attached to it, nor to anything behind it."""
        while node >= 0 and not self._count[node]:
            node = self._forget(node)

    def drop(self, node: int) -> None:
        """Gives up the node's blocks that nobody holds."""
        for column, pool in zip(self._blocks, self.pools, strict=True):
            block = column[node]
            if block >= 0 and not pool.refs(block):
                pool.unname(block)

    def clear(self) -> None:
        """Forgets everything: idle blocks become free, held ones private."""
        for pool in dict.fromkeys(self.pools):
            while pool.cached:
                pool.evict(next(pool.idle()))
        for at, (column, pool) in enumerate(zip(self._blocks, self.pools, strict=True)):
            for node in range(len(column)):
                if column[node] >= 0:
                    pool.unname(column[node])
                    self._detach(node, at)

    def place(self, pool: BlockPool, block: int) -> tuple[int, int]:
        """(node, column) of a named block."""
        nodes, columns = self._owners[id(pool)]
        return nodes[block], columns[block]

    def named(self, name: bytes) -> int:
        """The node of that name, whatever its tokens, or -1."""
        return self._nodes.get(name, NONE)

    def owner(self, pool: BlockPool, block: int) -> int:
        """The node of a named block."""
        return self._owners[id(pool)][0][block]

    # -- within --------------------------------------------------------------------------------------------------

    def _new(self, name: bytes, chunk: bytes) -> int:
        if self._free:
            node = self._free.pop()
            self._names[node], self._chunks[node] = name, chunk
        else:
            node = len(self._names)
            self._names.append(name)
            self._chunks.append(chunk)
            for column in (self._parent, self._first, self._next, self._prev, self._count):
                column.append(NONE)
            for column in self._blocks:
                column.append(NONE)
        self._nodes[name] = node
        self._parent[node] = self._first[node] = self._prev[node] = self._next[node] = NONE
        self._count[node] = 0
        self.live += 1
        return node

    def _link(self, node: int, parent: int) -> None:
        newest = self._first[parent]
        self._parent[node], self._next[node] = parent, newest
        if newest >= 0:
            self._prev[newest] = node
        self._first[parent] = node
        self._count[parent] += 1

    def _evicted(self, nodes: array[int], columns: array[int], block: int) -> None:
        node, column = nodes[block], columns[block]
        if self.on_evict is not None:
            self.on_evict(node, column)
        self._detach(node, column)

    def _detach(self, node: int, column: int) -> None:
        self._blocks[column][node] = NONE
        self._count[node] -= 1
        self.settle(node)

    def _forget(self, node: int) -> int:
        """Recycles a node that has neither block nor child; returns its parent, which has one child less."""
        parent, before, after = self._parent[node], self._prev[node], self._next[node]
        if after >= 0:
            self._prev[after] = before
        if before >= 0:
            self._next[before] = after
        elif parent >= 0:
            self._first[parent] = after
        del self._nodes[self.name(node)]
        self._names[node], self._chunks[node] = None, b""
        self._free.append(node)
        self.live -= 1
        if parent >= 0:
            self._count[parent] -= 1
        return parent


def _common(a: bytes, b: bytes) -> int:
    """In how many tokens two packed sequences agree from the start."""
    n = min(len(a), len(b)) // TOKEN_BYTES
    if a[: n * TOKEN_BYTES] == b[: n * TOKEN_BYTES]:
        return n
    same = np.frombuffer(a, "<i4", n) == np.frombuffer(b, "<i4", n)
    return int(same.argmin())
