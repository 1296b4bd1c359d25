"""`kvarn`: the tile as it is stored, a tile read alone and among others, and what evening out is worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quire.codecs import load_codec
from quire.spec import Field, Site

T, D = 32, 64


def tiles(seed: int, n: int = 1) -> torch.Tensor:
    """`[n, T, D]` with a few wide tokens and channels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, T, D, generator=g)
    return x * (0.7 * torch.randn(n, T, 1, generator=g)).exp() + torch.randn(n, 1, D, generator=g)


def site(name: str, block: int = T) -> Site:
    return Site(Field(name, (D,), "float32"), block)


def error(kv: str, name: str, x: torch.Tensor) -> float:
    codec, s, pos = load_codec(kv), site(name, x.shape[-2]), torch.arange(x.shape[-2])
    back = codec.decode(s, codec.encode(s, x, pos), pos, torch.float32)
    return float((back - x).norm() / x.norm())


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_number_is_code_times_scale_plus_min_times_norm(name: str, bits: int) -> None:
    """Of keys a scale per channel and a norm per token, of values the other way about; by hand, without rotation."""
    codec = load_codec(f"kvarn:tile=32,rotate=false,key_bits={bits},value_bits={bits}")
    x = tiles(1)[0]
    parts = codec.encode(site(name), x, torch.arange(T))
    axis = 1 if name == "v" else 0
    sides = {0: T, 1: D}
    assert parts["norm"].shape == (1, sides[axis])
    assert parts["scale"].shape == parts["min"].shape == (1, sides[1 - axis])
    norm = np.expand_dims(parts["norm"][0].float().numpy(), 1 - axis)
    y = (x.numpy() / norm).astype(np.float32)
    low = y.min(axis=axis, keepdims=True).astype(np.float16).astype(np.float32)
    scale = ((y.max(axis=axis, keepdims=True) - low) / (2**bits - 1)).astype(np.float16)
    np.testing.assert_array_equal(parts["scale"][0].numpy(), scale.squeeze(axis))
    codes = np.clip(np.rint((y - low) / scale.astype(np.float32)), 0, 2**bits - 1)
    want = (codes * scale.astype(np.float32) + low) * norm
    got = codec.decode(site(name), parts, torch.arange(T), torch.float32)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["k", "v"])
def test_a_tile_is_the_same_alone_and_among_others(name: str) -> None:
    """Blocks of two tiles, several at once, or each by itself: the same bytes."""
    codec = load_codec("kvarn:key_bits=2,tile=32")
    x = tiles(2, 12)
    at_once = codec.encode(site(name, 2 * T), x.view(6, 2 * T, D), torch.arange(2 * T))
    for i in range(12):
        alone = codec.encode(site(name), x[i], torch.arange(T))
        for part in ("scale", "min", "norm"):
            assert torch.equal(at_once[part][i // 2, i % 2], alone[part][0]), part
        n = alone["codes"].shape[0]
        assert torch.equal(at_once["codes"][i // 2, i % 2 * n : (i % 2 + 1) * n], alone["codes"])


@pytest.mark.parametrize("name", ["k", "v"])
def test_two_bits_lose_less_of_uneven_tiles_than_kivi(name: str) -> None:
    """At fewer bytes: tokens of different size spoil a channel's steps there, and channels a token's."""
    x = tiles(3, 8)
    if name == "v":
        x = x * (0.7 * torch.randn(D, generator=torch.Generator().manual_seed(4))).exp()
    assert error("kvarn:key_bits=2,tile=32", name, x) < 0.9 * error("kivi:bits=2", name, x)
