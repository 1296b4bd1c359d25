"""A look at the store while it works: what every block is, and which prefixes are asked for most.

    between two steps      Census(store), hottest(sharing, roots)   copies flat arrays, walks a bounded part of a tree
    anywhere, afterwards   census.rows(), census.cells()            counts what was copied

A block is in one of five states:

    free       nobody's
    cached     idle, and found again when somebody asks for its prefix
    held       one sequence reads it, and others would find it
    shared     several sequences read it
    private    one sequence reads it, and nobody finds it: its tail, what is being computed, what is not shared
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from quire.store.sharing import Sharing
from quire.store.store import BlockStore

__all__ = ["STATES", "Branch", "Census", "hottest"]

STATES = ("free", "cached", "held", "shared", "private")
_FREE, _CACHED, _HELD, _SHARED, _PRIVATE = range(5)

SHOWN_TOKENS = 24
"""Tokens of a branch that are kept: for a text that begins like it."""

_UNSEEN = 1 << 12
"""Tables that are asked for their groups: those of a policy may hold blocks of sizes that the spec does not have."""


@dataclass(frozen=True, slots=True)
class PoolCopy:
    """One pool, as it was.

    Args:
        tier: where its bytes lie.
        codecs: of the groups that it serves.
        refs, named, where: by block id; `owned` by slab.
    """

    block_bytes: int
    per_slab: int
    tier: str
    codecs: tuple[str, ...]
    block_tokens: tuple[int, ...]
    refs: array[int]
    named: bytes
    where: array[int]
    owned: bytes

    def states(self) -> np.ndarray:
        """`[slabs, per_slab] uint8`: the state of each place."""
        refs, named = np.frombuffer(self.refs, np.int32), np.frombuffer(self.named, np.uint8)
        held = np.where(refs > 1, _SHARED, np.where(named > 0, _HELD, _PRIVATE))
        by_id = np.where(refs > 0, held, np.where(named > 0, _CACHED, _FREE))
        out = np.empty(len(refs), np.uint8)
        out[np.frombuffer(self.where, np.int32)] = by_id
        return out.reshape(-1, self.per_slab)


class Census:
    """All blocks of a store, copied where no step runs.

    Cost: a copy of 9 bytes per block, about a millisecond for a million of them.
    """

    def __init__(self, store: BlockStore) -> None:
        self.usage = store.usage()
        groups: dict[int, dict[tuple[str, int], None]] = {}
        for group in store.spec.groups:
            groups.setdefault(group.block_bytes, {})[group.codec, group.block_tokens] = None
        if len(store.pools) > len(groups):
            for _, table in zip(range(_UNSEEN), store.tables, strict=False):
                for chain in table.chains:
                    key = chain.group.codec, chain.group.block_tokens
                    groups.setdefault(chain.group.block_bytes, {})[key] = None
        tier = str(store.arena.device or "counted only")
        self.pools = []
        for size, pool in store.pools.items():
            served = groups.get(size, {})
            codecs, tokens = tuple(c for c, _ in served), tuple(t for _, t in served)
            self.pools.append(PoolCopy(size, pool.per_slab, tier, codecs, tokens, *pool.copies()))

    def rows(self) -> list[dict[str, object]]:
        """A row per size of block: its codecs, tier, and bytes by state; `free` is of the slabs that it has."""
        out: list[dict[str, object]] = []
        for pool in self.pools:
            mine = pool.states()[np.frombuffer(pool.owned, np.uint8) > 0]
            counts = np.bincount(mine.ravel(), minlength=len(STATES))
            out.append(
                {
                    "block_bytes": pool.block_bytes,
                    "block_tokens": sorted(set(pool.block_tokens)),
                    "codecs": sorted(set(pool.codecs)),
                    "tier": pool.tier,
                    "bytes": {
                        s: int(n) * pool.block_bytes for s, n in zip(STATES, counts, strict=True)
                    },
                }
            )
        return out

    def cells(self, most: int) -> tuple[int, list[tuple[int, list[int]]]]:
        """The arena from its first byte to its last, in at most `most` cells of equally many bytes.

        A slab counts as many places as its smallest blocks need, so a larger block takes several.

        Returns:
            Places per cell, and runs of equal cells: (how many, places by state as in `STATES`).
        """
        slabs = len(self.pools[0].owned)
        per = max(pool.per_slab for pool in self.pools)
        places = np.zeros((slabs, per), np.uint8)
        for pool in self.pools:
            mine = np.frombuffer(pool.owned, np.uint8) > 0
            places[mine] = pool.states()[mine][:, np.arange(per) * pool.per_slab // per]
        flat, kinds = places.ravel(), len(STATES)
        width = max(1, -(-len(flat) // most))
        cell = np.arange(len(flat)) // width
        n_cells = int(cell[-1]) + 1
        counts = np.bincount(cell * kinds + flat, minlength=n_cells * kinds).reshape(-1, kinds)
        starts = np.flatnonzero(np.r_[True, (counts[1:] != counts[:-1]).any(1)])
        lengths = np.diff(np.r_[starts, n_cells])
        runs = [(int(n), counts[at].tolist()) for at, n in zip(starts, lengths, strict=True)]
        return width, runs


@dataclass(slots=True)
class Branch:
    """A run of chunks without a fork in it, and without a place where its use drops to less than half.

    Args:
        root: the namespace that it belongs to.
        tokens: of all its chunks.
        uses: how often its blocks were made or found, of its first chunk.
        held_chunks: of `chunks`, those that somebody reads now.
        begins: its first tokens.
        cut: more lies behind it than was looked at.
    """

    root: bytes
    tokens: int = 0
    uses: int = 0
    chunks: int = 0
    held_chunks: int = 0
    begins: list[int] = field(default_factory=list)
    children: list[Branch] = field(default_factory=list)
    cut: bool = False


def hottest(sharing: Sharing, roots: Iterable[bytes], most_chunks: int) -> list[Branch]:
    """The prefix trees of some namespaces, the most used branches of them. Call where no step runs.

    Args:
        sharing: the prefix cache.
        roots: names of empty prefixes, see `Sharing.roots`.
        most_chunks: that are visited, the hottest first.

    Returns:
        The branches that begin at the roots, the hottest first.

    Cost: about 3 µs a chunk.
    """
    index = sharing.index
    tops: list[Branch] = []
    queue: list[tuple[int, int, int, Branch, list[Branch]]] = []
    order = 0

    def push(node: int, branch: Branch, into: list[Branch]) -> None:
        nonlocal order
        order += 1
        heappush(queue, (-_uses(sharing, node), order, node, branch, into))

    for root in roots:
        for child in index.children(root):
            push(child, Branch(root), tops)
    visited = 0
    while queue:
        uses, _, node, branch, into = heappop(queue)
        if visited >= most_chunks:
            branch.cut = bool(branch.chunks)
            continue
        visited += 1
        if branch.chunks and -uses * 2 < branch.uses:
            into, branch = branch.children, Branch(branch.root)
        if not branch.chunks:
            branch.uses = -uses
            into.append(branch)
        tokens = index.tokens(node)
        branch.chunks += 1
        branch.tokens += len(tokens)
        branch.held_chunks += _is_held(sharing, node)
        if len(branch.begins) < SHOWN_TOKENS:
            branch.begins += tokens[: SHOWN_TOKENS - len(branch.begins)].tolist()
        behind = list(index.children(index.name(node)))
        if len(behind) == 1:
            push(behind[0], branch, into)
        else:
            for child in behind:
                push(child, Branch(branch.root), branch.children)
    return tops


def _uses(sharing: Sharing, node: int) -> int:
    """How often the most used of a node's blocks was made or found; 0 where all are gone."""
    index = sharing.index
    best = 0
    for column, pool in enumerate(index.pools):
        block = index.block(column, node)
        if block >= 0:
            best = max(best, pool.uses[block])
    return best


def _is_held(sharing: Sharing, node: int) -> bool:
    index = sharing.index
    return any(
        block >= 0 and pool.refs(block) > 0
        for column, pool in enumerate(index.pools)
        for block in (index.block(column, node),)
    )
