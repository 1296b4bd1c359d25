"""`kvarn`: few bits of rotated keys and values, in tiles whose tokens and channels were made to spread alike.

Idea: below four bits one wide row or column of a tile takes the steps of all others. A rotation spreads wide channels;
dividing each token and each channel by how far it spreads, in turn, evens out what is left. Keys then share a scale
along channels and values along tokens, and the division that the scale does not do by itself is kept beside.

    x ── rotate ──> balance ──>  keys:   codes, scale and min per channel, norm per token
                                 values: codes, scale and min per token,   norm per channel

Source: KVarN (Huawei, 2026; the released code's K4V2): tiles of 128 tokens, 16 turns of which the most even counts.
Differs: tiles are divided by their own spread first, since the published limits on factors are absolute and would
    leave narrow values as they are. Rotated in the codec, after RoPE, as `int4` is. The first tokens, which the
    published code keeps in 16 bits, are rounded too unless the recipe says `;sinks=4`. Codes are made with all factors
    as stored. `rotate=false` leaves the rotation out: better where a few channels of keys are far wider than others.
Cost: bytes of a tile of T tokens and head: keys T D b / 8 + 4 D + 2 T, values T D b / 8 + 4 T + 2 D, which at T = D =
    128 is 3.375 bits a number for 4-bit keys and 2-bit values. Blocks hold whole tiles, so up to a tile more is raw
    per sequence. No kernel reads it in place: blocks are decoded to be attended. Serves latents, as keys.
Error: half a step of the element's group times its norm, in the rotated basis; in the model's at most the root of
    their squares' sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quire.codecs.coded import Turned, affine_fields, choose
from quire.errors import ConfigError
from quire.spec import Field, Site

if TYPE_CHECKING:
    import torch

TURNS = 16
_LEAST = 2.0**-14
"""Of a norm: float16's smallest number of full precision."""


@dataclass(frozen=True)
class Codec(Turned):
    """Parameters `key_bits`, `value_bits`: 2 or 4; `tile`: tokens, 16, 32, 64 or 128; `rotate`: true or false."""

    key_bits: int = 4
    value_bits: int = 2
    tile: int = 128
    rotate: bool = True
    name: ClassVar[str] = "kvarn"
    shown: ClassVar[tuple[str, ...]] = ("kvarn", "kvarn:key_bits=2")

    def __post_init__(self) -> None:
        choose(self.name, "key_bits", self.key_bits, (2, 4))
        choose(self.name, "value_bits", self.value_bits, (2, 4))
        choose(self.name, "tile", self.tile, (16, 32, 64, 128))
        choose(self.name, "rotate", self.rotate, (True, False))

    @property
    def group_tokens(self) -> int:
        return self.tile

    def stored(self, site: Site) -> tuple[Field, ...]:
        if self.rotate and site.width % 2:
            raise ConfigError(
                f"codec kvarn cannot rotate {site.name} of {site.width} channels; use rotate=false, or codec fp8"
            )
        tiles = site.block_tokens // self.tile
        along, beside = (self.tile, site.width) if site.values else (site.width, self.tile)
        return (
            self.packed_field(site, self._bits(site)),
            *affine_fields(site, (tiles, along)),
            Field(f"{site.name}.norm", (tiles, beside), "float16", "block"),
        )

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, scale, low, norm = self._coded(site, x)
        dim = self._dim(site)
        return {
            "codes": self.pack(site, codes.flatten(-3, -2), self._bits(site)),
            "scale": scale.squeeze(dim),
            "min": low.squeeze(dim),
            "norm": norm.squeeze(self._other(site)),
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
        dim = self._dim(site)
        scale, low = (stored[n].float().unsqueeze(dim) for n in ("scale", "min"))
        norm = stored["norm"].float().unsqueeze(self._other(site))
        codes = self._tiles(self.unpack(site, stored["codes"], self._bits(site)))
        x = ((codes * scale + low) * norm).flatten(-3, -2)
        return (x if own_basis else self.turned(x)).to(dtype)

    def error_bound(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        from quire.ops.quantise import affine_bound

        tiles = self._tiles(self.turned(x.float()))
        norm = self._norm(site, tiles).double()
        bound = affine_bound((tiles / norm).float(), self._dim(site), self._levels(site)) * norm
        bound = bound.flatten(-3, -2) + 2.0**-20 * x.double().abs()
        return self.turned_bound(site, x, bound)

    def _coded(self, site: Site, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from quire.ops.quantise import affine

        tiles = self._tiles(self.turned(x.float()))
        norm = self._norm(site, tiles)
        return *affine(tiles / norm.float(), self._dim(site), self._levels(site)), norm

    def _norm(self, site: Site, tiles: torch.Tensor) -> torch.Tensor:
        """What a tile is divided by, float16: `[..., T, 1]` of keys, `[..., 1, D]` of values."""
        from quire.ops.balance import balance
        from quire.ops.quantise import half

        rows, columns = balance(tiles, TURNS)
        norm = half((columns if site.values else rows).clamp_min(_LEAST))
        return norm.unsqueeze(self._other(site))

    def _bits(self, site: Site) -> int:
        return self.value_bits if site.values else self.key_bits

    def _levels(self, site: Site) -> int:
        return (1 << self._bits(site)) - 1

    @staticmethod
    def _dim(site: Site) -> int:
        """Of a tile `[T, D]`, the dimension that shares a scale."""
        return -1 if site.values else -2

    @staticmethod
    def _other(site: Site) -> int:
        """The one that shares a norm."""
        return -2 if site.values else -1

    def _tiles(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., B, D]` to `[..., B / T, T, D]`."""
        tiles: torch.Tensor = x.unflatten(-2, (-1, self.tile))
        return tiles
