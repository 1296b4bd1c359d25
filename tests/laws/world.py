"""A store with real bytes, and a list of tokens for every sequence that says what it must read back.

Every token ever written has a number of its own, and each of its elements a value that follows from (number, layer,
head, field, channel). So a read proves which token it came from, through forks, moves, evictions and codecs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np
import torch

from laws.dense import first_raw, may_read
from lossy import Lossy, decoded
from quire.attention import Row, Step
from quire.plan import KVLayer, Layout, StateLayer
from quire.plan.layout import Turn
from quire.spec import CacheGroup, Coord, KVCodec, Residual, Site
from quire.store import BlockPool, BlockStore, BlockTable, Chain


def elements(tokens: np.ndarray, layer: int, heads: int, width: int, of: int) -> np.ndarray:
    """`[n, heads, width] float32`, exact integers."""
    h, d = np.arange(heads)[:, None], np.arange(width)
    key = tokens[:, None, None] * 7919 + layer * 104729 + h * 1299709 + of * 15485863 + d * 32452843
    return ((key * 2654435761 % (1 << 32) >> 14) - (1 << 17)).astype(np.float32)


@dataclass(eq=False)
class Seq:
    """The list model of one table: token numbers, and per chain the positions that `keep` has dropped."""

    table: BlockTable
    tokens: list[int] = field(default_factory=list)
    accepted: int = 0
    committed: int = 0
    dropped: list[set[int]] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)

    def twin(self, table: BlockTable) -> Seq:
        return Seq(
            table,
            list(self.tokens),
            self.accepted,
            self.committed,
            [set(d) for d in self.dropped],
            list(self.cut),
        )


def alone(
    codec: KVCodec, site: Site, x: np.ndarray, first: int, turn: Turn | None = None
) -> np.ndarray:
    """One block of one head through a codec, with nothing beside it; turned back for it and on again."""
    pos, y = torch.arange(first, first + len(x)), torch.from_numpy(x)
    assert site.layer is not None
    kept = {f.name.partition(".")[2]: getattr(torch, f.dtype) for f in codec.stored(site)}
    parts = codec.encode(site, y if turn is None else turn(site.layer, y, -pos), pos)
    parts = {part: y.to(kept[part]) for part, y in parts.items()}
    out = codec.decode(site, parts, pos, torch.float32)
    return (out if turn is None else turn(site.layer, out, pos)).numpy()


def fingerprint(table: BlockTable) -> tuple[object, ...]:
    """All that a table says about itself: equal before and after what failed."""
    chains = tuple(
        (
            c.group,
            c.ids[: c.count].tolist(),
            c.held,
            c.sealed,
            None if c.kept is None else c.kept.tolist(),
            c.cut,
        )
        for c in table.chains
    )
    return (table.length, table.accepted, table.committed, repr(chains))


class World:
    """Sequences over one store, with the model beside them."""

    def __init__(
        self, layers: list[KVLayer | StateLayer], layout: Layout, store: BlockStore
    ) -> None:
        self.layers, self.layout, self.store = layers, layout, store
        store.arena.buffer.fill_(255)  # what was never written is no number
        self.seqs: list[Seq] = []
        self.extra: list[tuple[BlockPool, int]] = []
        self.numbers = count(1)
        self.sealed_bytes: dict[tuple[int, int], bytes] = {}

    def open(self) -> Seq:
        table = self.store.open()
        seq = Seq(table, dropped=[set() for _ in table.chains], cut=[0] * len(table.chains))
        self.seqs.append(seq)
        return seq

    def lossy_of(self, layer: int) -> tuple[CacheGroup, Residual] | None:
        """The body of a layer and the span of its raw companion, or None where the layer is plain."""
        spans = {g.name: g.span for g in self.layout.spec.groups}
        for g in self.layout.spec.groups:
            if layer in g.layers and g.raw is not None:
                span = spans[g.raw]
                assert isinstance(span, Residual)
                return g, span
        return None

    def sealed(
        self, body: CacheGroup, name: str, x: np.ndarray, first: int, coord: Coord
    ) -> np.ndarray:
        """What one block `[B, D]` of one head reads as once it is sealed at position `first`."""
        codec = self.layout.codecs_of(body)[name]
        if isinstance(codec, Lossy):
            return decoded(x, first)
        layer, head = coord
        site = next(s for s in self.layout.sites_of(body, layer) if s.name == name)
        turns = name == "k" and codec.needs == "unrotated"
        turn = self.layout.turn if turns else None
        return alone(codec, replace(site, heads=(head,)), x, first, turn)

    # -- a forward -----------------------------------------------------------------------------------------------

    def forward(self, rows: list[tuple[Seq, int, int]]) -> None:
        """Writes tokens [start, stop) of each sequence and checks everything that their queries read."""
        step = Step(self.store, self.layout, [Row(s.table, a, b) for s, a, b in rows])
        for s, a, _ in rows:
            self._check_states(s, a)
        numbers = np.concatenate([np.array(s.tokens[a:b], np.int64) for s, a, b in rows])
        for x in self.layers:
            if isinstance(x, KVLayer):
                values = {
                    f.name: torch.from_numpy(elements(numbers, x.layer, x.heads, f.shape[0], of))
                    for of, f in enumerate(x.fields)
                }
                step.write(x.layer, values)
                self._check_reads(step, x, rows)
        for s, _, b in rows:
            self._write_states(s, b)

    def _check_reads(self, step: Step, x: KVLayer, rows: list[tuple[Seq, int, int]]) -> None:
        longest = max(b for _, _, b in rows)
        names = (x.fields[0].name, x.fields[1].name)
        for r in step.of_layer(x.layer)[2]:
            for name, both in zip(
                names, step.gather_both(x.layer, r, names, torch.float32), strict=True
            ):
                assert torch.equal(both, step.gather(x.layer, r, name, torch.float32))
        for of, f in enumerate(x.fields):
            got = np.full((step.n_tokens, x.heads, longest, f.shape[0]), np.nan, np.float32)
            for r in step.of_layer(x.layer)[2]:
                values = step.gather(x.layer, r, f.name, torch.float32).numpy()
                seen = r.mask()
                mask = (
                    np.ones((*r.tokens.shape, values.shape[2]), bool)
                    if seen is None
                    else seen.numpy()
                )
                for i, t in np.ndindex(*r.tokens.shape):
                    slots = mask[i, t].nonzero()[0]
                    at = r.kpos[i].numpy()[slots]
                    for j, head in enumerate(r.group.heads(x.layer)):
                        into = got[int(r.tokens[i, t]), head]
                        assert len(set(at.tolist())) == len(at)
                        assert np.isnan(into[at]).all(), "a position is read twice"
                        into[at] = values[i, j, slots]
            at = 0
            for s, a, b in rows:
                want = self._expected(s, x, f.name, of, a, b, longest)
                mine = got[at : at + b - a]
                assert np.array_equal(mine, want, equal_nan=True), _difference(
                    mine, want, x.layer, f.name, a
                )
                at += b - a

    def _expected(
        self, s: Seq, x: KVLayer, name: str, of: int, start: int, stop: int, longest: int
    ) -> np.ndarray:
        """What queries [start, stop) read: `[T, heads, longest, D]`, NaN where nothing is read."""
        width = x.fields[of].shape[0]
        raw = elements(np.array(s.tokens[:stop], np.int64), x.layer, x.heads, width, of)
        plain = next(g for g in self.layout.spec.groups if x.layer in g.layers and g.raw is None)
        for h in range(
            x.heads if plain.codec != "fp32" else 0
        ):  # rows of a plain codec are rounded when they are written
            raw[:, h] = self.sealed(plain, name, raw[:, h], 0, (x.layer, h))
        lossy = self.lossy_of(x.layer)
        coded, residual, size = raw.copy(), None, 1
        if lossy is not None:
            body, residual = lossy
            size = body.block_tokens
            for first in range(0, stop // size * size, size):
                for h in range(x.heads):
                    at = slice(first, first + size)
                    coded[at, h] = self.sealed(body, name, raw[at, h], first, (x.layer, h))
        out = np.full((stop - start, x.heads, longest, width), np.nan, np.float32)
        for q in range(start, stop):
            limit = 0 if residual is None else first_raw(q, size, residual.residual_tokens)
            sinks = 0 if residual is None else residual.sinks
            for h in range(x.heads):
                gone = self._dropped(s, x.layer, h)
                for k in range(q + 1):
                    if may_read(x.span, q, k) and k not in gone:
                        out[q - start, h, k] = coded[k, h] if sinks <= k < limit else raw[k, h]
        return out

    @staticmethod
    def _dropped(s: Seq, layer: int, head: int) -> set[int]:
        for chain, gone in zip(s.table.chains, s.dropped, strict=True):
            if (layer, head) in chain.group.coords:
                return gone
        raise AssertionError("a coordinate is in no chain")

    # -- recurrent state -----------------------------------------------------------------------------------------

    def _state_rows(self, s: Seq) -> list[tuple[Chain, int, str, torch.Tensor]]:
        out = []
        for chain in s.table.chains:
            if chain.group.recurrent:
                at = int(self.store.units(chain.group, chain.ids[:1])[0])
                for layer in chain.group.layers:
                    for f in chain.group.fields:
                        view = self.store.view(chain.group, layer, f.name)
                        out.append((chain, layer, f.name, view[at, 0]))
        return out

    def _check_states(self, s: Seq, start: int) -> None:
        if start:
            for _, layer, _, row in self._state_rows(s):
                want = elements(np.array([s.tokens[start - 1]]), layer, 1, row.shape[-1], 9)[0, 0]
                assert np.array_equal(row.numpy(), want), "a state is not its sequence's"

    def _write_states(self, s: Seq, stop: int) -> None:
        for _, layer, _, row in self._state_rows(s):
            row.copy_(
                torch.from_numpy(
                    elements(np.array([s.tokens[stop - 1]]), layer, 1, row.shape[-1], 9)[0, 0]
                )
            )

    # -- the books -----------------------------------------------------------------------------------------------

    def check_books(self) -> None:
        """Law 1: counts recounted from tables, lists and slabs, not from the pools' own counters."""
        refs: dict[tuple[int, int], int] = {}
        for seq in self.seqs:
            for chain in seq.table.chains:
                assert chain.held == np.count_nonzero(chain.ids[: chain.count] != -1)
                for block in chain.live().tolist():
                    refs[id(chain.pool), block] = refs.get((id(chain.pool), block), 0) + 1
        for pool, block in self.extra:
            refs[id(pool), block] = refs.get((id(pool), block), 0) + 1
        check_pools(self.store.arena.pools, refs)
        u = self.store.usage()
        assert u.held_bytes + u.cached_bytes + u.free_bytes == u.total_bytes
        assert u.held_bytes == sum(
            p.block_bytes for p in self.store.arena.pools for b in range(p.capacity) if p.refs(b)
        )
        for seq in self.seqs:
            t = seq.table
            assert (t.length, t.accepted, t.committed) == (
                len(seq.tokens),
                seq.accepted,
                seq.committed,
            )
            assert t.used_bytes() <= t.held_bytes()

    def check_sealed(self) -> None:
        """Law 2: the bytes of what is sealed, or has a name, are those of the first look."""
        now: dict[tuple[int, int], bytes] = {}
        places: set[tuple[int, int]] = set()
        pools = {id(p): p for p in self.store.arena.pools}
        for p in pools.values():
            self._watch(p)
        for seq in self.seqs:
            for c in seq.table.chains:
                places |= {(id(c.pool), b) for b in c.ids[: c.sealed].tolist() if b >= 0}
                places |= {(id(c.pool), b) for b in c.live().tolist() if c.pool.named(b)}
        for at, p in pools.items():
            places |= {(at, b) for b in p.idle()}
        places |= {(id(p), b) for p, b in self.extra}
        for at, block in places:
            p = pools[at]
            begin = p.byte_offset(block)
            now[at, block] = (
                self.store.arena.buffer[begin : begin + p.block_bytes].numpy().tobytes()
            )
            before = self.sealed_bytes.get((at, block))
            assert before is None or before == now[at, block], "sealed bytes changed"
        self.sealed_bytes = now

    def _watch(self, pool: BlockPool) -> None:
        """A block that is taken begins anew."""
        if "take" not in vars(pool):
            take = pool.take

            def taken() -> int:
                block = take()
                self.sealed_bytes.pop((id(pool), block), None)
                return block

            vars(pool)["take"] = taken

    def drain(self) -> None:
        """Law 9: after everything is released nothing is held; after eviction nothing is left."""
        for pool, block in self.extra:
            pool.release(block)
        for seq in self.seqs:
            seq.table.release()
        self.seqs, self.extra = [], []
        self.check_books()
        assert self.store.usage().held_bytes == 0
        for pool in self.store.arena.pools:
            for block in list(pool.idle()):
                pool.evict(block)
        assert self.store.usage().free_bytes == self.store.arena.total_bytes
        assert self.store.arena.free_slabs == self.store.arena.slabs


