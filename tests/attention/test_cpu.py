"""The compiled kernel against dense attention in float64, at every instruction-set level that this processor has."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laws.dense import plain_spans
from quire.attention import ReferenceBackend, Row, Step, reference
from quire.attention.cpu import CpuBackend
from quire.attention.segments import lay_out
from quire.codecs import fp8, int4, int8
from quire.errors import ConfigError
from quire.kernels import build, native
from quire.models.bridge import make_backend
from quire.plan import KVLayer, build_layout
from quire.spans import Full, Sinks, Span, Window
from quire.spec import Field, KVCodec, KVConfig, Packing, Site
from quire.store import BlockStore
from steps import DTYPES, Bench, Case, check

LIBRARY = native.load()
pytestmark = pytest.mark.skipif(
    LIBRARY is None, reason="the CPU kernels were not built here (no C++ compiler)"
)
LEVELS = [
    x for x in range(1, 9) if LIBRARY is not None and (x == LIBRARY.isa or 1 < x < LIBRARY.isa)
]

cases = st.builds(
    Case,
    lengths=st.lists(
        st.tuples(st.integers(0, 70), st.sampled_from([1, 1, 1, 2])), min_size=1, max_size=3
    ).map(tuple),
    span=plain_spans,
    size=st.sampled_from([1, 3, 16, 32, 64, 128]),
    heads=st.integers(1, 2),
    share=st.sampled_from([1, 1, 2, 3, 4, 5, 9]),
    dtype=st.sampled_from(["float32", "float32", "bfloat16", "float16"]),
    softcap=st.sampled_from([None, None, 3.0]),
    sinks=st.booleans(),
    window=st.sampled_from([None, None, None, 3]),
    seed=st.integers(0, 10**6),
    width=st.sampled_from([16, 48, 64, 80, 96, 128, 256]),
)
splits = st.builds(
    Case,
    lengths=st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 2])), min_size=1, max_size=3
    ).map(tuple),
    span=plain_spans,
    size=st.sampled_from([1, 3, 16]),
    heads=st.integers(2, 3),
    sinks=st.booleans(),
    split=st.just(value=True),
    seed=st.integers(0, 10**6),
    width=st.sampled_from([16, 64]),
)
levels = st.sampled_from(LEVELS or [0])


def near(kv: str) -> float:
    """Of the output's norm: where codes are multiplied as integers, queries and weights become whole numbers."""
    return 3e-4 if any(name in kv for name in ("int8", "int4", "kivi")) else 2e-6


@given(case=cases, isa=levels)
@settings(max_examples=max(50, settings.default.max_examples))
def test_the_kernel_is_dense_attention(case: Case, isa: int) -> None:
    check(case, CpuBackend(isa=isa))


@given(case=splits, isa=levels)
def test_heads_that_keep_other_tokens_are_read_each_by_itself(case: Case, isa: int) -> None:
    check(case, CpuBackend(isa=isa))


@given(
    cached=st.sampled_from([0, 1, 15, 127, 128, 129, 511, 512, 700, 1300]),
    stored=st.sampled_from(["float32", "bfloat16", "float16"]),
    width=st.sampled_from([64, 80, 96, 128, 256]),
    size=st.sampled_from([16, 32, 64, 128]),
    share=st.integers(1, 9),
    isa=levels,
    seed=st.integers(0, 10**6),
)
@settings(deadline=None)
def test_its_arithmetic_is_float32_whatever_is_stored(
    cached: int, stored: str, width: int, size: int, share: int, isa: int, seed: int
) -> None:
    """Against float64 over what is stored: within 1e-6 of the output's norm."""
    bench = Stored(cached, stored, width, size, share, seed)
    got = CpuBackend(isa=isa).run(bench.step, 0, bench.q, scale=width**-0.5)
    want = ReferenceBackend().run(bench.step, 0, bench.q.double(), scale=width**-0.5)
    assert float((got - want).norm()) <= 1e-6 * float(want.norm())


