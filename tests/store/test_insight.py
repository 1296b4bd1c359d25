"""Why a request missed, and what other sizes of memory would find."""

from __future__ import annotations

import random

import pytest

from engine.fake_runner import Clock
from laws.small import layout_of, store_of
from quire.errors import ConfigError
from quire.share import ShareConfig, parse_share
from quire.spans import Full, Window
from quire.store.insight import Ghost, Miss
from quire.store.namespace import Namespace
from quire.store.sharing import Sharing
from store.test_sharing import IDS, fill, leave


def watched(slabs: int = 64, *, windows: bool = False, clock: Clock | None = None) -> Sharing:
    spans = (Window(6), Full()) if windows else (Full(),)
    return Sharing(store_of(layout_of(*spans), slabs), explain=True, clock=clock or Clock())


def why(
    sharing: Sharing, ids: list[int], namespace: Namespace | None = None, label: str = ""
) -> Miss | None:
    table = sharing.take(sharing.look(ids, namespace, label=label))
    miss = table.path.miss if table.path else None
    fill(table, len(ids))
    table.release()
    return miss


def test_what_was_never_stored() -> None:
    sharing = watched()
    assert why(sharing, IDS) == Miss(0, "never stored")
    assert why(sharing, IDS) is None
    assert why(sharing, [7, 8, 9, 10, 11, 12]) == Miss(0, "never stored")
    assert why(sharing, [*IDS, *range(9)]) == Miss(23, "never stored")


@pytest.mark.parametrize("at", [1, 4, 9, 11, 17])
def test_the_first_token_that_differs(at: int) -> None:
    sharing = watched()
    why(sharing, IDS)
    other = [*IDS[:at], 55, *IDS[at + 1 :]]
    assert why(sharing, other) == Miss(at, "differs", at, IDS[at], 55)


def test_what_was_evicted_when_and_for_whom() -> None:
    clock = Clock()
    sharing = watched(6, clock=clock)
    why(sharing, IDS, label="one")
    clock.now_s = 10.0
    why(sharing, [900 + i for i in range(13)], label="two")
    clock.now_s = 12.5
    miss = why(sharing, IDS, label="three")
    assert miss is not None
    assert (miss.at, miss.reason, miss.ago_s, miss.by) == (8, "evicted", 2.5, "two")
    assert miss.text() == "from token 8 on: evicted 2.5 s before, for request two"


def test_a_window_that_is_gone_is_evicted_too() -> None:
    sharing = watched(windows=True)
    leave(sharing, IDS)
    table = sharing.open(IDS[:17])
    lost = int(table.chains[0].ids[3])
    table.release()
    sharing.index.pools[0].evict(lost)
    miss = why(sharing, IDS[:17])
    assert miss is not None
    assert (miss.at, miss.reason) == (12, "evicted")


def test_what_another_namespace_has() -> None:
    sharing = watched()
    a, b = Namespace(b"a"), Namespace(b"b")
    why(sharing, IDS, a)
    assert why(sharing, IDS, b) == Miss(0, "other namespace")
    assert why(sharing, IDS, b) is None


def test_memory_of_the_evicted_is_bounded() -> None:
    sharing = watched(4)
    assert sharing.explainer is not None
    sharing.explainer.remember = 5
    for i in range(40):
        leave(sharing, [i, 1, 2, 3, 4])
    assert len(sharing.explainer._evicted) == 5


def zipf(n: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[int(draw.paretovariate(0.6)) % 300, *range(16)] for _ in range(n)]


@pytest.mark.parametrize("evict", ["lru", "cost"])
def test_a_ghost_finds_what_a_cache_of_that_size_finds(evict: str) -> None:
    """With nothing running beside, each size is exact: compared with real caches of half and twice the memory."""
    group = layout_of(Full()).spec.groups[0]

    def cache(blocks: int, ghost: float) -> Sharing:
        store = store_of(layout_of(Full()), blocks)
        assert store.arena.total_bytes == blocks * group.block_bytes
        return Sharing(store, evict=evict, ghost=ghost)

    real = {f: cache(int(80 * f), 1.0 if f == 1 else 0.0) for f in (0.5, 1, 2)}
    for ids in zipf(600, 3):
        for sharing in real.values():
            table = sharing.open(ids)
            fill(table, 16)  # whole chunks: a ghost knows no parts
            table.release()
    assert real[1].ghost is not None
    figures = {g.factor: g for g in real[1].ghost.figures()}
    assert sorted(figures) == [0.5, 1.0, 2.0]
    for f, sharing in real.items():
        assert figures[f].hit_tokens == sharing.stats.hit_tokens
        assert figures[f].asked_tokens == 600 * 16
    assert figures[0.5].hit_ratio < figures[1].hit_ratio < figures[2].hit_ratio


def test_a_ghost_that_follows_a_part_is_near() -> None:
    sharing = Sharing(store_of(layout_of(Full()), 400), ghost=1.0)
    part = Ghost(sharing, 0.3)
    draw = random.Random(5)
    for _ in range(4000):
        ids = [draw.randrange(500), *range(16)]
        path = sharing.look(ids)
        names = path.ahead(16)
        shadow = part.enter(names)
        table = sharing.take(path)
        fill(table, 16)
        table.release()
        if shadow is not None:
            shadow.grow(names)
            shadow.leave()
    assert sharing.ghost is not None
    for whole, some in zip(sharing.ghost.figures(), part.figures(), strict=True):
        assert 0.15 * whole.asked_tokens < some.asked_tokens < 0.45 * whole.asked_tokens
        assert some.hit_ratio == pytest.approx(whole.hit_ratio, abs=0.06)


def test_the_options_have_a_string_form() -> None:
    text = "prefix:evict=lru,explain=on,ghost=0.5,audit=0.01"
    assert parse_share(text) == ShareConfig("prefix", "lru", True, 0.5, 0.01)
    for wrong in ("prefix:explain=yes", "prefix:ghost=2", "prefix:audit=x", "prefix:ghost"):
        with pytest.raises(ConfigError):
            parse_share(wrong)


def test_ghosts_hold_what_runs_and_let_it_go() -> None:
    """Two requests at a time: what the first has published the second finds, in every size that has the room."""
    sharing = Sharing(store_of(layout_of(Full()), 8), ghost=1.0)
    assert sharing.ghost is not None
    one = sharing.open(IDS[:17])
    fill(one, 17)
    two = sharing.open([*IDS[:13], 1])
    found = [g.hit_tokens for g in sharing.ghost.figures()]
    assert found == [12, 12, 12]
    fill(two, 14)
    fill(one, 17)
    for table in (one, two):
        table.release()
    for _, ghost in sharing.ghost._sizes:
        assert ghost.store.usage().held_bytes == 0
