"""`kivi`: 2 or 4 bits, keys per channel and values per token, beside a window of recent tokens in 16 bits.

Idea: keys have a few channels that are large in every token, values have none. So keys share a scale along each channel
(over `group` tokens), where a large channel spoils nobody else's steps, values along each token (over `group`
channels); the last `residual` tokens, which are attended to most, stay as they are.

    |== K: groups of 32 tokens by channel, V: groups of 32 channels by token ==|##### R raw #####|# tail|

Source: KIVI (Liu et al., arXiv 2402.02750), section 3 and algorithm 1: post-RoPE keys, s = (max - min) / (2^b - 1),
    zero-point min, R = 128, groups of 32.
Differs: K and V of a block of B tokens are sealed together once it has left the window, so that a sealed block never
    changes and can be shared: R to R + B - 1 tokens are raw. The published code flushes its R keys at once when R have
    gathered (T mod R raw) and values one at a time (R raw). So (R + B) / 2 more keys and B / 2 more values are raw on
    average: at 2 bits and D = 128 0.6 % more bytes at 32k tokens and 14 % at 1k.
    A scale of 0, by which the published code divides, gives code 0; codes are made with scale and min as stored.
Cost: bytes per token and head for K and V together, D = 128, groups of 32: 96 at 2 bits, 160 at 4 (512 in bf16), and
    R + B / 2 raw tokens per sequence. Blocks hold whole groups. Serves no latents: they are key and value at once.
Error: half a step of the element's group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from quire.codecs.coded import Coded, affine_fields, choose
from quire.errors import ConfigError
from quire.spec import Field, Packing, Site

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Codec(Coded):
    """Parameters `bits`: 2 or 4; `residual`: tokens of the raw window; `group`: tokens, or channels, of one scale."""

    bits: int = 2
    residual: int = 128
    group: int = 32
    name: ClassVar[str] = "kivi"
    shown: ClassVar[tuple[str, ...]] = ("kivi:bits=4", "kivi:bits=2")
    searched: ClassVar[tuple[str, ...]] = (
        *shown,
        *("kivi:bits=4,residual=32", "kivi:bits=2,residual=32"),
    )

    def __post_init__(self) -> None:
        choose(self.name, "bits", self.bits, (2, 4))
        choose(self.name, "group", self.group, (16, 32, 64, 128))
        if type(self.residual) is not int or self.residual < 0:
            raise ConfigError(
                f"codec kivi: residual={self.residual} is not served; it is a number of tokens, 0 or more"
            )

    @property
    def group_tokens(self) -> int:
        return self.group

    @property
    def residual_tokens(self) -> int:
        return self.residual

    def stored(self, site: Site) -> tuple[Field, ...]:
        if site.name not in ("k", "v"):
            raise ConfigError(
                f"codec kivi cannot serve {site.name}: it scales keys by channel and values by token, and a latent is "
                "both; use int8, fp8 or int4"
            )
        codes = self.packed_field(site, self.bits)
        if not site.values:
            return codes, *affine_fields(site, (site.block_tokens // self.group, site.width))
        if site.width % self.group:
            fit = [g for g in (16, 32, 64, 128) if site.width % g == 0]
            raise ConfigError(
                f"codec kivi: groups of {self.group} channels do not divide v's {site.width}; "
                + (f"use group={fit[-1]}" if fit else "use int8 or fp8")
            )
        return codes, *affine_fields(site, (site.width // self.group, site.block_tokens))

    def packing(self, site: Site) -> Packing:
        shared: Literal["token", "channel"] = "token" if site.values else "channel"
        return Packing(self.bits, shared, self.group, nearest=True)

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        from quire.ops.quantise import affine

        codes, scale, low = affine(self._groups(site, x), self._dim(site), self._levels)
        scale, low = (y.squeeze(self._dim(site)) for y in (scale, low))
        if site.values:
            scale, low = scale.transpose(-1, -2), low.transpose(-1, -2)
        return {
            "codes": self.pack(site, self._flat(site, codes), self.bits),
            "scale": scale,
            "min": low,
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
        scale, low = stored["scale"].float(), stored["min"].float()
        if site.values:
            scale, low = scale.transpose(-1, -2), low.transpose(-1, -2)
        scale, low = (y.unsqueeze(self._dim(site)) for y in (scale, low))
        codes = self._groups(site, self.unpack(site, stored["codes"], self.bits))
        return self._flat(site, codes * scale + low).to(dtype)

    def error_bound(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        from quire.ops.quantise import affine_bound

        return self._flat(site, affine_bound(self._groups(site, x), self._dim(site), self._levels))

    @property
    def _levels(self) -> int:
        return (1 << self.bits) - 1

    @staticmethod
    def _dim(site: Site) -> int:
        """Of `_groups`, the dimension that shares a scale."""
        return -1 if site.values else -2

    def _groups(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        """`[..., B, D]` to `[..., B, D / g, g]` for values, to `[..., B / g, g, D]` for keys."""
        groups: torch.Tensor = x.unflatten(self._dim(site), (-1, self.group))
        return groups

    @staticmethod
    def _flat(site: Site, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `_groups`."""
        return x.flatten(-2) if site.values else x.flatten(-3, -2)
