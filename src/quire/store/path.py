"""Where a table stands in the prefix index: the names of its chunks, what it promised, and how it publishes."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from quire.store.chain import GONE
from quire.store.checkpoints import STATE
from quire.store.index import TOKEN_BYTES, chunk_name, packed
from quire.store.namespace import Hints, Namespace
from quire.store.table import BlockTable

if TYPE_CHECKING:
    from quire.store.checkpoints import Checkpoints
    from quire.store.insight import Miss, Shadow
    from quire.store.sharing import Sharing

__all__ = ["Path"]


class Path:
    """Where one table stands in the index; made by `Sharing.open`.

    names[i] is the name of the first i chunks. `tokens` is a live list: the table's tokens, appended to by its owner.
    """

    __slots__ = (
        *("adapter", "done", "found", "hints", "known", "label", "limit", "marks", "miss"),
        *("moving", "names", "namespace", "nodes", "owner", "promised", "prompt", "public"),
        *("public_tokens", "salt", "seen", "shadow", "sharing", "tokens", "whole"),
    )

    def __init__(
        self, sharing: Sharing, namespace: Namespace, base: bytes, tokens: Sequence[int]
    ) -> None:
        self.sharing = sharing
        self.tokens = tokens
        self.public_tokens = namespace.public_tokens(tokens) if namespace.shared else 0
        self.public = self.public_tokens // sharing.grain
        self.salt = namespace.salt
        self.names = [namespace.root(base, public=self.public > 0)]
        self.done = 0
        """Chunks that were found or published."""
        self.promised = 0
        """Chunks that whoever follows may wait for."""
        self.whole = b""
        """The name of a compaction that whoever follows may wait for, see `store.whole`."""
        self.owner: Any = None
        self.hints: Hints | None = None
        self.limit = 0
        """At most so many tokens were to be found."""
        self.nodes: list[int] = []
        """Between `look` and `take`: of the chunks that are there."""
        self.known = 0
        """How many lie before the first that nobody has."""
        self.found = 0
        """How many of them can be resumed from."""
        self.marks: list[int] = []
        """Lengths, ascending, at which a checkpoint of recurrent states is still to be made."""
        self.prompt = 0
        """Tokens when it was planned; behind them one checkpoint moves along."""
        self.moving = b""
        """The chunk that has it."""
        self.label = ""
        self.adapter = b""
        self.namespace = namespace
        self.seen: list[bytes] = []
        """Names of chunks that are there and could not be resumed from; where misses are explained."""
        self.miss: Miss | None = None
        self.shadow: Shadow | None = None

    def parent(self, chunk: int) -> bytes:
        """What the name of that chunk is made from, beside its tokens."""
        name = self.names[chunk]
        return sha256(name + self.salt).digest() if chunk == self.public > 0 else name

    def extend(self, chunk: bytes) -> bytes:
        """The name of one more chunk."""
        name = chunk_name(self.parent(len(self.names) - 1), chunk)
        self.names.append(name)
        return name

    def ahead(self, n_tokens: int) -> list[bytes]:
        """Names of all whole chunks of the first `n_tokens`, known or not; nothing changes."""
        grain, known = self.sharing.grain, len(self.names)
        for at in range(known - 1, n_tokens // grain):
            self.extend(packed(self.tokens[at * grain : (at + 1) * grain]))
        names = self.names[1 : n_tokens // grain + 1]
        del self.names[known:]
        return names

    def parents(self, names: Sequence[bytes]) -> list[bytes]:
        """What each of these names of the first chunks is made from, and one more: of what comes behind them."""
        out = [self.names[0], *names]
        if 0 < self.public < len(out):
            out[self.public] = sha256(out[self.public] + self.salt).digest()
        return out

    def twin(self) -> Path:
        """The same place, for a fork; it promises nothing."""
        twin = object.__new__(Path)
        twin.sharing, twin.tokens, twin.public, twin.salt = (
            self.sharing,
            list(self.tokens),
            self.public,
            self.salt,
        )
        twin.names, twin.done = self.names[: self.done + 1], self.done
        twin.promised, twin.owner, twin.hints = 0, None, self.hints
        twin.public_tokens, twin.whole = self.public_tokens, b""
        twin.limit, twin.nodes, twin.found = self.limit, [], 0
        twin.label, twin.adapter, twin.namespace = self.label, self.adapter, self.namespace
        twin.seen, twin.miss, twin.shadow = [], None, None
        twin.known, twin.marks, twin.prompt, twin.moving = 0, [], self.prompt, b""
        return twin

    def back(self, n_tokens: int) -> None:
        """The table was truncated to so many tokens."""
        sharing, chunks = self.sharing, n_tokens // self.sharing.grain
        if chunks < self.done:
            self.withdraw()
            self._forget_bare()
            self.done, self.moving = chunks, b""
            del self.names[chunks + 1 :]
        if (
            not n_tokens and sharing.turn_tokens is not None
        ):  # maybe a long one now, with other keys
            self.withdraw()
            base = sharing.base_of(len(self.tokens), self.adapter)
            self.names = [self.namespace.root(base, public=self.public > 0)]

    # -- promises ------------------------------------------------------------------------------------------------

    def promise(self, n_tokens: int, owner: Any) -> None:
        """Says that the chunks of the first `n_tokens` will be published by `owner`, unless it is released before."""
        self.owner = owner
        grain = self.sharing.grain
        blob = packed(self.tokens[self.done * grain : n_tokens // grain * grain])
        for at in range(0, len(blob), grain * TOKEN_BYTES):
            self.sharing.promised.setdefault(self.extend(blob[at : at + grain * TOKEN_BYTES]), self)
        self.promised = len(self.names) - 1
        for mark in self.marks:
            self._promise_state(mark)

    def promise_whole(self, name: bytes) -> None:
        """Says that the same owner will publish a compaction of that name, unless it is released before."""
        if self.sharing.promised.setdefault(name, self) is self:
            self.whole = name

    def withdraw(self) -> None:
        """Takes back what is promised and not published."""
        promised = self.sharing.promised
        for name in self.names[self.done + 1 : self.promised + 1]:
            for key in (name, STATE + name):
                if promised.get(key) is self:
                    del promised[key]
        self.promised = 0
        self.withdraw_whole()

    def withdraw_whole(self) -> None:
        """Takes the promise of a compaction back."""
        if self.whole:
            self.sharing.promised.pop(self.whole, None)
        self.whole = b""

    def _promise_state(self, mark: int) -> None:
        chunks = mark // self.sharing.grain
        if self.done < chunks <= self.promised:
            self.sharing.promised.setdefault(STATE + self.names[chunks], self)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def plan(self, states: Checkpoints) -> None:
        """Says where checkpoints are to be made on the way through the tokens that there are now."""
        grain, self.prompt = self.sharing.grain, len(self.tokens)
        least = self.sharing.least(self)
        marks = states.marks(self.done * grain, self.known * grain, self.prompt)
        self.marks = [m for m in marks if m >= least]

    def mark(self, n_tokens: int) -> None:
        """Somebody else goes on otherwise behind so many tokens: a checkpoint is made there, if it still can be."""
        sharing = self.sharing
        at = n_tokens // sharing.grain * sharing.grain
        states = sharing.states
        last = (self.prompt - 1) // sharing.grain * sharing.grain
        if states is None or at in self.marks or not self.done * sharing.grain < at <= last:
            return
        if at >= sharing.least(self) and states.resumes(at, self.prompt):
            insort(self.marks, at)
            self._promise_state(at)

    def until(self, start: int, stop: int) -> int:
        """How far [start, stop) may be computed before a checkpoint is to be made."""
        return next((m for m in self.marks if start < m < stop), stop)

    def _checkpoint(self, table: BlockTable, name: bytes, parent: bytes, chunk: bytes) -> None:
        """The table has come to the end of a chunk: its states are kept where they are wanted."""
        states, at = self.sharing.states, table.committed
        if states is None or at != table.length or at != self.done * self.sharing.grain:
            return
        moves = at >= self.prompt and at % states.every != 0
        if at not in self.marks and at < self.prompt:
            return
        if self.moving:
            states.drop(self.moving)
            self.moving = b""
        if states.keep(table, self, name, parent, chunk) and moves:
            self.moving = name

    def _passed(self) -> None:
        """Marks that lie behind are nobody's to wait for."""
        done, promised = self.done * self.sharing.grain, self.sharing.promised
        while self.marks and self.marks[0] <= done:
            key = STATE + self.names[self.marks.pop(0) // self.sharing.grain]
            if promised.get(key) is self:
                del promised[key]

    def _forget_bare(self) -> None:
        """Chunks that were noted and have nothing behind them, not even a state."""
        index = self.sharing.index
        if self.sharing.sparse and self.done:
            index.settle(index.named(self.names[self.done]))
            if 0 < self.public <= self.done:  # what is private hangs on a name of its own
                index.settle(index.named(self.names[self.public]))

    # -- the end -------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Nothing more is published."""
        self.withdraw()
        self._forget_bare()
        if self.shadow is not None:
            self.shadow.leave()
            self.shadow = None

    # -- publishing ----------------------------------------------------------------------------------------------

    def publish(self, table: BlockTable) -> None:
        """Names the table's chunks that became whole; a block that exists already takes the place of its duplicate."""
        sharing, grain = self.sharing, self.sharing.grain
        sealed = [c.sealed * c.group.block_tokens for c in table.chains if not c.group.recurrent]
        last = min(table.committed, *sealed) // grain if sealed else table.committed // grain
        name = parent = chunk = b""
        while self.done < last:
            first = self.done * grain
            chunk = packed(self.tokens[first : first + grain])
            known = len(self.names) > self.done + 1
            name = self.names[self.done + 1] if known else self.extend(chunk)
            parent = self.parent(self.done)
            node = sharing.index.add(name, parent, chunk)
            if node < 0 or len(chunk) < grain * TOKEN_BYTES:
                self.leave()
                table.path = None  # another prefix has the name, or tokens are not told: all behind it is private
                return
            self._attach(table, node, self.done)
            if sharing.promised.get(name) is self:
                del sharing.promised[name]
            self.done += 1
        if sharing.states is not None and name:
            self._checkpoint(table, name, parent, chunk)
            self._passed()
        if self.shadow is not None:
            self.shadow.grow(self.names[1 : self.done + 1])

    def settle(self, table: BlockTable) -> None:
        """The table is about to be released: its partial block stays under (parent, tokens)."""
        if self.shadow is not None:
            self.shadow.grow(self.names[1 : self.done + 1])
        self.leave()
        del self.names[self.done + 1 :]
        index, first = self.sharing.index, self.done * self.sharing.grain
        rest = packed(self.tokens[first : table.committed])
        n_tokens = len(rest) // TOKEN_BYTES
        if (
            not index.plain
            or not 0 < n_tokens < self.sharing.grain
            or n_tokens < table.committed - first
        ):
            return
        parent = self.parent(self.done)
        near, same = index.nearest(parent, rest)
        if same == n_tokens:
            return  # what is there begins like this
        if near >= 0 and same == len(index.tokens(near)):
            index.drop(near)  # it is the beginning of what comes now
        node = index.add(chunk_name(parent, rest), parent, rest)
        if node >= 0:
            self._attach(table, node, self.done)

    def _attach(self, table: BlockTable, node: int, chunk: int) -> None:
        sharing, index = self.sharing, self.sharing.index
        for column, (group, j) in enumerate(index.columns):
            chain = table.chains[group]
            if chain.group.recurrent:
                continue  # written in place: what is kept of it is a copy
            entry = chunk * index.per[group] + j
            block = int(chain.ids[entry]) if entry < chain.count else GONE
            if block == GONE:
                continue
            have = index.block(column, node)
            if have < 0:
                index.attach(column, node, block)
                sharing.stats.stored_blocks += 1
                have = block
            elif have != block:
                chain.pool.hold(have)
                chain.pool.found(have)
                chain.ids[entry] = have
                chain.pool.release(block)
                sharing.stats.merged_blocks += 1
            if self.hints is not None:
                sharing.hint(column, have, self.hints)
        if not sharing.sparse:
            index.settle(node)
