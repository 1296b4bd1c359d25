"""One sequence: how many tokens it has, and for every group the chain of blocks that holds them.

logical   0 ........................ committed ........ length
plain     |#####|#####|#####|###..|                              blocks cover [0, length); sealing moves nothing
body      |#####|#####|#####|                                    a lossy body: whole blocks of accepted tokens only
raw       |.....|.....|#####|###..|                              its plain companion: tail and residual window
state     |x|                                                    recurrent: one block, rewritten in place

append(n)    makes room for n more tokens in every group, or raises and changes nothing
commit(n)    tokens [0, n) are final: whole blocks are sealed, what no span needs any more is given back
truncate(n)  forgets tokens from n on (drafts, a rejected continuation)
fork()       a second sequence over the same blocks; only the last, partly filled ones are copied
keep(...)    drops chosen tokens of a group and writes the rest into new private blocks; `compact`: each head its own
split(...)   gives some coordinates of a group a chain of their own, so that they can keep other tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from quire.errors import CapacityError, ConfigError, InvariantError, RequestError
from quire.spec import CacheGroup, Coord
from quire.store.chain import GONE, Chain
from quire.store.pool import BlockPool

if TYPE_CHECKING:
    from quire.store.cold import Cold
    from quire.store.path import Path
    from quire.store.store import BlockStore


class Keeper(Protocol):
    """Which tokens of one sequence stay; made by `quire.models.keep`."""

    def before_append(self, table: BlockTable, n_tokens: int) -> None:
        """Compacts, where the committed length says so. Raises CapacityError; the table is unchanged then."""
        ...

    def spare(self, length: int) -> int:
        """Tokens of room besides, for what will be read once more and forgotten when `length` tokens are computed."""
        ...

    def until(self, start: int, stop: int) -> int:
        """How far [start, stop) may be computed before tokens must go: start < it <= stop."""
        ...

    def begin_prompt(self, table: BlockTable, n_tokens: int) -> None:
        """So many tokens that come next are a further prompt: tokens go at its end, and not before."""
        ...

    def reads_by(self, position: int) -> Any:
        """The policy by which the query at a position reads fewer blocks than there are; None: it reads all."""
        ...

    def fork(self) -> Keeper:
        """Of a twin with the same tokens."""
        ...

    def record(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """All that it knows, as JSON and arrays by name, for a file. Raises ConfigError."""
        ...

    def finish(self, table: BlockTable) -> None:
        """The sequence has ended as it should: what is due now and others would find goes before it is released."""
        ...

    def reset(self) -> None:
        """The sequence is empty again."""
        ...


Copy = tuple[BlockPool, int, int]
"""(pool, source block, private block): the source's reference is given back once it is copied."""


