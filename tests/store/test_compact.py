"""Compaction: what is kept reads back bit for bit, what attention reads is what was kept, and all else is freed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from quire.attention import ReferenceBackend, Row, Step
from quire.attention.cpu import CpuBackend
from quire.attention.reference import TorchBackend
from quire.errors import CapacityError, InvariantError
from quire.kernels import native
from quire.models.moving import read_field, row_mover, unit_tokens
from quire.plan import KVLayer, Layout, build_layout
from quire.spec import Field, KVConfig, Window
from quire.store import BlockStore
from quire.store.compact import Part, compact, companion, families, settled

LAYERS, HEADS, WIDTH = 2, 3, 16
CODECS = (
    *(
        "fp32",
        "bf16",
        "fp8",
        "fp8:scale=token",
        "int8",
        "int8:scale=channel",
        "int4",
        "int4:rotate=false",
    ),
    *("int4;sinks=3;window=20", "kivi:bits=4,group=16,residual=16", "k=int8,v=int4"),
)


def layout_of(kv: str, *, window: bool = False) -> Layout:
    fields = (Field("k", (WIDTH,), "float32"), Field("v", (WIDTH,), "float32"))
    layers = [KVLayer(i, HEADS, fields) for i in range(LAYERS)]
    if window:
        layers.append(KVLayer(LAYERS, HEADS, fields, Window(10)))
    return build_layout(layers, KVConfig(kv, block_tokens=16), dtype="float32")


@dataclass
class World:
    """One table, all keys and values ever written, and of each coordinate the positions that it should hold."""

    kv: str
    seed: int = 0
    window: bool = False
    slabs: int = 400
    kept: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layout = layout_of(self.kv, window=self.window)
        slab = max(g.block_bytes for g in self.layout.spec.groups)
        self.store = BlockStore(self.layout.spec, slab * self.slabs, device="cpu", slab_bytes=slab)
        self.store.arena.buffer.fill_(255)  # no number
        self.table = self.store.open()
        self.rng = np.random.default_rng(self.seed)
        self.layers = LAYERS + self.window
        self.data = torch.zeros(self.layers, 2, 0, HEADS, WIDTH)
        self.kept = {(layer, h): [] for layer in range(LAYERS) for h in range(HEADS)}

    def grow(self, n: int) -> None:
        start = self.table.length
        new = torch.from_numpy(self.rng.standard_normal((self.layers, 2, n, HEADS, WIDTH))).float()
        self.data = torch.cat([self.data, new], 2)
        self.table.append(n)
        step = Step(self.store, self.layout, [Row(self.table, start, start + n)])
        for layer in range(self.layers):
            step.write(layer, {"k": new[layer, 0], "v": new[layer, 1]})
        self.table.commit()
        for positions in self.kept.values():
            positions.extend(range(start, start + n))

    def shrink(self, classes: int) -> None:
        """Drops at random; heads fall into so many classes of equal counts."""
        (name, chains), *_ = families(self.table).items()
        lossy = companion(self.table, chains[0]) is not None
        unit, size = unit_tokens(self.layout, chains[0].group), chains[0].group.block_tokens
        sinks = 3 if "sinks" in self.kv else 0
        of = {c: chain for chain in chains for c in chain.group.coords}
        by_class: dict[int, list[tuple[int, int]]] = {}
        for coord in sorted(of):
            by_class.setdefault(int(self.rng.integers(classes)), []).append(coord)
        parts, want = [], {}
        for coords in by_class.values():
            low = min(settled(self.table, of[c]) for c in coords)
            grain = max(unit, size if lossy else 1)
            least = -(-max(sinks, 1) // grain)
            n = int(self.rng.integers(least, max(least, low // grain) + 1)) * grain
            rows = []
            for c in coords:
                settled_slots = settled(self.table, of[c])
                first = -(-sinks // unit) * unit
                free = np.arange(first, settled_slots, unit)
                some = (
                    self.rng.choice(free, (n - first) // unit, replace=False) if n > first else []
                )
                slots = np.sort(np.concatenate([[*range(0, first, unit)], some])).astype(np.int64)
                rows.append((slots[:, None] + np.arange(unit)).reshape(-1)[:n])
                held, behind = self.kept[c][:settled_slots], self.kept[c][settled_slots:]
                want[c] = [held[i] for i in rows[-1]] + behind
            parts.append(Part(tuple(coords), np.stack(rows)))
        before = {c: self.read(c) for c in of}
        compact(self.table, {name: parts}, row_mover(self.layout))
        for c, positions in want.items():
            old = {p: i for i, p in enumerate(self.kept[c])}
            for had, has in zip(before[c], self.read(c), strict=True):
                rows_now = [old[p] for p in positions[: has.shape[0]]]
                assert torch.equal(has, had[rows_now]), "codes are copied, never encoded twice"
        self.kept.update(want)

    def chain(self, coord: tuple[int, int]):
        return next(
            c for cs in families(self.table).values() for c in cs if coord in c.group.coords
        )

    def read(self, coord: tuple[int, int]) -> list[torch.Tensor]:
        """What the chain stores for one coordinate: keys and values of all its slots, decoded."""
        chain, (layer, head) = self.chain(coord), coord
        n = len(chain.all_positions(self.table.length))
        at = chain.group.heads(layer).index(head)
        return [read_field(self.store, self.layout, chain, layer, f, n)[at] for f in ("k", "v")]

    def check(self) -> None:
        """Positions, bytes, and attention of one more token, by every backend, against the kept sets."""
        n = self.table.length
        for coord, positions in self.kept.items():
            chain = self.chain(coord)
            mine = chain.true_positions(n)[chain.group.coords.index(coord)].tolist()
            assert mine == positions[: len(mine)]
            assert (
                len(mine) > len(positions) - 48 if chain.group.raw else len(mine) == len(positions)
            )
        self.grow(1)
        q = torch.from_numpy(self.rng.standard_normal((1, 2 * HEADS, WIDTH))).float()
        step = Step(self.store, self.layout, [Row(self.table, n, n + 1)])
        backends = [ReferenceBackend(), TorchBackend()]
        if native.load() is not None:
            backends.append(CpuBackend())
        for layer in range(LAYERS):
            want = self.dense(layer, q[0].double(), n)
            for backend in backends:
                got = backend.run(step, layer, q, scale=0.25)[0].double()
                assert (got - want).abs().max() < 2e-3 * want.norm(), backend.name

    def dense(self, layer: int, q: torch.Tensor, n: int) -> torch.Tensor:
        out = []
        for head in range(HEADS):
            chain, coord = self.chain((layer, head)), (layer, head)
            positions = self.kept[coord]
            k, v = (self.data[layer, i, positions, head] for i in (0, 1))
            raw = companion(self.table, chain)
            if raw is not None:
                stored = self.read(coord)
                low, sinks = raw.group.span.start(n), raw.group.span.sinks
                for i, p in enumerate(positions):
                    if sinks <= p < low:
                        k[i], v[i] = stored[0][i], stored[1][i]
            elif self.kv == "bf16":
                k, v = k.bfloat16().float(), v.bfloat16().float()
            for share in range(2):
                s = torch.softmax(k.double() @ q[2 * head + share] * 0.25, 0)
                out.append(s @ v.double())
        return torch.stack(out)


@pytest.mark.parametrize("kv", CODECS)
@pytest.mark.parametrize("classes", [1, 4])
def test_what_is_kept_reads_back_and_is_attended(kv: str, classes: int) -> None:
    world = World(kv, seed=classes)
    world.grow(150)
    for n in (1, 40, 33, 70):
        world.shrink(classes)
        world.check()
        world.grow(n)
    world.check()
    held = sum(c.held * c.group.block_bytes for c in world.table.chains)
    assert world.store.usage().held_bytes == held == world.table.held_bytes()
    world.table.release()
    assert world.store.usage().held_bytes == 0


def test_a_windows_layer_is_left_alone() -> None:
    world = World("fp32", window=True)
    world.grow(64)
    before = next(c for c in world.table.chains if c.group.span == Window(10)).ids.copy()
    world.shrink(2)
    after = next(c for c in world.table.chains if c.group.span == Window(10)).ids
    assert (before == after).all()
    world.check()


def test_a_shared_prefix_stays_for_its_other_holder() -> None:
    world = World("fp32")
    world.grow(64)
    other = world.table.fork()
    step = Step(world.store, world.layout, [Row(other, 63, 64)])
    before = [step.gather(0, r, "k", torch.float32) for r in step.of_layer(0)[2]]
    world.shrink(1)
    world.grow(20)
    after = [step.gather(0, r, "k", torch.float32) for r in step.of_layer(0)[2]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    other.release()
    world.check()


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("kv", ["fp32", "int8"])
def test_without_room_nothing_changes(kv: str, classes: int) -> None:
    world = World(kv, slabs=26)
    world.grow(100)
    other = world.store.open()
    with pytest.raises(CapacityError):
        other.append(10_000)
    for n in (64, 16, 1):
        with contextlib.suppress(CapacityError):
            while True:
                other.append(n)
    usage, ids = world.store.usage(), [c.ids[: c.count].tolist() for c in world.table.chains]
    with pytest.raises(CapacityError):
        world.shrink(classes)
    assert world.store.usage() == usage
    assert [c.ids[: c.count].tolist() for c in world.table.chains] == ids


def test_only_final_tokens_and_whole_families() -> None:
    world = World("fp32")
    world.grow(20)
    name, chains = next(iter(families(world.table).items()))
    coords = chains[0].group.coords
    some = Part(coords[1:], np.zeros((len(coords) - 1, 1), np.int64))
    with pytest.raises(InvariantError, match="all its coordinates"):
        compact(world.table, {name: [some]})
    world.table.append(1)
    with pytest.raises(InvariantError, match="not final"):
        compact(world.table, {name: []})
