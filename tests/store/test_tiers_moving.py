"""A block's bytes out of the arena and back: all of its own, and nothing of anybody else's."""

from __future__ import annotations

import numpy as np
import pytest

from quire.errors import InvariantError
from quire.spec import CacheGroup, CacheSpec, Field
from quire.store import BlockStore
from quire.store.tiers.moving import Mover, unmeant

GROUP = CacheGroup(
    "g",
    ((0, 0), (0, 1), (1, 0)),
    (
        Field("k", (6,), "float16"),  # 12 bytes a token: 96 of 128 in a block of 8
        Field("v", (16,), "float16"),  # 32: 256, nothing is left
        Field("scale", (3,), "float16", "block"),
    ),
    block_tokens=8,
)


def test_the_parts_that_are_nobodys() -> None:
    assert unmeant(GROUP, 8) == [slice(96, 128), slice(390, 448)]
    assert unmeant(GROUP, 5) == [slice(60, 128), slice(288, 384), slice(384, 448)]
    assert GROUP.tile_bytes == 448


@pytest.mark.parametrize("n_tokens", [1, 5, 8])
def test_there_and_back(n_tokens: int) -> None:
    store = BlockStore(CacheSpec((GROUP,)), 1 << 20, device="cpu")
    store.arena.buffer.fill_(255)  # what was somebody else's
    pool, mover = store.pool_for(GROUP), Mover(store.arena)
    source, target = pool.take(), pool.take()
    out = mover.read(GROUP, pool, source, n_tokens)
    tiles = out.reshape(3, 448)
    meant = np.zeros(448, bool)
    meant[: 12 * n_tokens] = meant[128 : 128 + 32 * n_tokens] = True
    meant[384:390] = n_tokens == 8
    assert (tiles[:, meant] == 255).all()
    assert not tiles[:, ~meant].any()
    draw = np.random.Generator(np.random.PCG64(1)).integers(0, 256, len(out), np.uint8)
    mover.write(pool, target, draw)
    start = pool.byte_offset(target)
    assert np.array_equal(store.arena.buffer[start : start + len(draw)].numpy(), draw)
    start = pool.byte_offset(source)
    assert (store.arena.buffer[start : start + len(draw)] == 255).all()


def test_an_arena_that_counts_has_nothing_to_move() -> None:
    assert not Mover(BlockStore(CacheSpec((GROUP,)), 1 << 20).arena).there


def test_units_beside_the_arena_are_addresses() -> None:
    store = BlockStore(CacheSpec((GROUP,)), 1 << 20, device="cpu")
    mover = Mover(store.arena)
    rows = mover.space(3, GROUP.block_bytes)
    begin = store.arena.buffer.data_ptr()
    assert [begin + 64 * int(u) for u in mover.units(rows)] == [row.ctypes.data for row in rows]
    with pytest.raises(InvariantError, match="do not begin at its units"):
        mover.units(rows[:, 8:])