class BlockTable:
    """One sequence's cache, made by `BlockStore.open()`. Holds references, never bytes."""

    def __init__(self, store: BlockStore) -> None:
        self.store = store
        self.length = 0
        """Logical tokens held; the last may not be accepted, or not computed yet."""
        self.accepted = 0
        """Tokens that will not be rolled back."""
        self.committed = 0
        """Tokens whose every query has been answered. committed <= accepted <= length."""
        self.chains = [Chain(g, store.pool_for(g)) for g in store.spec.groups]
        self.closed = False
        self.path: Path | None = None
        """Where it publishes its blocks (`Sharing.open`); None for a private sequence."""
        self.keeper: Keeper | None = None
        """Decides which tokens stay, at fixed lengths; None: all that the spans need."""
        self.cold: Cold | None = None
        """What lies in host memory or on a disk while the sequence runs."""
        store.tables.add(self)

    # -- growing -------------------------------------------------------------------------------------------------

    def append(self, n_tokens: int, *, drafts: int = 0) -> None:
        """Makes room for `n_tokens` more tokens, the last `drafts` of them not accepted yet.

        Raises:
            CapacityError: a pool is exhausted; the table is unchanged.
        """
        if self.closed or not 0 <= drafts <= n_tokens:
            raise InvariantError(f"append({n_tokens}, drafts={drafts}), closed={self.closed}")
        if self.keeper is not None and n_tokens:
            self.keeper.before_append(self, n_tokens)
        if drafts < n_tokens and self.accepted < self.length:
            raise InvariantError(
                f"{self.length - self.accepted} drafts must be accepted or truncated first"
            )
        length = self.length + n_tokens
        accepted = length - drafts if drafts < n_tokens else self.accepted
        spare = 0 if self.keeper is None else self.keeper.spare(length)
        self._reserve(length + spare, accepted)
        self.length, self.accepted = length, accepted

    def accept(self, n_tokens: int) -> None:
        """Declares tokens [0, n) accepted: bodies get the blocks to seal them into.

        Raises:
            CapacityError: nothing has changed.
        """
        if not self.accepted <= n_tokens <= self.length:
            raise InvariantError(
                f"accept({n_tokens}) of {self.accepted} accepted, {self.length} held"
            )
        self._reserve(self.length, n_tokens)
        self.accepted = n_tokens

    def commit(self, n_tokens: int | None = None) -> list[tuple[int, int]]:
        """Tokens [0, n) are final (all accepted ones by default), and every query before n has been answered.

        A lossy block becomes sealed once a `Step` has encoded it. Tokens that were drafts when they were computed
        are encoded by the next one; their raw blocks wait for it.

        Returns:
            (chain index, entry) of each block that became sealed.
        """
        n = self.accepted if n_tokens is None else n_tokens
        if not self.committed <= n <= self.accepted:
            raise InvariantError(
                f"commit({n}) of {self.committed} committed, {self.accepted} accepted"
            )
        self.committed = n
        sealed = self._seal(n)
        path = self.path
        if path is not None and n // path.sharing.grain > path.done:
            path.publish(self)  # before a window lets go of what it names
        bodies = {c.group.raw: c for c in self.chains if c.group.raw is not None}
        for chain in self.chains:
            if not chain.group.recurrent:
                body = bodies.get(chain.group.name)
                unsealed = None if body is None else body.logical(body.encoded)
                chain.drop_behind(n, unsealed)
        return sealed

    def _seal(self, n: int) -> list[tuple[int, int]]:
        """(chain index, entry) of each block that tokens [0, n) being final has sealed."""
        sealed: list[tuple[int, int]] = []
        for at, chain in enumerate(self.chains):
            size = chain.group.block_tokens
            if chain.group.recurrent:
                continue
            whole = min(chain.slot(n) // size, chain.count)
            if chain.group.raw is not None:
                if self.store.arena.device is None:
                    chain.encoded = chain.count  # nothing to encode where memory is only counted
                whole = min(whole, chain.encoded)
            if whole > chain.sealed:
                there = chain.ids[chain.sealed : whole] != GONE
                sealed.extend((at, chain.sealed + int(i)) for i in np.flatnonzero(there))
                chain.sealed = whole
        return sealed

    # -- shrinking -----------------------------------------------------------------------------------------------

    def truncate(self, n_tokens: int) -> None:
        """Forgets tokens from `n_tokens` on.

        Raises:
            RequestError: what a query at `n_tokens` needs is gone (a window moved on, a lossy block was sealed, a
                recurrent state was overwritten, tokens were dropped). The table is unchanged.
            CapacityError: a shared block would have to be copied and none is left. The table is unchanged.
        """
        if self.closed or not 0 <= n_tokens <= self.length:
            raise RequestError(f"cannot truncate a sequence of {self.length} tokens to {n_tokens}")
        if n_tokens == self.length:
            return
        if n_tokens == 0:
            self.reset()
            return
        if any(c.group.recurrent for c in self.chains):
            raise RequestError(
                "a recurrent state cannot go back; recompute the sequence from its start"
            )
        if n_tokens < self.committed:
            self._check_resumable(n_tokens)
        wants = [min(c.count, c.entries_for(n_tokens, n_tokens)) for c in self.chains]
        partial = [
            (c, w - 1) for c, w in zip(self.chains, wants, strict=True) if w and c.partial(n_tokens)
        ]
        copies = self._own(partial)
        for chain, want in zip(self.chains, wants, strict=True):
            while chain.count > want:
                chain.pop()
            whole = chain.slot(n_tokens) // chain.group.block_tokens
            chain.sealed, chain.encoded = min(chain.sealed, whole), min(chain.encoded, whole)
        self.store.copy_blocks(copies)
        if self.path is not None:
            self.path.back(n_tokens)
        self.length = n_tokens
        self.accepted = min(self.accepted, n_tokens)
        self.committed = min(self.committed, n_tokens)

    def unreserve(self) -> None:
        """Forgets tokens that were reserved and not computed, and the blocks that were taken for them alone."""
        n = self.committed
        for chain in self.chains:
            want = chain.entries_for(n, n)
            while chain.count > want and not chain.group.recurrent:
                chain.pop()
        self.length = self.accepted = n

    def reset(self) -> None:
        """Back to an empty sequence; every block is given back, later ones first."""
        for chain in self.chains:
            while chain.count:
                chain.pop()
            chain.cursor = chain.sealed = chain.encoded = chain.cut = chain.cold = 0
            chain.kept = chain.own = None
        if self.path is not None:
            self.path.back(0)
        if self.keeper is not None:
            self.keeper.reset()
        if self.cold is not None:
            self.cold.drop()
            self.cold = None
        self.length = self.accepted = self.committed = 0

    def follow(self, tokens: Sequence[int]) -> None:
        """Says which live list holds the table's tokens from now on; a fork begins with a copy of its twin's."""
        if self.path is not None:
            self.path.tokens = tokens

    def finish(self) -> None:
        """Before `release`, where the sequence has ended as it should and was not only broken off."""
        if self.keeper is not None:
            self.keeper.finish(self)

    def release(self) -> None:
        """Gives every reference back, later blocks of a chain before earlier ones. Idempotent."""
        if not self.closed:
            if self.path is not None:
                self.path.settle(self)
                self.path = None
            self.reset()
            self.closed = True
            self.store.tables.discard(self)

    # -- sharing and dropping ------------------------------------------------------------------------------------

    def fork(self) -> BlockTable:
        """A second sequence with the same tokens. Full blocks are shared; partly filled ones and states are copied.

        Raises:
            CapacityError: no block for the copies; nothing has changed.
        """
        if self.closed:
            raise InvariantError("fork of a released table")
        if self.cold is not None:
            raise CapacityError("a sequence with blocks away is not forked; compute the twin anew")
        twin = BlockTable(self.store)
        twin.length, twin.accepted, twin.committed = self.length, self.accepted, self.committed
        twin.chains = [c.copy() for c in self.chains]
        for chain in twin.chains:
            for block in chain.live():
                chain.pool.hold(int(block))
        try:
            copies = twin._own(
                [(c, c.count - 1) for c in twin.chains if c.count and c.partial(self.length)]
            )
        except CapacityError:
            twin.release()
            raise
        self.store.copy_blocks(copies)
        if self.path is not None:
            twin.path = self.path.twin()
        if self.keeper is not None:
            twin.keeper = self.keeper.fork()
        return twin

    def keep(self, chain_index: int, positions: Sequence[int] | np.ndarray) -> None:
        """Keeps only these committed tokens of one chain; its other blocks go back.

        Kept rows are copied, as stored and never encoded twice, into new private blocks; uncommitted ones follow.

        Args:
            chain_index: into `chains`.
            positions: ascending logical positions below `committed`, all still present.

        Raises:
            ConfigError: a lossy or recurrent group, whose blocks cannot be taken apart.
            CapacityError: no blocks for the copies; nothing has changed.
        """
        chain = self.chains[chain_index]
        self.leave()
        lossy = chain.group.raw is not None or any(
            c.group.raw == chain.group.name for c in self.chains
        )
        if chain.group.recurrent or lossy:
            raise ConfigError(
                f"group {chain.group.name}: tokens of a lossy or recurrent group cannot be dropped singly"
            )
        wanted = np.asarray(positions, np.int64)
        have = chain.positions(self.length)
        if len(wanted) and (
            np.any(np.diff(wanted) <= 0)
            or wanted[-1] >= self.committed
            or not np.isin(wanted, have).all()
        ):
            raise InvariantError(
                "keep takes ascending committed positions that the chain still holds"
            )
        rows = np.concatenate([wanted, have[have >= self.committed]])
        slots = np.searchsorted(chain.all_positions(self.length), rows)
        size = chain.group.block_tokens
        fresh = Chain(chain.group, chain.pool)
        self._grow(fresh, -(-len(rows) // size))
        self.store.copy_rows(
            chain.group, chain.ids[slots // size], slots % size, fresh.ids[: fresh.count]
        )
        fresh.kept, fresh.cut, fresh.sealed = wanted, self.committed, len(wanted) // size
        self._replace(chain, [fresh])

    def split(self, chain_index: int, coords: Iterable[Coord]) -> int:
        """Gives `coords` of one chain's group a chain of their own, so that they can keep other tokens.

        Both parts move into blocks of their own size; the shared originals, if any, stay with their other holders.

        Returns:
            Index of the new chain.

        Raises:
            ConfigError: a lossy or recurrent group, or not a proper part of its coordinates.
            CapacityError: no blocks for the parts; nothing has changed.
        """
        chain = self.chains[chain_index]
        self.leave()
        spec = replace(self.store.spec, groups=tuple(c.group for c in self.chains))
        parts = spec.split(chain.group.name, coords).groups
        fresh = []
        try:
            for group in (parts[chain_index], parts[-1]):
                new = Chain(group, self.store.pool_for(group))
                fresh.append(new)
                for block in chain.ids[: chain.count]:
                    if block == GONE:
                        new.push(GONE)
                        new.held -= 1
                    else:
                        new.push(new.pool.take())
        except CapacityError:
            for new in fresh:
                while new.count:
                    new.pop()
            raise
        for new in fresh:
            new.cursor, new.sealed, new.kept, new.cut = (
                chain.cursor,
                chain.sealed,
                chain.kept,
                chain.cut,
            )
            if chain.own is not None:
                new.own = chain.own[[chain.group.coords.index(c) for c in new.group.coords]]
            self.store.copy_tiles(chain.group, chain.live(), new.group, new.live())
        self._replace(chain, fresh)
        return len(self.chains) - 1

    # -- looking -------------------------------------------------------------------------------------------------

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        """The groups of this sequence: the store's, refined by `split`."""
        return tuple(c.group for c in self.chains)

    def held_bytes(self) -> int:
        """Bytes of the blocks that this sequence references, shared ones in full."""
        return sum(c.held * c.group.block_bytes for c in self.chains)

    def used_bytes(self) -> int:
        """Bytes of the rows among them that hold a token or a state: the rest is what partly filled blocks waste."""
        used = 0
        for c in self.chains:
            rows = c.held if c.group.recurrent else len(c.positions(self.length))
            used += rows * c.group.block_bytes // c.group.block_tokens
        return used

    def own_tails(self) -> None:
        """Makes the blocks that what follows is written into the table's own. Raises CapacityError; unchanged then."""
        partial = [(c, c.count - 1) for c in self.chains if c.count and c.partial(self.length)]
        self.store.copy_blocks(self._own(partial))

    def leave(self) -> None:
        """From here on its blocks depend on more than its tokens: they are private."""
        if self.path is not None:
            self.path.leave()
            self.path = None

    # -- within --------------------------------------------------------------------------------------------------

    def _reserve(self, length: int, accepted: int) -> None:
        """Takes the blocks that are missing, or none at all."""
        short = [(c, c.entries_for(length, accepted) - c.count) for c in self.chains]
        done: list[Chain] = []
        if self.path is not None:
            self.path.sharing.actor = (
                self.path.label
            )  # whoever loses a block now can be told to whom
        try:
            for chain, n in short:
                for _ in range(n):
                    chain.push(chain.pool.take())
                    done.append(chain)
        except CapacityError:
            for chain in reversed(done):
                chain.pop()
            raise

    @staticmethod
    def _grow(chain: Chain, n_blocks: int) -> None:
        try:
            for _ in range(n_blocks):
                chain.push(chain.pool.take())
        except CapacityError:
            while chain.count:
                chain.pop()
            raise

    def _replace(self, old: Chain, fresh: list[Chain]) -> None:
        """Puts fresh[0] in the old chain's place, further ones at the end, and gives the old blocks back."""
        self.chains[self.chains.index(old)] = fresh[0]
        self.chains += fresh[1:]
        while old.count:
            old.pop()

    def _own(self, places: list[tuple[Chain, int]]) -> list[Copy]:
        """Makes these entries private: takes a block for each that is shared or named. All or nothing."""
        shared = []
        for chain, entry in places:
            block = int(chain.ids[entry])
            if block != GONE and (chain.pool.refs(block) > 1 or chain.pool.named(block)):
                shared.append((chain, entry, block))
        taken: list[int] = []
        try:
            for chain, _, _ in shared:
                taken.append(chain.pool.take())
        except CapacityError:
            for (chain, _, _), mine in zip(shared, taken, strict=False):
                chain.pool.release(mine)
            raise
        copies = []
        for (chain, entry, block), mine in zip(shared, taken, strict=True):
            chain.ids[entry] = mine
            copies.append((chain.pool, block, mine))
        return copies

    def _check_resumable(self, n: int) -> None:
        for chain in self.chains:
            if chain.kept is not None and n < chain.cut:
                raise RequestError(
                    f"cannot go back to {n} tokens: tokens before {chain.cut} were dropped"
                )
            have = chain.positions(self.length)
            tail = chain.slot(n) // chain.group.block_tokens  # written in place by what follows
            gone = chain.partial(n) and chain.ids[tail] == GONE
            for lo, hi in (*chain.group.span.needs(n), *([(n - 1, n)] if gone else [])):
                top = (
                    hi
                    if chain.group.raw is None
                    else hi // chain.group.block_tokens * chain.group.block_tokens
                )
                low = lo if chain.kept is None else max(lo, chain.cut)  # dropped on purpose before
                if np.count_nonzero((have >= low) & (have < top)) < top - low:
                    raise RequestError(
                        f"cannot go back to {n} tokens: group {chain.group.name} has given up what position {n} needs"
                    )
