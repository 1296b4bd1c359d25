"""A look at the store: every block counted once, by what it is; and the branches that are used most."""

from __future__ import annotations

import random

from laws.small import layout_of, store_of
from lossy import Lossy
from quire.spans import Full, Window
from quire.store.census import STATES, Census, hottest
from quire.store.sharing import Namespace, Sharing
from store.test_sharing import IDS, fill, leave

GRAIN = 4


def counted(census: Census) -> dict[str, int]:
    """Bytes by state over all pools."""
    return {s: sum(row["bytes"][s] for row in census.rows()) for s in STATES}


def test_every_block_is_what_it_is() -> None:
    sharing = Sharing(store_of(layout_of(Full()), 16))
    store = sharing.store
    (size,) = store.pools
    assert counted(Census(store)) == dict.fromkeys(STATES, 0)
    leave(sharing, IDS)  # five named blocks, and the partial one
    first, second = sharing.open(IDS), sharing.open([*IDS[:8], 1, 2, 3, 4, 5, 6])
    fill(second, 14)
    seen = counted(Census(store))
    assert seen["shared"] == 2 * size  # the first eight tokens
    assert (
        seen["held"] == (3 + 1) * size
    )  # the rest of the first, and what the second has published
    assert seen["private"] == (1 + 1) * size  # the copied part of a block, and a tail
    assert seen["cached"] == 1 * size  # the partial block
    usage = store.usage()
    assert seen["cached"] == usage.cached_bytes
    assert seen["held"] + seen["shared"] + seen["private"] == usage.held_bytes
    first.release()
    second.release()
    after = counted(Census(store))
    assert after["held"] == after["shared"] == after["private"] == 0
    assert after["cached"] == store.usage().cached_bytes


def test_the_map_has_all_bytes_and_few_cells() -> None:
    """Random sequences over pools of two sizes: the cells add up to what the pools say."""
    draw = random.Random(3)
    sharing = Sharing(store_of(layout_of(Full(), Window(8), codec=Lossy()), 64))
    assert len(sharing.store.pools) > 1
    tables = []
    for _ in range(60):
        ids = [draw.randrange(3) for _ in range(draw.randrange(2, 24))]
        table = sharing.open(ids)
        fill(table, len(ids))
        tables.append(table)
        if len(tables) > 5:
            tables.pop(draw.randrange(len(tables))).release()
        census = Census(sharing.store)
        width, runs = census.cells(most=40)
        n_cells = sum(n for n, _ in runs)
        assert n_cells <= 40
        per = max(pool.per_slab for pool in census.pools)
        places = sum(n * sum(row) for n, row in runs)
        assert places == sharing.store.arena.slabs * per
        assert all(sum(row) == width for _, row in runs[:-1])
        idle = sum(n * row[STATES.index("cached")] for n, row in runs)
        exact = sum(
            row["bytes"]["cached"] / row["block_bytes"] * per / pool.per_slab
            for row, pool in zip(census.rows(), census.pools, strict=True)
        )
        assert abs(idle - exact) <= per * len(census.pools)
        assert counted(census)["cached"] == census.usage.cached_bytes
    for table in tables:
        table.release()


def test_the_hottest_branches_come_first() -> None:
    sharing = Sharing(store_of(layout_of(Full()), 64))
    stem = list(range(16))
    for tail in range(6):
        leave(sharing, [*stem, *[50 + tail] * 8, 1])
    for _ in range(3):
        leave(sharing, [*[90] * 8, 2])
    (root,) = sharing.roots
    hot, cold = hottest(sharing, [root], 100)
    assert (hot.tokens, hot.chunks, hot.begins) == (16, 4, stem)
    assert (hot.uses, len(hot.children), hot.cut) == (6, 6, False)
    assert {child.tokens for child in hot.children} == {8 + 1}
    assert cold.begins[:8] == [90] * 8
    assert cold.uses == 3
    assert hot.held_chunks == 0
    table = sharing.open([*stem[:8], 1, 1])
    assert hottest(sharing, [root], 100)[0].held_chunks == 2
    table.release()


def test_a_look_at_a_tree_is_bounded() -> None:
    sharing = Sharing(store_of(layout_of(Full()), 64))
    for first in range(10):
        leave(sharing, [first] * 40)
    for _ in range(2):
        leave(sharing, [3] * 40)
    tops = hottest(sharing, sharing.roots, 5)
    assert [b.begins[0] for b in tops] == [3]
    assert sum(b.chunks for b in tops) == 5
    assert tops[0].cut


def test_each_namespace_has_a_tree_of_its_own() -> None:
    sharing = Sharing(store_of(layout_of(Full()), 64))
    for salt in (b"a", b"b"):
        leave(sharing, [*IDS, salt[0]], Namespace(salt))
    assert sorted(sharing.roots.values()) == [b"a", b"b"]
    for root, salt in sharing.roots.items():
        (branch,) = hottest(sharing, [root], 100)
        assert branch.root == root
        assert branch.tokens == len(IDS) + 1
        assert sharing.index.tokens(next(iter(sharing.index.children(root)))).tolist() == IDS[:4]
        assert salt[0] in branch.begins or len(branch.begins) < len(IDS) + 1


def test_a_branch_ends_where_its_use_drops() -> None:
    """One chain of chunks without a fork: what all ask for, and what one of them went on with."""
    sharing = Sharing(store_of(layout_of(Full()), 64))
    stem = list(range(16))
    leave(sharing, [*stem, *[50] * 8])
    for _ in range(4):
        leave(sharing, stem)
    (branch,) = hottest(sharing, sharing.roots, 100)
    (behind,) = branch.children
    assert (branch.tokens, behind.tokens) == (16, 8)
    assert branch.uses >= 5
    assert behind.uses == 1
    assert behind.begins == [50] * 8
