"""Where the compiled kernel leaves the probabilities of single queries, and which tokens they belong to.

one read of R rows   [R][heads][N]     the runs of slots that a row reads side by side, zeros behind
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from quire.attention.observe import Attended, Mass, latest
from quire.attention.read import Read, index
from quire.kernels import native
from quire.kernels.native import DecodeArgs


@dataclass(frozen=True, slots=True)
class Paid:
    """The places of a step's segments, for `n_rows` rows of heads.

    Args:
        places: `native.PLACE` per segment.
        n_floats: of all reads.
        reads: with each one's first float and `[R, N]` positions.
    """

    places: np.ndarray
    n_floats: int
    n_rows: int
    reads: list[tuple[Read, int, torch.Tensor]]

    def ask(self, args: DecodeArgs, attended: Attended) -> torch.Tensor:
        """Has the kernel leave probabilities and logarithms; returns the memory for the former, zeros."""
        flat = torch.zeros(self.n_floats)
        args.lse, args.probs = attended.lse.data_ptr(), flat.data_ptr()
        args.places, args.folded = self.places.ctypes.data, native.FOLDS[attended.fold]
        return flat

    def answer(self, layer: int, kv_heads: int, flat: torch.Tensor, attended: Attended) -> None:
        """What the kernel left, as the reads' masses."""
        parts = []
        for r, at, positions in self.reads:
            heads = r.group.heads(layer)
            n_rows, n_slots = positions.shape
            mass = flat[at : at + n_rows * self.n_rows * n_slots].view(n_rows, self.n_rows, n_slots)
            if len(heads) < kv_heads:
                mass = mass.unflatten(1, (kv_heads, -1))[:, list(heads)].flatten(1, 2)
            parts.append(Mass(r.group, r.rows, heads, positions, mass))
        attended.parts += latest(parts, attended.top) if attended.over == "latest" else parts


def plan_paid(single: Sequence[Read], n_rows: int) -> Paid:
    """Places for the segments of these reads in the order of their queries, as the kernel gets them."""
    runs = [
        (first, k, i, lo, hi)
        for k, r in enumerate(single)
        for i, first in enumerate(r.firsts)
        for lo, hi in r.runs(i)
    ]
    runs.sort(key=lambda x: x[0])
    lengths = [np.zeros(len(r.rows), np.int64) for r in single]
    for _, k, i, lo, hi in runs:
        lengths[k][i] += hi - lo
    widths = [int(n.max()) for n in lengths]
    firsts = np.cumsum(
        [0] + [len(r.rows) * n_rows * w for r, w in zip(single, widths, strict=True)]
    )
    positions = [
        np.full((len(r.rows), w), -1, np.int64) for r, w in zip(single, widths, strict=True)
    ]
    filled = [np.zeros(len(r.rows), np.int64) for r in single]
    places = np.zeros(len(runs), native.PLACE)
    for at, (_, k, i, lo, hi) in enumerate(runs):
        begin = filled[k][i]
        places[at] = firsts[k] + i * n_rows * widths[k] + begin, widths[k]
        slots = single[k].extents[i].slot_positions(single[k].source.block_tokens)
        positions[k][i, begin : begin + hi - lo] = slots[lo:hi]
        filled[k][i] += hi - lo
    reads = [
        (r, int(first), index(p, torch.device("cpu")))
        for r, first, p in zip(single, firsts[:-1], positions, strict=True)
    ]
    return Paid(places, int(firsts[-1]), n_rows, reads)
