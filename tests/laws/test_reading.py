"""Law 4, and the store's half of law 8: a query's answer does not depend on how its tokens came to be computed.

A schedule says how one sequence is computed: chunks, drafts of which some are rejected, other sequences in the batch, a
preemption that starts over, a hit that begins from another sequence's blocks. Every read is held to the oracle by
`World`; here the answers of two schedules are held to each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrations import at_work
from laws.dense import plain_spans
from laws.world import Seq, World
from lossy import Lossy
from quire.attention import ReferenceBackend, Row, Step
from quire.codecs import available
from quire.models.turn import Rope
from quire.plan import KVLayer, Layout, build_layout
from quire.spans import Chunked, Full, Sinks, Window
from quire.spec import Field, KVCodec, KVConfig, Span
from quire.store import BlockStore

HEADS, SHARE, WIDTH = 2, 2, 4


def layout_of(
    span: Span, size: int, codec: KVCodec | None, sinks: int = 0, width: int = WIDTH
) -> tuple[list[KVLayer], Layout]:
    fields = (Field("k", (width,), "float32"), Field("v", (width,), "float32"))
    layers = [KVLayer(0, HEADS, fields, span)]
    chosen = None if codec is None else {"": codec}
    lossy = codec is not None and not codec.plain
    config = KVConfig(f"auto;sinks={sinks if lossy else 0}", block_tokens=size)
    layout = build_layout(layers, config, dtype="float32", codecs=chosen)
    return layers, replace(layout, turn=turn)


def turn(layer: int, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """A RoPE for codecs that want keys before it."""
    return Rope(100.0 ** -torch.linspace(0, 1, x.shape[-1] // 2), halves=True).turn(x, by)


codecs = st.one_of(st.none(), st.builds(Lossy, st.integers(0, 14)))

SEALS_EARLY = {
    "kivi": "kivi:residual=20,group=16",
    "kvarn": "kvarn:tile=16",
    "kvquant": "kvquant:tile=16,bits=2",
}
"""How a codec seals and reads back within a hundred tokens, where it would not by itself."""
SIZE = 50_000.0
"""Of the numbers that `World` makes: what codecs learned from is like what they are given."""
SEALING = [SEALS_EARLY.get(name, name) for name in available()]

long_spans = st.one_of(
    st.just(Full()),
    st.builds(Window, st.integers(20, 60)),
    st.builds(Chunked, st.integers(20, 60)),
    st.builds(Sinks, st.integers(1, 20), st.integers(20, 40)),
)


def test_every_codec_is_read_decoded_here() -> None:
    """Else what is said below of every codec would be said of raw rows."""
    for recipe in SEALING:
        codec = at_work(recipe, 16, SIZE)
        _, layout = layout_of(Full(), 16, codec, 0, 16)
        assert {g.block_tokens for g in layout.spec.groups} == {16}, recipe
        assert codec.plain or codec.residual_tokens <= 32, recipe


# -- what is read ------------------------------------------------------------------------------------------------


@given(
    span=plain_spans,
    size=st.integers(1, 6),
    residual=st.integers(0, 14),
    sinks=st.sampled_from([0, 0, 1, 4, 9]),
    turns=st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8
    ),
    lazy=st.booleans(),
)
@settings(max_examples=max(200, settings.default.max_examples))
def test_a_lossy_cache_reads_what_the_contract_says(
    span, size, residual, sinks, turns, lazy
) -> None:  # type: ignore[no-untyped-def]
    """One sequence in chunks and drafts, some rejected, some accepted before and some after the next forward."""
    layers, layout = layout_of(span, size, Lossy(residual), sinks)
    run_turns(layers, layout, turns, lazy=lazy)


def run_turns(
    layers: list[KVLayer], layout: Layout, turns: list[tuple[int, int, int]], *, lazy: bool
) -> None:
    world = World(list(layers), layout, BlockStore(layout.spec, 1 << 20, device="cpu"))
    seq = world.open()
    for n, most, rejected in turns:
        drafts = min(n - 1, most)
        grow(world, seq, n, drafts)
        left = len(seq.tokens) - min(drafts, rejected)
        seq.table.truncate(left)
        del seq.tokens[left:]
        seq.table.accept(left)
        seq.accepted = left
        if not lazy:
            seq.table.commit()
            seq.committed = left
        world.check_books()
        world.check_sealed()
    world.drain()


@pytest.mark.parametrize("recipe", SEALING)
@given(
    span=long_spans,
    sinks=st.sampled_from([0, 3, 20]),
    turns=st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=5
    ),
    lazy=st.booleans(),
)
@settings(max_examples=max(8, settings.default.max_examples // 10))
def test_every_codec_reads_what_the_contract_says(recipe, span, sinks, turns, lazy) -> None:  # type: ignore[no-untyped-def]
    """The same over every codec of the folder, held to the codec itself on one block with nothing beside it."""
    codec = at_work(recipe, 16, SIZE)
    run_turns(*layout_of(span, 16, codec, sinks, 16), turns, lazy=lazy)


def grow(world: World, seq: Seq, n: int, drafts: int) -> None:
    start = len(seq.tokens)
    seq.table.append(n, drafts=drafts)
    seq.tokens += [next(world.numbers) for _ in range(n)]
    seq.accepted = start + n - drafts
    world.forward([(seq, start, start + n)])


# -- what is answered --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """`tokens` are computed and stay, `drafts` more are computed and rejected; `preempt` starts over first."""

    tokens: int
    drafts: int = 0
    preempt: bool = False
    others: int = 0


turns = st.builds(
    Turn,
    st.integers(1, 9),
    st.sampled_from([0, 0, 1, 5]),
    st.integers(0, 9).map(lambda x: x == 0),
    st.integers(0, 2),
)
schedules = st.lists(turns, min_size=1, max_size=12)


def token_values(
    text: int, at: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k, v, q of a text's tokens, each by its position; wrong drafts are another text's."""
    made = []
    for p in at.tolist():
        g = torch.Generator().manual_seed(text * 100_003 + p)
        made.append(torch.randn(2 + SHARE, HEADS, width, generator=g))
    x = torch.stack(made, 1)
    q = x[2:].permute(1, 2, 0, 3).reshape(len(at), HEADS * SHARE, width)
    return x[0], x[1], q


