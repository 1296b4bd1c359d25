"""Moving rotated vectors on by some positions: RoPE of any model, found out by asking it instead of reading its code.

A text of one token repeated has the same hidden state at every position: attention over equal values gives that value,
whatever its weights. So the keys of a layer at positions p and 0 differ by RoPE alone, and of a model's frequencies,
the two ways to pair channels and the number of channels that turn, the ones are its own under which they agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from quire.errors import ConfigError
from quire.models.moving import read_field
from quire.models.rope import Regimes

__all__ = ["Rope", "Turner", "find_turner"]

TOKENS = 24
"""Of the repeated text: far enough that frequencies differ by more than rounding."""


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
        return torch.cat([both.to(x.dtype), x[..., d:]], -1)

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

    Cost: one forward of a few tokens.
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
    found: dict[int, Rope | None] = {}
    for layer, keys in _keys(bridge).items():
        found[layer] = _explain(layer, keys, angles)
    return Turner(found)


def _keys(bridge: Any) -> dict[int, torch.Tensor]:
    """Layer to `[heads, TOKENS, D]`, the keys of one token repeated."""
    from quire.models.runner import ModelRunner  # the runner asks for a turner, too

    table = bridge.store.open()
    try:
        table.append(TOKENS)
        ModelRunner(bridge).forward([_Repeat(table)])
        out: dict[int, torch.Tensor] = {}
        for layer, names in bridge.layers():  # before a window lets go of any
            name = "k_rope" if "k_rope" in names else names[0]
            plain = [c for c in table.chains if c.group.raw is None and c.group.holds(layer)]
            heads = [read_field(bridge.store, bridge.layout, c, layer, name, TOKENS) for c in plain]
            out[layer] = torch.cat(heads)
        return out
    finally:
        table.release()


@dataclass
class _Repeat:
    """An item of one token, repeated."""

    table: Any
    tokens: Sequence[int] = (1,) * TOKENS
    start: int = 0
    stop: int = TOKENS
    logits: int = 1


def _explain(layer: int, keys: torch.Tensor, angles: list[torch.Tensor]) -> Rope | None:
    by = torch.arange(keys.shape[1], device=keys.device)
    first = keys[:, :1].expand_as(keys)
    size = keys.norm()
    if float((keys - first).norm()) <= 1e-5 * float(size):
        return None
    best: tuple[float, Rope | None] = (float("inf"), None)
    for a in angles:
        for halves in (True, False):
            if 2 * len(a) <= keys.shape[-1]:
                rope = Rope(a, halves)
                error = float((rope.turn(first, by) - keys).norm() / size)
                best = min(best, (error, rope), key=lambda x: x[0])
    if best[0] > 2e-2:  # 16-bit keys agree to a hundredth
        raise ConfigError(
            f"no RoPE of this model explains how the keys of layer {layer} turn with their positions"
        )
    return best[1]
