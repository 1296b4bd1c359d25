"""The pool and the arena: order, slabs, and random programs over pools of several sizes against counts."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laws.world import check_pools
from quire.errors import CapacityError, ConfigError, InvariantError
from quire.store import Arena, BlockPool, fit_slab_bytes


def pool_of(slabs: int = 4, per_slab: int = 4, **more) -> BlockPool:  # type: ignore[no-untyped-def]
    return BlockPool(Arena(slabs * per_slab * 64, per_slab * 64), 64, **more)


def refs_of(*pools: BlockPool) -> dict[tuple[int, int], int]:
    return {(id(p), b): p.refs(b) for p in pools for b in range(p.capacity) if p.refs(b)}


# -- order -------------------------------------------------------------------------------------------------------


def test_idle_blocks_go_least_recently_used_first() -> None:
    pool = pool_of(slabs=1)
    blocks = [pool.take() for _ in range(4)]
    for b in blocks:
        pool.name(b)
    for b in (blocks[2], blocks[0], blocks[3], blocks[1]):
        pool.release(b)
    pool.hold(blocks[0])  # a hit: used again, so it goes last
    pool.release(blocks[0])
    assert list(pool.idle()) == [blocks[2], blocks[3], blocks[1], blocks[0]]
    assert [pool.take() for _ in range(4)] == [blocks[2], blocks[3], blocks[1], blocks[0]]


def test_unnamed_blocks_are_free_at_once_and_taken_before_idle_ones() -> None:
    pool = pool_of(slabs=1)
    kept, lost = pool.take(), pool.take()
    pool.name(kept)
    pool.release(kept)
    pool.release(lost)
    assert (pool.held, pool.cached, pool.free) == (0, 1, 3)
    assert kept not in {pool.take() for _ in range(3)}
    assert pool.take() == kept


def test_a_slab_is_cleared_while_others_give_up_more_of_it() -> None:
    """Blocks that go together: who is told of one gives up the rest, in the slab that is being emptied, too."""
    arena = Arena(4 * 256, 256)
    pool, other = BlockPool(arena, 64), BlockPool(arena, 128)
    blocks = [pool.take() for _ in range(16)]
    for b in blocks:
        pool.name(b)
    for b in blocks[2:]:
        pool.release(b)
    together = set(blocks[2:8])

    def told(block: int) -> None:
        if block in together:
            together.discard(block)
            while together:
                pool.unname(together.pop())

    pool.on_evict = told
    taken = [other.take() for _ in range(6)]
    assert len(set(taken)) == 6
    assert (pool.held, other.held) == (2, 6)
    check_pools([pool, other], refs_of(pool, other))
    for b in taken:
        other.release(b)
    for b in blocks[:2]:
        pool.release(b)
    assert arena.usage().held_bytes == 0
    check_pools([pool, other], {})


def test_eviction_is_announced_before_the_block_is_used_again() -> None:
    told: list[int] = []
    pool = pool_of(slabs=1, per_slab=2, on_evict=told.append)
    blocks = [pool.take(), pool.take()]
    for b in blocks:
        pool.name(b)
        pool.release(b)
    assert pool.take() == blocks[0]
    assert told == blocks[:1]
    pool.unname(blocks[1])
    assert told == blocks
    assert (pool.cached, pool.held) == (0, 1)


def test_a_free_slab_is_taken_before_something_cached_is_lost() -> None:
    pool = pool_of(slabs=2, per_slab=2)
    blocks = [pool.take(), pool.take()]
    for b in blocks:
        pool.name(b)
        pool.release(b)
    pool.take()
    assert pool.cached == 2


# -- mistakes are our bugs ---------------------------------------------------------------------------------------


def test_books_that_would_not_balance_are_refused() -> None:
    pool = pool_of()
    block = pool.take()
    with pytest.raises(InvariantError, match="not cached"):
        pool.evict(block)
    pool.release(block)
    for act in (pool.release, pool.hold, pool.name):
        with pytest.raises(InvariantError):
            act(block)
    assert (pool.held, pool.cached) == (0, 0)
    with pytest.raises(InvariantError, match="blocks of 128 bytes in slabs of 64"):
        BlockPool(Arena(640, 64), 128)


# -- slabs -------------------------------------------------------------------------------------------------------


def test_an_empty_slab_goes_back_to_the_arena() -> None:
    pool = pool_of(slabs=3, per_slab=2)
    blocks = [pool.take() for _ in range(6)]
    assert pool.arena.free_slabs == 0
    pool.release(blocks[2])
    assert pool.arena.free_slabs == 0
    pool.release(blocks[3])
    assert pool.arena.free_slabs == 1
    other = BlockPool(pool.arena, 128)
    assert other.take() >= 0
    with pytest.raises(CapacityError, match="no block of 128 bytes left: 1 held"):
        other.take()


@pytest.mark.parametrize("per_slab", [1, 2, 3])
def test_a_cached_slab_of_another_pool_is_cleared_the_least_recently_used_first(
    per_slab: int,
) -> None:
    arena = Arena(3 * per_slab * 64, per_slab * 64)
    small, large = BlockPool(arena, 64), BlockPool(arena, 64 * per_slab)
    slabs = [[small.take() for _ in range(per_slab)] for _ in range(3)]
    for slab in slabs:
        for b in slab:
            small.name(b)
    for i in (1, 0, 2):
        for b in slabs[i]:
            small.release(b)
    large.take()
    assert set(small.idle()) == {*slabs[0], *slabs[2]}
    large.take()
    assert set(small.idle()) == set(slabs[2])


def test_blocks_that_are_held_move_with_their_bytes() -> None:
    arena = Arena(2 * 256, 256, device="cpu")
    small, large = BlockPool(arena, 64), BlockPool(arena, 256)
    blocks = [small.take() for _ in range(8)]
    for b in blocks:
        at = small.byte_offset(b)
        arena.buffer[at : at + 64] = b + 1
    kept = [blocks[0], blocks[5]]
    for b in blocks:
        if b not in kept:
            small.release(b)
    large.take()  # each slab holds one block: one of them moves over
    assert small.slabs == 1
    for b in kept:
        at = small.byte_offset(b)
        assert arena.buffer[at : at + 64].tolist() == [b + 1] * 64
    assert len({small.location(b) for b in kept}) == 2
    check_pools([small, large], refs_of(small, large))


def test_cached_blocks_make_way_for_held_ones_that_must_move() -> None:
    arena = Arena(2 * 128, 128)
    small, large = BlockPool(arena, 64), BlockPool(arena, 128)
    blocks = [small.take() for _ in range(4)]
    for b in (blocks[1], blocks[3]):  # one held and one cached block in each slab: nothing is free
        small.name(b)
        small.release(b)
    large.take()
    assert (small.held, small.cached, small.slabs) == (2, 0, 1)
    check_pools([small, large], refs_of(small, large))


def test_taking_and_releasing_allocate_nothing() -> None:
    pool = pool_of(slabs=64, per_slab=64)

    def churn() -> None:
        for _ in range(20):
            first = pool.take()
            for _ in range(300):
                pool.take()
            for b in range(pool.capacity):
                if pool.refs(b) and b != first:
                    pool.release(b)
            pool.release(first)

    churn()
    grown, peaks = [], []
    tracemalloc.start()
    try:
        for _ in range(
            4
        ):  # all threads are counted, and the test runner's own may allocate meanwhile
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            churn()
            after, peak = tracemalloc.get_traced_memory()
            grown.append(after - before)
            peaks.append(peak - before)
    finally:
        tracemalloc.stop()
    assert min(grown) < 512
    assert min(peaks) < 4096  # integers that come and go


# -- random programs ---------------------------------------------------------------------------------------------

operations = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "take", "release", "release", "name", "hit", "evict"]),
        st.integers(0, 2),
        st.integers(0, 99),
    ),
    max_size=120,
)


@given(
    units=st.lists(st.integers(1, 6), min_size=2, max_size=3),
    slab=st.integers(6, 13),
    slabs=st.integers(1, 6),
    program=operations,
)
@settings(max_examples=max(150, settings.default.max_examples))
def test_what_is_free_is_free_for_all(units, slab, slabs, program) -> None:  # type: ignore[no-untyped-def]
    """A block is refused only when the held ones alone, packed as tightly as can be, leave no slab."""
    arena = Arena(slabs * slab * 64, slab * 64)
    pools = [BlockPool(arena, u * 64) for u in units]
    held: list[tuple[BlockPool, int]] = []
    for what, which, j in program:
        pool = pools[which % len(pools)]
        mine = [h for h in held if h[0] is pool]
        if what == "take":
            try:
                held.append((pool, pool.take()))
            except CapacityError:
                packed = sum(-(-(p.held + (p is pool)) // p.per_slab) for p in pools)
                assert packed > arena.slabs
        elif what == "release" and mine:
            _, block = mine[j % len(mine)]
            held.remove((pool, block))
            pool.release(block)
        elif what == "name" and mine:
            pool.name(mine[j % len(mine)][1])
        elif what in ("hit", "evict") and pool.cached:
            block = list(pool.idle())[j % pool.cached]
            if what == "hit":
                pool.hold(block)
                held.append((pool, block))
            else:
                pool.evict(block)
        want: dict[tuple[int, int], int] = {}
        for p, b in held:
            want[id(p), b] = want.get((id(p), b), 0) + 1
        check_pools(pools, want)


# -- the arena ---------------------------------------------------------------------------------------------------


def test_an_arena_below_one_slab_is_refused_in_one_line() -> None:
    with pytest.raises(CapacityError) as caught:
        Arena(1000, 1024)
    assert (
        str(caught.value)
        == "the arena of 1,000 bytes is smaller than one slab of 1,024 bytes; give it more"
    )
    with pytest.raises(ConfigError, match="multiple of 64"):
        Arena(1000, 100)


def test_an_arena_without_a_device_has_no_bytes() -> None:
    arena = Arena(1 << 36, 2 << 20)
    assert arena.usage().free_bytes == 1 << 36
    with pytest.raises(ConfigError, match="counts only"):
        _ = arena.buffer


@given(
    units=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
    target=st.sampled_from([1 << 12, 1 << 16, 2 << 20]),
)
def test_fit_slab_bytes_is_near_the_target_and_wastes_little(units: list[int], target: int) -> None:
    sizes = [u * 64 for u in units]
    slab = fit_slab_bytes(sizes, target)
    low = max(target, *sizes)
    assert max(sizes) <= slab <= 2 * low
    assert slab % 64 == 0
    assert slab >= low // 2
    assert any(slab % s == 0 for s in sizes)
    if len(set(sizes)) == 1:
        assert slab % sizes[0] == 0
    assert fit_slab_bytes(reversed(sizes), target) == slab


def test_fit_slab_bytes_of_usual_blocks() -> None:
    assert fit_slab_bytes([98304, 24576]) % 98304 == 0
    with pytest.raises(ConfigError):
        fit_slab_bytes([])
    with pytest.raises(ConfigError):
        fit_slab_bytes([0, 64])


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")
def test_the_arena_s_memory_may_be_huge_pages() -> None:
    arena = Arena(64 << 20, device="cpu")
    begin = arena.buffer.data_ptr()
    inside, flags = False, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            low, high = (int(x, 16) for x in line.split()[0].split("-"))
            inside = low <= begin + (32 << 20) < high
        elif inside and line.startswith("VmFlags"):
            flags = line
    assert " hg" in flags