def answers(layout: Layout, schedule: list[Turn], n: int, hit_at: int) -> torch.Tensor:
    """`[n, H_q, D]` float64 answers of text 1 under a schedule."""
    store = BlockStore(layout.spec, 1 << 20, device="cpu")
    backend = ReferenceBackend()
    (width,) = layout.fields_of(layout.spec.groups[0])[0].shape
    out = torch.full((n, HEADS * SHARE, width), float("nan"), dtype=torch.float64)
    table, others = store.open(), [store.open(), store.open()]
    if hit_at:  # another request computed the same beginning; this one resumes from its blocks
        source = store.open()
        source.append(hit_at)
        out[:hit_at] = forward(store, layout, backend, [(source, 1, 0, hit_at, hit_at)])[0]
        source.commit()
        table.release()
        table = source.fork()
        source.release()
    at = table.length
    for turn in [*schedule, Turn(n)]:
        if at == n:
            break
        if turn.preempt:
            table.release()
            table, at = store.open(), 0
        keep = min(turn.tokens, n - at)
        table.append(keep + turn.drafts, drafts=turn.drafts)
        rows = [(table, 1, at, at + keep, at + keep + turn.drafts)]
        for i, other in enumerate(others[: turn.others]):
            start = other.length
            other.append(1 + i)
            rows.append((other, 5 + i, start, start + 1 + i, start + 1 + i))
        out[at : at + keep] = forward(store, layout, backend, rows)[0][:keep]
        at += keep
        table.truncate(at)
        table.commit()
        for other in others:
            other.commit()
    for t in (table, *others):
        t.release()
    assert store.usage().held_bytes == 0
    return out


def forward(store, layout, backend, rows) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """Rows are (table, text, start, stop of what is true, stop with drafts)."""
    step = Step(store, layout, [Row(t, a, c) for t, _, a, _, c in rows])
    parts = []
    (width,) = layout.fields_of(layout.spec.groups[0])[0].shape
    for _, text, a, b, c in rows:
        good = token_values(text, torch.arange(a, b), width)
        bad = token_values(text + 50, torch.arange(b, c), width) if b < c else None
        parts.append(
            good if bad is None else tuple(torch.cat(x) for x in zip(good, bad, strict=True))
        )
    k, v, q = (torch.cat(x) for x in zip(*parts, strict=True))
    step.write(0, {"k": k, "v": v})
    out = backend.run(step, 0, q.double(), scale=0.5)
    return list(out.split([c - a for _, _, a, _, c in rows]))


@given(
    span=plain_spans,
    size=st.integers(1, 6),
    codec=codecs,
    n=st.integers(1, 30),
    schedule=schedules,
    hit=st.integers(0, 29),
    sinks=st.sampled_from([0, 0, 1, 4, 9]),
)
def test_every_schedule_gives_the_same_answers(span, size, codec, n, schedule, hit, sinks) -> None:  # type: ignore[no-untyped-def]
    _, layout = layout_of(span, size, codec, sinks)
    same_answers(layout, schedule, n, hit)


@pytest.mark.parametrize("recipe", SEALING)
@given(
    span=long_spans,
    sinks=st.sampled_from([0, 3, 20]),
    n=st.integers(40, 90),
    schedule=st.lists(
        st.builds(Turn, st.integers(1, 40), st.sampled_from([0, 0, 1, 18]), st.just(value=False)),
        max_size=5,
    ),
    hit=st.integers(0, 60),
)
@settings(max_examples=max(5, settings.default.max_examples // 15))
def test_every_schedule_gives_the_same_answers_under_every_codec(
    recipe, span, sinks, n, schedule, hit
) -> None:  # type: ignore[no-untyped-def]
    _, layout = layout_of(span, 16, at_work(recipe, 16, SIZE), sinks, 16)
    same_answers(layout, schedule, n, hit)


def same_answers(layout: Layout, schedule: list[Turn], n: int, hit: int) -> None:
    """Of numbers up to SIZE: sums of scores in another order are out by that many roundings."""
    one_go, near = answers(layout, [], n, 0), {"rtol": 1e-9, "atol": 1e-9}
    assert not one_go.isnan().any()
    torch.testing.assert_close(answers(layout, schedule, n, min(hit, n - 1)), one_go, **near)
    torch.testing.assert_close(answers(layout, [Turn(1)] * n, n, 0), one_go, **near)
