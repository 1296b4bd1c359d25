"""From logits to tokens: each transform as a pure function over rows, and the draw.

Order: repetition penalty, frequency and presence penalty, logit bias, minimum tokens, temperature, top-k, top-p, min-p;
each means what `transformers`' processor of that name means (tested against them).

A row's token is a function of its logits and `(seed, sample index, output position)`, nothing else: one uniform number
is hashed from the three and looked up in the cumulative distribution *in vocabulary order*. So a request gets the same
tokens alone or in a batch, preempted or not, drafted or not; and where two runs' logits differ by rounding, the chance
of another token is of the order of that rounding (in sorted order two near-equal tokens could swap places).

Shapes: R rows, V vocabulary. All work is on the logits' device; parameters travel there in one small copy each.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "TokenCounts",
    "add_bias_",
    "choose",
    "cutoff",
    "forbid_",
    "largest",
    "pick",
    "repetition_penalty_",
    "subtract_penalties_",
    "uniform",
    "width",
]

CANDIDATES = 256
"""Best tokens that are sorted in search of a nucleus, at first."""

WIDEN = 8
"""How many times more a row with a wider nucleus looks at next."""

STRIDE = 64
"""Logits per group in the search for the largest."""

FEW = 1 << 16
"""Fewer logits than this are searched at once: starting more operations would cost more than they save."""

TIES = 32
"""How many more than the k best are looked at, so that tokens tied with the k-th are seen."""

_UNIT = 2.0**-24


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1), exact in float32, that depends on the three integers and nothing else.

    Args:
        seed: [0, 2**64).
        index: which of the request's samples.
        position: 0 for the first output token.
    """
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, index, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 40) * _UNIT


class TokenCounts:
    """Which tokens a sample has seen, and how often each stands in its output; kept up to date one token at a time.

    Args:
        prompt: the prompt's token ids.

    Cost: O(1) per new token; 16 bytes per distinct token.
    """

    __slots__ = ("_slot", "counts", "ids", "n_distinct", "n_output")

    def __init__(self, prompt: Sequence[int]) -> None:
        distinct = dict.fromkeys(prompt)
        self._slot = {token: slot for slot, token in enumerate(distinct)}
        self.n_distinct = len(self._slot)
        self.n_output = 0
        self.ids = np.zeros(max(64, 2 * self.n_distinct), dtype=np.int64)
        self.ids[: self.n_distinct] = list(distinct)
        self.counts = np.zeros(len(self.ids), dtype=np.float32)

    def extend(self, output: Iterable[int]) -> None:
        """Count further output tokens."""
        for token in output:
            slot = self._slot.get(token)
            if slot is None:
                slot = self._slot[token] = self.n_distinct
                if slot == len(self.ids):
                    self.ids = np.concatenate([self.ids, np.zeros_like(self.ids)])
                    self.counts = np.concatenate([self.counts, np.zeros_like(self.counts)])
                self.ids[slot] = token
                self.n_distinct += 1
            self.counts[slot] += 1.0
            self.n_output += 1

    def seen(self) -> np.ndarray:
        """[n] int64: distinct tokens of prompt and output."""
        return self.ids[: self.n_distinct]

    def output_counts(self) -> np.ndarray:
        """[n] float32 beside `seen`: occurrences in the output."""
        return self.counts[: self.n_distinct]


def repetition_penalty_(logits: Tensor, rows: Tensor, ids: Tensor, penalty: Tensor) -> None:
    """Make tokens seen before less likely, in place: positive logits are divided, negative ones multiplied.

    Args:
        logits: [R, V] float32.
        rows: [n] int64, with
        ids: [n] int64: which entries; each at most once.
        penalty: [n] float32.

    Source: CTRL, arXiv 1909.05858, as `RepetitionPenaltyLogitsProcessor` has it.
    """
    values = logits[rows, ids]
    logits[rows, ids] = torch.where(values < 0, values * penalty, values / penalty)


