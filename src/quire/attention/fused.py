"""torch's fused attention over what a chunk of queries reads, piece by piece.

Under a mask the fused call computes every score, forbidden ones too; of a prompt's that is half. A piece is some
queries over the keys from the first to the last that one of them reads:

    queries 0..255      ████▒▒
    queries 256..511    ██████▒▒        ▒ masked, the rest is not asked for
    queries 512..767    ████████▒▒

Pieces follow from the plan alone and serve all layers of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from quire.attention.read import Read

CHUNK_ROWS = 256
"""Queries of a piece. Fewer read the keys too often, more compute too much that is masked (benchmarks/prefill.py)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries [start, stop) over keys [low, high); `mask: [R, 1, queries, keys]`, None where all are read."""

    start: int
    stop: int
    low: int
    high: int
    mask: torch.Tensor | None


def pieces(parts: list[Read], window: int | None) -> list[Piece]:
    """Of reads of the same queries whose keys stand side by side; made once for all layers.

    Cost: once per step one look at each of the T x N places of the mask.
    """
    key = (tuple(map(id, parts)), window)
    found = parts[0].pieces.get(key)
    if found is None:
        found = parts[0].pieces[key] = _cut(joined_mask(parts, window), parts)
    return found


def attend_pieces(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cut: list[Piece], scale: float
) -> torch.Tensor:
    """`q: [R, H_q, T, D]`, `k, v: [R, H_kv, N, D]` to `[R, H_q, T, D_v]`; zeros for queries of no piece."""
    grouped = q.shape[1] != k.shape[1]

    def attend(p: Piece) -> torch.Tensor:
        keys = slice(p.low, p.high)
        return F.scaled_dot_product_attention(
            q[:, :, p.start : p.stop],
            k[:, :, keys],
            v[:, :, keys],
            attn_mask=p.mask,
            scale=scale,
            enable_gqa=grouped,
        )

    if len(cut) == 1 and cut[0].stop - cut[0].start == q.shape[2]:
        return attend(cut[0])
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for p in cut:
        out[:, :, p.start : p.stop] = attend(p)
    return out


def _cut(mask: torch.Tensor | None, parts: list[Read]) -> list[Piece]:
    n_queries, n_keys = parts[0].queries, sum(r.slots[1] - r.slots[0] for r in parts)
    if mask is None:
        return [Piece(0, n_queries, 0, n_keys, None)]
    cut = []
    for start in range(0, n_queries, CHUNK_ROWS):
        stop = min(n_queries, start + CHUNK_ROWS)
        some = mask[:, :, start:stop].flatten(0, 2).any(0).nonzero()
        if len(some):
            low, high = int(some[0]), int(some[-1]) + 1
            of_piece = mask[:, :, start:stop, low:high]
            cut.append(Piece(start, stop, low, high, None if of_piece.all() else of_piece))
    return cut


def joined_mask(parts: list[Read], window: int | None) -> torch.Tensor | None:
    """`[R, 1, T, N]`: the masks of reads of the same queries whose keys stand side by side, made once for all layers.

    None where all is read.
    """
    key = ("mask", tuple(map(id, parts)), window)
    made = parts[0].pieces
    if key not in made:
        made[key] = _joined_mask(parts, window)
    found: torch.Tensor | None = made[key]
    return found


def _joined_mask(parts: list[Read], window: int | None) -> torch.Tensor | None:
    """`[R, 1, T, N]`: the masks of segments that stand side by side; None where all is read."""
    masks = [r.mask(window) for r in parts]
    if all(m is None for m in masks):
        return None
    whole = [
        torch.ones(1, 1, r.kpos.shape[1], dtype=torch.bool, device=r.kpos.device).expand(
            *r.tokens.shape, -1
        )
        if m is None
        else m.expand(*r.tokens.shape, -1)
        for r, m in zip(parts, masks, strict=True)
    ]
    return (whole[0] if len(whole) == 1 else torch.cat(whole, -1)).unsqueeze(1)
