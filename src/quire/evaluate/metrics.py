"""Figures from scores: per-token values in float64, and the intervals that say what they are worth.

    ΔNLL_i    = log p_full(token_i) - log p_kv(token_i)                 nats; above zero: the codec made it worse
    KL_i      = sum_v p_full(v) (log p_full(v) - log p_kv(v))           nats; sees what the target's own ΔNLL does not
    agree_i   = argmax p_full == argmax p_kv

Every difference is paired: the same token after the same text, once with the exact cache and once with the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from quire.errors import RequestError

if TYPE_CHECKING:
    import torch

Values = npt.NDArray[np.float64]

RESAMPLES = 2000
RUN_TOKENS = 64
"""Consecutive tokens that a bootstrap draws together, because neighbours err together."""
_SLAB_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its interval; `low` and `high` are None where there is one unit only, which says nothing."""

    value: float
    low: float | None
    high: float | None

    def map(self, f: Callable[[float], float]) -> Estimate:
        """Of an increasing function of the figure."""
        return Estimate(
            f(self.value),
            None if self.low is None else f(self.low),
            None if self.high is None else f(self.high),
        )


# -- per token ---------------------------------------------------------------------------------------------------


def log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`logits: [n, vocab]`, `targets: [n]` to the log-probability of each target, `[n]` float64 on the CPU."""
    import torch

    out = torch.empty(len(logits), dtype=torch.float64)
    for rows in _slabs(logits):
        x = logits[rows].double()
        picked = x.gather(1, targets[rows, None]).squeeze(1)
        out[rows] = (picked - x.logsumexp(-1)).cpu()
    return out


def kl_divergence(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(full ‖ other) of each row of logits `[n, vocab]`, in nats, `[n]` float64 on the CPU."""
    import torch

    out = torch.empty(len(full), dtype=torch.float64)
    for rows in _slabs(full):
        p = full[rows].double().log_softmax(-1)
        q = other[rows].double().log_softmax(-1)
        # 0 x (-inf - -inf) where both rule a token out; where only the other does, the divergence is infinite
        terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
        out[rows] = terms.sum(-1).cpu()
    return out


def top1_agreement(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Whether both rows of logits `[n, vocab]` have the same largest token: `[n]` bool on the CPU."""
    return (full.argmax(-1) == other.argmax(-1)).cpu()


def _slabs(logits: torch.Tensor) -> list[slice]:
    """Rows that are taken to float64 at a time."""
    n, step = len(logits), max(1, _SLAB_ELEMENTS // max(1, logits.shape[-1]))
    return [slice(i, min(n, i + step)) for i in range(0, n, step)]


# -- over tokens -------------------------------------------------------------------------------------------------


def perplexity(nll: Values) -> float:
    """exp of the mean negative log-likelihood; infinite where float64 ends."""
    mean = float(np.mean(nll))
    return math.exp(mean) if mean < 709 or math.isnan(mean) else math.inf


def runs(lengths: list[int], run_tokens: int = RUN_TOKENS) -> npt.NDArray[np.int64]:
    """Unit of every token for `paired_bootstrap`: runs of consecutive tokens that do not cross from text to text.

    Args:
        lengths: scored tokens of each text, in order.
    """
    labels, at = [], 0
    for n in lengths:
        labels.append(at + np.arange(n) // run_tokens)
        at += -(-n // run_tokens)
    return np.concatenate(labels) if labels else np.empty(0, np.int64)


def proportion(right: npt.ArrayLike, units: npt.ArrayLike, *, seed: int = 0) -> Estimate:
    """Share of right answers. Where all are right, or none, resampling sees no spread: then the bounds are exact.

    Args:
        right: `[n]` 0 or 1.
        units: `[n]` integers, as for `paired_bootstrap`; the exact bounds count units, not answers.

    Source: Clopper and Pearson, Biometrika 26 (1934): with n of n, the lower 97.5 % bound is 0.025^(1/n).
    """
    found = paired_bootstrap(right, units, seed=seed)
    if found.value not in (0.0, 1.0):
        return found
    bound = 0.025 ** (1 / len(np.unique(np.asarray(units))))
    return Estimate(1.0, bound, 1.0) if found.value else Estimate(0.0, 0.0, 1 - bound)


def paired_bootstrap(
    values: npt.ArrayLike,
    units: npt.ArrayLike | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """Mean of `values` with a percentile interval over resampled units.

    Give differences of two configurations on the same tokens, and the interval is the paired one. The same values and
    seed give the same interval to the last digit.

    Args:
        values: `[n]`, one per token or answer.
        units: `[n]` integers; values with the same one are drawn together. None: each by itself.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; units as in a cluster bootstrap.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not len(x):
        raise RequestError("a mean needs at least one value")
    labels = np.arange(len(x)) if units is None else np.unique(units, return_inverse=True)[1]
    mean = float(x.mean())
    if not np.isfinite(mean):
        return Estimate(mean, None, None)
    sums, counts = np.bincount(labels, x), np.bincount(labels)
    n = len(sums)
    if n < 2:
        return Estimate(mean, None, None)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _SLAB_ELEMENTS // n)
    for i in range(0, resamples, step):
        drawn = rng.integers(0, n, (min(step, resamples - i), n))
        means[i : i + len(drawn)] = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high))