def check_pools(pools: list[BlockPool], refs: dict[tuple[int, int], int]) -> None:
    """Every block is in exactly one place: held, idle, on its slab's free list, or not handed out yet."""
    owners: dict[int, int] = {}
    for p in pools:
        held = {b for b in range(p.capacity) if p.refs(b)}
        assert {b: p.refs(b) for b in held} == {b: n for (at, b), n in refs.items() if at == id(p)}
        idle = list(p.idle())
        assert len(set(idle)) == len(idle) == p.cached
        assert len(held) == p.held
        assert not held & set(idle)
        assert all(p.named(b) for b in idle)
        assert sorted(p._where) == list(range(p.capacity)) == [p._where[b] for b in p._at]
        open_slabs, slab = [], p._open
        while slab != -1:
            open_slabs.append(slab)
            slab = p._open_next[slab]
        owned = [s for s in range(p.arena.slabs) if p._owned[s]]
        assert len(owned) == p.slabs
        for s in owned:
            assert owners.setdefault(s, id(p)) == id(p), "two pools own one slab"
            free, b = [], p._freed[s]
            while b != -1:
                free.append(b)
                b = p._next[b]
            base = s * p.per_slab
            free += [p._at[at] for at in range(base + p._fresh[s], base + p.per_slab)]
            inside = [b for b in [*held, *idle] if p.location(b)[0] == s]
            assert len(set(free)) == len(free)
            assert not set(free) & set(inside)
            assert len(free) + len(inside) == p.per_slab
            assert inside, "an empty slab was not given back"
            assert (s in open_slabs) == bool(free)
            assert p._used[s] == len(inside)
            assert p._slab_held[s] == sum(b in held for b in inside)
        assert len(open_slabs) == len(set(open_slabs)) == sum(s in owned for s in open_slabs)
        assert all(p.location(b)[0] in owned for b in [*held, *idle])
    arena = pools[0].arena
    spare = list(arena._free[: arena.free_slabs])
    assert len(set(spare)) == len(spare)
    assert not set(spare) & set(owners)
    assert len(spare) + len(owners) == arena.slabs


def _difference(got: np.ndarray, want: np.ndarray, layer: int, name: str, start: int) -> str:
    bad = ~((got == want) | (np.isnan(got) & np.isnan(want)))
    q, h, k, d = (int(x[0]) for x in bad.nonzero())
    where = f"layer {layer} {name}: query {start + q} head {h} position {k}"
    return f"{where}: read {got[q, h, k, d]}, not {want[q, h, k, d]}"
