"""Sharing prefixes: tables that begin with what is cached already, and leave behind what they computed.

    open(tokens)    |== found ==|~ copied ~|                    blocks that are held; n tokens of one that differs later
    commit          |===========|=====|=====|---|               whole chunks are named; a duplicate is merged
    release         |===========|=====|=====|==|                the partial block, too: under (parent, tokens)

A hit ends at the largest boundary whose needs every group still has: all blocks of full attention, the last ones of a
window, the raw ones of a residual window, a checkpoint of every recurrent state. So whoever resumes there reads what it
would have read after computing it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from quire.errors import CapacityError, ConfigError, InvariantError, RequestError
from quire.spec import DEFAULT_BLOCK_TOKENS
from quire.store.chain import GONE, Chain
from quire.store.checkpoints import STATE, Checkpoints, common_tokens
from quire.store.evict import make_eviction
from quire.store.index import TOKEN_BYTES, PrefixIndex, chunk_name, packed
from quire.store.insight import LONG, Explainer, Ghost
from quire.store.namespace import Hints, Namespace, Tenants
from quire.store.path import Path
from quire.store.store import BlockStore
from quire.store.table import BlockTable
from quire.store.whole import Wholes

if TYPE_CHECKING:
    from quire.store.tiering import Tiering

__all__ = ["Hints", "Namespace", "Path", "Sharing", "SharingStats", "Tenants"]


MOST_ROOTS = 1024
"""Namespaces whose tree can still be shown."""


@dataclass(slots=True)
class SharingStats:
    """Counters since the start. Tokens are of look-ups: each is asked for once.

    Args:
        lookups: tables opened.
        asked_tokens: that could have been found.
        hit_tokens: that were, copied ones included.
        copied_tokens: of those, copied out of a block that differs later.
        stored_blocks: that got a name.
        merged_blocks: computed although another had computed them meanwhile, and given back.
        evicted_blocks: named ones given up.
        waits: times that a request waited for another to compute its prefix.
        stored_states: checkpoints of recurrent groups, one per group.
        stored_wholes: compacted prefixes that got a name; hit_wholes: times that one was resumed from; evicted_wholes:
            of those, given up.
    """

    lookups: int = 0
    asked_tokens: int = 0
    hit_tokens: int = 0
    copied_tokens: int = 0
    stored_blocks: int = 0
    merged_blocks: int = 0
    evicted_blocks: int = 0
    waits: int = 0
    stored_states: int = 0
    stored_wholes: int = 0
    hit_wholes: int = 0
    evicted_wholes: int = 0

    @property
    def hit_ratio(self) -> float:
        """Hit tokens over asked ones."""
        return self.hit_tokens / self.asked_tokens if self.asked_tokens else 0.0


class Sharing:
    """The prefix cache of one store.

    Args:
        store: its groups are shared.
        base: digest of everything else that a block's bytes depend on: weights, dtype, configuration.
        evict: "cost" or "lru", see `store/evict.py`.
        explain: find the reason of each miss.
        ghost: share of the prefixes that are followed at other sizes of memory; 0: none.
        clock: seconds.
        one_by_one: this model computes whole prompts, or one token at a time (Mamba-1 kinds).
        stateful_tokens: per chunk where all groups are recurrent.
        turn_tokens: sequences longer than this have other keys at all positions (LongRoPE): they are named apart, and
            resumed only behind it.

    Raises:
        ConfigError: an unknown policy, or a ghost of recurrent states.
    """

    def __init__(
        self,
        store: BlockStore,
        base: bytes = b"",
        *,
        evict: str = "cost",
        explain: bool = False,
        ghost: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        one_by_one: bool = False,
        stateful_tokens: int = DEFAULT_BLOCK_TOKENS,
        turn_tokens: int | None = None,
    ) -> None:
        self.store = store
        self.turn_tokens = turn_tokens
        self.base = sha256(b"quire prefix 1" + base).digest()
        self.evict = evict
        self.index = PrefixIndex(
            store.spec, store.pool_for, self._evicted, stateful_tokens=stateful_tokens
        )
        self.grain = self.index.grain
        self.states: Checkpoints | None = None
        """Where groups are recurrent."""
        if self.index.states:
            self.states = Checkpoints(self, one_by_one=one_by_one)
            if ghost:
                raise ConfigError(
                    "share: a ghost counts blocks, and this model resumes at checkpoints of recurrent state; drop ghost"
                )
        self.stats = SharingStats()
        self.explainer = Explainer(self, clock) if explain else None
        self.ghost = Ghost(self, ghost) if ghost else None
        self.actor = ""
        """Which request took memory last."""
        self.tiering: Tiering | None = None
        """Memory below the store's, where there is any."""
        self.promised: dict[bytes, Path] = {}
        """Names of chunks that somebody is computing."""
        self.roots: dict[bytes, bytes] = {}
        """Name of the empty prefix -> salt, of the private namespaces that looked last: where trees begin."""
        for group in store.spec.groups:
            saved = group.block_tokens
            if self.states is not None and group.recurrent:
                saved = self.states.every
            store.pool_for(group).adopt(make_eviction(evict, saved, clock))
        self.wholes = Wholes(self)
        """Compactions that can be found, see `store.whole`."""
        far = 1 << 40
        full = [g for g, group in enumerate(store.spec) if group.span.needs(far) == ((0, far),)]
        self._full = [c for c, (g, _) in enumerate(self.index.columns) if g in full]
        self._full_only = len(self._full) == len(self.index.columns)
        self.sparse = self.states is not None and not self._full
        """Chunks are known, too, that have nothing but the state of one behind them."""

    # -- opening -------------------------------------------------------------------------------------------------

    def open(
        self,
        tokens: Sequence[int],
        namespace: Namespace | None = None,
        *,
        limit: int | None = None,
        adapter: bytes = b"",
        hints: Hints | None = None,
    ) -> BlockTable:
        """A table over the longest prefix of `tokens` that is cached: `take` what `look` finds."""
        return self.take(self.look(tokens, namespace, limit=limit, adapter=adapter, hints=hints))

    def look(
        self,
        tokens: Sequence[int],
        namespace: Namespace | None = None,
        *,
        limit: int | None = None,
        adapter: bytes = b"",
        hints: Hints | None = None,
        label: str = "",
    ) -> Path:
        """Finds a prefix without taking it; nothing may happen to the store before `take`.

        Args:
            tokens: a live list: what the table will hold is published under what it says then.
            namespace: whose; one without salt when None.
            limit: at most so many tokens are found; all but the last when None, which must be computed for its logits.
            adapter: digest of what is added to the weights.
            hints: for the blocks that it finds and makes.
            label: names the request where another's miss is explained.

        Raises:
            RequestError: hints for a policy that has none.

        Cost: a hash and a look-up per chunk of the prefix.
        """
        if hints is not None:
            self.check_hints()
        path = self.path(tokens, namespace, adapter)
        own = path.namespace
        path.hints, path.label = hints, label
        if not path.public:
            self._note_root(path.names[0], own.salt)
        path.limit = max(0, len(tokens) - 1 if limit is None else limit)
        if self.states is not None:
            self.states.tidy()
        path.nodes = self._walk(path, packed(tokens[: path.limit]))
        path.known = len(path.nodes)
        if self.sparse:
            while path.known and path.nodes[path.known - 1] < 0:
                path.known -= 1
        path.found = path.known if self._full_only else self._boundary(path)
        if not self.resumes(path.found, path):
            path.found = 0
        if self.explainer is not None:
            path.seen = path.names[path.found + 1 :]
            if self.sparse:
                path.seen = path.names[path.found + 1 : path.known + 1]
        return path

    def path(
        self, tokens: Sequence[int], namespace: Namespace | None = None, adapter: bytes = b""
    ) -> Path:
        """Where these tokens would stand, without looking for them."""
        path = Path(self, namespace or Namespace(), self.base_of(len(tokens), adapter), tokens)
        path.adapter = adapter
        return path

    def take(self, path: Path) -> BlockTable:
        """A table over what was found."""
        nodes, path.nodes = path.nodes[: path.found], []
        table = self.store.open()
        if nodes and not self._fill(table, nodes, path):
            path.found = 0
        path.done = path.found
        del path.names[path.done + 1 :]
        if self.states is not None:
            path.plan(self.states)
        if self.index.plain and path.limit > table.length >= self.least(path):
            self._copy_part(table, path)
        table.path = path
        if self.explainer is not None:
            path.miss = self.explainer.explain(
                path, table, path.namespace, self.base_of(len(path.tokens), path.adapter)
            )
        if self.ghost is not None:
            path.shadow = self.ghost.enter(path.ahead(path.limit))
        stats = self.stats
        stats.lookups += 1
        stats.asked_tokens += path.limit
        stats.hit_tokens += table.length
        return table

    def awaited(self, path: Path, owner: Any) -> bytes | None:
        """After `look`: the name of the first chunk that is missing, if somebody before `owner` is computing it.

        Or of a state behind chunks that are there. Whoever computes what both have in common leaves a state at its end.
        """
        if not self.promised:
            return None
        at = path.known if self._full or self.sparse else path.found
        first = at * self.grain
        if first + self.grain <= path.limit:
            name = chunk_name(path.parent(at), packed(path.tokens[first : first + self.grain]))
            if self.computing(name, owner) and self._will_leave(path, self.promised[name]):
                self.stats.waits += 1
                return name
        for boundary in range(at if self.states is not None else 0, path.found, -1):
            name = STATE + path.names[boundary]
            if self.computing(name, owner) and self.resumes(boundary, path):
                self.stats.waits += 1
                return name
        return None

    def _will_leave(self, path: Path, other: Path) -> bool:
        """Asks who computes what both have in common to leave its states, too; whether that is worth waiting for."""
        if self.states is None and not self.least(path):
            return True
        same = common_tokens(path.tokens[: path.limit], other.tokens)
        other.mark(same)
        return self.resumes(same // self.grain, path)

    def resumes(self, chunks: int, path: Path) -> bool:
        """Whether a sequence can go on behind so many chunks, and gains by it."""
        boundary = chunks * self.grain
        if boundary < self.least(path):
            return False
        return self.states is None or self.states.resumes(boundary, len(path.tokens))

    def turned(self, n_tokens: int) -> bool:
        """Whether a sequence of so many tokens is one of the long ones, see `turn_tokens`."""
        return self.turn_tokens is not None and n_tokens > self.turn_tokens

    def base_of(self, n_tokens: int, adapter: bytes) -> bytes:
        """What the names of a sequence of so many tokens begin with."""
        return self.base + adapter + (LONG if self.turned(n_tokens) else b"")

    def least(self, path: Path) -> int:
        """The fewest tokens that may be found: what is computed next must make a long sequence of it."""
        long = self.turn_tokens is not None and self.turned(len(path.tokens))
        return (self.turn_tokens or 0) + 1 if long else 0

    def computing(self, name: bytes, owner: Any) -> bool:
        """Whether somebody before `owner` still promises that chunk."""
        path = self.promised.get(name)
        return path is not None and path.owner < owner

    @property
    def gapless(self) -> bool:
        """Whether a chunk is only there behind all chunks before it: some group forgets nothing behind a window."""
        return bool(self._full)

    def clear(self) -> None:
        """Forgets everything: idle blocks become free, held ones private."""
        self.wholes.clear()
        self.index.clear()

    def check_hints(self) -> None:
        """Raises RequestError where the policy takes no hints."""
        if not self.index.pools[0].policy.hints:
            raise RequestError(f"evict={self.evict!r} takes no hints; use evict='cost'")

    def hint(self, column: int, block: int, hints: Hints) -> None:
        """Passes a wish on to the pool's policy."""
        self.index.pools[column].policy.hint(block, hints.priority, hints.keep_for_s)

    def rebase(self, more: bytes) -> None:
        """Names depend on this as well. Nothing may be stored yet."""
        if self.index.live or self.wholes:
            raise InvariantError("names cannot change while the index has some")
        self.base = sha256(self.base + more).digest()

    @property
    def full_columns(self) -> list[int]:
        """Columns of the index whose every block a prefix needs; of the others those of `needed`."""
        return self._full

    # -- within --------------------------------------------------------------------------------------------------

    def _note_root(self, name: bytes, salt: bytes) -> None:
        self.roots.pop(name, None)
        self.roots[name] = salt
        if len(self.roots) > MOST_ROOTS:
            del self.roots[next(iter(self.roots))]

    def _walk(self, path: Path, blob: bytes) -> list[int]:
        """The nodes of the prefix's chunks; -1 where one is missing that windows may do without."""
        index, width = self.index, self.grain * TOKEN_BYTES
        nodes: list[int] = []
        for at in range(0, len(blob) - width + 1, width):
            chunk = blob[at : at + width]
            node = index.find(path.extend(chunk), chunk)
            if self._full and (node < 0 or any(index.block(c, node) < 0 for c in self._full)):
                path.names.pop()
                break
            nodes.append(node)
        return nodes

    def _boundary(self, path: Path) -> int:
        """The largest number of chunks behind which every group still has what it needs."""
        for n in range(path.known, 0, -1):
            if not self.resumes(n, path):
                break
            if self._resumable(path.nodes, n):
                return n
        return 0

    def _resumable(self, nodes: list[int], chunks: int) -> bool:
        index, last = self.index, nodes[chunks - 1]
        if index.states and (last < 0 or any(index.block(c, last) < 0 for c in index.states)):
            return False
        for column, (g, j) in enumerate(index.columns):
            if column in self._full or column in index.states:
                continue
            per = index.per[g]
            for entry in self.needed(g, chunks * self.grain):
                if entry % per == j:
                    node = nodes[entry // per]
                    if node < 0 or self.index.block(column, node) < 0:
                        return False
        return True

    def needed(self, g: int, boundary: int) -> list[int]:
        """Entries of a group's chain that queries from `boundary` on may read; of a recurrent one the last chunk's."""
        group = self.store.spec.groups[g]
        size = self.grain if group.recurrent else group.block_tokens
        entries: set[int] = set()
        for lo, hi in group.span.needs(boundary):
            entries.update(range(lo // size, -(-hi // size)))
        return sorted(entries)

    def _fill(self, table: BlockTable, nodes: list[int], path: Path) -> bool:
        """Gives an empty table the blocks of these chunks, and a copy of the states; False where those lack room."""
        boundary = len(nodes) * self.grain
        for g, chain in enumerate(table.chains):
            if chain.group.recurrent:
                continue
            size = chain.group.block_tokens
            per, first = self.index.per[g], self.index.columns.index((g, 0))
            needed = set(self.needed(g, boundary))
            for entry in range(boundary // size):
                if entry in needed:
                    column = first + entry % per
                    block = self.index.block(column, nodes[entry // per])
                    chain.pool.hold(block)
                    chain.pool.found(block)
                    chain.push(block)
                    if self.tiering is not None:
                        self.tiering.found(column, nodes[entry // per], block)
                    if path.hints is not None:
                        self.hint(column, block, path.hints)
                else:
                    chain.push(GONE)
                    chain.held -= 1
            needs = chain.group.span.needs(boundary)
            last = needs[-1][0] if needs and needs[-1][1] == boundary else boundary
            chain.cursor = min(chain.count, last // size)
            chain.sealed = chain.count
            if chain.group.raw is not None:
                chain.encoded = chain.count
        if self.states is not None and not self.states.load(table, nodes[-1], path):
            table.reset()
            return False
        table.length = table.accepted = table.committed = boundary
        return True

    def _copy_part(self, table: BlockTable, path: Path) -> None:
        """Copies the beginning of a block that agrees for a while: no codec here needs it whole."""
        first = table.length
        rest = packed(path.tokens[first : min(path.limit, first + self.grain)])
        node, n_tokens = self.index.nearest(path.parent(path.done), rest)
        if node < 0:
            return
        sources = [self.index.block(c, node) for c in range(len(self.index.columns))]
        taken: list[tuple[Chain, int, int]] = []
        for chain, block in zip(table.chains, sources, strict=True):
            chain.pool.hold(block)
        try:
            for chain, block in zip(table.chains, sources, strict=True):
                taken.append((chain, block, chain.pool.take()))
        except CapacityError:
            for chain, block in zip(table.chains, sources, strict=True):
                chain.pool.release(block)
            for chain, _, mine in taken:
                chain.pool.release(mine)
            return
        for chain, block, mine in taken:
            chain.pool.found(block)
            chain.push(mine)
        self.store.copy_blocks([(chain.pool, block, mine) for chain, block, mine in taken])
        table.length = table.accepted = table.committed = table.length + n_tokens
        self.stats.copied_tokens += n_tokens

    def _evicted(self, node: int, column: int) -> None:
        self.stats.evicted_blocks += 1
        if self.tiering is not None:
            self.tiering.evicted(node, column)
        if self.states is not None and column not in self.index.states:
            self.states.orphaned(node)
        if self.explainer is not None:
            self.explainer.evicted(self.index.name(node), self.actor)
