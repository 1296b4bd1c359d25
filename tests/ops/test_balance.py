"""`ops.balance` against the published loop, written down anew: divide, look, keep the most even."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quire.ops.balance import balance

T, D = 24, 16


def planted(
    seed: int, spread: float = 1.0, shape: tuple[int, int] = (T, D)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A tile with wide and narrow rows and columns, and the factors that made it."""
    rng = np.random.default_rng(seed)
    rows, columns = (np.exp(spread * rng.standard_normal(n)) for n in shape)
    return rng.standard_normal(shape) * rows[:, None] * columns, rows, columns


def by_the_book(x: np.ndarray, turns: int) -> tuple[np.ndarray, np.ndarray]:
    """Each turn divides what the last one left by its rows' deviations and then by its columns'."""
    size = x.std()
    x = x / size
    log_rows, log_columns = np.zeros(len(x)), np.zeros(x.shape[1])

    def left() -> np.ndarray:
        return x / np.exp(log_rows)[:, None] / np.exp(log_columns)

    def uneven() -> float:
        y = left()
        return float(np.prod([y.std(a).max() / y.std(a).min() for a in (0, 1)]))

    found = [(uneven(), log_rows, log_columns)]
    for _ in range(turns):
        log_rows = np.clip(log_rows + np.log(left().std(1)), -0.3, 10)
        log_columns = np.clip(log_columns + np.log(left().std(0)), -0.3, 10)
        found.append((uneven(), log_rows, log_columns))
    _, log_rows, log_columns = min(found, key=lambda f: f[0])
    return np.exp(log_rows) * size, np.exp(log_columns) * size


@pytest.mark.parametrize("turns", [0, 1, 2, 16])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_published_loop(turns: int, seed: int) -> None:
    x, _, _ = planted(seed)
    x += 3.0 * seed
    rows, columns = balance(torch.from_numpy(x), turns)
    want_rows, want_columns = by_the_book(x, turns)
    np.testing.assert_allclose(rows.numpy(), want_rows, rtol=1e-9)
    np.testing.assert_allclose(columns.numpy(), want_columns, rtol=1e-9)


def test_what_is_left_is_more_even_than_the_tile() -> None:
    for seed in range(5):
        x, rows, columns = planted(seed, 0.2, (128, 64))
        found = [f.numpy() for f in balance(torch.from_numpy(x), 16)]
        left = x / found[0][:, None] / found[1]
        for axis in (0, 1):
            before, after = (float(y.std(axis).max() / y.std(axis).min()) for y in (x, left))
            assert after < 0.75 * before
        assert np.corrcoef(np.log(found[0]), np.log(rows))[0, 1] > 0.7
        assert np.corrcoef(np.log(found[1]), np.log(columns))[0, 1] > 0.7


def test_the_size_of_a_tile_does_not_matter() -> None:
    x = torch.from_numpy(planted(1)[0])
    rows, columns = balance(x, 16)
    for size in (1e-6, 1e5):
        more = balance(x * size, 16)
        torch.testing.assert_close(more[0], rows * size, rtol=1e-9, atol=0)
        torch.testing.assert_close(more[1], columns * size, rtol=1e-9, atol=0)


@pytest.mark.parametrize("fill", [0.0, 3.5])
def test_equal_numbers_give_factors_above_zero(fill: float) -> None:
    rows, columns = balance(torch.full((2, T, D), fill), 16)
    for factor in (rows, columns):
        assert bool((factor > 0).all())
        assert bool(factor.isfinite().all())
