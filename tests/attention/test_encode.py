"""Blocks sealed by the compiled kernel hold the bytes that their codecs make in torch."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.attention import ReferenceBackend, Row, Step
from quire.attention.cpu import CpuBackend
from quire.codecs import int4, int8
from quire.kernels import native
from quire.ops.rotate import hadamard
from quire.plan import KVLayer, build_layout
from quire.spec import Field, KVCodec, KVConfig, Packing, Site
from quire.store import BlockStore
from steps import DTYPES

LIBRARY = native.load()
pytestmark = pytest.mark.skipif(
    LIBRARY is None, reason="the CPU kernels were not built here (no C++ compiler)"
)
LEVELS = [
    x for x in range(1, 9) if LIBRARY is not None and (x == LIBRARY.isa or 1 < x < LIBRARY.isa)
]
RECIPES = [
    "int8",
    "int8:scale=channel",
    "int8:scale=tensor",
    "fp8",
    "fp8:format=e5m2",
    "fp8:scale=token",
    "fp8:format=e5m2,scale=token",
    "int4",
    "int4:rotate=false",
    "int4:group=32",
    "int4:group=32,rotate=false",
    "int4:group=64",
    "kivi:bits=2,residual=0",
    "kivi:bits=4,residual=0",
    "kivi:bits=4,residual=0,group=16",
    "kivi:bits=2,residual=16,group=64",
    "k=int8,v=int4",
    "k=int4,v=bf16",
    "k=fp16,v=kivi:bits=2,residual=0",
    "k=fp32,v=int8;sinks=4;window=32",
]
NAMES = ("k", "v")
LATENTS = ("latent", "k_rope")


@dataclass(frozen=True)
class Case:
    kv: str
    dtype: str = "float32"
    widths: tuple[int, int] = (64, 64)
    size: int = 32
    tokens: int = 100
    kind: str = "normal"
    seed: int = 0
    names: tuple[str, str] = NAMES


def drawn(case: Case, width: int, g: torch.Generator) -> torch.Tensor:
    shape = (case.tokens, 2, width)
    x = torch.randn(shape, generator=g)
    match case.kind:
        case "one hot channel":
            x[..., 3] *= 100
        case "mixed sizes":
            x *= 10.0 ** torch.randint(-9, 5, shape, generator=g)
        case "ties":
            x = torch.randint(-9, 9, shape, generator=g) / 2.0
        case "tiny":
            x *= 1e-7
        case "zeros of both signs":
            x = x.sign() * 0.0
        case "constant":
            x = torch.full(shape, -1234.5)
        case "infinite":
            x[torch.rand(shape, generator=g) < 0.01] = torch.inf
            x[torch.rand(shape, generator=g) < 0.01] = -torch.inf
        case "edges":  # scales between two of float16, numbers between two codes: what only exact division tells apart
            levels = _levels(case.kv)
            bits = torch.randint(0x3000, 0x4000, (), generator=g).to(torch.int16)
            below, above = (b.view(torch.float16).float() for b in (bits, bits + 1))
            top, scale = levels * (below + above) / 2, ((below + above) / 2).half().float()
            x = (torch.randint(0, levels, shape, generator=g) + 0.5) * scale
            for at, value in ((0, top), (1, 0.0)):
                x[..., at::16] = x[at::16] = value
        case "no number":
            x[torch.rand(shape, generator=g) < 0.01] = torch.nan
    return x.to(DTYPES[case.dtype])


def _levels(kv: str) -> int:
    return 448 if "fp8" in kv else 127 if "int8" in kv else 3 if "bits=2" in kv else 15


def sealed(
    case: Case, backend: ReferenceBackend, codecs: dict[str, KVCodec] | None = None
) -> BlockStore:
    """Three chunks of a sequence written and sealed, in memory that was ones before."""
    fields = tuple(Field(n, (w,), case.dtype) for n, w in zip(case.names, case.widths, strict=True))
    config = KVConfig(case.kv, block_tokens=case.size)
    layers = [KVLayer(i, 2, fields) for i in range(2)]
    layout = build_layout(layers, config, dtype=case.dtype, codecs=codecs)
    room = 2 * layout.spec.bytes_for(case.tokens, chunk_tokens=case.tokens)
    room += 16 * sum(g.block_bytes for g in layout.spec)
    store = BlockStore(layout.spec, room, device="cpu")
    store.arena.buffer.fill_(255)
    table, at = store.open(), 0
    for stop in (case.tokens // 3, case.tokens - 1, case.tokens):
        table.append(stop - at)
        step = Step(store, layout, [Row(table, at, stop)])
        for layer in range(2):
            g = torch.Generator().manual_seed(case.seed + layer)
            values = {f.name: drawn(case, f.shape[0], g)[at:stop] for f in fields}
            backend.write(step, layer, values)
        table.commit()
        at = stop
    return store


def counted(isa: int = 0) -> tuple[CpuBackend, list[int]]:
    backend, calls = CpuBackend(isa=isa), []
    library = backend.library
    backend.library = SimpleNamespace(  # type: ignore[assignment]
        write=library.write, encode=lambda a: (calls.append(1), library.encode(a))
    )
    return backend, calls


@pytest.mark.parametrize("kv", RECIPES)
@given(
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    width=st.sampled_from([32, 48, 64, 80, 96, 128, 256]),
    size=st.sampled_from([16, 32, 64, 128]),
    tokens=st.integers(130, 160),
    kind=st.sampled_from(
        [
            *("normal", "one hot channel", "mixed sizes", "ties", "tiny", "constant"),
            *("edges", "edges", "infinite", "zeros of both signs"),
        ]
    ),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=max(6, settings.default.max_examples // 10), deadline=None)
def test_the_bytes_are_those_of_the_codecs(
    kv: str, dtype: str, width: int, size: int, tokens: int, kind: str, seed: int
) -> None:
    """Over the whole arena, at every instruction-set level."""
    if "kivi" in kv or "group" in kv:
        width = {True: 128, False: 96}["group=64" in kv or width > 96]
    if kind == "infinite" and "int4" in kv and "rotate=false" not in kv:
        kind = "normal"  # the rotation would make it no number
    size = max(size, 64 if "group=64" in kv else 32) if "kivi" in kv else size
    case = Case(kv, dtype, (width, width), size, tokens, kind, seed)
    want = sealed(case, ReferenceBackend()).arena.buffer
    assert (want != 255).any()
    for isa in LEVELS:
        backend, calls = counted(isa)
        got = sealed(case, backend).arena.buffer
        assert calls, "the kernel was not asked"
        assert torch.equal(got, want), isa


@given(
    kv=st.sampled_from(["int8", "int4", "int4:group=64", "fp8:scale=token", "int8:scale=channel"]),
    size=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    rank=st.sampled_from([64, 512, 1024]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=max(6, settings.default.max_examples // 10), deadline=None)
def test_latents_are_encoded_as_keys(kv: str, size: int, dtype: str, rank: int, seed: int) -> None:
    case = Case(kv, dtype, (rank, 64), size, 200, "one hot channel", seed, LATENTS)
    backend, calls = counted()
    got = sealed(case, backend).arena.buffer
    assert calls
    assert torch.equal(got, sealed(case, ReferenceBackend()).arena.buffer)


@pytest.mark.parametrize("kv", [x for x in RECIPES if "=bf16" not in x and "=fp" not in x])
def test_what_is_no_number_stays_where_it_was(kv: str) -> None:
    """Scales and minima that are no number are none in both; their bits are the processor's own."""
    case = Case(kv, size=64, widths=(128, 128), kind="no number", seed=3)
    a, b = (sealed(case, x).arena.buffer for x in (CpuBackend(), ReferenceBackend()))
    same = (a == b).view(-1, 2).all(1)
    halves = torch.stack([a.view(torch.float16), b.view(torch.float16)])
    assert halves[:, ~same].isnan().all()
    assert (a != 255).any()


