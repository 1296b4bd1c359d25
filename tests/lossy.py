"""A codec that only the tests have, made to betray whoever reads other bytes than the contract says.

A block is quantised against its first token with one scale over all its tokens, so that order and boundaries matter;
the scale depends on every position of the block and is stored in fewer bits than it is computed in, so that encoding
with other positions, or reading codes that were never stored, changes what is read.

`Lossy` is the codec in torch, `decoded` the oracle in NumPy: written apart, equal bit for bit in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from quire.spec import Field

LEVELS = 100.0


@dataclass(frozen=True)
class Lossy:
    """Stores `codes` per token, `base` and `scale` per block."""

    residual_tokens: int = 0
    group_tokens: int = 1
    name: ClassVar[str] = "lossy"
    plain: ClassVar[bool] = False

    def stored(self, of: Field, block_tokens: int) -> tuple[Field, ...]:
        return (
            Field(f"{of.name}.codes", of.shape, "int16"),
            Field(f"{of.name}.base", of.shape, "float32", "block"),
            Field(f"{of.name}.scale", (1,), "float16", "block"),
        )

    def encode(self, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.float()
        base = x[..., :1, :]
        turn = 1.0 + (pos.sum(-1) % 3).to(torch.float32) / 8.0
        scale = (x - base).abs().amax((-2, -1)) / LEVELS * turn + 2.0**-10
        codes = torch.round((x - base) / scale[..., None, None])
        return {"codes": codes, "base": base.squeeze(-2), "scale": scale.unsqueeze(-1)}

    def decode(self, stored: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        scale = stored["scale"].float().unsqueeze(-2)
        out = stored["codes"].float() * scale + stored["base"].float().unsqueeze(-2)
        return out.to(dtype)

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        """Half a step of the widest scale, and what float16 takes from the scale over all steps."""
        reach = (x - x[..., :1, :]).abs().amax((-2, -1), keepdim=True)
        step = reach / LEVELS * 1.25 + 2.0**-10
        return step * (0.5 + LEVELS * 2.0**-10) + 1e-6 * x.abs()


def decoded(x: np.ndarray, first: int) -> np.ndarray:
    """What one block `[B, D] float32` starting at position `first` reads as once it is sealed."""
    x = x.astype(np.float32)
    base = x[0]
    turn = np.float32(1 + (sum(range(first, first + len(x))) % 3) / 8)
    reach = np.abs(x - base).max() / np.float32(LEVELS)
    scale = np.float32(reach * turn + np.float32(2.0**-10))
    codes = np.rint((x - base) / scale).astype(np.int16)
    return codes.astype(np.float32) * np.float32(np.float16(scale)) + base
