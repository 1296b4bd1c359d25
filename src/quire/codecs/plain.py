"""What `fp64`, `fp32`, `fp16` and `bf16` share: a row is stored as it comes, cast to the dtype. Not a codec itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quire.spec import Field

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
    group_tokens: ClassVar[int] = 1
    residual_tokens: ClassVar[int] = 0

    def stored(self, of: Field, block_tokens: int) -> tuple[Field, ...]:
        return (Field(of.name, of.shape, self.dtype, of.per),)

    def encode(self, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        return {"": x.to(getattr(torch, self.dtype))}

    def decode(self, stored: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return stored[""].to(dtype)

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise, for values within the dtype's range."""
        return x.abs() * self.epsilon + self.smallest
