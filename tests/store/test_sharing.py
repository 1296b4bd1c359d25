"""The prefix cache by hand: what is found, where it ends, what is left behind, and who may have it."""

from __future__ import annotations

import pytest

from laws.small import layout_of, store_of
from lossy import Lossy
from quire.errors import ConfigError, RequestError
from quire.share import ShareConfig, parse_share
from quire.spans import Full, Sinks, Span, Window
from quire.spec import KVCodec
from quire.store import BlockStore, BlockTable
from quire.store import path as writing
from quire.store import sharing as module
from quire.store.sharing import Hints, Namespace, Sharing


def made(
    *spans: Span, codec: KVCodec | None = None, slabs: int = 64, evict: str = "cost", sinks: int = 0
) -> Sharing:
    layout = layout_of(*(spans or (Full(),)), codec=codec, sinks=sinks)
    return Sharing(store_of(layout, slabs), evict=evict)


def leave(
    sharing: Sharing, ids: list[int], namespace: Namespace | None = None, chunk: int = 1 << 30
) -> int:
    """One request from beginning to end; returns what it found."""
    table = sharing.open(ids, namespace)
    found = table.length
    fill(table, len(ids), chunk)
    table.release()
    return found


def fill(table: BlockTable, n: int, chunk: int = 1 << 30) -> None:
    while table.length < n:
        table.append(min(chunk, n - table.length))
        table.commit()


IDS = list(range(100, 123))  # five blocks of 4 and three tokens


def test_all_but_the_last_token_is_found() -> None:
    sharing = made()
    assert leave(sharing, IDS) == 0
    assert leave(sharing, IDS) == 22
    assert leave(sharing, [*IDS, 1, 2]) == 23
    assert (
        leave(sharing, [*IDS[:10], 7, 8, 9]) == 10
    )  # 8 held, 2 copied out of a block that goes on otherwise
    assert leave(sharing, [7, *IDS]) == 0
    assert leave(sharing, IDS[:1]) == 0
    stats = sharing.stats
    assert stats.lookups == 6
    assert stats.hit_tokens == 22 + 23 + 10
    assert stats.copied_tokens == 2 + 3 + 2


def test_the_limit_is_kept() -> None:
    sharing = made()
    leave(sharing, IDS)
    for limit in (0, 1, 3, 4, 9, 23):
        table = sharing.open(IDS, limit=limit)
        assert table.length == table.committed == limit
        table.release()


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_window_resumes_where_its_last_blocks_are(chunk: int) -> None:
    sharing = made(Window(6), Full())
    leave(sharing, IDS, chunk=chunk)
    table = sharing.open([*IDS[:16], 1, 2, 3])
    assert table.length == 16
    window, full = table.chains
    assert (window.ids[: window.count] >= 0).tolist() == [False, False, True, True]
    assert (full.ids[: full.count] >= 0).all()
    fill(table, 19)
    assert window.cursor == 3


def test_a_window_that_lost_a_block_resumes_before_it() -> None:
    sharing = made(Window(6), Full())
    leave(sharing, IDS)
    window = sharing.index.pools[0]
    assert window is sharing.index.pools[1]  # one size, one pool
    table = sharing.open(IDS[:17])
    lost = int(table.chains[0].ids[3])
    table.release()
    window.evict(lost)
    assert sharing.open(IDS[:17]).length == 12


def test_only_windows_need_no_beginning() -> None:
    sharing = made(Window(5))
    leave(sharing, IDS)
    pool = sharing.index.pools[0]
    for block in list(pool.idle()):
        node = sharing.index.owner(pool, block)
        if IDS[0] in sharing.index.tokens(node).tolist():
            pool.evict(block)
    assert sharing.open(IDS).length == 22


def test_sinks_are_needed_wherever_one_resumes() -> None:
    sharing = made(Sinks(1, 4))
    leave(sharing, IDS)
    table = sharing.open(IDS)
    assert table.length == 22
    sink = int(table.chains[0].ids[0])
    assert sink >= 0
    table.release()
    sharing.index.pools[0].evict(sink)
    assert sharing.open(IDS).length == 0


@pytest.mark.parametrize("residual", [0, 2, 4, 9])
def test_lossy_hits_end_at_boundaries_with_their_raw_window(residual: int) -> None:
    sharing = made(codec=Lossy(residual))
    leave(sharing, IDS)
    table = sharing.open([*IDS[:18], 1, 2])
    assert table.length == 16
    body, raw = table.chains
    assert (body.ids[: body.count] >= 0).all()
    assert body.encoded == 4
    first = max(0, 16 - residual) // 4
    assert (raw.ids[: raw.count] >= 0).tolist() == [i >= first for i in range(4)]
    if residual:
        pool, lost = raw.pool, int(raw.ids[3])
        table.release()
        pool.evict(lost)
        assert sharing.open([*IDS[:18], 1, 2]).length == 12


def test_what_two_computed_at_once_is_merged() -> None:
    sharing = made()
    one, two = sharing.open(IDS), sharing.open(list(IDS))
    fill(one, 23)
    fill(two, 23)
    assert sharing.stats.merged_blocks == 5
    assert one.chains[0].ids[:5].tolist() == two.chains[0].ids[:5].tolist()
    assert one.chains[0].ids[5] != two.chains[0].ids[5]
    assert sharing.store.usage().held_bytes == 7 * sharing.store.spec.groups[0].block_bytes
    two.release()
    one.release()
    assert sharing.store.usage().held_bytes == 0


def test_text_that_was_generated_is_found_in_the_next_turn() -> None:
    sharing = made()
    ids = list(IDS)
    table = sharing.open(ids)
    fill(table, 23)
    for token in range(9):
        ids.append(token)
        fill(table, len(ids))
    table.release()
    assert leave(sharing, [*ids, 50, 51]) == len(ids)


