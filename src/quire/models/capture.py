"""Keys, values and their squared gradients as a model's own forward and backward give them, for what learns from them.

A rotation is its own transpose, so where keys are turned back to what they were before RoPE gradients turn with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from quire.errors import ConfigError
from quire.models.probe import Shape, run_model, text_config
from quire.models.turn import Turner

__all__ = ["FIRST", "Capture", "Progress"]

FIRST = 1
"""Tokens of a window that nothing is learned from: the first is often unlike all others."""

Progress = Callable[[str, int, int], None]
"""progress(what, done, total)."""


class _Through(DynamicCache):
    """Lets keys and values through and keeps those of some layers, their gradients to be asked for."""

    kept: dict[int, tuple[torch.Tensor, torch.Tensor]]
    wanted: frozenset[int]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx in self.wanted:
            for x in (key_states, value_states):
                if torch.is_grad_enabled():
                    x.requires_grad_() if x.is_leaf else x.retain_grad()
            self.kept[layer_idx] = (key_states, value_states)
        out: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return out


class Capture:
    """What a model's layers hand to their cache, window by window.

    Args:
        model, shape: not attached to anything.
        turner: turns keys back to position 0, and gradients with them; None leaves both as they come.
        offsets: layer to what is added to its keys first, as `Bridge.key_offsets`.
        weighted: whether gradients are asked for.
    """

    def __init__(
        self, model: Any, shape: Shape, turner: Turner | None, offsets: Any, *, weighted: bool
    ) -> None:
        self.model, self.shape, self.weighted = model, shape, weighted
        self.turner, self.offsets = turner, offsets

    def read(
        self, windows: Sequence[list[int]], layers: Sequence[int], progress: Progress | None
    ) -> Iterator[tuple[int, str, torch.Tensor, torch.Tensor | None]]:
        """(layer, field, `[heads, N, D]`, squared gradients) of some layers, from one pass over the text."""
        xs: dict[tuple[int, str], list[torch.Tensor]] = {}
        gs: dict[tuple[int, str], list[torch.Tensor]] = {}
        for i, window in enumerate(windows):
            kept = self._window(window, layers)
            for layer in layers:
                if layer not in kept:
                    raise ConfigError(
                        f"layer {layer} of this model hands nothing to its cache, so it cannot be calibrated"
                    )
                for name, x in zip(("k", "v"), kept[layer], strict=True):
                    value, grad = self._ready(layer, name, x)
                    xs.setdefault((layer, name), []).append(value)
                    if grad is not None:
                        gs.setdefault((layer, name), []).append(grad)
            if progress is not None:
                progress(f"reading for layers {layers[0]} to {layers[-1]}", i + 1, len(windows))
        for key in list(xs):
            weight = torch.cat(gs.pop(key), 1).float() if key in gs else None
            yield *key, torch.cat(xs.pop(key), 1), weight

    def _window(
        self, window: list[int], layers: Sequence[int]
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        ids = torch.tensor([window], device=self.model.device)
        frozen = [(p, p.requires_grad) for p in self.model.parameters()]
        cache = _Through(config=text_config(self.model))
        cache.kept, cache.wanted = {}, frozenset(layers)
        try:
            for p, _ in frozen:
                p.requires_grad = False
            with torch.set_grad_enabled(self.weighted):
                extra = {"position_ids": torch.arange(len(window), device=ids.device)[None]}
                logits = run_model(
                    self.model, ids, cache, self.shape.cache_name, self.shape.accepts, **extra
                )
                if self.weighted:
                    loss = torch.nn.functional.cross_entropy(
                        logits[0, :-1].float(), ids[0, 1:], reduction="sum"
                    )
                    loss.backward()
        finally:
            for p, before in frozen:
                p.requires_grad = before
        return cache.kept

    def _ready(
        self, layer: int, name: str, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[heads, n, D]` as the codec will be given it, and its squared gradient, without the window's first."""
        grad = None if x.grad is None else x.grad[0].float()
        value = x.detach()[0]
        if name == "k":
            offset = self.offsets.get(layer)
            value = value if offset is None else value + offset.unsqueeze(1)
            if self.turner is not None:
                back = -torch.arange(value.shape[1], device=value.device)
                dtype = value.dtype
                value = self.turner(layer, value.float(), back).to(dtype)
                grad = None if grad is None else self.turner(layer, grad, back)
        squared = None if grad is None else (grad**2)[:, FIRST:].bfloat16()
        return value[:, FIRST:].clone(), squared
