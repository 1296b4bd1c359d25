"""Compaction: each coordinate's kept tokens, copied as stored into private blocks; the old ones go back.

    before    |####|####|####|####|##..|      one group, all coordinates
    part      |####|##..|                      coordinates that keep 6 rows each: which ones is each one's own affair
    part      |####|####|#...|                 those that keep 9, in a chain of their own

    lossy     body |####|####|####|####|      rows are chosen below `settled`, which nobody reads raw any more;
              raw             |....|##..|      whole blocks from there on, and the raw companion, stay as they are

Coordinates that keep equally many tokens share a chain whichever these are: keys carry their positions, and all that a
query must know of kept tokens is that they lie before it. So memory is freed per layer and per head, by the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from quire.errors import CapacityError, InvariantError
from quire.spec import BOUNDS, CacheGroup, Coord, Residual
from quire.store.chain import GONE, Chain
from quire.store.store import BlockStore
from quire.store.table import BlockTable

__all__ = ["Move", "Part", "compact", "families", "move_rows", "settled"]

Move = Callable[[BlockStore, Chain, Chain, int, np.ndarray, np.ndarray, np.ndarray], None]
"""move(store, old, new, layer, old tiles [h], new tiles [h], slots [h, n]): copies rows of one layer's heads, as they
are stored, to the first n rows of the new chain. Tiles count the chain's own heads of the layer."""


@dataclass(frozen=True)
class Part:
    """Coordinates that keep equally many rows: `slots[i]` are those of `coords[i]`, ascending, in its chain."""

    coords: tuple[Coord, ...]
    slots: np.ndarray


def families(table: BlockTable) -> dict[str, list[Chain]]:
    """The chains that tokens can be dropped from, by the name of the group that they were once: full attention only."""
    far = 1 << 40
    raws = {c.group.raw for c in table.chains}
    out: dict[str, list[Chain]] = {}
    for c in table.chains:
        full = not c.group.recurrent and c.group.span.needs(far) == ((0, far),)
        if full and c.group.name not in raws:
            out.setdefault(c.group.name.partition("/")[0], []).append(c)
    return out


def settled(table: BlockTable, chain: Chain) -> int:
    """How many slots may be chosen from: all committed ones, of a lossy body those that nobody reads raw any more."""
    raw = companion(table, chain)
    if raw is None:
        return chain.slot(table.committed)
    assert isinstance(raw.group.span, Residual)
    whole = raw.group.span.start(table.committed) // chain.group.block_tokens
    return chain.slot(max(chain.cut, whole * chain.group.block_tokens))


def companion(table: BlockTable, chain: Chain) -> Chain | None:
    """The raw chain beside a lossy body."""
    return next((c for c in table.chains if chain.group.reads(c.group)), None)


def compact(
    table: BlockTable, wanted: Mapping[str, Sequence[Part]], move: Move | None = None
) -> None:
    """Keeps chosen rows of whole families, all or nothing.

    Args:
        table: with no token that is not committed.
        wanted: a family to its parts, which together are all its coordinates. Of a lossy body each part keeps whole
            blocks, and what lies in the raw sinks' rows stays in its place.
        move: copies rows; by default field by field, which serves fields stored per token.

    Raises:
        CapacityError: no blocks for the copies; nothing has changed.

    Cost: every kept row is read and written once.
    """
    if table.length != table.committed:
        raise InvariantError("tokens that are not final cannot be compacted")
    work = [
        _Family(table, chains, wanted[name])
        for name, chains in families(table).items()
        if name in wanted
    ]
    taken: list[Chain] = []
    try:
        for family in work:
            family.take(taken)
    except CapacityError:
        for chain in taken:
            while chain.count:
                chain.pop()
        raise
    table.leave()
    for family in work:
        family.fill(move or move_rows)
        family.replace()