def test_forks_publish_what_each_of_them_wrote() -> None:
    sharing = made()
    ids = list(IDS)
    one = sharing.open(ids)
    fill(one, 23)
    two = one.fork()
    other = list(ids)
    two.follow(other)
    for a, b in ((1, 2), (3, 4), (5, 6)):
        ids.append(a)
        other.append(b)
        fill(one, len(ids))
        fill(two, len(other))
    one.release()
    two.release()
    assert leave(sharing, [*ids, 9]) == len(ids)
    assert leave(sharing, [*other, 9]) == len(other)


def test_what_is_taken_back_is_published_as_what_came_instead() -> None:
    sharing = made()
    ids = list(IDS)
    table = sharing.open(ids)
    fill(table, 23)
    table.truncate(9)
    ids[9:] = [1, 2, 3, 4, 5]
    fill(table, 14)
    table.release()
    assert leave(sharing, [*ids, 7]) == 14
    assert leave(sharing, [*IDS, 7]) == 20  # the partial block went when the table went back


def test_a_table_whose_tokens_are_dropped_leaves_nothing() -> None:
    sharing = made()
    table = sharing.open(IDS)
    fill(table, 10)
    table.keep(0, [0, 5])
    fill(table, 23)
    table.release()
    assert leave(sharing, IDS) == 8


def test_a_name_alone_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hash that always says the same, every other prefix is a miss and what comes behind stays private."""
    for part in (module, writing):
        monkeypatch.setattr(part, "chunk_name", lambda parent, chunk: bytes(32))
    sharing = made()
    leave(sharing, IDS)
    assert leave(sharing, [5, 6, 7, 8, 9]) == 0
    assert sharing.index.collisions > 0


def test_a_preempted_table_finds_itself_again() -> None:
    sharing = made(slabs=12)
    table = sharing.open(IDS)
    fill(table, 15)
    table.release()
    again = sharing.open(IDS)
    assert again.length == 15
    fill(again, 23)


def test_a_shorter_part_gives_way_to_a_longer_one() -> None:
    sharing = made()
    leave(sharing, IDS[:9])
    leave(sharing, IDS[:11])
    assert sharing.store.usage().cached_bytes == 3 * sharing.store.spec.groups[0].block_bytes
    leave(sharing, IDS[:10])
    assert sharing.open([*IDS[:11], 1]).length == 11


def test_whoever_follows_knows_that_it_may_wait() -> None:
    sharing = made()
    first = sharing.look(IDS)
    assert sharing.awaited(first, (1,)) is None
    table = sharing.take(first)
    first.promise(len(IDS), (0,))
    other = sharing.look([*IDS[:12], 1, 2, 3, 4, 5])
    name = sharing.awaited(other, (1,))
    assert name is not None
    assert sharing.awaited(other, (-1,)) is None  # nobody waits for one behind it
    fill(table, 12, 4)
    assert not sharing.computing(name, (1,))
    assert sharing.awaited(sharing.look(other.tokens), (1,)) is None
    assert sharing.awaited(sharing.look(IDS), (1,)) is not None
    table.release()
    assert not sharing.promised


def test_tenants_do_not_find_each_other() -> None:
    sharing = made()
    a, b = Namespace(b"a"), Namespace(b"b")
    leave(sharing, IDS, a)
    assert leave(sharing, IDS, b) == 0
    assert leave(sharing, IDS) == 0
    assert [leave(sharing, IDS, x) for x in (a, b, None)] == [22, 22, 22]
    assert sharing.open(IDS, a, adapter=b"lora").length == 0


def test_a_declared_prefix_is_shared_by_whole_chunks_and_no_further() -> None:
    sharing = made()
    system = tuple(IDS[:10])
    a, b, c = (Namespace(x, shared=(system,)) for x in (b"a", b"b", b"c"))
    outsider, other = Namespace(b"a2"), Namespace(b"d", shared=(system,), group="other")
    leave(sharing, IDS, a)
    assert leave(sharing, IDS, b) == 8
    assert leave(sharing, IDS, a) == 22
    assert leave(sharing, [*IDS[:6], 1, 2, 3], c) == 0  # not the declared prefix
    assert leave(sharing, IDS, outsider) == 0
    assert leave(sharing, IDS, other) == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prefx", "known: off, prefix"),
        ("prefix:evict=fifo", "known: cost, lru"),
        ("prefix:evct=lru", "evict=cost|lru"),
        ("off:evict=lru", "drop"),
    ],
)
def test_a_wrong_share_says_what_would_work(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("|", r"\|")):
        parse_share(text)


def test_share_in_its_string_form() -> None:
    assert parse_share("off") == ShareConfig()
    assert parse_share("prefix:evict=lru") == ShareConfig("prefix", "lru")


def test_hints_are_refused_where_they_mean_nothing() -> None:
    sharing = made(evict="lru")
    with pytest.raises(RequestError, match="evict='cost'"):
        sharing.open(IDS, hints=Hints(1))
    for wrong in ({"priority": 4}, {"priority": 0.5}, {"keep_for_s": -1.0}):
        with pytest.raises(RequestError):
            Hints(**wrong)  # type: ignore[arg-type]


def _blocks(store: BlockStore) -> int:
    return store.usage().cached_bytes // store.spec.groups[0].block_bytes


def test_clearing_forgets_held_blocks_too() -> None:
    sharing = made()
    leave(sharing, [1, 2, 3, 4, 5])
    table = sharing.open(IDS)
    fill(table, 12)
    sharing.index.clear()
    assert _blocks(sharing.store) == 0
    assert sharing.index.live == 0
    fill(table, 23)
    table.release()
    assert leave(sharing, IDS) == 0
