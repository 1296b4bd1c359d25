"""What queries paid to each token, by every backend, against dense attention in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laws.dense import may_read, plain_spans
from quire.attention import Attended, ReferenceBackend, Row, Step
from quire.attention import observe as module
from quire.attention.cpu import CpuBackend
from quire.attention.observe import FOLDS, Fold, Over
from quire.attention.reference import TorchBackend
from quire.errors import ConfigError
from quire.kernels import native
from quire.plan import KVLayer, build_layout
from quire.spans import Full, Sinks, Window
from quire.spec import Field, KVConfig
from quire.store import BlockStore
from steps import Bench, Case

LIBRARY = native.load()
kernel = pytest.mark.skipif(
    LIBRARY is None, reason="the CPU kernels were not built here (no C++ compiler)"
)
LEVELS = [
    x for x in range(1, 9) if LIBRARY is not None and (x == LIBRARY.isa or 1 < x < LIBRARY.isa)
]
folds = st.sampled_from(FOLDS)
overs: Any = st.sampled_from([("sum", 0), ("sum", 0), ("max", 0), ("latest", 1), ("latest", 3)])


def paid(
    bench: Bench, fold: Fold, last: int | None, over: Over = "sum", top: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logarithms of all queries in float64, and each row's mass by position."""
    c, at, lses, masses = bench.case, 0, [], []
    for kv, row, gone in zip(bench.kv, bench.step.rows, bench.gone, strict=True):
        mass = torch.zeros(c.heads, c.share, row.stop, dtype=torch.float64)
        mass = mass if fold == "each" else mass[:, :1]
        for i in range(row.start, row.stop):
            p = torch.zeros(c.heads, c.share, row.stop, dtype=torch.float64)
            lse = torch.zeros(c.heads, c.share, dtype=torch.float64)
            for h in range(c.heads):
                lost = gone if h == c.heads - 1 else set()
                seen = [j for j in range(i + 1) if may_read(c.span, i, j) and j not in lost]
                seen = [j for j in seen if c.window is None or i - j < c.window]
                q = bench.q[at].double().view(c.heads, c.share, -1)[h]
                s = q @ kv[0, seen, h].double().T * 0.4
                if c.softcap is not None:
                    s = c.softcap * torch.tanh(s / c.softcap)
                whole = s
                if bench.logits is not None:
                    sink = bench.logits.view(c.heads, c.share, 1)[h].double()
                    whole = torch.cat([s, sink], 1)
                lse[h] = torch.logsumexp(whole, 1)
                p[h][:, seen] = torch.exp(s - lse[h].unsqueeze(1))
            if last is None or i >= row.stop - last:
                p = {"each": p, "mean": p.mean(1, True), "max": p.amax(1, True)}[fold]
                if over == "sum":
                    mass += p
                elif over == "max":
                    mass = mass.maximum(p)
                for x, line in zip(p.flatten(0, 1), mass.flatten(0, 1), strict=True):
                    best = sorted(range(row.stop), key=lambda j: -x[j])[:top]
                    for j in best:
                        if x[j] > 0:
                            line[j] = i + 1
            lses.append(lse.flatten())
            at += 1
        masses.append(mass.flatten(0, 1))
    return torch.stack(lses), masses


def ask(bench: Bench, backend: ReferenceBackend, attended: Attended, q: Any = None) -> torch.Tensor:
    c = bench.case
    return backend.run(
        bench.step,
        0,
        bench.q if q is None else q,
        scale=0.4,
        softcap=c.softcap,
        sinks=bench.logits,
        window=c.window,
        attended=attended,
    )


def check(
    case: Case,
    backend: ReferenceBackend,
    fold: Fold,
    last: int | None,
    near: float,
    how: tuple[Over, int] = ("sum", 0),
) -> Attended:
    over, top = how
    bench, attended = Bench(case), Attended(fold, last, over, top)
    out = ask(bench, backend, attended)
    assert torch.equal(out, bench.run(backend)), "asking changed the answer"
    lse, masses = paid(bench, fold, last, over, top)
    at = 0
    for row, want in zip(bench.step.rows, masses, strict=True):
        got = attended.total(row)
        torch.testing.assert_close(got.double(), want, rtol=near, atol=near)
        n = row.stop - row.start
        asked = n if last is None else min(n, last)
        mine = attended.lse[at : at + n].double()
        torch.testing.assert_close(
            mine[n - asked :], lse[at + n - asked : at + n], rtol=near, atol=near
        )
        assert mine[: n - asked].isnan().all()
        at += n
    return attended


rows = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from([1, 1, 2, 5])), min_size=1, max_size=3
).map(tuple)


