"""Law 5: |decode(encode(x)) - x| <= error_bound(x), for every codec in the folder."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibrations import at_work, named
from lossy import Lossy, decoded
from quire.codecs import available, load_codec
from quire.codecs.calibrated import Calibrated
from quire.codecs.recipe import codec_text
from quire.errors import ConfigError
from quire.spec import DTYPE_BYTES, Field, KVCodec, Site

RECIPES = (
    *available(),
    "int8:scale=channel",
    "int8:scale=tensor",
    "fp8:scale=token",
    "fp8:format=e5m2",
    "fp8:format=e5m2,scale=token",
    "int4:group=32",
    "int4:group=64",
    "int4:rotate=false",
    "int4:group=32,rotate=false",
    "kivi:bits=4",
    "kivi:group=16",
    "kivi:bits=4,group=64",
    "kvarn:key_bits=2,tile=32",
    "kvarn:value_bits=4,tile=64",
    "kvarn:tile=16,rotate=false",
    "cq:form=2c3b",
    "kvquant:bits=2,outliers=matrix,tile=16",
    "kvquant:bits=3,sparse=0,keys=token,qnorm=true",
)
"""Every codec of the folder as it comes, and what else its parameters make of it."""

CODECS: list[KVCodec] = [*(load_codec(named(text)) for text in RECIPES), Lossy()]
FIELDS = ("k", "v", "latent", "k_rope")
LARGEST = {"fp64": 1e30, "fp32": 1e30, "bf16": 1e30}
"""The range within which a codec promises its bound; float16's where no other is given."""


