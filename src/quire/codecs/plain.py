"""What `fp64`, `fp32`, `fp16` and `bf16` share: a row is stored as it comes, cast to the dtype. Not a codec itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from quire.spec import Field, Packing, Site

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Plain:
    """Stores elements in `dtype`. Cost: its bytes per element, one pass; sealing moves nothing."""

    name: ClassVar[str]
    dtype: ClassVar[str]
    epsilon: ClassVar[float]
    """Largest relative rounding error of a normal number."""
    smallest: ClassVar[float]
    """Largest absolute rounding error of a subnormal one."""
    plain: ClassVar[bool] = True
    needs: ClassVar[Literal["rotated", "unrotated"]] = "rotated"
    group_tokens: ClassVar[int] = 1
    residual_tokens: ClassVar[int] = 0

    def stored(self, site: Site) -> tuple[Field, ...]:
        of = site.field
        return (Field(of.name, of.shape, self.dtype, of.per),)

    def packing(self, site: Site) -> Packing:
        return Packing()

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        return {"": x.to(getattr(torch, self.dtype))}

    def decode(
        self,
        site: Site,
        stored: Mapping[str, torch.Tensor],
        pos: torch.Tensor,
        dtype: torch.dtype,
        *,
        own_basis: bool = False,
    ) -> torch.Tensor:
        return stored[""].to(dtype)

    def query_map(self, site: Site, q: torch.Tensor) -> torch.Tensor:
        return q

    def output_map(self, site: Site, out: torch.Tensor) -> torch.Tensor:
        return out

    def error_bound(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        """Elementwise, for values within the dtype's range."""
        return x.abs() * self.epsilon + self.smallest