@given(
    case=st.builds(
        Case,
        lengths=rows,
        span=plain_spans,
        size=st.sampled_from([1, 3, 4]),
        heads=st.integers(1, 3),
        share=st.integers(1, 3),
        dtype=st.sampled_from(["float32", "float64"]),
        softcap=st.sampled_from([None, 3.0]),
        sinks=st.booleans(),
        window=st.sampled_from([None, None, 3]),
        split=st.booleans(),
        seed=st.integers(0, 10**6),
    ).filter(lambda c: not (c.split and c.heads < 2)),
    fold=folds,
    last=st.sampled_from([None, None, 1, 3]),
    how=overs,
)
@settings(max_examples=max(40, settings.default.max_examples // 2), deadline=None)
def test_the_reference_gives_softmax_probabilities(
    case: Case, fold: Fold, last: int | None, how: tuple[Over, int]
) -> None:
    near = 1e-12 if case.dtype == "float64" else 1e-5
    check(case, ReferenceBackend(), fold, last, near, how)
    check(case, TorchBackend(), fold, last, near, how)


@kernel
@given(
    case=st.builds(
        Case,
        lengths=st.lists(
            st.tuples(st.integers(0, 70), st.sampled_from([1, 1, 1, 3])), min_size=1, max_size=3
        ).map(tuple),
        span=plain_spans,
        size=st.sampled_from([1, 3, 16, 32]),
        heads=st.integers(2, 3),
        share=st.sampled_from([1, 2, 3, 5, 9]),
        softcap=st.sampled_from([None, 3.0]),
        sinks=st.booleans(),
        split=st.booleans(),
        seed=st.integers(0, 10**6),
        width=st.sampled_from([16, 48, 64]),
    ),
    fold=folds,
    last=st.sampled_from([None, 1]),
    how=overs,
    isa=st.sampled_from(LEVELS or [0]),
)
@settings(max_examples=max(50, settings.default.max_examples // 2), deadline=None)
def test_the_kernel_gives_softmax_probabilities(
    case: Case, fold: Fold, last: int | None, how: tuple[Over, int], isa: int
) -> None:
    check(case, CpuBackend(isa=isa), fold, last, 1e-5, how)


@kernel
@pytest.mark.parametrize("cached", [511, 512, 700, 1300])
def test_pieces_of_long_contexts_share_one_sum(cached: int) -> None:
    """More than one piece a query, windows that begin within a block, and several queries."""
    for span in (Full(), Window(600), Sinks(5, 40)):
        case = Case(((cached, 1), (3, 1)), span, size=16, width=32, share=2, sinks=True)
        backend = CpuBackend()
        asked: list[bool] = []
        decode = backend.library.decode
        backend.library = SimpleNamespace(  # type: ignore[assignment]
            decode=lambda a, asked=asked, decode=decode: (asked.append(bool(a.probs)), decode(a))
        )
        check(case, backend, "mean", None, 1e-5)
        assert asked == [True, False], "the kernel was not asked, or asked for more than was wanted"


@kernel
@pytest.mark.parametrize(
    "kv", ["int8", "int4", "kivi:bits=2,residual=32", "k=int4,v=bf16;sinks=4;window=32", "fp8"]
)
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("top", [0, 5])
def test_codes_and_their_raw_tail_are_paid_apart(kv: str, fold: Fold, top: int) -> None:
    """A body and its raw companion are two parts; together they hold every position once."""
    fields = (Field("k", (64,), "float32"), Field("v", (64,), "float32"))
    layout = build_layout([KVLayer(0, 2, fields)], KVConfig(kv), dtype="float32")
    store = BlockStore(layout.spec, 8 << 20, device="cpu")
    store.arena.buffer.fill_(255)
    g, rows = torch.Generator().manual_seed(1), []
    for n in (200, 90):
        table, at = store.open(), 0
        kv_rows = torch.randn(2, n, 2, 64, generator=g)
        for stop in (n - 1, n):
            table.append(stop - at)
            step = Step(store, layout, [Row(table, at, stop)])
            ReferenceBackend().write(step, 0, {"k": kv_rows[0, at:stop], "v": kv_rows[1, at:stop]})
            table.commit()
            at = stop
        rows.append(Row(table, n - 1, n))
    step = Step(store, layout, rows)
    q = torch.randn(2, 6, 64, generator=g)
    over: Over = "latest" if top else "sum"
    mine, theirs = (Attended(fold, over=over, top=top) for _ in range(2))
    CpuBackend().run(step, 0, q, scale=0.2, attended=mine)
    ReferenceBackend().run(step, 0, q.double(), scale=0.2, attended=theirs)
    torch.testing.assert_close(mine.lse.double(), theirs.lse, rtol=1e-4, atol=1e-4)
    for row in rows:
        got, want = mine.total(row).double(), theirs.total(row)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
        if top:
            assert ((got > 0).sum(1) == top).all(), "the largest of body and tail together"
        elif fold != "max":
            torch.testing.assert_close(got.sum(1), torch.ones(len(got)).double(), rtol=1e-4, atol=0)


def test_many_queries_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(((5, 40),), sinks=True)
    monkeypatch.setattr(module, "SCORE_BYTES", 1)
    check(case, ReferenceBackend(), "mean", 7, 1e-5)


def test_one_question_can_be_asked_again() -> None:
    bench, attended = Bench(Case(((9, 1), (3, 2)))), Attended()
    ask(bench, ReferenceBackend(), attended)
    first = [attended.total(r) for r in bench.step.rows]
    ask(bench, ReferenceBackend(), attended)
    for row, want in zip(bench.step.rows, first, strict=True):
        assert torch.equal(attended.total(row), want)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"fold": "sum"}, "each, mean, max"),
        ({"last": 0}, "each, mean, max"),
        ({"over": "latest"}, "top of 1 or more"),
        ({"top": 3}, "over='latest'"),
    ],
)
def test_questions_that_mean_nothing_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Attended(**wrong)
