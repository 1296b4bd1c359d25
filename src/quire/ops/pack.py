"""Small integers into bytes, in the order in which a kernel's 32-bit lanes eat them; pure torch, exact inverses.

A byte holds `p = 8 / bits` codes, and four bytes side by side hold `4 p` neighbours: code `4 e + j` of them lies in
byte `j`, from bit `bits * e` on. So one shift and one mask unpack four codes at once, whatever the width.

    bits 4, byte j    | code 4 + j | code j |        neighbours: channels for keys, tokens for values
    bits 2, byte j    | 12 + j | 8 + j | 4 + j | j |

    keys    [B / 16][D / 4p][16 t][4]     a lane is a token     no sums across lanes for q k
    values  [B / 4p][D][4]                a lane is a channel   none for p v
"""

from __future__ import annotations

import math

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
    """`[..., n]` codes of 1 to 8, 10 or 12 bits to `[..., ceil(n bits / 8)] uint8`; a row begins a byte."""
    n, (per_word, n_bytes) = codes.shape[-1], _word(bits)
    x = torch.nn.functional.pad(codes.long(), (0, -n % per_word)).unflatten(-1, (-1, per_word))
    word = (x << _places(per_word, bits, codes)).sum(-1, keepdim=True)
    packed: torch.Tensor = (word >> _places(n_bytes, 8, codes) & 255).to(torch.uint8).flatten(-2)
    return packed[..., : -(-n * bits // 8)]


def unpack_bits(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of `pack_bits`: `[..., n] int64`."""
    per_word, n_bytes = _word(bits)
    x = packed
    if n_bytes > 1:
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % n_bytes)).unflatten(-1, (-1, n_bytes))
        x = (x.long() << _places(n_bytes, 8, packed)).sum(-1)
    codes: torch.Tensor = x.long().unsqueeze(-1) >> _places(per_word, bits, packed)
    return (codes & (1 << bits) - 1).flatten(-2)[..., :n]


def _word(bits: int) -> tuple[int, int]:
    """Codes and bytes of the shortest word that both fill, which must fit an int64."""
    whole = math.lcm(bits, 8)
    return whole // bits, whole // 8


def _places(n: int, bits: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(0, n * bits, bits, device=like.device)
