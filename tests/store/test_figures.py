"""What the spec says a sequence takes, and what it then holds; where blocks lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laws.dense import plain_spans
from laws.small import KV, grown, layout_of, store_of
from laws.world import World
from lossy import Lossy
from quire.errors import CapacityError, ConfigError
from quire.plan import KVLayer, StateLayer
from quire.spans import Full, Window
from quire.spec import CacheSpec
from quire.store import BlockStore


def most_blocks(store: BlockStore, n: int, chunk: int) -> dict[str, int]:
    """What one sequence really holds at most on its way to n tokens."""
    table, most = store.open(), {g.name: 0 for g in store.spec.groups}
    while table.length < n:
        table.append(min(chunk, n - table.length))
        for c in table.chains:
            most[c.group.name] = max(most[c.group.name], c.held)
        table.commit()
    table.release()
    return most


@given(
    spans=st.lists(plain_spans, min_size=1, max_size=2),
    size=st.integers(1, 6),
    residual=st.one_of(st.none(), st.integers(0, 13)),
    state=st.booleans(),
    n=st.integers(0, 70),
    chunk=st.integers(1, 20),
)
def test_blocks_for_bounds_what_a_sequence_holds(spans, size, residual, state, n, chunk) -> None:  # type: ignore[no-untyped-def]
    codec = None if residual is None else Lossy(residual)
    layout = layout_of(*spans, size=size, codec=codec, state=state)
    spec = layout.spec
    store = BlockStore(spec, 1 << 20)
    said, held = spec.blocks_for(n, chunk_tokens=chunk), most_blocks(store, n, chunk)
    for g in spec.groups:
        assert held[g.name] <= said[g.name]
        slack = 0 if type(g.span) is Full or g.recurrent else 2 + len(g.span.reach(n))
        if slack:  # the schedule that holds most may be another one
            slack += (chunk - 1) // g.block_tokens
        assert said[g.name] <= held[g.name] + slack
    assert spec.bytes_for(n, chunk_tokens=chunk) == sum(
        said[g.name] * g.block_bytes for g in spec.groups
    )


@given(
    spans=st.lists(plain_spans, min_size=1, max_size=2),
    residual=st.one_of(st.none(), st.integers(0, 13)),
    slabs=st.integers(3, 12),
    per_slab=st.integers(1, 3),
    n=st.integers(1, 60),
)
def test_what_fits_does_fit(spans, residual, slabs, per_slab, n) -> None:  # type: ignore[no-untyped-def]
    layout = layout_of(*spans, codec=None if residual is None else Lossy(residual))
    slab = per_slab * max(g.block_bytes for g in layout.spec.groups)
    sizes = {g.block_bytes for g in layout.spec.groups}
    store = BlockStore(layout.spec, slab * max(slabs, len(sizes)), slab_bytes=slab)
    if store.fits(n, chunk_tokens=3):
        most_blocks(store, n, 3)
    elif all(type(s) is Full for s in spans) and residual is None:
        with pytest.raises(CapacityError):
            store.open().append(n)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_used_bytes_and_waste(device: str | None) -> None:
    layout = layout_of(Full(), size=4)
    store = store_of(layout, device=device)
    table = store.open()
    assert (table.held_bytes(), table.used_bytes()) == (0, 0)
    table.append(5)
    block = layout.spec.groups[0].block_bytes
    assert table.held_bytes() == 2 * block
    assert table.used_bytes() == 5 * block // 4
    recurrent = store_of(layout_of(Full(), state=True)).open()
    assert recurrent.used_bytes() == 0


def test_a_store_too_small_for_one_request_says_so_in_one_line() -> None:
    spec = layout_of(Full(), codec=Lossy(4)).spec
    with pytest.raises(CapacityError) as caught:
        BlockStore(spec, 2048, slab_bytes=2048)
    assert "is too small for one request" in str(caught.value)
    assert "need at least 4,096" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_counting_stores_make_the_same_choices_as_real_ones() -> None:
    layout = layout_of(Full(), Window(7), codec=Lossy(4))
    held = []
    for device in (None, "cpu"):
        store = BlockStore(layout.spec, 1 << 20, device=device)
        world_layers: list[KVLayer | StateLayer] = [KVLayer(0, 2, KV), KVLayer(1, 2, KV, Window(7))]
        table = store.open()
        trail = []
        world = World(world_layers, layout, store) if device else None
        seq = world.open() if world else None
        for n in (5, 1, 1, 9, 3):
            t = seq.table if seq else table
            t.append(n)
            if world and seq:
                seq.tokens += [next(world.numbers) for _ in range(n)]
                world.forward([(seq, len(seq.tokens) - n, len(seq.tokens))])
            t.commit()
            trail.append([c.held for c in t.chains])
        held.append(trail)
    assert held[0] == held[1]


def test_views_are_those_of_the_group_and_not_of_its_name() -> None:
    store = store_of(layout_of(Full()), device="cpu")
    table = grown(store, 4)
    whole = store.view(table.groups[0], 0, "k")
    table.split(0, [(0, 1)])
    part = store.view(table.groups[0], 0, "k")
    assert (whole.shape[1], part.shape[1]) == (2, 1)
    other = store.open()
    other.append(4)
    other.split(0, [(0, 0)])  # what stays is called as before and begins elsewhere
    assert other.groups[0].name == table.groups[0].name
    for look in (store.view, store.rows, store.slots):
        assert look(other.groups[0], 0, "k") is not look(table.groups[0], 0, "k")


def test_places_reach_every_block_of_a_full_arena() -> None:
    layout = layout_of(Full(), size=4)
    store = store_of(layout, slabs=5, device="cpu")
    group = layout.spec.groups[0]
    table = store.open()
    table.append(20)
    units = store.units(group, table.chains[0].ids[:5])
    assert sorted(units.tolist()) == [i * group.block_bytes // 64 for i in range(5)]
    for field in ("k", "v"):
        view = store.view(group, 0, field)
        view[torch.from_numpy(units)] = 3.0
    assert int((store.arena.buffer.view(torch.float32) == 3.0).sum()) == 5 * 2 * 4 * 4 * 2
    assert isinstance(np.asarray(units), np.ndarray)


def test_a_spec_refuses_what_does_not_belong_together() -> None:
    a, b = layout_of(Full(), codec=Lossy(4)).spec.groups
    with pytest.raises(ConfigError, match="raw group must exist"):
        CacheSpec((a,))
    with pytest.raises(ConfigError, match="unique"):
        CacheSpec((b, b))
