"""`int8`: 8-bit integers, symmetric, with one float16 scale per token and head.

Idea: 127 steps to the largest magnitude of the group that shares a scale. With `scale=token` a group is one token's
channels of a head, with `scale=channel` one channel over a block's tokens (for keys whose channels differ in size),
with `scale=tensor` the whole tile.

Source: round-to-nearest integer quantisation with absolute-maximum scales.
Differs: symmetric, where the usual per-token form (vLLM's) has a zero-point as well: a product of codes then needs no
    correction by sums of the query, and what a zero-point saves is worth little at eight bits. Stored as q + 128.
Cost: bytes per token, head and field: D + 2 (token), D + 2 D / B (channel), D + 2 / B (tensor), and alignment. Encoding
    reads a block twice, decoding once. Serves latents, which are laid out as keys.
Error: half a step; what float16 takes from the scale is part of the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from quire.codecs.coded import Coded, choose
from quire.spec import Field, Packing, Site

if TYPE_CHECKING:
    import torch

TOP = 127
_DIMS: Mapping[str, tuple[int, ...]] = {"token": (-1,), "channel": (-2,), "tensor": (-2, -1)}


@dataclass(frozen=True)
class Codec(Coded):
    """Parameter `scale`: what shares a scale: `token` (of one head), `channel` or `tensor` (of one block)."""

    scale: str = "token"
    name: ClassVar[str] = "int8"

    def __post_init__(self) -> None:
        choose(self.name, "scale", self.scale, tuple(_DIMS))

    def stored(self, site: Site) -> tuple[Field, ...]:
        name = f"{site.name}.scale"
        scale = {
            "token": Field(name, (), "float16"),
            "channel": Field(name, (site.width,), "float16", "block"),
            "tensor": Field(name, (1,), "float16", "block"),
        }
        return self.packed_field(site, 8), scale[self.scale]

    def packing(self, site: Site) -> Packing:
        if self.scale == "token":
            return Packing(8, "token", site.width, nearest=True)
        shared: Literal["channel", "tile"] = "channel" if self.scale == "channel" else "tile"
        return Packing(8, shared, site.block_tokens, nearest=True)

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        from quire.ops.quantise import symmetric

        codes, scale = symmetric(x, _DIMS[self.scale], TOP)
        return {
            "codes": self.pack(site, codes + 128, 8),
            "scale": scale.squeeze(_DIMS[self.scale][0]),
        }

    def decode(
        self,
        site: Site,
        stored: Mapping[str, torch.Tensor],
        pos: torch.Tensor,
        dtype: torch.dtype,
        *,
        own_basis: bool = False,
    ) -> torch.Tensor:
        scale = stored["scale"].float().unsqueeze(_DIMS[self.scale][0])
        return ((self.unpack(site, stored["codes"], 8) - 128) * scale).to(dtype)

    def error_bound(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        from quire.ops.quantise import symmetric_bound

        return symmetric_bound(x, _DIMS[self.scale], TOP)
