"""Law 5: |decode(encode(x)) - x| <= error_bound(x), for every codec in the folder."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lossy import Lossy, decoded
from quire.codecs import available, load_codec
from quire.spec import DTYPE_BYTES, Field, KVCodec

CODECS: list[KVCodec] = [*(load_codec(name) for name in available()), Lossy()]
LARGEST = {"fp16": 60000.0}  # the range within which a codec promises its bound


def rows(seed: int, shape: tuple[int, ...], kind: str, top: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    match kind:
        case "outliers":
            x[..., 0] *= 100.0
        case "tiny":
            x *= 1e-7
        case "huge":
            x *= 1e4
        case "constant":
            x = torch.full(shape, float(x.flatten()[0]))
        case "zero":
            x = torch.zeros(shape)
    return x.clamp(-top, top)


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
@given(
    seed=st.integers(0, 10**6),
    lead=st.lists(st.integers(1, 3), max_size=2),
    groups=st.integers(1, 4),
    width=st.sampled_from([2, 16, 64]),
    kind=st.sampled_from(["normal", "outliers", "tiny", "huge", "constant", "zero"]),
    first=st.integers(0, 10**5),
)
def test_the_error_is_within_its_bound(codec, seed, lead, groups, width, kind, first) -> None:  # type: ignore[no-untyped-def]
    size = math.lcm(4, codec.group_tokens) * groups
    x = rows(seed, (*lead, size, width), kind, LARGEST.get(codec.name, math.inf))
    of = Field("k", (width,), "float32")
    stored = codec.encode(x, torch.arange(first, first + size).expand(*lead, size))
    fields = {f.name.partition(".")[2]: f for f in codec.stored(of, size)}
    assert set(stored) == set(fields)
    cast = {}
    for part, y in stored.items():
        f = fields[part]
        tokens = (size,) if f.per == "token" else ()
        assert tuple(y.shape) == (*lead, *tokens, *f.shape)
        assert f.dtype in DTYPE_BYTES
        cast[part] = y.to(getattr(torch, f.dtype))
    back = codec.decode(cast, torch.float32)
    bound = codec.error_bound(x)
    assert back.shape == x.shape
    assert back.dtype == torch.float32
    excess = (back.double() - x.double()).abs() - bound.double().expand_as(x)
    assert float(excess.max()) <= 0.0


@given(seed=st.integers(0, 10**6), size=st.integers(1, 9), first=st.integers(0, 99))
def test_the_tests_own_codec_equals_its_oracle(seed: int, size: int, first: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-(1 << 17), 1 << 17, (size, 3), generator=g).float()
    codec = Lossy()
    parts = codec.encode(x, torch.arange(first, first + size))
    dtypes = {
        f.name.partition(".")[2]: getattr(torch, f.dtype)
        for f in codec.stored(Field("k", (3,), "float32"), size)
    }
    back = codec.decode({part: y.to(dtypes[part]) for part, y in parts.items()}, torch.float32)
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
