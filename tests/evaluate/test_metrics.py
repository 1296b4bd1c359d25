"""Every figure against a case worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quire.errors import RequestError
from quire.evaluate.metrics import (
    kl_divergence,
    log_probs,
    paired_bootstrap,
    perplexity,
    proportion,
    runs,
    top1_agreement,
)

LN2 = math.log(2)


def logits(*rows: list[float]) -> torch.Tensor:
    """Rows of probabilities as logits; a constant on a row must not matter."""
    return torch.tensor(rows).log() + 3.0


def test_nll_and_perplexity() -> None:
    got = log_probs(
        logits([0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.25, 0.5, 0.25]), torch.tensor([0, 1, 2])
    )
    assert got.dtype == torch.float64
    nll = -got.numpy()
    assert nll == pytest.approx([LN2, 3 * LN2, 2 * LN2], abs=1e-6)
    assert perplexity(nll) == pytest.approx(4.0, abs=1e-5), "exp of the mean, 2 ln 2"


def test_kl_of_two_coins() -> None:
    """KL(1/2, 1/2 ‖ 1/4, 3/4) = 1/2 ln 2 + 1/2 ln(2/3); the other way round it is another number."""
    fair, bent = logits([0.5, 0.5]), logits([0.25, 0.75])
    assert kl_divergence(fair, bent).item() == pytest.approx(
        0.5 * LN2 + 0.5 * math.log(2 / 3), abs=1e-6
    )
    assert kl_divergence(bent, fair).item() == pytest.approx(
        0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-6
    )
    assert kl_divergence(fair, fair + 2.0).item() == pytest.approx(0.0, abs=1e-12)


def test_kl_with_tokens_ruled_out() -> None:
    both = logits([0.5, 0.5, 0.0])
    assert kl_divergence(both, both).item() == 0.0
    assert kl_divergence(logits([0.5, 0.25, 0.25]), both).item() == math.inf
    assert kl_divergence(both, logits([0.25, 0.25, 0.5])).item() == pytest.approx(LN2, abs=1e-6)


def test_kl_of_large_rows_is_that_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(2, 7, 11)
    whole = kl_divergence(a, b)
    monkeypatch.setattr("quire.evaluate.metrics._SLAB_ELEMENTS", 22)
    assert torch.equal(kl_divergence(a, b), whole)
    want = a.double().log_softmax(-1).diagonal()
    assert torch.allclose(log_probs(a, torch.arange(7)), want, atol=1e-12)


def test_agreement() -> None:
    a = torch.tensor([[1.0, 2, 3], [3, 2, 1], [0, 5, 0]])
    b = torch.tensor([[0.0, 0, 9], [2, 3, 1], [4, 5, 4]])
    assert top1_agreement(a, b).tolist() == [True, False, True]


def test_runs_do_not_cross_texts() -> None:
    assert runs([5, 3], 2).tolist() == [0, 0, 1, 1, 2, 3, 3, 4]


def test_the_interval_of_a_fair_coin() -> None:
    """The mean of 100 tosses of 0 and 1 has standard error 0.05: 95 % lie within 1.96 of it."""
    e = paired_bootstrap([0, 1] * 50, resamples=4000)
    assert e.value == 0.5
    assert e.low == pytest.approx(0.402, abs=0.02)
    assert e.high == pytest.approx(0.598, abs=0.02)


def test_a_constant_difference_has_no_width_and_units_widen() -> None:
    assert paired_bootstrap([0.25] * 9).low == paired_bootstrap([0.25] * 9).high == 0.25
    # ten runs of ten equal values are ten observations, not a hundred
    values = np.repeat(np.random.default_rng(3).normal(size=10), 10)
    single = paired_bootstrap(values)
    grouped = paired_bootstrap(values, np.repeat(np.arange(10), 10))
    assert grouped.value == single.value
    width = (grouped.high or 0) - (grouped.low or 0)
    assert width == pytest.approx(10**0.5 * ((single.high or 0) - (single.low or 0)), rel=0.15)


def test_units_weigh_by_their_tokens() -> None:
    """A unit of three ones and a unit of one zero: 3/4, or when one is drawn twice 1 or 0."""
    e = paired_bootstrap([1, 1, 1, 0], [0, 0, 0, 1])
    assert (e.value, e.low, e.high) == (0.75, 0.0, 1.0)
    middle = paired_bootstrap([1, 1, 1, 0], [0, 0, 0, 1], level=0.2)
    assert (middle.low, middle.high) == (0.75, 0.75), "one of each: three ones of four"


def test_one_unit_says_nothing_and_no_value_is_refused() -> None:
    e = paired_bootstrap([1.0, 2.0], [0, 0])
    assert (e.value, e.low, e.high) == (1.5, None, None)
    assert paired_bootstrap([1.0, math.inf]).low is None
    with pytest.raises(RequestError, match="at least one value"):
        paired_bootstrap([])


def test_all_right_is_not_certain() -> None:
    """5 of 5: no share below 0.025^(1/5) = 0.478 gives that with 2.5 % probability. Units count, not answers."""
    units = np.repeat(np.arange(5), 3)
    all_right = proportion(np.ones(15), units)
    assert (all_right.value, all_right.low, all_right.high) == (1.0, 0.025 ** (1 / 5), 1.0)
    none = proportion(np.zeros(15), units)
    assert (none.value, none.low, none.high) == (0.0, 0.0, pytest.approx(1 - 0.4781762498))
    some = np.array([1.0] * 9 + [0.0] * 6)
    assert proportion(some, units, seed=3) == paired_bootstrap(some, units, seed=3)


def test_a_perplexity_beyond_float64_is_infinite() -> None:
    assert perplexity(np.array([800.0])) == math.inf
    assert math.isnan(perplexity(np.array([math.nan])))
    assert perplexity(np.array([700.0])) == math.exp(700.0)


def test_repeatable_to_the_last_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=500)
    first = paired_bootstrap(x, seed=4)
    assert first == paired_bootstrap(x, seed=4)
    assert first != paired_bootstrap(x, seed=5)
    assert first.value == paired_bootstrap(x, seed=5).value
