"""Variance normalisation: one factor per token and one per channel that make all rows and columns spread alike.

    x [T, D]  ~  rows[t] * y[t, d] * columns[d]        every row and every column of y about equally wide

Source: KVarN (Huawei, 2026): rows and columns in turn, as Sinkhorn and Knopp do for sums, and the best turn kept.
"""

from __future__ import annotations

import torch

LEAST, MOST = -0.3, 10.0
"""Of the factors' logarithms: a narrow row is hardly widened, since what it holds matters little."""
_TINY = 1e-3
"""Of a standard deviation, relative to the whole tile's."""


def balance(x: torch.Tensor, turns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the rows `[..., T]` and of the columns `[..., D]` of tiles `[..., T, D]`, float64, above zero.

    Each turn sets the rows' factors to the standard deviations of rows divided by the columns', then the other way
    about. Of all turns, and of no factor at all, the one counts whose widest row and column exceed the narrowest
    least. A tile of equal numbers gets its own size.

    Cost: 4 products of a matrix and a vector per turn, in float64 so that neither batch nor order shows in the result.
    """
    x = x.double()
    whole = _spread(x.flatten(-2)).clamp_min(torch.finfo(torch.float32).tiny)[..., None, None]
    x = x / whole
    squares = x * x
    ones = torch.ones_like(x[..., 0]), torch.ones_like(x[..., 0, :])
    rows, columns = best = ones
    least = _imbalance(x, squares, rows, columns)
    for _ in range(turns):
        rows = _factor(_widths(x, squares, columns))
        columns = _factor(_widths(x.mT, squares.mT, rows))
        now = _imbalance(x, squares, rows, columns)
        better = now < least
        least = torch.where(better, now, least)
        best = (
            torch.where(better[..., None], rows, best[0]),
            torch.where(better[..., None], columns, best[1]),
        )
    size = whole[..., 0]
    return best[0] * size, best[1] * size


def _spread(x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = x.std(-1, correction=0)
    return out


def _widths(x: torch.Tensor, squares: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """Standard deviations `[..., T]` of the rows of `x / across`."""
    inverse = 1 / across[..., None]
    n = x.shape[-1]
    mean = (x @ inverse)[..., 0] / n
    square = (squares @ (inverse * inverse))[..., 0] / n
    return (square - mean * mean).clamp_min(0).sqrt()


def _factor(width: torch.Tensor) -> torch.Tensor:
    return width.clamp_min(_TINY).log().clamp(LEAST, MOST).exp()


def _imbalance(
    x: torch.Tensor, squares: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """How much wider the widest row is than the narrowest, times the same of the columns."""
    out = torch.ones(x.shape[:-2], dtype=x.dtype, device=x.device)
    for width in (
        _widths(x, squares, columns) / rows,
        _widths(x.mT, squares.mT, rows) / columns,
    ):
        least, most = width.clamp_min(_TINY).aminmax(dim=-1)
        out = out * most / least
    return out
