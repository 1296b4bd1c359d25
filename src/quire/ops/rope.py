"""Rotary position embedding (arXiv 2104.09864), in both pairings that models use."""

from __future__ import annotations

import torch


def rope_angles(
    positions: torch.Tensor, dim: int, *, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[..., dim / 2]` for integer `positions: [...]`; pair m turns by `pos * theta^(-2m/dim)`."""
    m = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device)
    angle = positions.to(torch.float64).unsqueeze(-1) * theta ** (-m / dim)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns pairs (m, m + D/2), as Llama's code in transformers does. `x: [..., D]`, `cos, sin: [..., D/2]`."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns pairs (2m, 2m + 1), as in the paper, DeepSeek and GPT-J. `x: [..., D]`, `cos, sin: [..., D/2]`."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
