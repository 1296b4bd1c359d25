"""`int4`: 4-bit integers of rotated keys and values, asymmetric, per token and head.

Idea: a few channels of keys are far larger than the others and would take all 16 steps for themselves. A normalised
Hadamard rotation over the head's channels spreads them evenly; being orthogonal, it changes no product of a query and a
key that are both rotated, and a sum of rotated values is rotated back once. Every token stands for itself.

    k, v ── rotate ──> 16 steps from the smallest to the largest of each group ──> codes, scale, min

Source: QuaRot (Ashkboos et al., arXiv 2404.00456) for the rotation; the per-token form with one group as wide as the
    head is SAW-INT4's and llama.cpp's.
Differs: keys are rotated after RoPE, in the codec, so that no weight of the model changes; scale and min are float16,
    and codes are made with both as they are stored. A width that is no power of two (80, 96) is rotated in blocks of
    the largest power of two that divides it. `rotate=false` leaves the rotation out, for comparison.
Cost: bytes per token, head and field: D / 2 + 4 D / g for groups of g channels (`group=head`: g = D; or 32, 64, 128),
    and alignment. Encoding and decoding add D log2 w additions a row. Serves latents, which are laid out as keys.
Error: half a step per channel in the rotated basis; in the model's at most the root of their squares' sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quire.codecs.coded import Turned, affine_fields, choose
from quire.errors import ConfigError
from quire.spec import Field, Packing, Site, hadamard_width

if TYPE_CHECKING:
    import torch

LEVELS = 15


@dataclass(frozen=True)
class Codec(Turned):
    """Parameters `group`: channels that share a scale, `head` for all of a head's; `rotate`: true or false."""

    group: int | str = "head"
    rotate: bool = True
    name: ClassVar[str] = "int4"

    def __post_init__(self) -> None:
        choose(self.name, "group", self.group, ("head", 32, 64, 128))
        choose(self.name, "rotate", self.rotate, (True, False))

    def stored(self, site: Site) -> tuple[Field, ...]:
        codes = self.packed_field(site, 4)
        if self.rotate and site.width % 2:
            raise ConfigError(
                f"codec int4 cannot rotate {site.name} of {site.width} channels; use rotate=false, or codec fp8"
            )
        return codes, *affine_fields(site, (site.width // self._group(site), site.block_tokens))

    def packing(self, site: Site) -> Packing:
        turned = hadamard_width(site.width) if self.rotate else 0
        return Packing(4, "token", self._group(site), turned, nearest=True)

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        from quire.ops.quantise import affine

        codes, scale, low = affine(self._groups(site, self.turned(x.float())), -1, LEVELS)
        return {
            "codes": self.pack(site, codes.flatten(-2), 4),
            "scale": scale.squeeze(-1).transpose(-1, -2),
            "min": low.squeeze(-1).transpose(-1, -2),
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
        scale, low = (stored[n].float().transpose(-1, -2).unsqueeze(-1) for n in ("scale", "min"))
        x = (self._groups(site, self.unpack(site, stored["codes"], 4)) * scale + low).flatten(-2)
        return (x if own_basis else self.turned(x)).to(dtype)

    def error_bound(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        from quire.ops.quantise import affine_bound

        bound: torch.Tensor = affine_bound(
            self._groups(site, self.turned(x.float())), -1, LEVELS
        ).flatten(-2)
        return self.turned_bound(site, x, bound)

    def _group(self, site: Site) -> int:
        group = site.width if self.group == "head" else int(self.group)
        if site.width % group:
            raise ConfigError(
                f"codec int4: groups of {group} channels do not divide {site.name}'s {site.width}; use group=head"
            )
        return group

    def _groups(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        """`[..., D]` to `[..., D / g, g]`."""
        groups: torch.Tensor = x.unflatten(-1, (-1, self._group(site)))
        return groups
