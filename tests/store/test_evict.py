"""Which idle block goes first."""

from __future__ import annotations

import pytest

from engine.fake_runner import Clock
from quire.errors import ConfigError
from quire.store import Arena, BlockPool
from quire.store.evict import CostAware, make_eviction
from store.test_sharing import IDS, fill, leave, made


def pool_of(n: int, policy: CostAware) -> BlockPool:
    return BlockPool(Arena(64 * n, 64 * n), 64, policy=policy)


def idle(pool: BlockPool, uses: int = 1) -> int:
    """A new idle block that was found `uses - 1` times."""
    block = pool.take()
    pool.name(block)
    for _ in range(uses - 1):
        pool.found(block)
    pool.release(block)
    return block


def touch(pool: BlockPool, block: int) -> None:
    pool.hold(block)
    pool.found(block)
    pool.release(block)


def given_up(pool: BlockPool) -> list[int]:
    """Blocks in the order in which they are evicted from now on; ids come back, so only the first time counts."""
    log: list[int] = []
    pool.on_evict = log.append
    return log


def test_a_scan_does_not_wash_out_what_is_used_again() -> None:
    pool = pool_of(8, CostAware())
    hot = [idle(pool, uses=64) for _ in range(4)]
    gone = given_up(pool)
    for _ in range(30):
        idle(pool)
    assert len(gone) == 26
    assert not set(hot) & set(gone)


def test_what_is_never_used_again_goes_in_the_end() -> None:
    """A frequency of long ago does not stay for ever."""
    pool = pool_of(4, CostAware())
    old = idle(pool, uses=4)
    gone = given_up(pool)
    for _ in range(40):
        idle(pool)
    assert old in gone
    assert gone.index(old) > 3


def test_leaves_go_before_their_parents() -> None:
    sharing = made(slabs=6, evict="cost")
    leave(sharing, IDS)  # six blocks, all of the room
    leave(sharing, [*IDS[:12], 1])
    gone = []
    for at in range(4):
        leave(sharing, [500 + at, 1, 2, 3, 4])
        table = sharing.open(IDS, limit=20)
        gone.append(table.length)
        table.release()
    assert gone == sorted(gone, reverse=True)
    assert gone[0] in (12, 16)


@pytest.mark.parametrize("evict", ["lru", "cost"])
def test_a_chain_is_eaten_from_its_end(evict: str) -> None:
    sharing = made(slabs=6, evict=evict)
    leave(sharing, IDS)
    pool = sharing.index.pools[0]
    lengths = []
    while pool.cached:
        node = sharing.index.owner(pool, pool.victim())
        lengths.append(len(sharing.index.tokens(node)) + int(sharing.index.tokens(node)[0]))
        pool.evict(pool.victim())
    assert lengths == [123, 120, 116, 112, 108, 104]  # the partial block, then from last to first


def test_priority_is_worth_uses() -> None:
    pool = pool_of(4, CostAware())
    low, high, plain = pool.take(), pool.take(), pool.take()
    for block, priority in ((low, -2), (high, 2), (plain, 0)):
        pool.name(block)
        if priority:
            pool.policy.hint(block, priority, 0.0)
    for block in (low, high, plain):
        pool.release(block)
    order = []
    while pool.cached:
        order.append(pool.victim())
        pool.evict(order[-1])
    assert order == [low, plain, high]


def test_kept_blocks_go_last_and_still_go() -> None:
    clock = Clock()
    pool = pool_of(4, CostAware(clock=clock))
    kept = pool.take()
    pool.name(kept)
    pool.policy.hint(kept, 0, 60.0)
    pool.release(kept)
    gone = given_up(pool)
    for _ in range(20):
        idle(pool, uses=9)
    assert kept not in gone
    assert len({pool.take() for _ in range(4)}) == 4  # everything is wanted: a wish is no pin
    assert gone[-1] == kept


def test_a_wish_ends_with_its_time() -> None:
    clock = Clock()
    pool = pool_of(4, CostAware(clock=clock))
    kept = pool.take()
    pool.name(kept)
    pool.policy.hint(kept, 0, 60.0)
    pool.release(kept)
    touch(pool, kept)
    for _ in range(3):
        idle(pool, uses=9)
    gone = given_up(pool)
    idle(pool, uses=9)
    assert kept not in gone
    clock.now_s = 61.0
    for _ in range(4):
        idle(pool, uses=9)
    assert kept in gone


def test_hints_go_with_the_block() -> None:
    pool = pool_of(2, CostAware())
    first = pool.take()
    pool.name(first)
    pool.policy.hint(first, 3, 0.0)
    pool.release(first)
    pool.evict(first)
    again = idle(pool)
    other = idle(pool)
    assert again == first
    assert pool.victim() == again
    assert other != again


def test_the_slab_worth_least_is_cleared_for_another_size() -> None:
    """Two pools, one arena: a block of the second size takes the slab that was used least, not the oldest."""
    arena = Arena(4 * 256, 256)
    small = BlockPool(arena, 64, policy=CostAware())
    large = BlockPool(arena, 256, policy=CostAware())
    first = [idle(small, uses=9) for _ in range(4)]
    for _ in range(12):
        idle(small)
    gone = given_up(small)
    large.take()
    assert len(gone) == 4
    assert not set(first) & set(gone)


def test_a_pool_takes_from_another_what_is_worth_less_there() -> None:
    """No history decides who has the memory: a pool full of good blocks takes the slab of a pool full of bad ones."""
    arena = Arena(8 * 256, 256)
    good = BlockPool(arena, 64, policy=CostAware())
    bad = BlockPool(arena, 128, policy=CostAware())
    for _ in range(8):
        idle(bad)
    hot = [idle(good) for _ in range(16)]
    for _ in range(6):
        for block in hot:
            touch(good, block)
    for _ in range(40):
        block = idle(good)
        for _ in range(6):
            touch(good, block)
    assert bad.slabs < 4
    assert good.slabs > 4


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="cost, lru"):
        make_eviction("fifo")


def test_the_books_of_a_table_that_is_read_again() -> None:
    sharing = made()
    leave(sharing, IDS)
    table = sharing.open(IDS)
    pool = sharing.index.pools[0]
    assert [pool.uses[b] for b in table.chains[0].ids[:5].tolist()] == [2] * 5
    fill(table, 23)
    table.release()
