"""Each policy's score against a plain loop over numbers, in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quire.retention import parse_keep
from quire.retention.contract import Seen

if TYPE_CHECKING:
    import pytest

H, SHARE, T, D, N = 2, 3, 150, 8, 40
LENGTH = 400
ANGLES = np.array([1.0, 0.3, 0.09, 0.02])


def turn(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    theta = by.double().unsqueeze(-1) * torch.from_numpy(ANGLES)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    cos, sin = theta.cos(), theta.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def seen(**changes: Any) -> Seen:
    """Two heads that keep different 150 of 400 tokens, the first 4 and the last 32 among them."""
    g = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    middle = [
        torch.randperm(LENGTH - 36, generator=g)[: T - 36].sort().values + 4 for _ in range(H)
    ]
    ends = torch.arange(4), torch.arange(LENGTH - 32, LENGTH)
    fields = {"k": rand(H, T, D) + 0.5 * rand(H, 1, D), "v": rand(H, T, D)}
    made: dict[str, Any] = {
        "coords": tuple((1, h) for h in range(H)),
        "n_layers": 3,
        "positions": torch.stack([torch.cat([ends[0], m, ends[1]]) for m in middle]),
        "length": LENGTH,
        "prompt_tokens": LENGTH,
        "read": fields.__getitem__,
        "mass": rand(H, T).abs(),
        "queries": rand(H * SHARE, N, D),
        "query_positions": torch.arange(LENGTH - N, LENGTH),
        "scale": 0.3,
        "turn": turn,
    }
    return Seen(**{**made, **changes})


def score(text: str, shown: Seen) -> np.ndarray:
    found: np.ndarray = parse_keep(text).policy.score(shown).numpy()
    assert found.shape == (H, T)
    return found


def near(got: np.ndarray, want: Any) -> None:
    np.testing.assert_allclose(got, np.asarray(want), rtol=1e-9, atol=1e-12)


def test_h2o_is_the_sum_and_by_age_the_mean() -> None:
    s = seen()
    assert s.mass is not None
    near(score("h2o", s), s.mass)
    want = [[s.mass[h, t] / (LENGTH - int(s.positions[h, t])) for t in range(T)] for h in range(H)]
    near(score("h2o:age=true", s), want)


def test_tova_is_the_mean_over_the_layer() -> None:
    s = seen()
    assert s.mass is not None
    want = [sum(float(s.mass[h, t]) for h in range(H)) / H for t in range(T)]
    near(score("tova", s), [want] * H)


def test_snapkv_pools_what_lies_before_the_observed_queries() -> None:
    s = seen()
    assert s.mass is not None
    want = np.zeros((H, T))
    for h in range(H):
        own = [float(x) / 64 for x in s.mass[h]]
        late = [int(p) >= LENGTH - 64 for p in s.positions[h]]
        for t in range(T):
            around = [u for u in range(t - 2, t + 3) if 0 <= u < T and not late[u]]
            want[h, t] = own[t] if late[t] else sum(own[u] for u in around) / 5
    near(score("snapkv", s), want)


def test_lru_counts_arrival_as_a_use() -> None:
    s = seen()
    stamps = torch.randint(0, LENGTH, (H, T)).double()
    got = score("lru", seen(mass=stamps))
    near(
        got,
        [
            [max(float(stamps[h, t]), int(s.positions[h, t]) + 1) for t in range(T)]
            for h in range(H)
        ],
    )


def test_keydiff_is_minus_the_cosine_with_the_mean_direction() -> None:
    s = seen()
    k = s.read("k").numpy()
    for h in range(H):
        units = [x / math.sqrt(sum(x**2)) for x in k[h]]
        mean = sum(units) / T
        want = [-float(u @ mean) / math.sqrt(float(mean @ mean)) for u in units]
        near(score("keydiff", s)[h], want)


def test_lagkv_ranks_within_chunks_scaled_by_what_follows() -> None:
    s, lag = seen(), 40
    got = score(f"lagkv:lag={lag}", s)
    fields = [s.read("k").numpy(), s.read("v").numpy()]
    want = np.ones((H, T))
    for h in range(H):
        for start in range(4, T - 32, lag):
            stop = min(start + lag, T - 32)
            total = np.zeros(stop - start)
            for x in fields:
                after = x[h, stop : stop + lag]
                low, high = after.min(0), after.max(0)
                deviations = []
                for t in range(start, stop):
                    y = [(x[h, t, d] - low[d]) / (high[d] - low[d]) for d in range(D)]
                    m = sum(y) / D
                    deviations.append(math.sqrt(sum((a - m) ** 2 for a in y) / D))
                e = np.exp(deviations)
                total += e / e.sum()
            for i, x in enumerate(total):
                want[h, start + i] = sum(float(y) < float(x) for y in total) / (stop - start)
    near(got, want)
    assert (got[:, 4 : T - 32] < 1).all(), "small budgets must not go to the newest alone"


def test_expected_attention() -> None:
    s, ahead = seen(), 20
    assert s.queries is not None
    assert s.query_positions is not None
    q, at = s.queries.numpy(), s.query_positions.numpy()
    k, v = s.read("k").numpy(), s.read("v").numpy()

    def rotation(by: int) -> np.ndarray:
        out = np.zeros((D, D))
        for i, angle in enumerate(ANGLES):
            j, c, r = i + D // 2, math.cos(by * angle), math.sin(by * angle)
            out[i, i], out[i, j], out[j, i], out[j, j] = c, -r, r, c
        return out

    mean_turn = sum(rotation(LENGTH + i) for i in range(ahead)) / ahead
    want = np.zeros((H, T))
    for h in range(H):
        for g in range(SHARE):
            plain = [rotation(-int(p)) @ x for p, x in zip(at, q[h * SHARE + g], strict=True)]
            m = sum(plain) / N
            cov = sum(np.outer(x - m, x - m) for x in plain) / N
            m, cov = mean_turn @ m, mean_turn @ cov @ mean_turn.T
            e = np.zeros(T)
            for t in range(4, T):
                e[t] = math.exp(0.3 * k[h, t] @ m + 0.3**2 * k[h, t] @ cov @ k[h, t] / 2)
            want[h] += e / e.sum() / SHARE
        want[h] *= [math.sqrt(float(x @ x)) for x in v[h]]
    near(score(f"expected:ahead={ahead}", s), want)


def test_expected_attention_leaves_out_the_first_queries() -> None:
    early = seen(query_positions=torch.arange(N))
    assert early.queries is not None
    rest = seen(queries=early.queries[:, 4:], query_positions=torch.arange(4, N))
    near(score("expected", early), score("expected", rest))


def test_rkv_mixes_attention_and_redundancy(monkeypatch: pytest.MonkeyPatch) -> None:
    import quire.retention.rkv as module

    monkeypatch.setattr(module, "ROWS", 32)
    s, mix, alike = seen(), 0.3, 0.4
    assert s.mass is not None
    k, mass = s.read("k").numpy(), s.mass.numpy()
    want = np.zeros((H, T))
    for h in range(H):
        units = [x / math.sqrt(float(x @ x)) for x in k[h]]
        cosine = [
            [float(a @ b) if i != j else 0.0 for j, b in enumerate(units)]
            for i, a in enumerate(units)
        ]
        for row in cosine:
            similar = [j for j, c in enumerate(row) if c > alike]
            if similar:
                row[max(similar)] = 0.0
        redundancy = np.exp([sum(row[t] for row in cosine) / T for t in range(T)])
        redundancy /= redundancy.sum()
        for t in range(T):
            paid = max(mass[h, u] / 8 for u in range(max(0, t - 3), min(T, t + 4)))
            want[h, t] = mix * paid - (1 - mix) * redundancy[t]
    near(score(f"rkv:mix={mix},alike={alike}", s), want)


def test_fastgen_scores_shares() -> None:
    s = seen()
    assert s.mass is not None
    near(score("fastgen", s), [[float(x) / float(sum(row)) for x in row] for row in s.mass])


def test_random_depends_on_position_layer_head_and_seed_alone() -> None:
    s = seen()
    got = score("random", s)
    by_place = {
        (h, int(p)): float(x) for h in range(H) for p, x in zip(s.positions[h], got[h], strict=True)
    }
    flipped = seen(positions=s.positions.flip(0))
    for h in range(H):
        for p, x in zip(flipped.positions[h], score("random", flipped)[h], strict=True):
            assert by_place.get((h, int(p)), float(x)) == float(x)
    assert (got != score("random:seed=1", s)).mean() > 0.9
    other = seen(coords=((2, 0), (2, 1)))
    assert (got != score("random", other)).mean() > 0.9
    assert 0.4 < got.mean() < 0.6
    assert got.min() < 0.05
    assert got.max() > 0.95
