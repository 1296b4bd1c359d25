"""What a tile holds under each codec, number by number, worked out in NumPy from the layout's description."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quire.codecs import load_codec
from quire.errors import ConfigError
from quire.spec import Field, Site

B, D = 32, 64


def drawn(seed: int = 0, *, d: int = D) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((B, d)).astype(np.float32)
    x[:, 3] *= 20
    x[5] = 0
    return x


def encoded(kv: str, name: str, x: np.ndarray) -> dict[str, np.ndarray]:
    codec, site = load_codec(kv), Site(Field(name, (x.shape[1],), "float32"), B)
    parts = codec.encode(site, torch.from_numpy(x), torch.arange(B))
    for f in codec.stored(site):
        assert str(parts[f.name.partition(".")[2]].dtype) == f"torch.{f.dtype}"
    return {
        part: (y.float() if y.dtype.itemsize == 1 and y.is_floating_point() else y).numpy()
        for part, y in parts.items()
    }


def divide(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    s = scale.astype(np.float32)
    return np.rint(np.divide(x, s, out=np.zeros_like(x), where=s > 0))


@pytest.mark.parametrize("name", ["k", "v", "latent"])
@pytest.mark.parametrize(
    ("kv", "axis"), [("int8", 1), ("int8:scale=channel", 0), ("int8:scale=tensor", None)]
)
def test_int8(kv: str, axis: int | None, name: str) -> None:
    x = drawn()
    got = encoded(kv, name, x)
    scale = (np.abs(x).max(axis=axis, keepdims=True) / np.float32(127)).astype(np.float16)
    codes = np.clip(divide(x, np.broadcast_to(scale, x.shape)), -127, 127) + 128
    assert np.array_equal(got["scale"], scale.reshape(-1))
    for t in range(B):
        for d in range(D):
            at = (t // 4, d, t % 4) if name == "v" else (t // 16, d // 4, t % 16, d % 4)
            assert got["codes"][at] == codes[t, d]


def affine(x: np.ndarray, axis: int, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and minima of groups along an axis, with float16 scales."""
    low = x.min(axis=axis, keepdims=True).astype(np.float16)
    reach = np.maximum(x.max(axis=axis, keepdims=True) - low.astype(np.float32), np.float32(0))
    scale = (reach / np.float32(levels)).astype(np.float16)
    codes = divide(x - low.astype(np.float32), np.broadcast_to(scale, x.shape))
    return np.clip(codes, 0, levels), scale.squeeze(axis), low.squeeze(axis)


