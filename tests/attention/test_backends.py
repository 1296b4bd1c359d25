"""Backends over real blocks against dense attention in float64, and the fast one against the plain one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laws.dense import plain_spans
from quire.attention import ReferenceBackend, Row, Step, fused
from quire.attention import reference as module
from quire.attention.reference import TorchBackend
from quire.plan import KVLayer, build_layout
from quire.spans import Full, Sinks, Window
from quire.spec import Field, KVConfig
from quire.store import BlockStore
from steps import TOLERANCE, Bench, Case, check

lengths = st.lists(
    st.tuples(st.integers(0, 18), st.sampled_from([1, 1, 1, 2, 7])), min_size=1, max_size=4
).map(tuple)
cases = st.builds(
    Case,
    lengths=lengths,
    span=plain_spans,
    size=st.sampled_from([1, 3, 4]),
    heads=st.integers(1, 3),
    share=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "float32", "float64", "bfloat16", "float16"]),
    residual=st.one_of(st.none(), st.integers(0, 9)),
    softcap=st.sampled_from([None, None, 3.0]),
    sinks=st.booleans(),
    window=st.sampled_from([None, None, 3]),
    seed=st.integers(0, 10**6),
)
splits = st.builds(
    Case,
    lengths=lengths,
    span=plain_spans,
    size=st.sampled_from([1, 3, 4]),
    heads=st.integers(2, 3),
    sinks=st.booleans(),
    split=st.just(value=True),
    seed=st.integers(0, 10**6),
)
many = settings(max_examples=max(60, settings.default.max_examples // 2))


@given(case=cases)
@many
def test_the_reference_backend_is_dense_attention(case: Case) -> None:
    check(case, ReferenceBackend())


@given(case=cases)
@many
def test_the_torch_backend_is_dense_attention(case: Case) -> None:
    check(case, TorchBackend())


@given(case=cases, rows=st.sampled_from([1, 2, 3]))
@many
def test_chunks_in_pieces_are_dense_attention(case: Case, rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "CHUNK_ROWS", rows)
        check(case, TorchBackend())


def test_a_piece_asks_for_the_keys_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal chunk of 12 behind 8: the scores of each 4 queries, not of all 12 with all 20 keys."""
    monkeypatch.setattr(fused, "CHUNK_ROWS", 4)
    (read,) = Bench(Case(((8, 12),))).step.of_layer(0)[2]
    causal = [(p.start, p.stop, p.low, p.high) for p in fused.pieces([read], None)]
    assert causal == [(0, 4, 0, 12), (4, 8, 0, 16), (8, 12, 0, 20)]
    assert fused.pieces([read], None) is fused.pieces([read], None), "made once for all layers"
    narrow = [(p.start, p.stop, p.low, p.high) for p in fused.pieces([read], 3)]
    assert narrow == [(0, 4, 6, 12), (4, 8, 10, 16), (8, 12, 14, 20)]


@given(case=splits)
@many
def test_heads_that_keep_other_tokens_are_read_each_by_itself(case: Case) -> None:
    check(case, ReferenceBackend())
    check(case, TorchBackend())


@given(case=cases)
def test_the_fast_backend_is_held_to_the_plain_one(case: Case) -> None:
    bench = Bench(case)
    bound = TOLERANCE[bench.dtype]
    torch.testing.assert_close(
        bench.run(TorchBackend()), bench.run(ReferenceBackend()), rtol=bound, atol=bound
    )


@given(case=cases)
def test_queries_in_float64_are_answered_in_float64(case: Case) -> None:
    bench = Bench(case)
    got = bench.run(ReferenceBackend(), bench.q.double())
    assert got.dtype == torch.float64
    if case.residual is None:  # a codec is read in the query's dtype, the oracle in the model's
        torch.testing.assert_close(got, bench.dense(), rtol=1e-12, atol=1e-12)


# -- particular shapes -------------------------------------------------------------------------------------------