def rows(seed: int, shape: tuple[int, ...], kind: str, top: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    match kind:
        case "one hot channel":
            x[..., 0] *= 100.0
        case "shifted channels":
            x += torch.randn(shape[-1], generator=g) * 30.0
        case "huge outliers":
            x[torch.rand(shape, generator=g) < 0.02] *= top
        case "tiny":
            x *= 1e-7
        case "denormal":
            x *= 1e-40
        case "mixed sizes":
            x *= 10.0 ** torch.randint(-8, 4, shape, generator=g)
        case "huge":
            x *= 1e4
        case "constant":
            x = torch.full(shape, float(x.flatten()[0]) * 1000)
        case "one of its own":
            x = torch.zeros(shape)
            x.view(-1)[seed % x.numel()] = 7.3
        case "zero":
            x = torch.zeros(shape)
    return x.clamp(-top, top)


KINDS = (
    "normal",
    "one hot channel",
    "shifted channels",
    "huge outliers",
    "tiny",
    "denormal",
    "mixed sizes",
    "huge",
    "constant",
    "one of its own",
    "zero",
)


def serves(codec: KVCodec, site: Site) -> bool:
    try:
        codec.stored(site)
    except ConfigError:
        return False
    return True


def ready(codec: KVCodec, site: Site) -> tuple[KVCodec, Site]:
    """With tables for the site where it needs some, and the site of one head then."""
    return at_work(codec_text(codec), site.width) if isinstance(codec, Calibrated) else codec, (
        replace(site, layer=0, heads=(1,))
    )


def through(codec: KVCodec, site: Site, x: torch.Tensor, pos: torch.Tensor, **how: Any) -> Any:
    """Encoded, checked against what the codec says it stores, cast to that, and decoded."""
    size, lead = site.block_tokens, x.shape[:-2]
    stored = codec.encode(site, x, pos)
    fields = {f.name.partition(".")[2]: f for f in codec.stored(site)}
    assert set(stored) == set(fields)
    cast = {}
    for part, y in stored.items():
        f = fields[part]
        tokens = (size,) if f.per == "token" else ()
        assert tuple(y.shape) == (*lead, *tokens, *f.shape), part
        assert f.name == (f"{site.name}.{part}" if part else site.name)
        assert f.dtype in DTYPE_BYTES
        cast[part] = y.to(getattr(torch, f.dtype))
    return codec.decode(site, cast, pos, torch.float32, **how)


@pytest.mark.parametrize("codec", CODECS, ids=codec_text)
@given(
    seed=st.integers(0, 10**6),
    lead=st.lists(st.integers(1, 3), max_size=2),
    blocks=st.integers(1, 3),
    name=st.sampled_from(FIELDS),
    width=st.sampled_from([16, 64, 80, 96, 128]),
    kind=st.sampled_from(KINDS),
    first=st.integers(0, 10**5),
)
def test_the_error_is_within_its_bound(codec, seed, lead, blocks, name, width, kind, first) -> None:  # type: ignore[no-untyped-def]
    size = math.lcm(4, codec.group_tokens) * blocks
    site = Site(Field(name, (width,), "float32"), size)
    if not serves(codec, site):
        site = Site(Field("v", (64,), "float32"), size)
    codec, site = ready(codec, site)
    x = rows(seed, (*lead, size, site.width), kind, LARGEST.get(codec.name, 60000.0))
    back = through(codec, site, x, torch.arange(first, first + size).expand(*lead, size))
    bound = codec.error_bound(site, x)
    assert back.shape == x.shape
    assert back.dtype == torch.float32
    excess = (back.double() - x.double()).abs() - bound.double().expand_as(x)
    assert float(excess.max()) <= 0.0


@pytest.mark.parametrize("codec", CODECS, ids=codec_text)
def test_every_codec_serves_the_usual_shapes(codec: KVCodec) -> None:
    size = math.lcm(32, codec.group_tokens)
    for name in ("k", "v"):
        for width in (64, 128, 256):
            codec.stored(Site(Field(name, (width,), "float32"), size))


@pytest.mark.parametrize("codec", CODECS, ids=codec_text)
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("width", [64, 96])
def test_the_bound_says_something(codec: KVCodec, name: str, width: int) -> None:
    """It is no more than a few steps of the codec: some error comes near it."""
    size = math.lcm(32, codec.group_tokens)
    site = Site(Field(name, (width,), "float32"), size)
    if not serves(codec, site):
        return
    codec, site = ready(codec, site)
    x = rows(5, (2, size, width), "normal", 60000.0)
    back = through(codec, site, x, torch.arange(size))
    bound = codec.error_bound(site, x).expand_as(x).double()
    worst = float(((back.double() - x.double()).abs() / bound.clamp_min(1e-300)).max())
    assert worst > TIGHT.get(codec.name, 0.5), worst


TIGHT = {"fp64": -1.0, "fp32": -1.0, "lossy": 0.3, "int4": 0.18, "kvarn": 0.18}
"""The largest error of normal numbers over its bound, at least; exact codecs have none, and where a rotation adds up
many errors the worst case is far from the usual one."""


@pytest.mark.parametrize("codec", CODECS, ids=codec_text)
@pytest.mark.parametrize("width", [64, 96])
def test_a_backend_may_stay_in_the_codecs_basis(codec: KVCodec, width: int) -> None:
    """q.k and the sum of p v are the same in the model's basis and in the codec's own."""
    size = math.lcm(32, codec.group_tokens)
    pos = torch.arange(size)
    q, x = rows(1, (5, width), "normal", 1e3), rows(2, (size, width), "one hot channel", 1e3)
    p = torch.softmax(rows(3, (5, size), "normal", 1e3), -1)
    k, v = (Site(Field(n, (width,), "float32"), size) for n in ("k", "v"))
    if not serves(codec, k) or not serves(codec, v):
        return
    (codec, k), (_, v) = ready(codec, k), ready(codec, v)
    torch.testing.assert_close(
        codec.query_map(k, q) @ through(codec, k, x, pos, own_basis=True).T,
        q @ through(codec, k, x, pos).T,
        rtol=1e-5,
        atol=1e-3,
    )
    torch.testing.assert_close(
        codec.output_map(v, p @ through(codec, v, x, pos, own_basis=True)),
        p @ through(codec, v, x, pos),
        rtol=1e-5,
        atol=1e-4,
    )


@given(seed=st.integers(0, 10**6), size=st.integers(1, 9), first=st.integers(0, 99))
def test_the_tests_own_codec_equals_its_oracle(seed: int, size: int, first: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-(1 << 17), 1 << 17, (size, 3), generator=g).float()
    site = Site(Field("k", (3,), "float32"), size)
    back = through(Lossy(), site, x, torch.arange(first, first + size))
    assert torch.equal(back, torch.from_numpy(decoded(x.numpy(), first)))


def test_the_tests_own_codec_depends_on_order_boundaries_and_positions() -> None:
    x = torch.arange(12.0).reshape(6, 2) * 37.1 % 11
    codec = Lossy()

    def read(y: torch.Tensor, first: int) -> torch.Tensor:
        return torch.from_numpy(decoded(y.numpy(), first))

    whole = read(x, 0)
    assert not torch.equal(whole, x)
    assert not torch.equal(whole, torch.cat([read(x[:3], 0), read(x[3:], 3)]))
    assert not torch.equal(whole, read(x.flip(0), 0).flip(0))
    assert not torch.equal(read(x[:5], 0), read(x[:5], 1))
    assert codec.group_tokens == 1
