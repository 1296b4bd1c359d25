"""The normalised Hadamard rotation: spreads a vector's outliers over its channels, and is its own inverse."""

from __future__ import annotations

import torch

from quire.errors import ConfigError
from quire.spec import hadamard_width

__all__ = ["hadamard", "hadamard_width"]


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """`x @ H / sqrt(w)` over the last dimension, by the fast Walsh-Hadamard transform.

    H is block-diagonal, each block the Hadamard matrix of w channels, the largest power of two that divides D: one
    block for 64, 128 and 256, five of 16 for 80, three of 32 for 96.

    Cost: D log2 w additions per vector, in float32 for 16-bit vectors. Dot products of two rotated vectors equal those
    of the originals.
    """
    d = x.shape[-1]
    w = hadamard_width(d)
    if w < 2 <= d:
        raise ConfigError(f"a Hadamard rotation mixes pairs of channels, and {d} is odd")
    y = (x.float() if x.element_size() < 4 else x).reshape(-1, w)
    width = 1
    while width < w:
        y = y.reshape(-1, w // (2 * width), 2, width)
        y = torch.stack([y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]], 2)
        width *= 2
    out: torch.Tensor = y.reshape(x.shape) * w**-0.5
    return out.to(x.dtype)
