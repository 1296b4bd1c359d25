"""Uniform quantisers with float16 scales: codes are made with the scale as it is stored, so that it adds no error.

symmetric    x ~ code * scale           code in -top .. top      scale = max|x| / top
affine       x ~ code * scale + low     code in 0 .. levels      low = min x, scale = (max x - low) / levels

What lies beyond float16's range is clipped, and a scale that float16 rounds to 0 gives code 0; both stay within the
bounds given here, which are computed from the scales themselves. Source: the usual round-to-nearest quantisation; the
guard of a zero scale is what KIVI's published code (arXiv 2402.02750) lacks.
"""

from __future__ import annotations

import torch

HALF_MAX = 65504.0
_ROUNDING = 2.0**-21
"""Of the float32 arithmetic that makes codes and turns them back, relative to the largest number in it."""


def symmetric(
    x: torch.Tensor, dim: int | tuple[int, ...], top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `-top .. top` (float32, shape of x) and float16 scales (dimension `dim` kept as 1). Cost: two passes."""
    x = x.float()
    scale = half(x.abs().amax(dim, keepdim=True) / top)
    return _codes(x, scale).clamp(-top, top), scale


def symmetric_bound(x: torch.Tensor, dim: int | tuple[int, ...], top: int) -> torch.Tensor:
    """|code * scale - x| at most, elementwise."""
    scale = half(x.float().abs().amax(dim, keepdim=True) / top).double()
    size = x.double().abs()
    return torch.maximum(scale / 2, size - top * scale) + _ROUNDING * (size + scale)


def affine(
    x: torch.Tensor, dim: int, levels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes `0 .. levels` (float32, shape of x), float16 scales and minima (dimension `dim` kept as 1)."""
    x = x.float()
    # of zeros with both signs either may be the extreme, by the order of the reduction: + 0 makes them one
    low = half(x.amin(dim, keepdim=True) + 0.0)
    scale = half((x.amax(dim, keepdim=True) + 0.0 - low.float()).clamp_min(0) / levels)
    return _codes(x - low.float(), scale).clamp(0, levels), scale, low


def affine_bound(x: torch.Tensor, dim: int, levels: int) -> torch.Tensor:
    """|code * scale + low - x| at most, elementwise."""
    _, scale, low = (y.double() for y in affine(x, dim, levels))
    x = x.double()
    over = torch.maximum(low - x, x - (low + levels * scale))
    size = torch.maximum(x.abs(), low.abs())
    return torch.maximum(scale / 2, over) + _ROUNDING * (size + levels * scale)


def _codes(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale, rounded half to even; 0 where the scale is."""
    s = scale.float()
    return torch.where(s > 0, x / s, 0.0).round()


def half(x: torch.Tensor) -> torch.Tensor:
    """float16, clipped to its range."""
    return x.clamp(-HALF_MAX, HALF_MAX).half()