class Stored:
    """One float32 query over a cache that stores `stored`, other slots no number."""

    def __init__(
        self, cached: int, stored: str, width: int, size: int, share: int, seed: int = 0
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        fields = (Field("k", (width,), stored), Field("v", (width,), stored))
        layout = build_layout(
            [KVLayer(0, 2, fields, Full())], KVConfig(block_tokens=size), dtype=stored
        )
        self.store = BlockStore(layout.spec, 4 * layout.spec.bytes_for(cached + 1), device="cpu")
        self.store.arena.buffer.fill_(255)
        table = self.store.open()
        table.append(cached + 1)
        kv = torch.randn(2, cached + 1, 2, width, generator=g)
        step = Step(self.store, layout, [Row(table, 0, cached + 1)])
        CpuBackend().write(step, 0, {"k": kv[0], "v": kv[1]})
        self.kv = kv.to(DTYPES[stored])
        self.step = Step(self.store, layout, [Row(table, cached, cached + 1)])
        self.whole = step
        self.q = torch.randn(1, 2 * share, width, generator=g)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("given_as", ["float32", "bfloat16", "float16"])
def test_rows_are_written_as_torch_writes_them(stored: str, given_as: str) -> None:
    """Bit for bit, conversions between all dtypes included, with subnormals, infinities and ties."""
    x = torch.randn(2, 40, 2, 16, generator=torch.Generator().manual_seed(3))
    odd = torch.tensor([0.0, -0.0, 1e-8, 3e-6, 6.0e-5, 65519.0, 65520.0, torch.inf, -torch.inf])
    x.view(-1)[: 9 * 8] = odd.repeat(8)
    x.view(-1)[72:80] = torch.tensor(
        [1 + 2.0**-8, 1 + 3 * 2.0**-8, 2049.0, 2051.0, 3e38, 1e-45, -1, 1e-40]
    )
    x = x.to(DTYPES[given_as])
    fields = (Field("k", (16,), stored), Field("v", (16,), stored))
    layout = build_layout([KVLayer(0, 2, fields)], KVConfig(block_tokens=8), dtype=stored)
    views = []
    for backend in (CpuBackend(), ReferenceBackend()):
        store = BlockStore(layout.spec, 1 << 18, device="cpu")
        store.arena.buffer.zero_()
        table = store.open()
        table.append(40)
        backend.write(Step(store, layout, [Row(table, 0, 40)]), 0, {"k": x[0], "v": x[1]})
        views.append(store.arena.buffer.clone())
    assert torch.equal(*views)
    assert views[0].any()


def test_not_a_number_is_not_hidden() -> None:
    bench = Stored(40, "float32", 64, 16, 2)
    bench.q[0, 1, 5] = torch.nan
    got = CpuBackend().run(bench.step, 0, bench.q, scale=0.1)
    assert got[0, 1].isnan().all()
    assert not got[0, 0].isnan().any()
    for field in (0, 1):
        other = Stored(40, "float32", 64, 16, 2)
        view = other.store.view(other.step.layout.spec.groups[0], 0, "kv"[field])
        units = other.step.reads[0].blocks.at
        view[units[0, 1], 0, 3, 7] = torch.nan
        got = CpuBackend().run(other.step, 0, other.q, scale=0.1)
        assert got[0, :2].isnan().any()
        assert not got[0, 2:].isnan().any()


def test_a_query_is_answered_alike_in_any_batch_and_on_any_threads() -> None:
    """Bit for bit: pieces are cut by the sequence alone."""
    case = Case(tuple((n, 1) for n in (700, 3, 1400, 515)), size=16, width=64, share=4)
    together = Bench(case)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole = together.run(CpuBackend())
        torch.set_num_threads(1)
        alone = together.run(CpuBackend())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, alone)
    for i, row in enumerate(together.step.rows):
        step = Step(together.store, together.layout, [row])
        assert torch.equal(
            CpuBackend().run(step, 0, together.q[i : i + 1], scale=0.4), whole[i : i + 1]
        )


