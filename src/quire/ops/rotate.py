"""The normalised Hadamard rotation: spreads a vector's outliers over all channels, and is its own inverse."""

from __future__ import annotations

import torch

from quire.errors import ConfigError


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """`x @ H / sqrt(D)` over the last dimension, D a power of two, by the fast Walsh-Hadamard transform.

    Cost: D log2 D additions per vector. Dot products of two rotated vectors equal those of the originals.
    """
    d = x.shape[-1]
    if d & (d - 1):
        raise ConfigError(f"a Hadamard rotation needs a power of two, not {d} channels")
    y = x.reshape(-1, d)
    width = 1
    while width < d:
        y = y.reshape(-1, d // (2 * width), 2, width)
        y = torch.stack([y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]], 2)
        width *= 2
    out: torch.Tensor = y.reshape(x.shape) * d**-0.5
    return out.to(x.dtype)
