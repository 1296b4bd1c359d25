"""Absorbed attention over latents: the compiled kernel against float64, at every instruction-set level."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.attention import Attended, ReferenceBackend, Row, Step
from quire.attention.cpu import CpuBackend
from quire.kernels import native
from quire.plan import KVLayer, build_layout
from quire.spans import Full, Sinks, Span, Window
from quire.spec import Field, KVConfig
from quire.store import BlockStore
from steps import DTYPES

LIBRARY = native.load()
pytestmark = pytest.mark.skipif(
    LIBRARY is None, reason="the CPU kernels were not built here (no C++ compiler)"
)
LEVELS = [
    x for x in range(1, 9) if LIBRARY is not None and (x == LIBRARY.isa or 1 < x < LIBRARY.isa)
]
KEYS = {"keys": ("latent", "k_rope"), "value": "latent"}
RECIPES = [
    "auto",
    "int8",
    "int4",
    "fp8:scale=token",
    "latent=int4:group=64,k_rope=int8",
    "latent=int8",
]
FULL = Full()


class Mla:
    """Queries over sequences of latents; memory that holds no token is no number."""

    def __init__(
        self,
        lengths: tuple[tuple[int, int], ...],
        *,
        kv: str = "auto",
        stored: str = "float32",
        heads: int = 16,
        widths: tuple[int, int] = (64, 16),
        size: int = 32,
        span: Span = FULL,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        fields = (Field("latent", widths[:1], stored), Field("k_rope", widths[1:], stored))
        layers = [KVLayer(i, 1, fields, span) for i in range(2)]
        self.layout = build_layout(layers, KVConfig(kv, block_tokens=size), dtype=stored)
        spec = self.layout.spec
        room = sum(2 * spec.bytes_for(sum(n), chunk_tokens=sum(n)) for n in lengths)
        room += 16 * sum(x.block_bytes for x in spec)
        self.store = BlockStore(spec, room, device="cpu")
        self.store.arena.buffer.fill_(255)
        rows, new = [], []
        for cached, n in lengths:
            table, at = self.store.open(), 0
            x = [torch.randn(cached + n, 1, w, generator=g).to(DTYPES[stored]) for w in widths]
            x[0][..., 3] *= 4
            for stop in [s for s in (cached // 2, cached) if s]:
                if stop > at:
                    table.append(stop - at)
                    self.write([Row(table, at, stop)], [y[at:stop] for y in x])
                    table.commit()
                    at = stop
            table.append(n)
            rows.append(Row(table, cached, cached + n))
            new.append([y[cached:] for y in x])
        self.step = self.write(rows, [torch.cat(y) for y in zip(*new, strict=True)])
        self.q = torch.randn(self.step.n_tokens, heads, sum(widths), generator=g)
        self.scale = sum(widths) ** -0.5

    def write(self, rows: list[Row], x: list[torch.Tensor]) -> Step:
        step = Step(self.store, self.layout, rows)
        for layer in range(2):
            values = {"latent": x[0] * (1 - 2 * layer), "k_rope": x[1]}
            ReferenceBackend().write(step, layer, values)
        return step

    def run(self, backend: ReferenceBackend, q: torch.Tensor | None = None, **more: Any) -> Any:
        q = self.q if q is None else q
        return backend.run(self.step, 1, q, scale=self.scale, **KEYS, **more)

    def near(self, got: torch.Tensor, bound: float) -> bool:
        want = self.run(ReferenceBackend(), self.q.double())
        return float((got.double() - want).norm()) <= bound * float(want.norm())


def counted(isa: int = 0) -> tuple[CpuBackend, list[int]]:
    backend, calls = CpuBackend(isa=isa), []
    library = backend.library
    backend.library = SimpleNamespace(  # type: ignore[assignment]
        latent=lambda a: (calls.append(1), library.latent(a)), gather=library.gather
    )
    return backend, calls


@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 200), st.sampled_from([1, 1, 1, 3])), min_size=1, max_size=3
    )
    .map(tuple)
    .filter(lambda x: any(n == 1 for _, n in x)),
    stored=st.sampled_from(["float32", "bfloat16", "float16"]),
    heads=st.sampled_from([1, 3, 16, 37]),
    widths=st.sampled_from([(16, 16), (64, 16), (80, 48), (512, 64), (1024, 256)]),
    size=st.sampled_from([1, 3, 16, 32, 64]),
    span=st.sampled_from([FULL, FULL, Window(70), Sinks(3, 40)]),
    isa=st.sampled_from(LEVELS or [0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=max(40, settings.default.max_examples // 2), deadline=None)
def test_it_is_attention_in_float32(
    lengths: tuple[tuple[int, int], ...],
    stored: str,
    heads: int,
    widths: tuple[int, int],
    size: int,
    span: Span,
    isa: int,
    seed: int,
) -> None:
    """Within 1e-6 of the output's norm, over plain blocks of any size."""
    case = Mla(lengths, stored=stored, heads=heads, widths=widths, size=size, span=span, seed=seed)
    backend, calls = counted(isa)
    got = case.run(backend)
    assert calls, "the kernel was not asked"
    assert got.shape == (case.step.n_tokens, heads, widths[0])
    assert case.near(got, 1e-6)