def test_chunks_and_single_queries_share_a_step() -> None:
    case = Case(((40, 1), (9, 6), (0, 5), (70, 1)), size=16, width=32, share=2, sinks=True)
    check(case, CpuBackend())
    bench = Bench(replace(case, sinks=False))
    kernel = bench.run(CpuBackend())
    torch.testing.assert_close(kernel, bench.run(ReferenceBackend()), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(
    "case",
    [
        Case(((9, 1),), width=8),
        Case(((9, 1),), width=16, dtype="float64"),
        Case(((9, 1),), width=16, window=2),
        Case(((9, 1), (20, 1)), width=16, residual=3),
        Case(((9, 1),), width=272, span=Window(4)),
    ],
)
def test_what_the_kernel_does_not_serve_goes_through_torch(case: Case) -> None:
    check(case, CpuBackend())


def test_queries_in_strided_memory_are_read_where_they_lie() -> None:
    bench = Bench(Case(((9, 1), (30, 1)), width=32, share=2))
    wide = torch.zeros(2, 7, 2 * 32)
    wide[:, 2:6, ::2] = bench.q
    assert torch.equal(bench.run(CpuBackend(), wide[:, 2:6, ::2]), bench.run(CpuBackend()))
    turned = bench.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(bench.run(CpuBackend(), turned), bench.run(CpuBackend()))


RECIPES = [
    "int8",
    "int8:scale=channel",
    "int8:scale=tensor",
    "fp8",
    "fp8:format=e5m2",
    "fp8:scale=token",
    "int4",
    "int4:rotate=false",
    "int4:group=32",
    "int4:group=32,rotate=false",
    "kivi:bits=2,residual=32",
    "kivi:bits=4,residual=0,group=16",
    "kivi:bits=2,residual=16,group=64",
    "k=int8,v=int4",
    "k=int4,v=bf16",
    "k=fp8,v=kivi:bits=2,residual=32",
    "int4;sinks=4;window=32",
]


class Coded:
    """Float32 queries at the end of sequences that a recipe stores, in several chunks; other bytes are no number."""

    def __init__(
        self,
        kv: str,
        lengths: tuple[int, ...],
        width: int,
        size: int,
        share: int,
        span: Span,
        seed: int,
        spoil: int | None = None,
        codecs: Mapping[str, KVCodec] | None = None,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        fields = (Field("k", (width,), "float32"), Field("v", (width,), "float32"))
        self.layout = build_layout(
            [KVLayer(0, 2, fields, span)],
            KVConfig(kv, block_tokens=size),
            dtype="float32",
            codecs=codecs,
        )
        room = sum(
            4 * self.layout.spec.bytes_for(n + 1, chunk_tokens=n + 1) + (1 << 19) for n in lengths
        )
        self.store = BlockStore(self.layout.spec, room, device="cpu")
        self.store.arena.buffer.fill_(255)
        rows, last = [], []
        for n in lengths:
            table, at = self.store.open(), 0
            kv_values = torch.randn(2, n + 1, 2, width, generator=g)
            kv_values[0, :, :, 3] *= 4  # a channel that stands out
            if spoil is not None:
                kv_values[:, spoil] = torch.nan
            while at < n:
                stop = min(n, at + 50)
                table.append(stop - at)
                step = Step(self.store, self.layout, [Row(table, at, stop)])
                CpuBackend().write(
                    step, 0, {"k": kv_values[0, at:stop], "v": kv_values[1, at:stop]}
                )
                table.commit()
                at = stop
            table.append(1)
            rows.append(Row(table, n, n + 1))
            last.append(kv_values[:, n])
        self.step = Step(self.store, self.layout, rows)
        new = torch.stack(last, 1)
        CpuBackend().write(self.step, 0, {"k": new[0], "v": new[1]})
        self.q = torch.randn(len(lengths), 2 * share, width, generator=g)


@pytest.mark.parametrize("kv", RECIPES)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=2).map(tuple),
    width=st.sampled_from([32, 64, 96, 128]),
    size=st.sampled_from([32, 64]),
    share=st.sampled_from([1, 2, 4, 5]),
    span=st.sampled_from([Full(), Full(), Window(70), Sinks(3, 40)]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=max(10, settings.default.max_examples // 5))
def test_codes_are_read_in_place_as_they_decode(
    kv: str, lengths: tuple[int, ...], width: int, size: int, share: int, span: Span, seed: int
) -> None:
    """Against float64 attention over the decoded cache, at every level: within 2e-6 of the output's norm, within 3e-4
    where codes are multiplied as integers."""
    if "group=64" in kv:
        width, size = max(64, width // 64 * 64), 64
    case = Coded(kv, lengths, width, size, share, span, seed)
    want = ReferenceBackend().run(case.step, 0, case.q.double(), scale=width**-0.5)
    for isa in LEVELS:
        backend, calls = CpuBackend(isa=isa), []
        decode = backend.library.decode
        backend.library = SimpleNamespace(  # type: ignore[assignment]
            decode=lambda a, decode=decode, calls=calls: (calls.append(1), decode(a))
        )
        got = backend.run(case.step, 0, case.q, scale=width**-0.5)
        assert calls, "the kernel was not asked"
        assert float((got - want).norm()) <= near(kv) * float(want.norm()), isa


@pytest.mark.skipif(not {5, 6} <= set(LEVELS), reason="no matrix unit (AMX) here")
@pytest.mark.parametrize("kv", ["int8", "int4", "int4:group=32,rotate=false"])
@pytest.mark.parametrize("share", [1, 2, 4, 5])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_matrix_unit_adds_up_the_same_whole_numbers(kv: str, share: int, size: int) -> None:
    """Bit for bit what the level below gives, whatever lies side by side in a block."""
    case = Coded(kv, (200, 77), 96, size, share, Window(150), 7)
    one, other = (CpuBackend(isa=x).run(case.step, 0, case.q, scale=0.1) for x in (5, 6))
    assert torch.equal(one, other)


@given(
    kv=st.sampled_from(RECIPES),
    length=st.integers(40, 200),
    width=st.sampled_from([32, 64, 96, 128]),
    size=st.sampled_from([32, 64]),
    span=st.sampled_from([Full(), Window(70)]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=max(40, settings.default.max_examples // 2))
def test_codes_are_decoded_as_the_codec_decodes_them(
    kv: str, length: int, width: int, size: int, span: Span, seed: int
) -> None:
    """For chunks: the kernel's rows against the codec's own, in float32 and rounded to 16 bits."""
    if "group=64" in kv:
        width, size = max(64, width // 64 * 64), 64
    case = Coded(kv, (length,), width, size, 1, span, seed)
    for r in case.step.reads:
        if r.mode != "body":
            continue
        for name in ("k", "v"):
            want = case.step.gather(0, r, name, torch.float32)
            got = CpuBackend()._gather(case.step, 0, r, name, torch.float32)
            torch.testing.assert_close(got, want, rtol=2e-6, atol=4e-6)
            half = CpuBackend()._gather(case.step, 0, r, name, torch.bfloat16)
            assert torch.equal(half, got.to(torch.bfloat16))


@pytest.mark.parametrize("kv", ["int8", "k=int4,v=bf16", "kivi:bits=2,residual=32"])
def test_a_chunk_decodes_a_few_heads_at_a_time(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies side by side at once is bounded, and every head still reads its own."""
    fields = (Field("k", (32,), "float32"), Field("v", (32,), "float32"))
    layout = build_layout([KVLayer(0, 3, fields)], KVConfig(kv), dtype="float32")
    store = BlockStore(layout.spec, 4 << 20, device="cpu")
    g, table = torch.Generator().manual_seed(5), store.open()
    for at, stop in ((0, 150), (150, 160)):
        table.append(stop - at)
        step = Step(store, layout, [Row(table, at, stop)])
        x = torch.randn(2, stop - at, 3, 32, generator=g)
        CpuBackend().write(step, 0, {"k": x[0], "v": x[1]})
        table.commit()
    q = torch.randn(10, 6, 32, generator=g)
    want = CpuBackend().run(step, 0, q, scale=0.2)
    exact = ReferenceBackend().run(step, 0, q.double(), scale=0.2)
    assert float((want - exact).norm()) <= 3e-6 * float(exact.norm())
    backend, heads = CpuBackend(), []
    gather = backend.library.gather
    backend.library = SimpleNamespace(  # type: ignore[assignment]
        gather=lambda a: (heads.append(a.n_heads), gather(a))
    )
    monkeypatch.setattr(reference, "DENSE_BYTES", 1)
    torch.testing.assert_close(backend.run(step, 0, q, scale=0.2), want, rtol=1e-6, atol=1e-6)
    assert set(heads) == {1}


@pytest.mark.parametrize(
    "kv", ["int4", "int8", "fp8:scale=token", "k=int4,v=bf16", "k=bf16,v=int4"]
)
@pytest.mark.parametrize(
    ("span", "at"), [(Window(70), 130), (Window(70), 129), (Sinks(20, 40), 20), (Sinks(20, 40), 31)]
)
def test_what_is_not_read_cannot_spoil_what_is(kv: str, span: Span, at: int) -> None:
    """A token that is no number, in a tile of sixteen of which others are read."""
    case = Coded(kv, (200,), 64, 32, 2, span, 7, spoil=at)
    for isa in LEVELS:
        got = CpuBackend(isa=isa).run(case.step, 0, case.q, scale=0.1)
        want = ReferenceBackend().run(case.step, 0, case.q.double(), scale=0.1)
        assert float((got - want).norm()) <= near(kv) * float(want.norm())
    case = Coded(kv, (200,), 64, 32, 2, span, 7, spoil=170)
    assert CpuBackend().run(case.step, 0, case.q, scale=0.1).isnan().all()


class ByEight(int8.Codec):
    """Says of its scales what the kernels do not serve; decodes as it encodes."""

    def packing(self, site: Site) -> Packing:
        return Packing(8, "channel", 8)


class Wide(int8.Codec):
    """Scales in float32."""

    def stored(self, site: Site) -> tuple[Field, ...]:
        codes, scale = super().stored(site)
        return codes, replace(scale, dtype="float32")


class Low(int4.Codec):
    """Four bits with minima under another name."""

    def stored(self, site: Site) -> tuple[Field, ...]:
        codes, scale, low = super().stored(site)
        return codes, scale, replace(low, name=f"{site.name}.low")

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = super().encode(site, x, pos)
        return {"codes": parts["codes"], "scale": parts["scale"], "low": parts["min"]}

    def decode(
        self,
        site: Site,
        stored: Mapping[str, torch.Tensor],
        pos: torch.Tensor,
        dtype: torch.dtype,
        *,
        own_basis: bool = False,
    ) -> torch.Tensor:
        parts = {**stored, "min": stored["low"]}
        return super().decode(site, parts, pos, dtype, own_basis=own_basis)


class ScaledRows(fp8.Codec):
    """Rows of which the kernels are told that channels share scales."""

    def packing(self, site: Site) -> Packing:
        return Packing(0, "channel", site.block_tokens)


@pytest.mark.parametrize(
    "codec", [ByEight("channel"), Wide(), Low(rotate=False), ScaledRows(scale="token")]
)
def test_what_another_codec_packs_otherwise_goes_through_torch(codec: KVCodec) -> None:
    """Codecs come from other packages, too: what no kernel reads is decoded by the codec."""
    case = Coded("int8", (100,), 32, 32, 2, Full(), 5, codecs={"": codec})
    got = CpuBackend().run(case.step, 0, case.q, scale=0.2)
    want = ReferenceBackend().run(case.step, 0, case.q.double(), scale=0.2)
    assert float((got - want).norm()) <= 2e-6 * float(want.norm())
    for r in case.step.reads:
        for name in ("k", "v"):
            rows = CpuBackend()._gather(case.step, 0, r, name, torch.float32)
            assert torch.equal(rows, case.step.gather(0, r, name, torch.float32))


def test_whole_blocks_of_drafts_are_read_as_they_will_decode() -> None:
    """Three blocks of 16 tokens, of which one is accepted, and a draft that reads the others."""
    fields = (Field("k", (32,), "float32"), Field("v", (32,), "float32"))
    layout = build_layout(
        [KVLayer(0, 2, fields)], KVConfig("int8", block_tokens=16), dtype="float32"
    )
    store = BlockStore(layout.spec, 1 << 20, device="cpu")
    table, backend = store.open(), CpuBackend()
    kv = torch.randn(2, 51, 2, 32, generator=torch.Generator().manual_seed(2))
    for at, stop in ((0, 20), (20, 50), (50, 51)):
        table.append(stop - at, drafts=0 if at == 0 else stop - at)
        step = Step(store, layout, [Row(table, at, stop)])
        backend.write(step, 0, {"k": kv[0, at:stop], "v": kv[1, at:stop]})
    assert "through" in [r.mode for r in step.reads]
    q = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(3))
    got = backend.run(step, 0, q, scale=0.2)
    want = ReferenceBackend().run(step, 0, q.double(), scale=0.2)
    assert float((got - want).norm()) <= near("int8") * float(want.norm())


@pytest.mark.parametrize("head", [0, 1])
def test_a_head_that_no_group_holds_is_not_taken_for_another(head: int) -> None:
    fields = (Field("k", (32,), "float32"), Field("v", (32,), "float32"))
    layout = build_layout([KVLayer(0, 2, fields)], KVConfig(), dtype="float32")
    assert lay_out(layout, layout.spec.groups, 0, "k", "v") is not None
    parts = {g.coords: g for g in layout.spec.split("full0", [(0, 1)])}
    part = parts[(0, head),]
    assert lay_out(layout, (part,), 0, "k", "v") is None
    assert lay_out(layout, tuple(parts.values()), 0, "k", "v") is not None


def test_structures_are_those_of_the_header() -> None:
    """Field by field: name order and total size, as the compiler lays them out."""
    header = (build.SOURCES / "quire_cpu.h").read_text(encoding="utf-8")
    for name, mirror in (
        ("quire_field", native.FieldLayout),
        ("quire_form", native.Form),
        ("quire_decode_args", native.DecodeArgs),
        ("quire_gather_args", native.GatherArgs),
        ("quire_write_args", native.WriteArgs),
        ("quire_encode_args", native.EncodeArgs),
        ("quire_latent_args", native.LatentArgs),
    ):
        body = header[header.index(f"struct {name} {{") :].partition("{")[2].partition("};")[0]
        names = []
        for line in body.splitlines():
            code = (
                line.partition("//")[0].replace("const ", "").replace("*", "").strip().rstrip(";")
            )
            for part in code.partition(" ")[2].split(";"):
                words = part.split(",")
                names += [w.split("[")[0].strip() for w in words if w.strip()]
        assert names == [f[0] for f in mirror._fields_], name
    assert native.SEGMENT.itemsize == 24
    assert ctypes.sizeof(native.Form) == 112


def test_without_the_library_attention_runs_on_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    native.load.cache_clear()
    try:
        monkeypatch.setattr(native, "LIBRARY", tmp_path / "nothing.so")
        with caplog.at_level("INFO", logger="quire"):
            assert make_backend("auto").name == "torch"
            assert make_backend("auto").name == "torch"
        assert len([r for r in caplog.records if "attention runs on torch" in r.message]) == 1
        with pytest.raises(ConfigError, match=r"quire\.kernels\.build"):
            make_backend("cpu")
    finally:
        monkeypatch.undo()
        native.load.cache_clear()
    assert make_backend("auto").name == "cpu"


def test_memory_of_another_device_is_not_for_the_kernels() -> None:
    assert make_backend("auto", "cuda").name == "torch"
    assert make_backend("reference", "cuda").name == "reference"
    with pytest.raises(ConfigError, match=r"on cuda; use 'auto'"):
        make_backend("cpu", "cuda")


@pytest.mark.parametrize("library", ["other version", "no library"])
def test_a_library_that_is_not_ours_is_refused_in_one_line(
    library: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    native.load.cache_clear()
    try:
        if library == "other version":
            monkeypatch.setattr(native, "ABI", native.ABI + 1)
        else:
            (tmp_path / "foreign.so").write_bytes(b"not for this machine")
            monkeypatch.setattr(native, "LIBRARY", tmp_path / "foreign.so")
        with caplog.at_level("INFO", logger="quire"):
            assert make_backend("auto").name == "torch"
        (said,) = [r.message for r in caplog.records]
        assert "attention runs on torch" in said
        assert "\n" not in said
    finally:
        monkeypatch.undo()
        native.load.cache_clear()


def test_a_build_without_a_compiler_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.main() == 1
    assert "no C++ compiler was found (c++" in capsys.readouterr().err


def test_the_compiler_is_the_one_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(build.BuildError, match="CXX says no-such-compiler"):
        build.compiler()
    monkeypatch.setenv("CXX", "sh -c")
    assert build.compiler() == [shutil.which("sh"), "-c"]


def test_a_folder_that_cannot_be_written_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "_run", lambda command: Path(command[-1]).touch())
    monkeypatch.setattr(build, "compiler", lambda: ["c++"])
    with pytest.raises(build.BuildError, match="cannot be written: No such file"):
        build.build(tmp_path / "nowhere" / "x.so")
    assert build.build(tmp_path / "x.so").exists()
