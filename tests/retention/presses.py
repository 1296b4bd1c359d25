"""Scorers in the form of kvpress, written for these tests: each looks at something else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


class Norm:
    """Keys alone."""

    def score(
        self, module: Any, hidden: Any, keys: Any, values: Any, paid: Any, kwargs: Any
    ) -> Any:
        return -keys.norm(dim=-1)


class First:
    """The first channel of each key: no two are alike, as norms are where a model normalises its keys."""

    def score(
        self, module: Any, hidden: Any, keys: Any, values: Any, paid: Any, kwargs: Any
    ) -> Any:
        return keys[..., 0]


def queries(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """`[1, H_q, n, D]` before RoPE."""
    n, d = hidden.shape[1], module.head_dim
    return module.q_proj(hidden).view(1, n, -1, d).transpose(1, 2)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def by_group(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`[1, H_q, T]` to `[1, H_kv, T]`."""
    return x.unflatten(1, (heads, -1)).mean(2)


@dataclass
class Expecting:
    """The module's own projection, its config and RoPE, and all hidden states."""

    ahead: int = 64
    compression_ratio: float = 0.0

    def score(
        self, module: Any, hidden: Any, keys: Any, values: Any, paid: Any, kwargs: Any
    ) -> Any:
        share = module.config.num_attention_heads // keys.shape[1]
        n = keys.shape[2]
        mean = queries(module, hidden).mean(2)
        at = torch.arange(n, n + self.ahead)[None]
        cos, sin = module.rotary_emb(mean, at)
        mean = turned(mean, cos.mean(1, keepdim=True), sin.mean(1, keepdim=True))
        k = keys.repeat_interleave(share, 1)
        logits = torch.einsum("bhd,bhnd->bhn", mean, k) * module.scaling
        return by_group(logits.softmax(-1), keys.shape[1]) * values.norm(dim=-1)


@dataclass
class Windowed:
    """The last queries, turned by the position embeddings of the call."""

    window: int = 16

    def score(
        self, module: Any, hidden: Any, keys: Any, values: Any, paid: Any, kwargs: Any
    ) -> Any:
        n, heads = keys.shape[2], keys.shape[1]
        assert n > self.window, "too short a text"
        assert kwargs["hidden_states"] is hidden
        cos, sin = (x[:, -self.window :].unsqueeze(1) for x in kwargs["position_embeddings"])
        q = turned(queries(module, hidden[:, -self.window :]), cos, sin)
        k = keys.repeat_interleave(q.shape[1] // heads, 1)
        p = (q @ k.transpose(2, 3) * module.scaling).softmax(-1).mean(2)
        return by_group(p, heads)


@dataclass
class Marking:
    """Marks the tokens that go, so it must know how many."""

    compression_ratio: float = 0.0

    def score(
        self, module: Any, hidden: Any, keys: Any, values: Any, paid: Any, kwargs: Any
    ) -> Any:
        n = keys.shape[2]
        out = torch.ones(keys.shape[:3])
        gone = n - int(n * (1 - self.compression_ratio))
        out[:, :, 10 : 10 + gone] = 0
        return out


class Sloping:
    """The second head's tokens are worth more."""

    def score(
        self, module: Any, hidden: Any, keys: Any, values: Any, paid: Any, kwargs: Any
    ) -> Any:
        height = torch.arange(keys.shape[1])[:, None] / 2 + torch.arange(keys.shape[2]) / 160
        return height[None]


class Drawing:
    """Random numbers."""

    def score(
        self, module: Any, hidden: Any, keys: Any, values: Any, paid: Any, kwargs: Any
    ) -> Any:
        return torch.rand(keys.shape[:3])


class Observing:
    """Attention weights."""

    def score(
        self, module: Any, hidden: Any, keys: Any, values: Any, paid: Any, kwargs: Any
    ) -> Any:
        return by_group(paid.sum(2), keys.shape[1])


class Wrong:
    """Another shape."""

    def score(
        self, module: Any, hidden: Any, keys: Any, values: Any, paid: Any, kwargs: Any
    ) -> Any:
        return keys


class Failing:
    """Nothing works."""

    def score(
        self, module: Any, hidden: Any, keys: Any, values: Any, paid: Any, kwargs: Any
    ) -> Any:
        raise KeyError("no such thing")


class Needing:
    """A model of another kind."""

    def post_init_from_model(self, model: Any) -> None:
        raise ValueError("no filters for this model")

    def score(
        self, module: Any, hidden: Any, keys: Any, values: Any, paid: Any, kwargs: Any
    ) -> Any:
        return keys[..., 0]


class ScorerPress(Norm):
    """Of the name that says its `compress` adds nothing."""

    def compress(self, *args: Any) -> Any:
        raise AssertionError("never called")


class Plain(ScorerPress):
    pass


class Rotating(Norm):
    """More than a score."""

    def compress(self, *args: Any) -> Any:
        raise AssertionError("never called")


class Silent:
    """No score at all."""


@dataclass
class Wrapping:
    """Around another press."""

    press: Any

    def score(
        self, module: Any, hidden: Any, keys: Any, values: Any, paid: Any, kwargs: Any
    ) -> Any:
        return self.press.score(module, hidden, keys, values, paid, kwargs)