def subtract_penalties_(
    logits: Tensor, rows: Tensor, ids: Tensor, counts: Tensor, frequency: Tensor, presence: Tensor
) -> None:
    """Subtract `frequency` per occurrence and `presence` once from tokens of the output, in place.

    Args:
        logits: [R, V] float32.
        rows: [n] int64, with
        ids: [n] int64: which entries; each at most once.
        counts: [n] float32; 0 leaves the entry alone.
        frequency: [n] float32, per occurrence.
        presence: [n] float32, once.
    """
    logits[rows, ids] -= counts * frequency + (counts > 0) * presence


def add_bias_(logits: Tensor, rows: Tensor, ids: Tensor, bias: Tensor) -> None:
    """Add `bias` [n] to the entries, in place; each entry at most once."""
    logits[rows, ids] += bias


def forbid_(logits: Tensor, rows: Tensor, ids: Tensor) -> None:
    """Make the entries impossible, in place: no end before the minimum number of tokens."""
    logits[rows, ids] = -math.inf


def width(top_k: int, top_p: float, n_vocab: int) -> int:
    """How many of a row's best tokens to look at first; 0: none are needed, only sums over the vocabulary.

    A function of the row's own parameters, so that a row is treated alike in every batch.
    """
    if not top_k and top_p >= 1.0:
        return 0
    wanted = 1 << (top_k + TIES - 1).bit_length() if top_k else CANDIDATES
    return min(wanted, n_vocab)


