"""Laws 1, 2, 3, 4 and 9: random programs over a store of real bytes against lists of tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from laws.dense import plain_spans
from laws.world import Seq, World, fingerprint
from lossy import Lossy
from quire.errors import CapacityError, RequestError
from quire.plan import KVLayer, StateLayer, build_layout
from quire.spans import Full
from quire.spec import Field, KVConfig
from quire.store import BlockStore
from quire.store.park import Parked
from quire.store.tiers.moving import Mover

MAX_TOKENS = 40


@st.composite
def worlds(draw: st.DrawFn, *, stateful: bool = False) -> World:
    """Layers of several spans and sizes in one arena of few slabs, plain or lossy with any residual window.

    Stateful ones have a recurrent layer for certain, and maybe nothing else.
    """
    size = draw(st.integers(1, 6))
    layers: list[KVLayer | StateLayer] = []
    for at in range(draw(st.integers(0 if stateful else 1, 3))):
        width = draw(st.sampled_from([2, 24]))
        fields = (Field("k", (width,), "float32"), Field("v", (2,), "float32"))
        layers.append(KVLayer(at, draw(st.integers(1, 3)), fields, draw(plain_spans)))
    if stateful or draw(st.integers(0, 3)) == 0:
        layers.append(
            StateLayer(
                len(layers),
                (Field("state", (draw(st.sampled_from([5, 90])),), "float32", "block"),),
            )
        )
    codecs = None
    skip = sinks = ""
    if isinstance(layers[0], KVLayer) and draw(st.booleans()):
        lossy = Lossy(
            draw(st.one_of(st.sampled_from([0, size, 2 * size]), st.integers(0, 3 * size)))
        )
        codecs = {"": lossy}
        sinks = f";sinks={draw(st.sampled_from([0, 0, 1, 3, 7]))}"
        if len(layers) > 1 and draw(st.booleans()):
            skip = ";skip_layers=0"
    layout = build_layout(
        layers,
        KVConfig(kv="auto" + skip + sinks, block_tokens=size),
        dtype="float32",
        codecs=codecs,
    )
    sizes = {g.block_bytes for g in layout.spec.groups}
    slab = max(sizes) * draw(st.integers(1, 3)) + 64 * draw(st.integers(0, 2))
    store = BlockStore(
        layout.spec, slab * (len(sizes) + draw(st.integers(0, 24))), device="cpu", slab_bytes=slab
    )
    return World(layers, layout, store)


class Programs(RuleBasedStateMachine):
    """Every rule is one thing that an engine does; a failure for want of room must leave no trace."""

    @initialize(world=worlds())
    def begin(self, world: World) -> None:
        self.world = world

    def pick(self, i: int) -> Seq:
        return self.world.seqs[i % len(self.world.seqs)]

    def some(self) -> bool:
        return bool(self.world.seqs)

    def attempt(self, seq: Seq, act: Callable[[], object]) -> bool:
        """Whether there was room. The table is as before where there was not."""
        before = fingerprint(seq.table)
        try:
            act()
        except CapacityError:
            assert fingerprint(seq.table) == before
            return False
        return True

    @precondition(lambda self: len(self.world.seqs) < 4)
    @rule()
    def open(self) -> None:
        self.world.open()

    @precondition(some)
    @rule(
        plan=st.lists(
            st.tuples(st.integers(0, 3), st.integers(1, 11), st.integers(0, 11), st.booleans()),
            min_size=1,
            max_size=3,
        )
    )
    def forward(self, plan: list[tuple[int, int, int, bool]]) -> None:
        rows: list[tuple[Seq, int, int]] = []
        commits = []
        for i, n, drafts, commit in plan:
            seq = self.pick(i)
            if any(seq is s for s, _, _ in rows) or len(seq.tokens) + n > MAX_TOKENS:
                continue
            fresh = n if seq.accepted < len(seq.tokens) else min(n, max(0, drafts - 5))
            if not self.attempt(seq, lambda t=seq.table, n=n, d=fresh: t.append(n, drafts=d)):
                continue
            start = len(seq.tokens)
            seq.tokens += [next(self.world.numbers) for _ in range(n)]
            if fresh < n:
                seq.accepted = start + n - fresh
            rows.append((seq, start, start + n))
            commits.append(commit)
        if rows:
            self.world.forward(rows)
        for (seq, _, _), commit in zip(rows, commits, strict=True):
            if commit:
                seq.table.commit()
                seq.committed = seq.accepted

    @precondition(some)
    @rule(i=st.integers(0, 3), n=st.integers(1, 30))
    def prefill(self, i: int, n: int) -> None:
        self.forward([(i, n, 0, True)])

    @precondition(some)
    @rule(n=st.integers(1, 6), drafts=st.integers(0, 9))
    def decode(self, n: int, drafts: int) -> None:
        """A batch of single tokens, or of one token and its drafts, some of which are then rejected."""
        extra = max(0, drafts - 5)
        for _ in range(n):
            self.forward([(i, 1 + extra, 5 + extra, True) for i in range(4)])
            for i, seq in enumerate(self.world.seqs):
                self.truncate(i, min(drafts // 2, len(seq.tokens) - seq.accepted))
                self.accept(i, MAX_TOKENS)

    @precondition(some)
    @rule(i=st.integers(0, 3), n=st.integers(0, MAX_TOKENS))
    def accept(self, i: int, n: int) -> None:
        seq = self.pick(i)
        n = seq.accepted + n % (len(seq.tokens) - seq.accepted + 1)
        if self.attempt(seq, lambda: seq.table.accept(n)):
            seq.accepted = n

    @precondition(some)
    @rule(i=st.integers(0, 3), n=st.integers(0, MAX_TOKENS))
    def commit(self, i: int, n: int) -> None:
        seq = self.pick(i)
        n = seq.committed + n % (seq.accepted - seq.committed + 1)
        seq.table.commit(n)
        seq.committed = n

    @precondition(some)
    @rule(i=st.integers(0, 3), back=st.integers(0, 12))
    def truncate(self, i: int, back: int) -> None:
        seq = self.pick(i)
        n = max(0, len(seq.tokens) - back)
        before = fingerprint(seq.table)
        try:
            done = self.attempt(seq, lambda: seq.table.truncate(n))
        except RequestError:
            assert fingerprint(seq.table) == before
            groups = seq.table.groups
            assert n not in (0, len(seq.tokens))
            assert any(g.recurrent for g in groups) or n < seq.committed
            easy = all(type(g.span) is Full and g.raw is None for g in groups) and n >= max(seq.cut)
            assert not easy, "nothing was lost, and still refused"
            return
        if done:
            del seq.tokens[n:]
            seq.accepted, seq.committed = min(seq.accepted, n), min(seq.committed, n)
            if n == 0:
                seq.dropped, seq.cut = [set() for _ in seq.dropped], [0] * len(seq.cut)

    @precondition(lambda self: 0 < len(self.world.seqs) < 5)
    @rule(i=st.integers(0, 3))
    def fork(self, i: int) -> None:
        seq = self.pick(i)
        twins: list[Seq] = []
        if self.attempt(seq, lambda: twins.append(seq.twin(seq.table.fork()))):
            self.world.seqs += twins

    @precondition(some)
    @rule(i=st.integers(0, 3), c=st.integers(0, 5), bits=st.integers(0, (1 << MAX_TOKENS) - 1))
    def keep(self, i: int, c: int, bits: int) -> None:
        seq = self.pick(i)
        c %= len(seq.table.chains)
        chain = seq.table.chains[c]
        if (
            chain.group.recurrent
            or chain.group.raw
            or any(g.raw == chain.group.name for g in seq.table.groups)
        ):
            return
        have = chain.positions(seq.table.length)
        wanted = [int(p) for p in have if p < seq.committed and bits >> int(p) & 1]
        if self.attempt(seq, lambda: seq.table.keep(c, wanted)):
            seq.dropped[c] = set(range(seq.committed)) - set(wanted)
            seq.cut[c] = seq.committed

    @precondition(some)
    @rule(i=st.integers(0, 3), c=st.integers(0, 5), bits=st.integers(1, 511))
    def split(self, i: int, c: int, bits: int) -> None:
        seq = self.pick(i)
        c %= len(seq.table.chains)
        group = seq.table.groups[c]
        part = [x for j, x in enumerate(group.coords) if bits >> j & 1]
        lossy = group.raw or any(g.raw == group.name for g in seq.table.groups)
        if group.recurrent or lossy or not 0 < len(part) < len(group.coords):
            return
        if self.attempt(seq, lambda: seq.table.split(c, part)):
            seq.dropped.append(set(seq.dropped[c]))
            seq.cut.append(seq.cut[c])

    @precondition(some)
    @rule(i=st.integers(0, 3))
    def release(self, i: int) -> None:
        seq = self.pick(i)
        self.world.seqs.remove(seq)
        seq.table.release()
        seq.table.release()

    @precondition(some)
    @rule(
        i=st.integers(0, 3),
        more=st.integers(0, 9),
        others=st.integers(0, 9),
        leaves=st.sampled_from([0, 1, 2, 99]),
        again=st.none() | st.integers(0, 3),
    )
    def park(self, i: int, more: int, others: int, leaves: int, again: int | None) -> None:
        """Swapped out, some blocks or all, with tokens reserved and not computed; others write where it was.

        Back in, if there is room; perhaps not for long, and out `again` with so many blocks filled.
        """
        seq, store = self.pick(i), self.world.store
        if seq.committed < len(seq.tokens):
            return
        with suppress(CapacityError):
            seq.table.append(more)
        parked = Parked(seq.table, Mover(store.arena))
        held = seq.table.held_bytes()
        assert held == parked.n_bytes
        assert parked.out(0.0, leaves) == held - seq.table.held_bytes()
        assert parked.leaving is (seq.table.held_bytes() > 0)
        self.world.check_books()
        self.scribble(others)
        if again is not None and self.attempt(seq, parked.take):
            assert seq.table.held_bytes() == held
            if parked.fill(0.0, again):
                with suppress(CapacityError):
                    seq.table.append(more)
            parked.leave()
            parked.out()
            assert seq.table.held_bytes() == 0
            self.world.check_books()
            self.scribble(others)
        if self.attempt(seq, parked.take):
            while not parked.fill(0.0, 1):
                assert not parked.filled
            assert parked.filled
        else:
            parked.drop()
            self.world.seqs.remove(seq)

    def scribble(self, others: int) -> None:
        """Somebody else has blocks that are free, writes all over them, and gives them back."""
        taken, store = [], self.world.store
        for pool in store.pools.values():
            with suppress(CapacityError):
                taken.extend((pool, pool.take()) for _ in range(others))
        for pool, block in taken:
            at = pool.byte_offset(block)
            store.arena.buffer[at : at + pool.block_bytes] = 255
            pool.release(block)

    @precondition(some)
    @rule(i=st.integers(0, 3), upto=st.integers(1, 20), then_release=st.booleans())
    def name(self, i: int, upto: int, then_release: bool) -> None:
        seq = self.pick(i)
        for chain in seq.table.chains:
            for block in chain.ids[: min(chain.sealed, upto)].tolist():
                if block >= 0:
                    chain.pool.name(block)
        if then_release:
            self.release(i)

    @precondition(lambda self: any(p.cached for p in self.world.store.arena.pools))
    @rule(j=st.integers(0, 20), again=st.booleans())
    def disturb_cached(self, j: int, again: bool) -> None:
        """Evicts a cached block, or takes it up again as a hit would."""
        pools = [p for p in self.world.store.arena.pools if p.cached]
        pool = pools[j % len(pools)]
        block = list(pool.idle())[j % pool.cached]
        if again:
            pool.hold(block)
            self.world.extra.append((pool, block))
        else:
            pool.evict(block)

    @precondition(lambda self: self.world.extra)
    @rule(j=st.integers(0, 20))
    def drop_extra(self, j: int) -> None:
        pool, block = self.world.extra.pop(j % len(self.world.extra))
        pool.release(block)

    @invariant()
    def books(self) -> None:
        if hasattr(self, "world"):
            self.world.check_books()

    @invariant()
    def sealed_bytes_stay(self) -> None:
        if hasattr(self, "world"):
            self.world.check_sealed()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


TestPrograms = Programs.TestCase
TestPrograms.settings = settings(
    settings.default,
    max_examples=max(120, settings.default.max_examples),
    stateful_step_count=30,
    suppress_health_check=list(HealthCheck),
)
