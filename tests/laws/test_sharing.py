"""Laws 1, 2, 3, 4 and 9 with prefixes found: random programs of two tenants over few tokens, so that hits abound.

What a position holds follows from the whole prefix before it and from its namespace. A block that is found under the
wrong prefix, or across namespaces, therefore reads as other numbers than the list model expects.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from zlib import crc32

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from laws.test_store import MAX_TOKENS, worlds
from laws.world import Seq, World
from quire.errors import CapacityError
from quire.store.index import NAME_BYTES
from quire.store.sharing import Namespace, Sharing

SYSTEM = (0, 1, 1, 0, 1, 0, 0)
TENANTS = (
    Namespace(b"a"),
    Namespace(b"b"),
    Namespace(b"c", shared=(SYSTEM, SYSTEM[:2])),
    Namespace(b"d", shared=(SYSTEM,)),
    Namespace(b"e", shared=(SYSTEM,), group="other"),
)


@dataclass(eq=False)
class Tenant(Seq):
    """A sequence with its ids; `tokens` are the numbers that say which prefix they stand behind."""

    namespace: Namespace = TENANTS[0]
    ids: list[int] = field(default_factory=list)
    public: int = 0

    def twin(self, table: object) -> Tenant:
        made = Tenant(
            table,  # type: ignore[arg-type]
            list(self.tokens),
            self.accepted,
            self.committed,
            [set(d) for d in self.dropped],
            list(self.cut),
            self.namespace,
            list(self.ids),
            self.public,
        )
        made.table.follow(made.ids)
        return made


def numbers(ids: list[int], namespace: Namespace, public_tokens: int) -> list[int]:
    """A number per position that depends on all that may be shared up to there."""
    at, out = crc32(namespace.group.encode() if public_tokens else namespace.salt), []
    for i, token in enumerate(ids):
        if i == public_tokens:
            at = crc32(namespace.salt, at)
        at = crc32(bytes([token]), at)
        out.append(at & 0xFFFFF)
    return out


class Sharers(RuleBasedStateMachine):
    """Tenants that open, compute, fork, go back and leave over one prefix cache."""

    @initialize(
        world=st.one_of(worlds(), worlds(stateful=True)),
        evict=st.sampled_from(["lru", "cost"]),
        size=st.integers(1, 6),
        every=st.integers(1, 4),
        one_by_one=st.booleans(),
    )
    def begin(self, world: World, evict: str, size: int, every: int, one_by_one: bool) -> None:
        self.world = world
        self.sharing = Sharing(
            world.store, b"weights", evict=evict, stateful_tokens=size, one_by_one=one_by_one
        )
        if self.sharing.states is not None:
            self.sharing.states.every = every * self.sharing.grain

    def pick(self, i: int) -> Tenant:
        seq = self.world.seqs[i % len(self.world.seqs)]
        assert isinstance(seq, Tenant)
        return seq

    def public(self, namespace: Namespace, ids: list[int]) -> int:
        """Tokens that may be shared: whole chunks of the longest declared prefix, written from the definition."""
        fits = [len(s) for s in namespace.shared if tuple(ids[: len(s)]) == s]
        return max(fits, default=0) // self.sharing.grain * self.sharing.grain

    @precondition(lambda self: len(self.world.seqs) < 4)
    @rule(
        tenant=st.integers(0, 4),
        ids=st.one_of(
            st.lists(st.integers(0, 1), min_size=1, max_size=MAX_TOKENS),
            st.lists(st.integers(0, 1), max_size=20).map(lambda x: [*SYSTEM, *x]),
        ),
        chunks=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    )
    def prefill(self, tenant: int, ids: list[int], chunks: list[int]) -> None:
        """A prompt: what is found, then the rest in chunks."""
        namespace = TENANTS[tenant]
        seq = Tenant(
            self.sharing.open(ids, namespace, limit=len(ids) - 1), namespace=namespace, ids=ids
        )
        table = seq.table
        assert table.length < len(ids)
        seq.dropped, seq.cut = [set() for _ in table.chains], [0] * len(table.chains)
        seq.public = self.public(namespace, ids)
        seq.tokens = numbers(ids, namespace, seq.public)[: table.length]
        seq.accepted = seq.committed = table.length
        self.world.seqs.append(seq)
        at = 0
        while len(seq.tokens) < len(ids) and self.more(seq, chunks[at % len(chunks)]):
            at += 1

    def more(self, seq: Tenant, n: int) -> bool:
        """Computes up to n further tokens of its ids."""
        start = len(seq.tokens)
        stop = min(len(seq.ids), start + n)
        if seq.table.path is not None:
            stop = seq.table.path.until(start, stop)
        try:
            seq.table.append(stop - start)
        except CapacityError:
            return False
        seq.tokens = numbers(seq.ids[:stop], seq.namespace, seq.public)
        self.world.forward([(seq, start, stop)])
        seq.table.commit()
        seq.accepted = seq.committed = stop
        return True

    @precondition(lambda self: self.world.seqs)
    @rule(tokens=st.lists(st.integers(0, 1), min_size=4, max_size=4), n=st.integers(1, 8))
    def decode(self, tokens: list[int], n: int) -> None:
        for _ in range(n):
            for i, token in zip(range(len(self.world.seqs)), tokens, strict=False):
                seq = self.pick(i)
                if len(seq.ids) == len(seq.tokens) < MAX_TOKENS:
                    seq.ids.append(token)
                    if not self.more(seq, 1):
                        seq.ids.pop()

    @precondition(lambda self: 0 < len(self.world.seqs) < 5)
    @rule(i=st.integers(0, 3))
    def fork(self, i: int) -> None:
        seq = self.pick(i)
        try:
            table = seq.table.fork()
        except CapacityError:
            return
        self.world.seqs.append(seq.twin(table))

    @precondition(lambda self: self.world.seqs)
    @rule(i=st.integers(0, 3))
    def release(self, i: int) -> None:
        """The end of a request, or a preemption: whoever comes back finds what it left."""
        seq = self.pick(i)
        self.world.seqs.remove(seq)
        seq.table.release()

    @precondition(lambda self: any(p.cached for p in self.world.store.arena.pools))
    @rule(j=st.integers(0, 20))
    def evict(self, j: int) -> None:
        pools = [p for p in self.world.store.arena.pools if p.cached]
        pool = pools[j % len(pools)]
        pool.evict(list(pool.idle())[j % pool.cached])

    @rule()
    def clear(self) -> None:
        self.sharing.index.clear()

    @invariant()
    def books(self) -> None:
        if hasattr(self, "world"):
            self.world.check_books()
            self.world.check_sealed()
            check_index(self.sharing)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()
            assert self.sharing.index.live == 0
            assert not self.sharing.promised


def check_index(sharing: Sharing) -> None:
    """Names, nodes, columns and owners say the same, recounted from the columns."""
    index = sharing.index
    nodes = dict(index._nodes)
    assert len(nodes) == index.live == len(index._names) - len(index._free)
    blocks = set()
    children: dict[int, set[int]] = {}
    for name, node in nodes.items():
        assert index.name(node) == name
        assert len(name) == NAME_BYTES
        held = 0
        for column, pool in enumerate(index.pools):
            block = index.block(column, node)
            if block >= 0:
                held += 1
                assert pool.named(block)
                assert index.owner(pool, block) == node
                assert (id(pool), block) not in blocks, "one block, two names"
                blocks.add((id(pool), block))
        parent = index._parent[node]
        if parent >= 0:
            children.setdefault(parent, set()).add(node)
        assert index._count[node] == held + sum(p == node for p in _parents(index, nodes))
    for node in nodes.values():
        listed, child = [], index._first[node]
        while child >= 0:
            listed.append(child)
            child = index._next[child]
        assert len(set(listed)) == len(listed)
        assert set(listed) == children.get(node, set())
    for pool in set(index.pools):
        for block in range(pool.capacity):
            assert pool.named(block) == ((id(pool), block) in blocks), "a name without a node"


def _parents(index: object, nodes: dict[bytes, int]) -> list[int]:
    return [index._parent[n] for n in nodes.values()]  # type: ignore[attr-defined]


TestSharers = Sharers.TestCase
TestSharers.settings = settings(
    settings.default,
    max_examples=max(60, settings.default.max_examples),
    stateful_step_count=25,
    suppress_health_check=list(HealthCheck),
)
