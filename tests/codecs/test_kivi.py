"""KIVI's published schedule as an oracle: the same numbers, other positions raw, and what that costs in bytes.

After T tokens the published code holds T mod R keys and min(T, R) values raw: keys are quantised R at a time, values
one by one. Here a block's keys and values are sealed together once it has left the window.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quire.codecs import load_codec
from quire.plan import KVLayer, build_layout
from quire.spans import Residual
from quire.spec import Field, KVConfig, Site

D, G = 64, 32


def quantised(x: np.ndarray, axis: int, bits: int) -> np.ndarray:
    """Groups along an axis, through codes with float16 scales and minima, as float32."""
    levels = (1 << bits) - 1
    low = x.min(axis=axis, keepdims=True).astype(np.float16).astype(np.float32)
    reach = np.maximum(x.max(axis=axis, keepdims=True) - low, np.float32(0))
    scale = (reach / np.float32(levels)).astype(np.float16).astype(np.float32)
    codes = np.rint(np.divide(x - low, scale, out=np.zeros_like(x), where=scale > 0))
    return np.clip(codes, 0, levels) * scale + low


class Published:
    """The released code's cache of one head: a prefill, then a token at a time."""

    def __init__(self, bits: int, residual: int) -> None:
        self.bits, self.residual = bits, residual
        self.k = self.v = np.zeros((0, D), np.float32)
        self.raw_k = self.raw_v = np.zeros((0, D), np.float32)

    def prefill(self, k: np.ndarray, v: np.ndarray) -> None:
        cut = len(k) - len(k) % self.residual
        self._seal_keys(k[:cut])
        self.raw_k = k[cut:]
        cut = max(0, len(v) - self.residual)
        self._seal_values(v[:cut])
        self.raw_v = v[cut:]

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        self.raw_k = np.concatenate([self.raw_k, k[None]])
        if len(self.raw_k) == self.residual:
            self._seal_keys(self.raw_k)
            self.raw_k = self.raw_k[:0]
        self.raw_v = np.concatenate([self.raw_v, v[None]])
        if len(self.raw_v) > self.residual:
            self._seal_values(self.raw_v[:1])
            self.raw_v = self.raw_v[1:]

    def _seal_keys(self, x: np.ndarray) -> None:
        assert len(x) % G == 0
        groups = x.reshape(-1, G, D)
        self.k = np.concatenate([self.k, quantised(groups, 1, self.bits).reshape(-1, D)])

    def _seal_values(self, x: np.ndarray) -> None:
        groups = x.reshape(-1, D // G, G)
        self.v = np.concatenate([self.v, quantised(groups, 2, self.bits).reshape(-1, D)])


def ours(name: str, x: np.ndarray, block: int, bits: int) -> np.ndarray:
    """Whole blocks as they read once sealed."""
    codec, site = load_codec(f"kivi:bits={bits}"), Site(Field(name, (D,), "float32"), block)
    blocks = torch.from_numpy(x).unflatten(0, (-1, block))
    pos = torch.arange(len(x)).view(-1, block)
    parts = codec.encode(site, blocks, pos)
    return codec.decode(site, parts, pos, torch.float32).flatten(0, 1).numpy()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("prompt", [0, 5, 128, 300])
def test_the_published_schedule_seals_the_same_numbers(bits: int, block: int, prompt: int) -> None:
    residual, n = 128, 420
    rng = np.random.default_rng(prompt)
    k, v = (rng.standard_normal((n, D)).astype(np.float32) for _ in range(2))
    k[:, 7] *= 30
    whole = n // block * block
    sealed_k, sealed_v = (ours(name, x[:whole], block, bits) for name, x in (("k", k), ("v", v)))
    span, paper = Residual(block, residual), Published(bits, residual)
    paper.prefill(k[:prompt], v[:prompt])
    for t in range(prompt, n):
        paper.append(k[t], v[t])
        seen = t + 1
        assert len(paper.raw_k) == seen % residual
        assert len(paper.raw_v) == min(seen, residual)
        assert len(paper.k) + len(paper.raw_k) == len(paper.v) + len(paper.raw_v) == seen
        raw = seen - span.start(seen)
        assert raw == seen if seen < residual + block else residual <= raw < residual + block
    both_k, both_v = min(len(paper.k), whole), min(len(paper.v), whole)
    assert both_k >= 256
    assert both_v >= 256
    assert np.array_equal(sealed_k[:both_k], paper.k[:both_k])
    assert np.array_equal(sealed_v[:both_v], paper.v[:both_v])


def raw_tokens(residual: int, block: int, first: int, stop: int) -> tuple[float, float, float]:
    """Raw tokens on average over lengths [first, stop): ours, the paper's keys, the paper's values."""
    span, lengths = Residual(block, residual), range(first, stop)
    mine = [t - span.start(t) for t in lengths]
    keys = [t % residual for t in lengths]
    return tuple(float(np.mean(x)) for x in (mine, keys, [residual] * len(mine)))  # type: ignore[return-value]


@pytest.mark.parametrize(("tokens", "share"), [(32768, 0.006), (1024, 0.14)])
def test_what_sealing_together_costs_in_bytes(tokens: int, share: float) -> None:
    """The docstring's figures: D = 128, blocks of 32, one head."""
    fields = (Field("k", (128,), "bfloat16"), Field("v", (128,), "bfloat16"))
    body, raw = build_layout(
        [KVLayer(0, 1, fields)], KVConfig("kivi"), dtype="bfloat16"
    ).spec.groups
    coded, plain = body.bytes_per_token / 2, raw.bytes_per_token / 2
    assert (coded, plain) == (48, 256)
    mine, keys, values = raw_tokens(128, 32, tokens, tokens + 1280)
    assert mine - keys == pytest.approx((128 + 32) / 2, abs=1)
    assert mine - values == pytest.approx(32 / 2, abs=1)
    paper = tokens * 2 * coded + (keys + values) * (plain - coded)
    extra = (2 * mine - keys - values) * (plain - coded)
    assert extra / paper == pytest.approx(share, rel=0.1)