def check_codes(got: np.ndarray, codes: np.ndarray, bits: int, *, values: bool) -> None:
    per = 8 // bits
    for t in range(codes.shape[0]):
        for d in range(codes.shape[1]):
            e, j = divmod((t if values else d) % (4 * per), 4)
            at = (t // (4 * per), d, j) if values else (t // 16, d // (4 * per), t % 16, j)
            assert got[at] >> bits * e & (1 << bits) - 1 == codes[t, d]


def sylvester(w: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < w:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(w)


@pytest.mark.parametrize("name", ["k", "v", "k_rope"])
@pytest.mark.parametrize(("group", "d"), [("head", 64), (32, 64), ("head", 80), (32, 96)])
def test_int4(group: int | str, d: int, name: str) -> None:
    x = drawn(d=d)
    g = d if group == "head" else int(group)
    plain = encoded(f"int4:group={group},rotate=false", name, x)
    codes, scale, low = affine(x.reshape(B, d // g, g), 2, 15)
    assert np.array_equal(plain["scale"], scale.T)
    assert np.array_equal(plain["min"], low.T)
    check_codes(plain["codes"], codes.reshape(B, d), 4, values=name == "v")
    w = {64: 64, 80: 16, 96: 32}[d]
    turned = (x.reshape(B, d // w, w) @ sylvester(w)).reshape(B, d).astype(np.float32)
    got = encoded(f"int4:group={group}", name, x)
    _, scale, low = affine(turned.reshape(B, d // g, g), 2, 15)
    np.testing.assert_allclose(got["scale"], scale.T, rtol=2e-3)
    np.testing.assert_allclose(got["min"], low.T, rtol=2e-3)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group", [16, 32])
def test_kivi(bits: int, group: int) -> None:
    x, levels = drawn(), (1 << bits) - 1
    keys = encoded(f"kivi:bits={bits},group={group}", "k", x)
    codes, scale, low = affine(x.reshape(B // group, group, D), 1, levels)
    assert np.array_equal(keys["scale"], scale)
    assert np.array_equal(keys["min"], low)
    assert keys["scale"].shape == (B // group, D)
    check_codes(keys["codes"], codes.reshape(B, D), bits, values=False)
    values = encoded(f"kivi:bits={bits},group={group}", "v", x)
    codes, scale, low = affine(x.reshape(B, D // group, group), 2, levels)
    assert np.array_equal(values["scale"], scale.T)
    assert np.array_equal(values["min"], low.T)
    check_codes(values["codes"], codes.reshape(B, D), bits, values=True)


@pytest.mark.parametrize(("form", "top", "step"), [("e4m3", 448, 1 / 8), ("e5m2", 57344, 1 / 4)])
def test_fp8(form: str, top: float, step: float) -> None:
    """Steps of an eighth or a quarter between powers of two, ties to even; saturating; the token's own scale."""
    x = np.zeros((B, 16), np.float32)
    x[0, :6] = [1 + step / 2, 1 + 3 * step / 2, -(1 + step * 0.6), 1e9, -1e9, 2 * (1 + step)]
    got = encoded(f"fp8:format={form}", "k", x)
    assert set(got) == {"codes"}
    assert got["codes"][0, :6].tolist() == [1, 1 + 2 * step, -(1 + step), top, -top, 2 * (1 + step)]
    scaled = encoded(f"fp8:format={form},scale=token", "v", x[:, :3] * 1e4)
    want = np.float16(np.abs(x[0, :3] * np.float32(1e4)).max() / np.float32(top))
    assert scaled["scale"].shape == (B,)
    assert scaled["scale"][0] == want
    assert scaled["codes"][1:].max() == 0.0
    back = scaled["codes"][0] * np.float32(want)
    np.testing.assert_allclose(back, x[0, :3] * 1e4, rtol=step / 2)


@pytest.mark.parametrize(
    "kv",
    [
        "int8",
        "int4",
        "int4:rotate=false",
        "kivi",
        "kvarn:tile=32,rotate=false",
        "fp8",
        "fp8:scale=token",
    ],
)
def test_nothing_known_becomes_no_number(kv: str) -> None:
    """Zeros, infinities and what float16 cannot hold give finite scales: a scale of 0 is not divided by."""
    codec = load_codec(kv)
    for name in ("k", "v"):
        site = Site(Field(name, (D,), "float32"), B)
        for fill in (0.0, 1e-30, 3e38, -3e38):
            x = torch.full((B, D), fill)
            parts = codec.encode(site, x, torch.arange(B))
            back = codec.decode(site, parts, torch.arange(B), torch.float32)
            if fill < 1e38 and fill > -1e38:
                assert float((back - x).abs().max()) < 1e-6
            elif "rotate" in kv or kv != "int4":  # a rotation adds up what has no room to be added
                assert bool(back.isfinite().all())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int8:scale=head", "scale=head is not served; known: token, channel, tensor"),
        ("fp8:format=e3m4", "format=e3m4 is not served; known: e4m3, e5m2"),
        ("fp8:scale=channel", "known: none, token"),
        ("int4:group=48", "group=48 is not served; known: head, 32, 64, 128"),
        ("int4:rotate=1", "rotate=1 is not served; known: true, false"),
        ("kivi:bits=3", "bits=3 is not served; known: 2, 4"),
        ("kivi:bits=2.0", "bits=2.0 is not served"),
        ("kivi:residual=-1", "it is a number of tokens, 0 or more"),
        ("kivi:residual=all", "it is a number of tokens, 0 or more"),
        ("kivi:group=8", "group=8 is not served; known: 16, 32, 64, 128"),
        ("kvarn:key_bits=3", "key_bits=3 is not served; known: 2, 4"),
        ("kvarn:value_bits=8", "value_bits=8 is not served; known: 2, 4"),
        ("kvarn:tile=8", "tile=8 is not served; known: 16, 32, 64, 128"),
        ("kvarn:rotate=no", "rotate=no is not served; known: true, false"),
    ],
)
def test_wrong_parameters_are_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_codec(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name", "width", "says"),
    [
        ("int8", "k", 62, "a head_dim that is a multiple of 4 works, or codec fp8"),
        ("int4", "k", 60, "a head_dim that is a multiple of 8 works, or codec fp8"),
        ("int4", "v", 61, "use rotate=false, or codec fp8"),
        ("int4:group=64", "k", 96, "use group=head"),
        ("kivi", "k", 72, "a head_dim that is a multiple of 16 works"),
        ("kivi", "v", 80, "do not divide v's 80; use group=16"),
        ("kivi", "v", 24, "use int8 or fp8"),
        ("kivi", "latent", 64, "use int8, fp8 or int4"),
        ("kvarn:key_bits=2", "k", 72, "a head_dim that is a multiple of 16 works"),
        ("kvarn:tile=32", "v", 61, "use rotate=false, or codec fp8"),
        ("kivi", "k_rope", 64, "use int8, fp8 or int4"),
    ],
)
def test_what_a_codec_cannot_serve_is_refused_in_one_line(
    text: str, name: str, width: int, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_codec(text).stored(Site(Field(name, (width,), "float32"), 32))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
