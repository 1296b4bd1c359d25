"""Weights of linear layers, rounded to 8 or 4 bits without data, and how 4 bits lie in memory.

    8 bits   a whole number from -127 to 127, and a float32 scale per output
    4 bits   a whole number from -8 to 7, and a bfloat16 scale per 32 inputs of an output: 4.5 bits a weight

Of 4 bits a line holds eight inputs of sixteen outputs, 32 bits an output: the even inputs in the lower half, the odd
ones in the upper, from the lowest bit. A product takes them out of it with one shift and one look-up, or two shifts.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "GROUP",
    "LINE",
    "PANEL",
    "from_lines",
    "to_int4",
    "to_int8",
    "to_lines",
    "to_scale_lines",
]

GROUP = 32
"""Inputs that share a scale of 4-bit weights."""
PANEL = 16
"""Outputs side by side in our own layouts."""
LINE = 8
"""Inputs in a line of 4-bit weights."""
TRIED = (8 / 7, 1.0, 0.9)
"""Scales that are tried, as shares of one that reaches the largest weight in 8 steps: in 7, as is usual, or clipped."""
_AT_ONCE = 1 << 18
"""Weights that are rounded at a time: what is made of them stays in a cache."""


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[n, k]` to whole numbers from -127 to 127 and a scale per output: `[n, k] int8`, `[n] float32`."""
    w = weight.float()
    scales = w.abs().amax(1).clamp_min(1e-30) / 127
    return (w / scales[:, None]).round().to(torch.int8), scales


def to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[n, k]` to whole numbers from -8 to 7 and a scale per group: `[n, k'] int8`, `[n, k' / 32] bfloat16`.

    k' is k up to a multiple of 32; what is added is 0. Of some scales, each fitted to the codes that it makes, a group
    gets the one with the least squared error, which is never above that of the nearest of 15 steps. A scale is negative
    where the largest weight is positive: there are 8 steps on the one side and 7 on the other.

    Cost: a few passes over the weight for each of `TRIED`, in pieces that a cache holds.
    """
    n, k = weight.shape
    padded = -(-k // GROUP) * GROUP
    codes = torch.zeros(n, padded, dtype=torch.int8)
    scales = torch.empty(n, padded // GROUP, dtype=torch.bfloat16)
    rows = max(1, _AT_ONCE // padded)
    for i in range(0, n, rows):
        w = weight.new_zeros(min(rows, n - i), padded, dtype=torch.float32)
        w[:, :k] = weight[i : i + rows]
        c, s = _rounded(w.view(len(w), -1, GROUP))
        codes[i : i + rows], scales[i : i + rows] = c.view(len(w), padded), s
    return codes, scales


def _rounded(w: Tensor) -> tuple[Tensor, Tensor]:
    """Groups `[..., 32] float32` to codes `[..., 32] int8` and scales `[...] bfloat16`."""
    at = w.abs().argmax(-1, keepdim=True)
    reach = w.gather(-1, at) / -8
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for share in TRIED:
        codes = (w / _nonzero(reach * share)).round_().clamp_(-8, 7)
        # of these codes the scale with the least error, and of that scale the codes
        fitted = (w * codes).sum(-1, keepdim=True) / (codes * codes).sum(-1, keepdim=True)
        scale = _nonzero(fitted.nan_to_num_().bfloat16().float())
        codes = (w / scale).round_().clamp_(-8, 7)
        error = (codes * scale).sub_(w).square_().sum(-1, keepdim=True)
        if best is None:
            best = codes, scale, error
            continue
        better = error < best[2]
        best = (
            torch.where(better, codes, best[0]),
            torch.where(better, scale, best[1]),
            torch.where(better, error, best[2]),
        )
    assert best is not None
    return best[0].to(torch.int8), best[1].squeeze(-1).bfloat16()


def _nonzero(scale: Tensor) -> Tensor:
    """Of weights that are all 0, or so small that bfloat16 has no scale for them, the codes are 0 under any scale."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def to_lines(codes: Tensor) -> Tensor:
    """`[n, k] int8` from -8 to 7 to `[ceil(n / 16), k / 8, 16] int32`; k a multiple of 8."""
    n, k = codes.shape
    whole = -(-n // PANEL) * PANEL
    if whole != n:
        codes = torch.cat([codes, codes.new_zeros(whole - n, k)])
    halves = codes.view(whole // PANEL, PANEL, k // LINE, LINE // 2, 2)
    made = torch.zeros(whole // PANEL, PANEL, k // LINE, dtype=torch.int32)
    for word in range(LINE // 2):
        for half in range(2):
            bits = (halves[..., word, half] & 15).to(torch.int32)
            made |= bits << (4 * word + 16 * half)
    return made.transpose(1, 2).contiguous()


def from_lines(lines: Tensor, n: int, k: int) -> Tensor:
    """The `[n, k] int8` that `to_lines` was given."""
    panels, count, _ = lines.shape
    words = [
        (lines << (28 - 4 * word - 16 * half)) >> 28
        for word in range(LINE // 2)
        for half in range(2)
    ]
    codes = torch.stack(words, -1).to(torch.int8)  # [panels, count, 16, 8]
    return codes.transpose(1, 2).reshape(panels * PANEL, count * LINE)[:n, :k].contiguous()


def to_scale_lines(scales: Tensor) -> Tensor:
    """`[n, groups]` to `[ceil(n / 16), groups, 16]`; zeros at the edge."""
    n, groups = scales.shape
    whole = -(-n // PANEL) * PANEL
    if whole != n:
        scales = torch.cat([scales, scales.new_zeros(whole - n, groups)])
    return scales.view(whole // PANEL, PANEL, groups).transpose(1, 2).contiguous()