def test_long_chunks_are_cut_by_the_memory_of_their_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(((5, 40),), residual=6, sinks=True)
    whole = Bench(case).run(ReferenceBackend())
    monkeypatch.setattr(module, "SCORE_BYTES", 1)
    for backend in (ReferenceBackend(), TorchBackend()):
        torch.testing.assert_close(Bench(case).run(backend), whole, rtol=1e-6, atol=1e-6)


def test_rows_of_like_length_are_read_together_and_far_ones_apart() -> None:
    near = Bench(Case(tuple((n, 1) for n in (8, 9, 10)), size=1))
    assert len(near.step.reads) == 1
    far = Bench(Case(((1, 1), (200, 1)), size=1))
    assert [tuple(r.kpos.shape) for r in far.step.reads] == [(1, 2), (1, 201)]
    mixed = Bench(Case(((8, 1), (9, 5), (8, 1)), size=1))
    assert sorted(r.tokens.shape[1] for r in mixed.step.reads) == [1, 5]


def test_sinks_and_window_in_one_block_are_read_once() -> None:
    bench = Bench(Case(((6, 1),), span=Sinks(2, 3), size=8))
    counted = torch.zeros(7)
    for r in bench.step.reads:
        mask = r.mask()
        at = r.kpos[0] if mask is None else r.kpos[0][mask[0, 0]]
        counted[at] += 1
    assert counted.tolist() == [1, 1, 0, 0, 1, 1, 1]


def test_latents_are_keys_and_values_at_once() -> None:
    fields = (Field("latent", (6,), "float32"), Field("k_rope", (2,), "float32"))
    layout = build_layout([KVLayer(0, 1, fields)], KVConfig(block_tokens=4), dtype="float32")
    store = BlockStore(layout.spec, 1 << 16, device="cpu")
    table = store.open()
    table.append(10)
    step = Step(store, layout, [Row(table, 0, 10)])
    latent, rope, q = torch.randn(10, 1, 6), torch.randn(10, 1, 2), torch.randn(10, 3, 8)
    step.write(0, {"latent": latent, "k_rope": rope})
    k = torch.cat([latent, rope], -1)[:, 0]
    s = torch.einsum("thd,nd->thn", q, k) * 0.3
    s = s.masked_fill(~torch.ones(10, 10, dtype=torch.bool).tril().unsqueeze(1), -torch.inf)
    want = torch.softmax(s, -1) @ latent[:, 0]
    for backend in (ReferenceBackend(), TorchBackend()):
        got = backend.run(step, 0, q, scale=0.3, keys=("latent", "k_rope"), value="latent")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: Case(**{**vars(c), "window": None}),
        lambda c: Case(**{**vars(c), "softcap": None}),
        lambda c: Case(**{**vars(c), "sinks": False}),
        lambda c: Case(**{**vars(c), "span": Full()}),
        lambda c: Case(**{**vars(c), "residual": 8}),
    ],
)
def test_the_comparison_can_fail(spoil: Callable[[Case], Case]) -> None:
    """Negative controls: each ingredient changes the answer by more than the tolerance."""
    case = Case(((12, 2),), Sinks(2, 9), window=10, softcap=2.0, sinks=True, residual=0, seed=3)
    wrong = Bench(spoil(case)).run(ReferenceBackend())
    assert float((wrong.double() - Bench(case).dense()).abs().max()) > 1e-3


def test_a_step_of_many_layers_plans_once() -> None:
    fields = (Field("k", (4,), "float32"), Field("v", (4,), "float32"))
    layers = [KVLayer(i, 2, fields, Window(4) if i % 2 else Full()) for i in range(6)]
    layout = build_layout(layers, KVConfig(block_tokens=4), dtype="float32")
    store = BlockStore(layout.spec, 1 << 20, device="cpu")
    table = store.open()
    table.append(9)
    step = Step(store, layout, [Row(table, 0, 9)])
    assert len(step.reads) == len(step.writes) == 2
    assert [r.group.span for r in step.of_layer(3)[2]] == [Window(4)]
    assert step.positions().tolist() == list(range(9))
    assert np.array_equal(step.of_layer(1)[2][0].kpos[0, :9], np.arange(9))
