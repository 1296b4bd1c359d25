"""Compactions that are published as a whole: a prefix of which chosen tokens stay, found at its end or not at all.

    computed     |== full prefix ==============|        its own blocks; named chunk by chunk, as always
    compacted    |####|####|##..|                       chosen rows in new blocks, chains that heads share
    published    |####|####|##..|  + keeper's books     one name: full prefix, policy, all that it depends on
    resumed      |####|####|##..|question ...           full blocks by reference, the last one copied when written to

The name chains every token of the prefix, those that went included. What stays depends on all of them, so a part of it
means nothing: a whole is found by who asks for exactly that prefix under exactly that policy, and goes as a whole when
the first of its blocks is evicted. It holds no reference: its blocks are idle ones with a name, as all that is cached.
How it goes down to tiers, and comes up again: `store.whole_tiers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from quire.errors import CapacityError
from quire.store.chain import GONE, Chain
from quire.store.evict import make_eviction
from quire.store.index import packed
from quire.store.namespace import Hints
from quire.store.pool import BlockPool

if TYPE_CHECKING:
    from quire.store.path import Path
    from quire.store.sharing import Sharing
    from quire.store.table import BlockTable

__all__ = ["Whole", "Wholes", "whole_name"]


def whole_name(path: Path, n_tokens: int, policy: str) -> bytes:
    """The name of what a policy leaves of the first `n_tokens`: SHA-256, 32 bytes.

    Args:
        path: whose tokens, namespace and base they are.
        n_tokens: of the full prefix.
        policy: its canonical text.

    Cost: a hash per chunk that the path does not know yet.
    """
    grain = path.sharing.grain
    names = [path.names[0], *path.ahead(n_tokens)]
    chunks = n_tokens // grain
    behind_public = n_tokens > path.public_tokens
    parent = path.parents(names[1:])[chunks] if behind_public else names[chunks]
    rest = packed(path.tokens[chunks * grain : n_tokens])
    about = f"whole {n_tokens} {policy}".encode()
    return sha256(parent + sha256(about).digest() + rest).digest()


@dataclass(slots=True, eq=False)
class Whole:
    """One published compaction.

    Args:
        tokens: of the full prefix, packed; compared on every hit.
        policy: canonical text, compared too.
        length: tokens of the full prefix.
        chains: what a resumed table starts with; no references of their own.
        state: what the policy has to go on with, see `models.keeper.Keeper.fork`.
    """

    name: bytes
    tokens: bytes
    policy: str
    length: int
    chains: list[Chain]
    state: Any
    blocks: list[tuple[BlockPool, int]] = field(default_factory=list)

    @property
    def block_bytes(self) -> int:
        """Bytes of its blocks in the arena."""
        return sum(pool.block_bytes for pool, _ in self.blocks)

    @property
    def state_bytes(self) -> int:
        """Of `state`, beside the arena: no pool counts them, and they go with the blocks."""
        return int(self.state.state_bytes)


class Wholes:
    """The published compactions of one store.

    Args:
        sharing: the prefix cache, whose eviction policy serves these blocks too.
    """

    def __init__(self, sharing: Sharing) -> None:
        self.sharing = sharing
        self._wholes: dict[bytes, Whole] = {}
        self._owner: dict[tuple[int, int], Whole] = {}  # (pool, block)
        self._watched: set[int] = set()
        for pool in dict.fromkeys(sharing.index.pools):
            self._watch(pool)

    def __len__(self) -> int:
        return len(self._wholes)

    def __iter__(self) -> Any:
        return iter(self._wholes.values())

    def find(self, name: bytes, tokens: Sequence[int], policy: str) -> Whole | None:
        """The compaction of that name, of these tokens, under that policy."""
        found = self._wholes.get(name)
        if found is None or found.policy != policy or found.tokens != packed(tokens):
            return None
        return found

    def owns(self, pool: BlockPool, block: int) -> bool:
        """Whether a named block is part of a whole."""
        return (id(pool), block) in self._owner

    # -- out and in ----------------------------------------------------------------------------------------------

    def open(self, whole: Whole) -> BlockTable:
        """A table that goes on where the compacted prefix ends. Its blocks are shared: `own_tails` before writing."""
        table = self.sharing.store.open()
        table.chains = [chain.copy() for chain in whole.chains]
        for chain in table.chains:
            for block in chain.live():
                chain.pool.hold(int(block))
                chain.pool.found(int(block))
        table.length = table.accepted = table.committed = whole.length
        stats = self.sharing.stats
        stats.hit_wholes += 1
        stats.lookups += 1
        stats.asked_tokens += whole.length
        stats.hit_tokens += whole.length
        return table

    def publish(
        self,
        name: bytes,
        tokens: Sequence[int],
        policy: str,
        table: BlockTable,
        state: Any,
        hints: Hints | None = None,
    ) -> bool:
        """Names what a table holds, which was compacted just now; the table keeps it all.

        Blocks that are named already, and those that the table will write to, are copied.

        Returns:
            False where it is there already, a lossy block is not encoded yet, or there is no room for the copies.

        Cost: a copy of the last block of each chain, and of what a window or a residual window holds.
        """
        if name in self._wholes:
            return False
        chains = [chain.copy() for chain in table.chains]
        if any(c.group.raw is not None and c.encoded < c.count for c in chains):
            return False
        mine: list[tuple[BlockPool, int]] = []  # one reference each, until they have a name
        copies: list[tuple[BlockPool, int, int]] = []
        try:
            for chain in chains:
                pool, last = chain.pool, chain.count - 1 if chain.partial(table.length) else -1
                for entry in range(chain.count):
                    block = int(chain.ids[entry])
                    if block == GONE:
                        continue
                    if entry == last or pool.named(block):
                        fresh = pool.take()
                        copies.append((pool, block, fresh))
                        chain.ids[entry] = block = fresh
                    else:
                        pool.hold(block)
                    mine.append((pool, block))
        except CapacityError:
            for pool, block in reversed(mine):
                pool.release(block)
            return False
        arena = self.sharing.store.arena
        for pool, source, target in copies:
            arena.copy(pool.byte_offset(source), pool.byte_offset(target), pool.block_bytes)
        self.adopt(Whole(name, packed(tokens), policy, table.length, chains, state, mine), hints)
        self.sharing.stats.stored_wholes += 1
        return True

    def adopt(self, whole: Whole, hints: Hints | None = None) -> None:
        """Names the blocks of one, and gives the reference back that each of them had."""
        if whole.name not in self._wholes:  # else somebody computed it meanwhile
            self._wholes[whole.name] = whole
            for chain in whole.chains:
                self._watch(chain.pool, chain.group.block_tokens)
            for pool, block in whole.blocks:
                self._owner[id(pool), block] = whole
                pool.name(block)
                if hints is not None:
                    pool.policy.hint(block, hints.priority, hints.keep_for_s)
        for pool, block in reversed(whole.blocks):
            pool.release(block)

    def clear(self) -> None:
        """Forgets all of them: idle blocks become free, held ones private."""
        for whole in list(self._wholes.values()):
            self._drop(whole)

    # -- eviction ------------------------------------------------------------------------------------------------

    def _watch(self, pool: BlockPool, block_tokens: int = 0) -> None:
        """Is told of the pool's evictions from now on, before the index is."""
        if id(pool) in self._watched:
            return
        self._watched.add(id(pool))
        if (
            block_tokens
        ):  # a size that only heads or layers by themselves have: nothing was cached in it before
            pool.adopt(make_eviction(self.sharing.evict, block_tokens))
        pool.on_evict = partial(self._evicted, pool, pool.on_evict)

    def _evicted(self, pool: BlockPool, otherwise: Any, block: int) -> None:
        whole = self._owner.pop((id(pool), block), None)
        if whole is None:
            if otherwise is not None:
                otherwise(block)
        elif whole.name in self._wholes:  # else it is being dropped
            sharing = self.sharing
            sharing.stats.evicted_wholes += 1
            if sharing.explainer is not None:
                sharing.explainer.evicted(whole.name, sharing.actor)
            if sharing.tiering is not None:
                sharing.tiering.wholes.evicted(whole)
            self._drop(whole)

    def _drop(self, whole: Whole) -> None:
        del self._wholes[whole.name]
        for pool, block in whole.blocks:
            if self._owner.get((id(pool), block)) is whole:
                pool.unname(block)  # which evicts it where nobody holds it
                self._owner.pop((id(pool), block), None)
