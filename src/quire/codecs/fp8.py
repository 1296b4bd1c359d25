"""`fp8`: every element as an 8-bit float, saturating.

Idea: a float's steps grow with its size, so that no scale is needed: `format=e4m3` keeps 3 bits of mantissa up to 448,
`format=e5m2` 2 bits up to 57,344. With `scale=token` a token's channels of a head are first scaled to the format's
range by a float16 number of their own, for models whose keys or values leave it.

Source: OCP 8-bit floating point (Micikevicius et al., arXiv 2209.05433); the scale of 1.0 per tensor is what serving
    engines use by default.
Differs: only storage is 8-bit; scores and sums are not. What lies beyond the range saturates and never becomes NaN.
Cost: D bytes per token, head and field; `scale=token` 2 more. One pass each way. Serves any width and any block.
Error: e4m3 1/16 of the number (2^-10 below 2^-6); e5m2 1/8 (2^-17 below 2^-14).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quire.codecs.coded import Coded, choose
from quire.spec import Field, Packing, Site

if TYPE_CHECKING:
    import torch

_FORMATS: Mapping[str, tuple[str, float, float, float]] = {
    "e4m3": ("float8_e4m3fn", 448.0, 2.0**-4, 2.0**-10),
    "e5m2": ("float8_e5m2", 57344.0, 2.0**-3, 2.0**-17),
}
"""dtype, largest number, largest relative error of a normal number, largest error of a subnormal one."""


@dataclass(frozen=True)
class Codec(Coded):
    """Parameters `format`: e4m3 or e5m2; `scale`: `none` (1.0) or `token` (one per token and head)."""

    format: str = "e4m3"
    scale: str = "none"
    name: ClassVar[str] = "fp8"

    def __post_init__(self) -> None:
        choose(self.name, "format", self.format, tuple(_FORMATS))
        choose(self.name, "scale", self.scale, ("none", "token"))

    @property
    def group_tokens(self) -> int:
        return 1

    def stored(self, site: Site) -> tuple[Field, ...]:
        codes = Field(f"{site.name}.codes", site.field.shape, _FORMATS[self.format][0])
        scale = Field(f"{site.name}.scale", (), "float16")
        return (codes,) if self.scale == "none" else (codes, scale)

    def packing(self, site: Site) -> Packing:
        if self.scale == "none":
            return Packing(nearest=True)
        return Packing(0, "token", site.width, nearest=True)

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        dtype, top, _, _ = _FORMATS[self.format]
        x, scale = x.float(), self._scale(x)
        if scale is not None:
            x = torch.where(scale > 0, x / scale.float(), 0.0)
        codes = {"codes": x.clamp(-top, top).to(getattr(torch, dtype))}
        return codes if scale is None else codes | {"scale": scale.squeeze(-1)}

    def decode(
        self,
        site: Site,
        stored: Mapping[str, torch.Tensor],
        pos: torch.Tensor,
        dtype: torch.dtype,
        *,
        own_basis: bool = False,
    ) -> torch.Tensor:
        x = stored["codes"].float()
        return (x if self.scale == "none" else x * stored["scale"].float().unsqueeze(-1)).to(dtype)

    def error_bound(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        import torch

        _, top, relative, least = _FORMATS[self.format]
        scale, size = self._scale(x), x.double().abs()
        unit = torch.ones_like(size) if scale is None else scale.double()
        bound = torch.maximum(size * relative, unit * least)
        return torch.maximum(bound, size - unit * top) + 2.0**-21 * size

    def _scale(self, x: torch.Tensor) -> torch.Tensor | None:
        """`[..., B, 1]` float16, or None."""
        if self.scale == "none":
            return None
        from quire.ops.quantise import half

        return half(x.float().abs().amax(-1, keepdim=True) / _FORMATS[self.format][1])