@pytest.mark.parametrize("kv", RECIPES)
@pytest.mark.parametrize("span", [FULL, Window(70), Sinks(3, 40)])
@pytest.mark.parametrize("isa", LEVELS)
def test_codes_and_their_raw_tail_are_read_in_place(kv: str, span: Span, isa: int) -> None:
    """A body and its raw companion, merged; windows begin within sixteen tokens of a tile."""
    case = Mla(((130, 1), (201, 1), (5, 1)), kv=kv, widths=(128, 32), span=span, seed=3)
    backend, calls = counted(isa)
    got = case.run(backend)
    assert calls
    assert case.near(got, 2e-6)


@pytest.mark.parametrize("cached", [511, 512, 700, 1300])
@pytest.mark.parametrize("heads", [16, 128])
def test_pieces_are_merged(cached: int, heads: int) -> None:
    case = Mla(((cached, 1), (40, 1)), stored="bfloat16", heads=heads, widths=(512, 64))
    assert case.near(case.run(CpuBackend()), 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_queries_in_16_bits_are_answered_in_16_bits(dtype: str) -> None:
    case = Mla(((300, 1),), stored=dtype, widths=(512, 64))
    case.q = case.q.to(DTYPES[dtype])
    got = case.run(CpuBackend())
    assert got.dtype == case.q.dtype
    assert case.near(got, 3e-3)
    exact = case.run(CpuBackend(), case.q.float())
    assert torch.equal(got, exact.to(got.dtype))


def test_a_query_is_answered_alike_in_any_batch_and_on_any_threads() -> None:
    """Bit for bit: pieces are cut by the sequence alone, and heads do not know of each other."""
    case = Mla(tuple((n, 1) for n in (700, 3, 1400)), heads=40)
    before, answers = torch.get_num_threads(), []
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            answers.append(case.run(CpuBackend()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    for i, row in enumerate(case.step.rows):
        step = Step(case.store, case.layout, [row])
        alone = CpuBackend().run(step, 1, case.q[i : i + 1], scale=case.scale, **KEYS)
        assert torch.equal(alone[0], answers[0][i])


def test_not_a_number_is_not_hidden_and_not_spread() -> None:
    case = Mla(((40, 1), (50, 1)))
    case.q[0, 5, 3] = torch.nan
    got = case.run(CpuBackend())
    assert got[0, 5].isnan().all()
    assert not got[0, :5].isnan().any()
    assert not got[1].isnan().any()


def test_queries_in_strided_memory_are_read_where_they_lie() -> None:
    case = Mla(((40, 1), (9, 1)))
    wide = torch.zeros(2, 20, 2 * 80)
    wide[:, 2:18, ::2] = case.q
    assert torch.equal(case.run(CpuBackend(), wide[:, 2:18, ::2]), case.run(CpuBackend()))
    turned = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(case.run(CpuBackend(), turned), case.run(CpuBackend()))


@pytest.mark.parametrize(
    ("widths", "more"),
    [
        ((24, 8), {}),
        ((64, 8), {}),
        ((64, 16), {"softcap": 3.0}),
        ((64, 16), {"sinks": torch.linspace(-1, 1, 16)}),
        ((64, 16), {"window": 7}),
    ],
)
def test_what_the_kernel_does_not_serve_goes_through_torch(
    widths: tuple[int, int], more: dict[str, Any]
) -> None:
    case = Mla(((40, 1), (9, 1)), widths=widths)
    backend, calls = counted()
    got = case.run(backend, **more)
    assert not calls
    want = case.run(ReferenceBackend(), case.q.double(), **more)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_what_latents_were_paid_comes_from_torch() -> None:
    case, attended = Mla(((40, 1), (9, 1))), Attended("mean")
    case.run(CpuBackend(), attended=attended)
    for row in case.step.rows:
        mass = attended.total(row)
        assert mass.shape == (1, row.stop)
        torch.testing.assert_close(mass.sum(1), torch.ones(1))