def test_many_threads_write_the_same_bytes() -> None:
    case = Case("k=int8,v=int4", "bfloat16", (128, 128), tokens=3000)
    before, stores = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            stores.append(sealed(case, CpuBackend()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(stores[0].arena.buffer, stores[1].arena.buffer)


@pytest.mark.parametrize("width", [16, 32, 64, 128, 256, 512, 1024])
def test_the_rotation_rounds_as_its_reference_does(width: int) -> None:
    """One number that a norm a bit off would change: sums are whole, so that the norm alone rounds."""
    x = torch.randint(-3, 4, (64, width), generator=torch.Generator().manual_seed(width)).float()
    want = hadamard(x)
    assert torch.equal(want, (hadamard(x.double()) * width**0.5).round().float() * width**-0.5)


class Rounded(int8.Codec):
    """Encodes otherwise, and says nothing of it in its packing."""

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().encode(site, x.round(), pos)


class Other(int8.Codec):
    """Says itself that its codes are not the nearest ones."""

    def packing(self, site: Site) -> Packing:
        return Packing(8, "token", site.width)

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().encode(site, x.round(), pos)


class Turned(int4.Codec):
    """A rotation of fewer channels than a vector has lanes."""

    def packing(self, site: Site) -> Packing:
        return Packing(4, "token", self._group(site), 8, nearest=True)

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        turned = hadamard(x.float().unflatten(-1, (-1, 8))).flatten(-2)
        return int4.Codec(rotate=False).encode(site, turned, pos)


@pytest.mark.parametrize("codec", [Rounded(), Other(), Turned()])
def test_codecs_that_encode_in_another_way_do_it_themselves(codec: KVCodec) -> None:
    case, codecs = Case("int8", tokens=100), {"": codec}
    backend, calls = counted()
    got = sealed(case, backend, codecs).arena.buffer
    assert not calls
    assert torch.equal(got, sealed(case, ReferenceBackend(), codecs).arena.buffer)


@pytest.mark.parametrize(
    "case",
    [
        Case("int8", "float64"),
        Case("fp8", widths=(24, 24)),
        Case("fp8", widths=(1040, 1040)),
        Case("int8", widths=(64, 40)),
    ],
)
def test_shapes_that_the_kernel_does_not_serve_go_through_torch(case: Case) -> None:
    backend, calls = counted()
    got = sealed(case, backend).arena.buffer
    assert not calls
    assert torch.equal(got, sealed(case, ReferenceBackend()).arena.buffer)