class _Family:
    """One family's way from its old chains to its new ones."""

    def __init__(self, table: BlockTable, old: list[Chain], parts: Sequence[Part]) -> None:
        self.table, self.old, self.parts = table, old, parts
        self.raws = [companion(table, c) for c in old]
        self.low = [settled(table, c) for c in old]
        self.source = {coord: i for i, c in enumerate(old) for coord in c.group.coords}
        if sorted(c for p in parts for c in p.coords) != sorted(self.source):
            raise InvariantError("the parts of a family are all its coordinates, each once")
        self.same = len(old) == len(parts) == 1
        self.new: list[Chain] = []
        self.new_raws: list[Chain] = []

    def take(self, taken: list[Chain]) -> None:
        """Blocks for everything that will be copied."""
        store = self.table.store
        base, raw = self.old[0].group, self.raws[0]
        name, size = base.name.partition("/")[0], base.block_tokens
        for i, part in enumerate(self.parts):
            tag = "" if self.same else f"/{i}"
            group = replace(base, name=name + tag, coords=part.coords)
            n_blocks = -(-part.slots.shape[1] // size)
            raw_name = "" if raw is None else raw.group.name.partition("/")[0] + tag
            if raw is not None:
                group = replace(group, raw=raw_name)
                if part.slots.shape[1] % size:
                    raise InvariantError("a lossy body keeps whole blocks")
                n_blocks += 0 if self.same else self.old[0].count - self.low[0] // size
            self.new.append(self._take(store, group, n_blocks, taken))
            if raw is not None and not self.same:
                raw_group = replace(raw.group, name=raw_name, coords=part.coords)
                fresh = Chain(raw_group, store.pool_for(raw_group))
                taken.append(fresh)
                self.new_raws.append(fresh)
                for block in raw.ids[: raw.count]:
                    if block == GONE:
                        fresh.push(GONE)
                        fresh.held -= 1
                    else:
                        fresh.push(fresh.pool.take())
                fresh.cursor, fresh.sealed = raw.cursor, raw.sealed

    @staticmethod
    def _take(store: BlockStore, group: CacheGroup, n_blocks: int, taken: list[Chain]) -> Chain:
        fresh = Chain(group, store.pool_for(group))
        taken.append(fresh)
        for _ in range(n_blocks):
            fresh.push(fresh.pool.take())
        return fresh

    def fill(self, move: Move) -> None:
        """Copies, and says what the new chains hold."""
        table, size = self.table, self.old[0].group.block_tokens
        every = [c.true_positions(table.length) for c in self.old]
        for at, (new, part) in enumerate(zip(self.new, self.parts, strict=True)):
            n = part.slots.shape[1]
            self._copy(new, part, move)
            if self.raws[0] is not None:
                self._rest(at, new)
            new.own = np.stack(
                [
                    every[self.source[c]][self.old[self.source[c]].group.coords.index(c)][slots]
                    for c, slots in zip(part.coords, part.slots, strict=True)
                ]
            )
            new.kept = np.arange(n)
            new.cut = self.old[0].position(self.low[0])
            new.sealed = new.slot(table.committed) // size if self.raws[0] is None else new.count
            new.encoded = 0 if self.raws[0] is None else new.count

    def _copy(self, new: Chain, part: Part, move: Move) -> None:
        if self.table.store.arena.device is None or not part.slots.size:
            return
        for layer in new.group.layers:
            first = new.group.tile_index(layer)
            heads = new.group.heads(layer)
            for i, old in enumerate(self.old):
                there = old.group.heads(layer)
                mine = [t for t, h in enumerate(heads) if h in there]
                if mine:
                    tiles = np.array([there.index(heads[t]) for t in mine])
                    slots = part.slots[[first + t for t in mine]]
                    move(self.table.store, self.old[i], new, layer, tiles, np.array(mine), slots)

    def _rest(self, at: int, new: Chain) -> None:
        """Of a lossy body the blocks behind the settled ones, and the raw ones: by reference where nothing is split."""
        old, size = self.old, self.old[0].group.block_tokens
        if self.same:
            for block in old[0].ids[self.low[0] // size : old[0].count]:
                old[0].pool.hold(int(block))
                new.push(int(block))
            return
        kept = new.count - (old[0].count - self.low[0] // size)
        for chain, low in zip(old, self.low, strict=True):
            self._tiles(chain, chain.ids[low // size : chain.count], new, new.ids[kept : new.count])
        for raw in self.raws:
            assert raw is not None
            self._tiles(raw, raw.live(), self.new_raws[at], self.new_raws[at].live())

    def _tiles(self, old: Chain, blocks: np.ndarray, new: Chain, into: np.ndarray) -> None:
        """Whole tiles of the coordinates that two chains have in common."""
        store = self.table.store
        if store.arena.device is None:
            return
        buffer, width = store.arena.buffer, old.group.tile_bytes
        at = {c: i for i, c in enumerate(old.group.coords)}
        common = [(at[c], i) for i, c in enumerate(new.group.coords) if c in at]
        for block, fresh in zip(blocks, into, strict=True):
            a, b = old.pool.byte_offset(int(block)), new.pool.byte_offset(int(fresh))
            for source, target in common:
                begin = a + source * width
                buffer[b + target * width : b + (target + 1) * width] = buffer[
                    begin : begin + width
                ]

    def replace(self) -> None:
        """Puts the new chains in the old ones' places and gives the old blocks back."""
        chains = self.table.chains
        gone: list[Chain] = [*self.old, *(c for c in self.raws if c is not None and not self.same)]
        first = min(i for i, c in enumerate(chains) if c in gone)
        stay = [c for c in chains if not any(c is g for g in gone)]
        chains[:] = [*stay[:first], *self.new, *self.new_raws, *stay[first:]]
        for old in gone:
            while old.count:
                old.pop()


def move_rows(
    store: BlockStore,
    old: Chain,
    new: Chain,
    layer: int,
    tiles: np.ndarray,
    into: np.ndarray,
    slots: np.ndarray,
) -> None:
    """Copies token rows of every field, which must be stored per token."""
    import torch

    size = old.group.block_tokens
    n = slots.shape[1]
    device = store.arena.device

    def tensor(a: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(a)).long().to(device)

    source = (
        tensor(store.units(old.group, old.ids[slots // size])),
        tensor(tiles)[:, None],
        tensor(slots % size),
    )
    rows = np.arange(n)
    units = (
        tensor(store.units(new.group, new.ids[rows // size]))[None],
        tensor(into)[:, None],
        tensor(rows % size)[None],
    )
    for f in old.group.fields:
        if f.name == BOUNDS:
            continue  # of whole blocks, which these no longer are; who drops tokens does not ask for them
        if f.per != "token":
            raise InvariantError(
                f"field {f.name} is stored per block; its codec must move its rows"
            )
        store.view(new.group, layer, f.name)[units] = store.view(old.group, layer, f.name)[source]
