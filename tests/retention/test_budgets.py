"""How budgets are read, refused and spread over layers and heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quire.errors import ConfigError
from quire.retention import available, parse_keep
from quire.retention.contract import Budget, Scored
from quire.retention.recipe import policy_class
from quire.spec import Coord

SCORES = [n for n in available() if issubclass(policy_class(n), Scored) and n != "press"]


def tokens(n_layers: int = 4, n_heads: int = 2, n: int = 400) -> dict[Coord, torch.Tensor]:
    """Heads whose scores lie on different heights."""
    g = torch.Generator().manual_seed(5)
    return {
        (layer, h): torch.rand(n, generator=g) ** (1 + 3 * h + layer)
        for layer in range(n_layers)
        for h in range(n_heads)
    }


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("512", Budget(tokens=512)),
        ("0.2", Budget(share=0.2)),
        ("1.0", Budget(share=1.0)),
        ("64KiB", Budget(bytes=64 << 10)),
        ("1.5MB", Budget(bytes=1_500_000)),
    ],
)
def test_budgets_are_tokens_shares_or_bytes(text: str, want: Budget) -> None:
    assert parse_keep(f"h2o:budget={text}").policy.budget == want
    assert parse_keep(f"h2o:{text}").policy.budget == want, "the first parameter needs no name"


def test_what_a_budget_comes_to() -> None:
    assert Budget(tokens=512).tokens_of(1000, 64) == 512
    assert Budget(tokens=512).tokens_of(100, 64) == 100
    assert Budget(share=0.2).tokens_of(1000, 64) == 200
    assert Budget(bytes=64_000).tokens_of(5000, 64) == 1000


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ("budget=20", "is below the"),
        ("budget=1.5", "is no budget; 512 is tokens"),
        ("budget=none", "is no budget; 512 is tokens"),
        ("budgte=0.2", "it takes budget, sinks, window, boundary, every"),
        ("window=0", "window=0 must be an integer of at least 1"),
        ("sinks=-1", "sinks=-1 must be"),
        ("every=0.5", "every=0.5 must be"),
        ("budget=0.2,budget=0.3", "given twice"),
    ],
)
def test_wrong_parameters_are_refused_in_one_line(name: str, rest: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as e:
        parse_keep(f"{name}:{rest}")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ada", "needs a policy, as in ada"),
        ("h2o(snapkv)", "takes no policy in brackets"),
        ("ada(window:512)", "spreads the budget of a policy that scores"),
        ("pyramid(full)", "spreads the budget of a policy that scores"),
        ("ada(tova)", "use it alone, or in pyramid"),
        ("ada(pyramid(tova))", "use it alone, or in pyramid"),
        ("ada(fastgen)", "use it without a wrapper"),
        ("pyramid(fastgen)", "use it without a wrapper"),
        ("ada(pyramid(ada(h2o)))", "once is enough"),
        ("pyramid(pyramid(h2o))", "once is enough"),
        ("pyramid(h2o):beta=0.5", "beta=0.5 must be"),
        ("ada(h2o):floor=2", "must be a number in 0..1"),
        ("ada(h2o):floor=much", "must be a number in 0..1"),
        ("fastgen:recover=1.5", "must be a number in 0..1"),
        ("rkv:mix=2", "must be a number in 0..1"),
        ("rkv:alike=many", "must be a number in -1..1"),
        ("lru:k=0", "k=0 must be"),
        ("lagkv:lag=0", "lag=0 must be"),
        ("expected:ahead=0", "ahead=0 must be"),
        ("ada(h2o", "is no policy"),
        ("nonsense:budget=0.2", "known: ada, "),
    ],
)
def test_what_does_not_compose_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_keep(text)


def test_protected_tokens_are_sinks_window_and_the_prompts_end() -> None:
    policy = parse_keep("h2o:sinks=4,window=32,boundary=16").policy
    assert policy.protect(1000, 1000) == ((0, 4), (968, 1000))
    assert policy.protect(1200, 1000) == ((0, 4), (1168, 1200), (984, 1000))
    assert policy.protect(3, 3) == ((0, 3), (0, 3))
    assert parse_keep("pyramid(h2o:sinks=4)").policy.protect(1000, 1000)[0] == (0, 4)


def test_hits_leave_the_queries_that_a_policy_needs() -> None:
    for text, want in {
        "random": 1000,
        "tova": 999,
        "snapkv": 936,
        "rkv": 992,
        "expected": 872,
        "h2o": 0,
        "lru": 0,
        "fastgen": 0,
        "pyramid(snapkv)": 936,
        "ada(expected)": 872,
    }.items():
        assert parse_keep(text).policy.hit_limit(1000) == want, text


def test_a_pyramid_falls_evenly_and_spends_the_budget() -> None:
    found = parse_keep("pyramid(random)").policy.allocate(tokens(), 100, 1000)
    by_layer = [found[layer, 0] for layer in range(4)]
    low, high = 100 / 20, 200 - 100 / 20
    assert by_layer == [int(high - i * (high - low) / 3) for i in range(4)]
    assert all(found[layer, 0] == found[layer, 1] for layer in range(4))
    assert 0 <= 8 * 100 - sum(found.values()) < 8


def test_a_pyramid_that_has_too_few_tokens_below_is_less_steep() -> None:
    found = parse_keep("pyramid(random)").policy.allocate(tokens(n=150), 100, 1000)
    by_layer = [found[layer, 0] for layer in range(4)]
    assert by_layer == [150, 116, 83, 50]
    alone = parse_keep("pyramid(random)").policy.allocate(tokens(n_layers=1), 100, 1000)
    assert set(alone.values()) == {100}
    assert set(parse_keep("pyramid(random)").policy.allocate(tokens(n=90), 100, 1000).values()) == {
        90
    }


@pytest.mark.parametrize("floor", [0.2, 0.9])
def test_ada_gives_each_head_its_floor_and_the_rest_to_the_best(floor: float) -> None:
    scores, sure = tokens(n_layers=2), round(100 * floor)
    found = parse_keep(f"ada(random):floor={floor}").policy.allocate(scores, 100, 1000)
    for layer in range(2):
        heads = [np.sort(scores[layer, h].numpy())[::-1] for h in range(2)]
        rest = sorted(((x, h) for h in range(2) for x in heads[h][sure:]), reverse=True)
        owners = [owner for _, owner in rest[: 200 - 2 * sure]]
        assert [found[layer, h] for h in range(2)] == [sure + owners.count(h) for h in range(2)]
        assert found[layer, 0] > found[layer, 1]
        if floor == 0.9:
            assert found[layer, 1] == 90, "which its scores alone would not give it"


def test_wrappers_in_either_order_spread_alike() -> None:
    scores = tokens()
    one = parse_keep("ada(pyramid(random))").policy.allocate(scores, 100, 1000)
    two = parse_keep("pyramid(ada(random))").policy.allocate(scores, 100, 1000)
    assert one == two
    assert 0 <= 8 * 100 - sum(one.values()) < 8
    totals = [one[layer, 0] + one[layer, 1] for layer in range(4)]
    assert totals == sorted(totals, reverse=True)
    assert one[0, 0] != one[0, 1], "heads differ"
    for text in ("ada(pyramid(random))", "pyramid(ada(random))"):
        assert parse_keep(text).policy.by_head, "and a latent for all heads cannot have it"


def test_fastgen_takes_the_cheapest_way_that_recovers_enough() -> None:
    policy = parse_keep("fastgen:recover=0.9").policy
    mass = torch.zeros(3, 100)
    mass[0, 0] = 0.95  # protected
    mass[0, 50:] = 0.05 / 50
    mass[1, 0], mass[1, 40:50], mass[1, 50:] = 0.5, 0.042, 0.08 / 50
    mass[2] = 0.01
    scores = {(0, h): mass[h, 4:] for h in range(3)}
    assert policy.allocate(scores, 10, 100) == {(0, 0): 0, (0, 1): 10, (0, 2): 96}
    assert policy.allocate(scores, 200, 100)[0, 2] == 96
