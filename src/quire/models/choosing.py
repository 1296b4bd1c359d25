"""From scores and budgets to the slots that each KV head keeps. Pure functions.

A unit is a token, or a whole block where a codec's tokens can only be kept together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from quire.plan.kept import part_sizes
from quire.spec import Coord
from quire.store.compact import Part

__all__ = ["by_block", "inside", "make_parts"]


def inside(positions: torch.Tensor, intervals: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Which positions lie in one of the intervals."""
    out = torch.zeros_like(positions, dtype=torch.bool)
    for a, b in intervals:
        out |= (positions >= a) & (positions < b)
    return out


def by_block(x: Mapping[Coord, torch.Tensor], unit: int) -> dict[Coord, torch.Tensor]:
    """Whole blocks are worth their best token, and protected when one of theirs is."""
    return {
        c: s.view(-1, unit).amax(1) if s.dtype != torch.bool else s.view(-1, unit).any(1)
        for c, s in x.items()
    }


def make_parts(
    scores: Mapping[Coord, torch.Tensor],
    safe: Mapping[Coord, torch.Tensor],
    counts: Mapping[Coord, int],
    grain: int,
    size: int,
    unit: int,
) -> list[Part]:
    """Coordinates by how many units they keep, in few sizes (`plan.kept.part_sizes`), and their slots.

    Args:
        grain: numbers of units are multiples of it (a lossy body keeps whole blocks).
        size: tokens per block; where sizes differ at all they are whole blocks, which costs nothing.
        unit: tokens per unit.
    """
    have = {c: len(s) for c, s in scores.items()}
    sure = {c: int(x.sum()) for c, x in safe.items()}
    sizes = part_sizes(counts, have, sure, grain, max(1, size // unit))
    parts = []
    for n in sorted(set(sizes.values())):
        coords = tuple(sorted(c for c, m in sizes.items() if m == n))
        slots = np.stack([_best(scores[c], safe[c], n, unit) for c in coords])
        parts.append(Part(coords, slots))
    return parts


def _best(scores: torch.Tensor, safe: torch.Tensor, n: int, unit: int) -> np.ndarray:
    """Slots of the n best units, protected ones first, ascending."""
    order = torch.where(safe, torch.inf, scores)
    best = order.topk(n).indices.sort().values.cpu().numpy()
    if unit == 1:
        return best
    slots: np.ndarray = (best[:, None] * unit + np.arange(unit)).reshape(-1)
    return slots
