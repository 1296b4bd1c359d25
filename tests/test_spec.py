"""The spec: bytes by arithmetic, figures of growing and fixed groups, and refusals."""

from __future__ import annotations

import copy
import pickle

import pytest

from quire.errors import ConfigError
from quire.spans import Chunked, Full, Residual, Sinks, Span, State, Window
from quire.spec import CacheGroup, CacheSpec, Field, KVConfig, aligned

KV = (Field("k", (64,), "bfloat16"), Field("v", (64,), "bfloat16"))


def group(
    name: str = "g", span: Span | None = None, layers: int = 2, heads: int = 2, **more
) -> CacheGroup:  # type: ignore[no-untyped-def]
    coords = tuple((i, h) for i in range(layers) for h in range(heads))
    return CacheGroup(name, coords, KV, span or Full(), **more)


def test_bytes_by_hand() -> None:
    g = group()
    assert g.tile_bytes == 2 * 32 * 64 * 2
    assert g.block_bytes == 4 * g.tile_bytes
    assert g.bytes_per_token == 2 * 2 * 2 * 64 * 2
    assert g.field_offsets == {"k": 0, "v": 32 * 64 * 2}


def test_every_field_of_a_tile_starts_on_a_cache_line() -> None:
    fields = (
        Field("a", (3,), "uint8"),
        Field("b", (1,), "float16", "block"),
        Field("c", (5,), "float32"),
    )
    g = CacheGroup("g", ((0, 0),), fields, block_tokens=7)
    assert g.field_offsets == {"a": 0, "b": 64, "c": 128}
    assert g.tile_bytes == 64 + 64 + aligned(7 * 5 * 4) == 320
    assert g.bytes_per_token == 320 / 7


def test_layers_heads_and_tiles() -> None:
    g = CacheGroup("g", ((0, 1), (2, 0), (2, 3)), KV)
    assert g.layers == (0, 2)
    assert [g.heads(x) for x in (0, 1, 2)] == [(1,), (), (0, 3)]
    assert [g.tile_index(x) for x in (0, 2)] == [0, 1]


def test_groups_are_values() -> None:
    g = group()
    _ = g.block_bytes
    for twin in (group(), copy.deepcopy(g), pickle.loads(pickle.dumps(g))):
        assert twin == g
        assert hash(twin) == hash(g)
        assert twin.block_bytes == g.block_bytes
    part = CacheSpec((g,)).split("g", [(0, 0)])
    assert len({g, *part.groups}) == 3


@pytest.mark.parametrize(
    ("span", "grows"),
    [
        (Full(), True),
        (Window(4096), False),
        (Window(1), False),
        (Chunked(8192), False),
        (Chunked(1000), False),
        (Sinks(4, 1024), False),
        (Residual(32, 128), False),
        (Residual(32, 128, Window(64)), False),
        (State(), False),
    ],
)
def test_bytes_per_token_counts_what_grows(span: Span, grows: bool) -> None:
    g = group(span=span)
    assert CacheSpec((g,)).bytes_per_token == (g.bytes_per_token if grows else 0)


def test_lossy_and_recurrent_groups_count_once() -> None:
    body = group("b", raw="r")
    raw = group("r", Residual(32, 64))
    state = CacheGroup(
        "s", ((9, 0),), (Field("s", (100,), "float32", "block"),), State(), block_tokens=1
    )
    spec = CacheSpec((body, raw, state))
    assert spec.bytes_per_token == body.bytes_per_token
    assert spec.bytes_per_sequence == state.block_bytes == 448
    blocks = spec.blocks_for(1000, chunk_tokens=100)
    assert blocks["b"] == 31
    assert blocks["s"] == 1
    assert 1 + (64 + 100) // 32 <= blocks["r"] <= 8
    assert spec.bytes_for(0) == 0
    assert [spec.index(n) for n in "brs"] == [0, 1, 2]
    with pytest.raises(KeyError):
        spec.group("x")


def test_a_chunked_span_is_counted_at_its_fullest() -> None:
    spec = CacheSpec((group(span=Chunked(1024)),))
    assert spec.blocks_for(1025)["g"] >= 32  # at 1,024 tokens the whole chunk was there
    assert spec.blocks_for(100_000)["g"] <= 34


def test_splitting_again_and_again() -> None:
    spec = CacheSpec((group(heads=4, layers=1),))
    spec = spec.split("g", [(0, 3)]).split("g", [(0, 2)])
    assert {g.name: g.coords for g in spec} == {
        "g": ((0, 0), (0, 1)),
        "g/1": ((0, 3),),
        "g/2": ((0, 2),),
    }
    assert spec.bytes_per_token == CacheSpec((group(heads=4, layers=1),)).bytes_per_token


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Field("k", (4,), "float12"), "unknown dtype 'float12'; known: float64"),
        (lambda: CacheGroup("g", (), KV), "ascending, unique and not empty"),
        (lambda: CacheGroup("g", ((1, 0), (0, 0)), KV), "ascending, unique"),
        (lambda: CacheGroup("g", ((0, 0), (0, 0)), KV), "ascending, unique"),
        (lambda: group(block_tokens=0), "at least 1, not 0"),
        (lambda: CacheSpec((group("a"), group("b"))), "another group stores too"),
        (
            lambda: CacheSpec((group("a", raw="b"), group("b", block_tokens=16))),
            "blocks of as many tokens",
        ),
        (lambda: KVConfig(block_tokens=0), "32 is the default"),
        (lambda: KVConfig(kv=" "), "must not be empty"),
        (lambda: Window(0), "at least 1 token, not 0"),
        (lambda: Chunked(-1), "at least 1 token"),
        (lambda: Sinks(0, 4), "at least 1 token"),
        (lambda: Residual(0, 4), "at least 1 token"),
        (lambda: Residual(4, -1), "0 tokens or more"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError) as caught:
        make()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
