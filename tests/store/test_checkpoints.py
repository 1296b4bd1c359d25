"""Checkpoints of recurrent state by hand: where they are made, who finds them, and when they go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from laws.small import layout_of, store_of
from quire.errors import ConfigError
from quire.plan import KVLayer, StateLayer, build_layout
from quire.spans import Full, Span, Window
from quire.spec import Field, KVConfig
from quire.store import BlockTable
from quire.store.checkpoints import EVERY_TOKENS, ONE_BY_ONE, common_tokens
from quire.store.park import Parked
from quire.store.sharing import Namespace, Sharing
from quire.store.tiers.moving import Mover

if TYPE_CHECKING:
    import torch

IDS = list(range(100, 123))  # five chunks of 4 and three tokens


def made(*spans: Span, slabs: int = 64, every: int | None = None, **options: object) -> Sharing:
    sharing = Sharing(store_of(layout_of(*(spans or (Full(),)), state=True), slabs), **options)  # type: ignore[arg-type]
    assert sharing.states is not None
    if every is not None:
        sharing.states.every = every
    return sharing


def only_states(every: int = 1 << 20) -> Sharing:
    layout = build_layout(
        [StateLayer(0, (Field("s", (50,), "float32", "block"),))], KVConfig(), dtype="float32"
    )
    sharing = Sharing(store_of(layout), stateful_tokens=4)
    assert sharing.states is not None
    sharing.states.every = every
    return sharing


def fill(table: BlockTable, n: int) -> None:
    """As an engine does: chunks end where states are to be kept."""
    while table.length < n:
        assert table.path is not None
        table.append(table.path.until(table.length, n) - table.length)
        table.commit()


def leave(sharing: Sharing, ids: list[int], namespace: Namespace | None = None) -> int:
    table = sharing.open(ids, namespace)
    found = table.length
    fill(table, len(ids))
    table.release()
    return found


def states(sharing: Sharing) -> list[int]:
    """Lengths at which the prefixes of IDS have a state."""
    path, index = sharing.look(IDS, limit=len(IDS)), sharing.index
    return [
        4 * (i + 1)
        for i, node in enumerate(path.nodes)
        if node >= 0 and all(index.block(c, node) >= 0 for c in index.states)
    ]


@pytest.mark.parametrize("kind", ["full", "window", "states"])
def test_a_prompt_leaves_its_last_whole_chunk(kind: str) -> None:
    sharing = only_states() if kind == "states" else made(Full() if kind == "full" else Window(6))
    assert leave(sharing, IDS) == 0
    assert states(sharing) == [20]
    assert leave(sharing, IDS) == 20
    assert leave(sharing, [*IDS, 1, 2, 3]) == 20
    assert (
        leave(sharing, IDS[:20]) == 0
    )  # its last token must be computed, and no state lies before it
    assert states(sharing) == [16, 20]
    assert sharing.stats.stored_states == 3
    assert sharing.store.usage().held_bytes == 0


def test_a_chunk_that_ends_elsewhere_leaves_none() -> None:
    sharing = made()
    table = sharing.open(IDS)
    table.append(23)
    table.commit()
    table.release()
    assert states(sharing) == []
    table = sharing.open(IDS)
    assert table.length == 0
    table.append(8)  # ends with a chunk, where nobody wants a state
    table.commit()
    assert states(sharing) == []


def test_long_prompts_have_one_every_so_many_tokens() -> None:
    sharing = made(every=8)
    leave(sharing, IDS)
    assert states(sharing) == [8, 16, 20]
    assert leave(sharing, [*IDS[:18], 1, 2]) == 16


def test_tokens_between_checkpoints_weigh_as_much_as_one() -> None:
    sharing = made()
    assert sharing.states is not None
    assert sharing.states.every == EVERY_TOKENS
    heavy = StateLayer(1, (Field("s", (1 << 17,), "float32", "block"),))
    kv = KVLayer(0, 2, (Field("k", (4,), "float32"), Field("v", (4,), "float32")))
    layout = build_layout([kv, heavy], KVConfig(block_tokens=16), dtype="float32")
    states = Sharing(store_of(layout, 4)).states
    assert states is not None
    assert states.every == (1 << 19) // 64 == 8192


@pytest.mark.parametrize("kind", ["full", "states"])
def test_whoever_leaves_the_path_of_others_leaves_a_state_there(kind: str) -> None:
    sharing = made() if kind == "full" else only_states()
    leave(sharing, IDS)
    assert leave(sharing, [*IDS[:10], 1, 2, 3]) == 0
    assert states(sharing) == [8, 20]
    assert leave(sharing, [*IDS[:10], 7, 8, 9, 7]) == 8


def test_those_who_come_together_compute_once() -> None:
    sharing = made()
    one = sharing.open(IDS)
    assert one.path is not None
    one.path.promise(len(IDS), 1)
    other = [*IDS[:10], 1, 2, 3]
    assert sharing.awaited(sharing.look(other), 2) is not None
    assert one.path.marks == [8, 20]
    fill(one, 8)
    path = sharing.look(other)
    assert sharing.awaited(path, 2) is None
    assert sharing.take(path).length == 8


@pytest.mark.parametrize("room", [True, False])
def test_a_state_is_waited_for_until_it_is_there_or_will_not_be(room: bool) -> None:
    sharing = made()
    leave(sharing, IDS)
    second, third = [*IDS[:10], 1, 2, 3], [*IDS[:10], 7, 8, 9]
    table = sharing.open(second)
    assert table.path is not None
    table.path.promise(len(second), 1)
    name = sharing.awaited(sharing.look(third), 2)
    assert name is not None
    assert sharing.computing(name, 2)
    assert not sharing.computing(name, 0)
    table.append(8)
    if not room:
        sharing.index.pools[sharing.index.states[0]].take = _no_room  # type: ignore[method-assign]
    table.commit()
    assert not sharing.computing(name, 2)
    path = sharing.look(third)
    assert sharing.awaited(path, 2) is None
    assert path.found == (2 if room else 0)
    table.release()
    assert not sharing.promised


def _no_room() -> int:
    from quire.errors import CapacityError

    raise CapacityError("full")


def test_who_leaves_takes_its_promises_back() -> None:
    sharing = made()
    leave(sharing, IDS)
    table = sharing.open([*IDS[:10], 1, 2, 3])
    assert table.path is not None
    table.path.promise(13, 1)
    assert sharing.promised
    table.release()
    assert not sharing.promised


def test_one_state_moves_along_what_is_generated() -> None:
    sharing = made(every=16)
    ids = IDS[:6]
    table = sharing.open(ids)
    fill(table, 6)
    for token in IDS[6:]:
        ids.append(token)
        table.append(1)
        table.commit()
        assert len(states(sharing)) <= 3
    assert states(sharing) == [4, 16, 20]  # the prompt's, one of those that stay, and the last
    table.release()
    assert leave(sharing, [*IDS, 5, 6]) == 20


def test_a_state_that_somebody_found_stays_where_it_is() -> None:
    sharing = made()
    ids = IDS[:6]
    table = sharing.open(ids)
    fill(table, 6)
    for at, token in enumerate(IDS[6:]):
        ids.append(token)
        table.append(1)
        table.commit()
        if at == 4:
            assert leave(sharing, IDS[:10]) == 8
    assert states(sharing) == [4, 8, 20]


def test_a_copy_is_read_and_the_kept_one_is_never_written() -> None:
    layout = layout_of(Full(), state=True)
    sharing = Sharing(store_of(layout, device="cpu"))
    store, group = sharing.store, layout.spec.groups[1]
    view = store.view(group, 1, "s")

    def state(table: BlockTable) -> torch.Tensor:
        return view[int(store.units(group, table.chains[1].ids[:1])[0])]

    one = sharing.open(IDS)
    fill(one, 8)
    one.append(12)
    state(one).fill_(7.0)
    one.commit()
    state(one).fill_(8.0)
    table = sharing.open(IDS)
    assert table.length == 20
    assert bool((state(table) == 7).all())
    state(table).fill_(9.0)
    again = sharing.open(IDS)
    assert bool((state(again) == 7).all())
    assert table.chains[1].pool.refs(int(table.chains[1].ids[0])) == 1


def test_a_state_goes_with_the_block_of_its_chunk() -> None:
    sharing = made()
    leave(sharing, IDS)
    node = sharing.look(IDS).nodes[4]
    sharing.index.pools[0].evict(sharing.index.block(0, node))
    cached = sharing.store.usage().cached_bytes
    assert sharing.open(IDS).length == 0
    assert sharing.store.usage().cached_bytes == cached - sharing.store.spec.bytes_per_sequence
    assert leave(sharing, IDS) == 0
    assert states(sharing) == [16, 20]


def test_no_room_for_the_copy_is_no_hit() -> None:
    sharing = made()
    leave(sharing, IDS)
    pool = sharing.index.pools[sharing.index.states[0]]
    take, pool.take = pool.take, _no_room  # type: ignore[method-assign]
    table = sharing.open(IDS)
    assert (table.length, sharing.store.usage().held_bytes) == (0, 0)
    pool.take = take  # type: ignore[method-assign]
    assert leave(sharing, IDS) == 20


def test_other_tenants_find_no_state() -> None:
    sharing = made()
    leave(sharing, IDS, Namespace(b"a"))
    assert leave(sharing, IDS, Namespace(b"b")) == 0
    assert leave(sharing, IDS, Namespace(b"a")) == 20


def test_token_by_token_is_worth_it_where_little_is_left() -> None:
    sharing = made(one_by_one=True)
    states = sharing.states
    assert states is not None
    assert states.resumes(16 * ONE_BY_ONE, 17 * ONE_BY_ONE)
    assert not states.resumes(16 * ONE_BY_ONE - 4, 17 * ONE_BY_ONE)
    assert states.marks(0, 0, 23) == []
    assert states.marks(0, 0, 79) == [76]
    assert states.marks(0, 68, 71) == [68]
    assert leave(sharing, IDS) == 0
    assert sharing.stats.stored_states == 0


def test_a_parked_state_comes_back_as_it_was() -> None:
    layout = layout_of(Full(), state=True)
    sharing = Sharing(store_of(layout, device="cpu"))
    group, pool = layout.spec.groups[1], sharing.store.pool_for(layout.spec.groups[1])
    table = sharing.open(IDS[:6])
    fill(table, 6)  # a state lies at 4, with the first chunk
    view = sharing.store.view(group, 1, "s")
    view[int(sharing.store.units(group, table.chains[1].ids[:1])[0])].fill_(5.0)
    parked = Parked(table, Mover(sharing.store.arena))
    parked.take()
    parked.fill()
    block = int(table.chains[1].ids[0])
    assert not pool.named(block)
    assert bool((view[int(sharing.store.units(group, np.array([block]))[0])] == 5).all())


def test_ghosts_of_states_are_refused() -> None:
    with pytest.raises(ConfigError, match="drop ghost"):
        made(ghost=0.5)


def test_common_tokens() -> None:
    for n in range(9):
        assert common_tokens(IDS[:8], [*IDS[:n], 0, 1]) == min(n, 8)
    assert common_tokens([], IDS) == 0
