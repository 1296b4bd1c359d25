"""A codec that only the tests have, made to betray whoever reads other bytes than the contract says.

A block is quantised against its first token with one scale over all its tokens, so that order and boundaries matter;
the scale depends on every position of the block and is stored in fewer bits than it is computed in, so that encoding
with other positions, or reading codes that were never stored, changes what is read. A number that follows from a
token's position is taken off before and put back after, so that decoding with other positions does, too.

`Lossy` is the codec in torch, `decoded` the oracle in NumPy: written apart, equal bit for bit in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from quire.codecs.coded import Coded
from quire.spec import Field, Site

LEVELS = 100.0


@dataclass(frozen=True)
class Lossy(Coded):
    """Stores `codes` per token, `base` and `scale` per block."""

    residual_tokens: int = 0
    group_tokens: int = 1
    name: ClassVar[str] = "lossy"

    def stored(self, site: Site) -> tuple[Field, ...]:
        of = site.field
        return (
            Field(f"{of.name}.codes", of.shape, "int16"),
            Field(f"{of.name}.base", of.shape, "float32", "block"),
            Field(f"{of.name}.scale", (1,), "float16", "block"),
        )

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.float() - (pos % 5).unsqueeze(-1).to(torch.float32)
        base = x[..., :1, :]
        turn = 1.0 + (pos.sum(-1) % 3).to(torch.float32) / 8.0
        scale = (x - base).abs().amax((-2, -1)) / LEVELS * turn + 2.0**-10
        codes = torch.round((x - base) / scale[..., None, None])
        return {"codes": codes, "base": base.squeeze(-2), "scale": scale.unsqueeze(-1)}

    def decode(
        self,
        site: Site,
        stored: Mapping[str, torch.Tensor],
        pos: torch.Tensor,
        dtype: torch.dtype,
        *,
        own_basis: bool = False,
    ) -> torch.Tensor:
        scale = stored["scale"].float().unsqueeze(-2)
        out = stored["codes"].float() * scale + stored["base"].float().unsqueeze(-2)
        return (out + (pos % 5).unsqueeze(-1).to(torch.float32)).to(dtype)

    def error_bound(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        """Half a step of the widest scale, and what float16 takes from the scale over all steps."""
        reach = (x - x[..., :1, :]).abs().amax((-2, -1), keepdim=True) + 4
        step = reach / LEVELS * 1.25 + 2.0**-10
        return step * (0.5 + LEVELS * 2.0**-10) + 1e-6 * (x.abs() + 4)


def decoded(x: np.ndarray, first: int) -> np.ndarray:
    """What one block `[B, D] float32` starting at position `first` reads as once it is sealed."""
    off = (np.arange(first, first + len(x)) % 5).astype(np.float32)[:, None]
    x = x.astype(np.float32) - off
    base = x[0]
    turn = np.float32(1 + (sum(range(first, first + len(x))) % 3) / 8)
    reach = np.abs(x - base).max() / np.float32(LEVELS)
    scale = np.float32(reach * turn + np.float32(2.0**-10))
    codes = np.rint((x - base) / scale).astype(np.int16)
    return codes.astype(np.float32) * np.float32(np.float16(scale)) + base + off
