"""Small integers into bytes, in the order in which a kernel's 32-bit lanes eat them; pure torch, exact inverses.

A byte holds `p = 8 / bits` codes, and four bytes side by side hold `4 p` neighbours: code `4 e + j` of them lies in
byte `j`, from bit `bits * e` on. So one shift and one mask unpack four codes at once, whatever the width.

    bits 4, byte j    | code 4 + j | code j |        neighbours: channels for keys, tokens for values
    bits 2, byte j    | 12 + j | 8 + j | 4 + j | j |

    keys    [B / 16][D / 4p][16 t][4]     a lane is a token     no sums across lanes for q k
    values  [B / 4p][D][4]                a lane is a channel   none for p v
"""

from __future__ import annotations

import torch

TILE_TOKENS = 16
"""Tokens side by side in packed keys."""


def pack_keys(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`[..., B, D]` to `[..., B / 16, D / 4p, 16, 4] uint8`; B a multiple of 16, D of 4p. Cost: p passes."""
    x = codes.to(torch.uint8).unflatten(-2, (-1, TILE_TOKENS)).unflatten(-1, (-1, 8 // bits, 4))
    return _joined(x, -2, bits).transpose(-3, -2).contiguous()


def unpack_keys(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_keys`: `[..., B, D] uint8`."""
    return _split(packed.transpose(-3, -2), -2, bits).flatten(-3, -1).flatten(-3, -2)


def pack_values(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`[..., B, D]` to `[..., B / 4p, D, 4] uint8`; B a multiple of 4p. Cost: p passes."""
    x = codes.to(torch.uint8).unflatten(-2, (-1, 8 // bits, 4))
    return _joined(x, -3, bits).transpose(-2, -1).contiguous()


def unpack_values(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_values`: `[..., B, D] uint8`."""
    return _split(packed.transpose(-2, -1), -3, bits).flatten(-4, -2)


def _joined(x: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """The p codes along `dim` in one byte each."""
    first, *others = x.unbind(dim)
    for e, code in enumerate(others, 1):
        first = first | code << bits * e
    return first


def _split(x: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """The inverse: p codes per byte along a new dimension, `dim` of the result."""
    mask = (1 << bits) - 1
    return torch.stack([x >> bits * e & mask for e in range(8 // bits)], dim)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`[..., n]` codes of any width up to 16 to `[..., ceil(n bits / 8)] uint8`, bit after bit; a row begins a byte."""
    planes = codes.to(torch.int32).unsqueeze(-1) >> torch.arange(bits, device=codes.device) & 1
    line = planes.flatten(-2)
    line = torch.nn.functional.pad(line, (0, -line.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed: torch.Tensor = (line << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)
    return packed


def unpack_bits(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of `pack_bits`: `[..., n] int64`."""
    line = (
        packed.to(torch.int32).unsqueeze(-1) >> torch.arange(8, device=packed.device) & 1
    ).flatten(-2)
    planes = line[..., : n * bits].unflatten(-1, (n, bits))
    codes: torch.Tensor = (planes << torch.arange(bits, device=packed.device)).sum(-1)
    return codes
