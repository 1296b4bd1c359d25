"""Moving rotated vectors on by some positions: RoPE of any model, found out by asking it instead of reading its code.

Attention under RoPE sees distances only, so a text that begins at another position has the same hidden states. Its keys
differ by RoPE alone, and of a model's frequencies, the two ways to pair channels and the number of channels that turn,
the ones are its own under which the keys agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from quire.errors import ConfigError
from quire.models.probe import run_model, text_config
from quire.models.rope import Regimes

__all__ = ["Rope", "Turner", "find_turner"]

TOKENS, SHIFT = 12, 37
"""Of the text, and how much later it begins the second time."""


@dataclass(frozen=True)
class Rope:
    """`angles: [d / 2]` radians per position; channels pair as halves (i, i + d/2) or as neighbours (2i, 2i + 1)."""

    angles: torch.Tensor
    halves: bool
    last: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def turn(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """`x: [..., D]` moved on by `by: [...]` positions; channels beyond the angles stay."""
        d = 2 * len(self.angles)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = self._waves(by, dtype)
        y = x[..., :d].to(dtype)
        a, b = (y[..., : d // 2], y[..., d // 2 :]) if self.halves else (y[..., ::2], y[..., 1::2])
        turned = a * cos - b * sin, b * cos + a * sin
        both = torch.cat(turned, -1) if self.halves else torch.stack(turned, -1).flatten(-2)
        still = x[..., d:].expand(*both.shape[:-1], -1)
        return torch.cat([both.to(x.dtype), still], -1)

    def _waves(self, by: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines; those of the same tensor again are not computed again, since all layers ask with it."""
        known = self.last.get("waves")
        if known is None or known[0] is not by or known[1].dtype != dtype:
            theta = by.to(dtype).unsqueeze(-1) * self.angles.to(by.device, dtype)
            known = self.last["waves"] = (by, theta.cos(), theta.sin())
        return known[1], known[2]


class Turner:
    """The RoPE of every layer: `turner(layer, x, by)`. A layer without RoPE gives `x` back."""

    def __init__(self, ropes: dict[int, Rope | None]) -> None:
        self.ropes = ropes

    def __call__(self, layer: int, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        rope = self.ropes[layer]
        return x if rope is None else rope.turn(x, by)


@torch.inference_mode()
def find_turner(bridge: Any) -> Turner:
    """Finds the RoPE of each layer that caches keys.

    Raises:
        ConfigError: frequencies change with the length, or no RoPE explains the model's keys.

    Cost: two forwards of a few tokens.
    """
    model = bridge.model
    if Regimes(model).kind != "fixed":
        raise ConfigError(
            f"its RoPE ({Regimes(model).kind}) turns keys by the length of the whole sequence and cannot be turned back"
        )
    angles = [
        b.detach().double()
        for name, b in model.named_buffers()
        if name.endswith("inv_freq") and b.ndim == 1 and len(b)
    ]
    first, later = (_keys(bridge, start) for start in (0, SHIFT))
    layers = [layer for layer, _ in bridge.layers()]
    return Turner({layer: _explain(layer, first[layer], later[layer], angles) for layer in layers})


def _keys(bridge: Any, start: int) -> dict[int, torch.Tensor]:
    """Layer to `[heads, n, D]`: the keys that the model hands to a cache, of a text that begins at `start`."""
    model, shape = bridge.model, bridge.shape
    if "position_ids" not in shape.accepts:
        raise ConfigError("it takes no positions, so it has no RoPE that could be turned back")
    cache = DynamicCache(config=text_config(model))
    vocab = int(text_config(model).vocab_size)
    ids = torch.tensor([[(7 * i + 3) % vocab for i in range(TOKENS)]], device=model.device)
    positions = torch.arange(start, start + TOKENS, device=model.device)[None]
    run_model(model, ids, cache, shape.cache_name, shape.accepts, position_ids=positions)
    out = {}
    for layer, names in bridge.layers():
        found = cache.layers[layer]
        out[layer] = (found.values if "k_rope" in names else found.keys)[0].float()
    return out


def _explain(
    layer: int, first: torch.Tensor, later: torch.Tensor, angles: list[torch.Tensor]
) -> Rope | None:
    """The RoPE that turns one layer's keys into those of the same text `SHIFT` positions later."""
    size = float(later.norm())
    if float((first - later).norm()) <= 1e-5 * size:
        return None
    by = torch.full(first.shape[:-1], SHIFT, device=first.device)
    best: tuple[float, Rope | None] = (float("inf"), None)
    for a in angles:
        for halves in (True, False):
            if 2 * len(a) <= first.shape[-1]:
                rope = Rope(a, halves)
                error = float((rope.turn(first, by) - later).norm()) / size
                best = min(best, (error, rope), key=lambda x: x[0])
    if best[0] > 3e-2:  # 16-bit keys agree to a hundredth
        raise ConfigError(
            f"no RoPE of this model explains how the keys of layer {layer} turn with their positions"
        )
    return best[1]
