"""What a tile holds under each codec, number by number, worked out in NumPy from the layout's description."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quire.codecs import load_codec
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