def cutoff(
    logits: Tensor, best: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """The least logit that survives top-k, then top-p, then min-p.

    All three keep the best tokens and drop the rest, so their composition is one threshold per row; tokens tied with
    the last survivor survive.

    Args:
        logits: [R, V] float32, temperature applied.
        best: [R, n] the n largest of them in falling order; n = 0 where neither top-k nor top-p is asked.
        top_k: [R] int64; 0: off.
        top_p: [R] float32 in (0, 1]; 1: off.
        min_p: [R] float32 in [0, 1]; 0: off.

    Returns:
        [R] float32, -inf keeps all; and [R] bool, whether every survivor is among the best: otherwise more of them are
        needed, and the threshold is only a bound.

    Differs: `TopPLogitsWarper` keeps one of several tied tokens at the edge of the nucleus, whichever its unstable sort
        put last; here all stay, so that the result does not depend on the sort.
    """
    floor = logits.amax(dim=-1) + min_p.log()
    n_best = best.shape[1]
    if not n_best:
        return floor, torch.ones_like(floor, dtype=torch.bool)
    last = best[:, -1]
    kth = best.gather(1, (top_k.clamp(1, n_best) - 1).unsqueeze(1)).squeeze(1)
    kth = torch.where(top_k > 0, kth, -math.inf)
    complete = (top_k == 0) | (kth > last)  # else more tokens may be tied with the k-th
    if bool((top_p < 1.0).any()):
        kth = torch.where(top_p < 1.0, _nucleus(logits, best, kth, top_p), kth)
    floor = torch.maximum(floor, kth)
    return floor, (complete & (floor > last)) | (n_best == logits.shape[1])


def _nucleus(logits: Tensor, best: Tensor, floor: Tensor, top_p: Tensor) -> Tensor:
    """The least logit of each row's nucleus, sought among its best tokens.

    Args:
        logits: [R, V].
        best: [R, n] the n largest of them, in falling order.
        floor: [R] what top-k left: probabilities are those among tokens at or above it.
        top_p: [R].

    Returns:
        [R]; the last of the best where the nucleus goes on beyond them.
    """
    kept = best >= floor.unsqueeze(1)
    inside = torch.where(kept, best, -math.inf)
    # what top-k left is all among the best; otherwise the sum runs over the vocabulary
    total = inside.logsumexp(-1)
    if best.shape[1] < logits.shape[1]:
        total = torch.where(floor == -math.inf, logits.logsumexp(-1), total)
    mass = (inside - total.unsqueeze(1)).exp()
    keep = kept & (mass.cumsum(-1) - mass < top_p.unsqueeze(1))
    keep[:, 0] = True
    return inside.gather(1, keep.sum(-1, keepdim=True) - 1).squeeze(1)


def choose(
    logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, draws: Tensor, n_best: int
) -> Tensor:
    """Filter and draw one token per row.

    Args:
        logits: [R, V] float32, temperature applied.
        top_k: [R] int64, see `cutoff`.
        top_p: [R] float32.
        min_p: [R] float32.
        draws: [R] float32 in [0, 1), see `uniform`.
        n_best: how many of the best tokens to look at first, see `width`.

    Returns:
        [R] int64; -1 where the logits are not numbers.

    Cost: one partial sort of each row and work on n_best tokens; rows with more survivors go round again.
    """
    if not n_best:
        return pick(logits, cutoff(logits, logits[:, :0], top_k, top_p, min_p)[0], draws)
    best, ids = logits.topk(n_best, dim=-1)
    floor, complete = cutoff(logits, best, top_k, top_p, min_p)
    ids, order = ids.sort(dim=-1)  # vocabulary order
    at = pick(best.gather(1, order), floor, draws)
    tokens = torch.where(at < 0, at, ids.gather(1, at.clamp(0).unsqueeze(1)).squeeze(1))
    again = torch.nonzero(~complete & (at >= 0)).squeeze(1)
    if len(again):
        tokens[again] = choose(
            logits[again],
            top_k[again],
            top_p[again],
            min_p[again],
            draws[again],
            min(WIDEN * n_best, logits.shape[-1]),
        )
    return tokens


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row and where it is, the first of several; NaN is larger than all.

    In two rounds, groups of STRIDE and then the best group: a maximum without its place is a vector instruction, one
    with its place is not (5 to 18 times the time on a CPU).

    Args:
        logits: [R, V].

    Returns:
        [R] float32, [R] int64.
    """
    n_groups = logits.shape[-1] // STRIDE
    body = n_groups * STRIDE
    if n_groups < 2 or logits.numel() < FEW:
        best, at = logits.max(-1)
        return best, at
    best, group = logits[:, :body].unflatten(-1, (n_groups, STRIDE)).amax(-1).max(-1)
    inside = torch.arange(STRIDE, device=logits.device)
    at = group * STRIDE + logits.gather(1, (group * STRIDE).unsqueeze(1) + inside).argmax(-1)
    if body < logits.shape[-1]:
        rest, there = logits[:, body:].max(-1)
        later = (rest > best) | (rest.isnan() & ~best.isnan())
        at = torch.where(later, there + body, at)
        best = torch.where(later, rest, best)
    return best, at


def pick(logits: Tensor, floor: Tensor | None, draws: Tensor) -> Tensor:
    """One token per row, by inverting the cumulative distribution in vocabulary order.

    Args:
        logits: [R, V] float32, transformed.
        floor: [R] tokens below it are out; None: all are in.
        draws: [R] float32 in [0, 1), see `uniform`.

    Returns:
        [R] int64; -1 where the logits are not numbers.
    """
    if floor is not None:
        logits = logits.masked_fill(logits < floor.unsqueeze(1), -math.inf)
    mass = logits.softmax(-1)
    reached = mass.cumsum(-1)
    total = reached[:, -1:]
    # the largest draw times a total near 1 still rounds to less than the total
    token = torch.searchsorted(reached, draws.unsqueeze(1) * total, right=True)
    token = token.clamp_(max=logits.shape[-1] - 1)
    # a parallel scan need not be monotone to the last bit: never land on a token that is out
    token = torch.where(mass.gather(1, token) > 0, token, mass.argmax(-1, keepdim=True))
    return torch.where(total.isfinite(), token, -1).squeeze(1)
