"""k-means on cases whose answer is known, and codes of any width packed and unpacked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.ops.kmeans import _centres, kmeans, nearest
from quire.ops.pack import pack_bits, unpack_bits


def test_the_centres_of_two_clouds_are_their_weighted_means() -> None:
    x = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [10.0, 4.0], [10.0, 8.0]]])
    w = torch.tensor([[1.0, 3.0, 1.0, 1.0]])
    found = kmeans(x, w, 2, seed=0)[0]
    found = found[found[:, 0].argsort()]
    assert found.tolist() == [[1.5, 0.0], [10.0, 6.0]]


def test_groups_do_not_know_of_each_other() -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(3, 400, 2, generator=g)
    x[1] *= 100
    both = kmeans(x, torch.ones(3, 400), 8, seed=5)
    assert torch.equal(both, kmeans(x, torch.ones(3, 400), 8, seed=5))
    cost = [_cost(x[i], both[i]) for i in range(3)]
    assert cost[1] > 1000 * cost[0]
    for i in range(3):
        random = x[i, :8]
        assert cost[i] < 0.7 * _cost(x[i], random)


def _cost(x: torch.Tensor, centres: torch.Tensor) -> float:
    return float(torch.cdist(x, centres).min(-1).values.square().sum())


def test_what_weighs_nothing_pulls_nothing() -> None:
    """Two centres, three clouds: the one of weight zero gets none."""
    x = torch.cat([torch.zeros(50, 1), torch.ones(50, 1), torch.full((50, 1), 9.0)])[None]
    w = torch.cat([torch.ones(100), torch.zeros(50)])[None]
    assert sorted(kmeans(x, w, 2, seed=1).flatten().tolist()) == [0.0, 1.0]
    even = kmeans(x, torch.zeros(1, 150), 2, seed=1).flatten()  # no weight at all: all alike
    assert float(even.max()) == 9.0


def test_far_clouds_each_get_a_centre() -> None:
    """Sixteen small clouds far apart: a beginning by distance finds all of them, one by chance does not."""
    at = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)) * 100
    x = (at.repeat(30, 1) + torch.randn(480, 2, generator=torch.Generator().manual_seed(1)))[None]
    for seed in range(3):
        assert _cost(x[0], kmeans(x, torch.ones(1, 480), 16, seed=seed)[0]) < 480 * 3


def test_a_centre_that_nobody_is_near_moves_to_where_it_saves_most() -> None:
    x = torch.tensor([[[0.0], [1.0], [9.0], [30.0]]])
    w, at = torch.tensor([[1.0, 1.0, 5.0, 1.0]]), torch.tensor([[0, 0, 0, 0]])
    cost = torch.tensor([[1.0, 1.0, 64.0, 100.0]])
    moved = _centres(x, w, at, cost, torch.zeros(1, 3, 1))
    assert moved[0, 0].item() == pytest.approx((0 + 1 + 45 + 30) / 8)
    assert moved[0, 1:, 0].tolist() == [9.0, 30.0]


def test_nearest_is_by_squared_distance_and_of_equals_the_first() -> None:
    centres = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [0.0, 5.0]]])
    x = torch.tensor([[[1.0, 0.0], [1.1, 0.0], [0.0, 2.6], [-9.0, 2.4]]])
    assert nearest(x, centres).tolist() == [[0, 1, 2, 0]]


def test_nearest_is_the_same_alone_and_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    x, centres = torch.randn(2, 333, 4, generator=g), torch.randn(2, 64, 4, generator=g)
    whole = nearest(x, centres)
    assert torch.equal(whole[:, 7:8], nearest(x[:, 7:8], centres))
    monkeypatch.setattr("quire.ops.kmeans._NEAR", 640)
    assert torch.equal(whole, nearest(x, centres))


@given(
    bits=st.sampled_from([*range(1, 9), 10, 12]),
    n=st.integers(1, 40),
    rows=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_bits_are_packed_and_come_back(bits: int, n: int, rows: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (rows, n), generator=g)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, -(-n * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, n), codes)


def test_bits_lie_one_after_another_from_the_lowest() -> None:
    assert pack_bits(torch.tensor([1, 2, 3, 7]), 3).tolist() == [0b11_010_001, 0b0000_111_0]
