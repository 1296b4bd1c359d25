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
    "distribution",
    "forbid_",
    "largest",
    "pick",
    "repetition_penalty_",
    "rows_at_once",
    "subtract_penalties_",
    "survivors",
    "uniform",
    "width",
]

SORTED = 1024
"""So many candidates are sorted in search of a nucleus; of more only those where it ends."""

FEW_SHARE = 8
"""A row is looked at whole where more than this fraction of the vocabulary can survive."""

WHOLE = 1 << 17
"""Logits of rows looked at whole that a CPU works on together, see `rows_at_once`."""

LEVEL_BITS = 17
"""Low bits of a float32 probability that its level leaves out: 64 levels for each factor of two."""

N_LEVELS = (0x3F800000 >> LEVEL_BITS) + 1
"""Levels of the probabilities from 0 to 1."""

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


def width(top_k: int, n_vocab: int) -> int:
    """How many of a row's best tokens are its candidates; 0: top-k does not tell.

    A function of the row's own parameters, so that a row is treated alike in every batch.
    """
    return min(1 << (top_k + TIES - 1).bit_length(), n_vocab) if top_k else 0


def choose(
    logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, draws: Tensor, n_best: int
) -> Tensor:
    """Filter and draw one token per row.

    Most rows have few candidates, among which all survivors are; the others are looked at whole. Which it is depends on
    the row alone.

    Args:
        logits: [R, V] float32, temperature applied.
        top_k: [R] int64, at least 1 where n_best > 0.
        top_p: [R] float32, see `survivors`.
        min_p: [R] float32.
        draws: [R] float32 in [0, 1), see `uniform`.
        n_best: see `width`.

    Returns:
        [R] int64; -1 where the logits are not numbers.

    Cost: a softmax; a partial sort (top-k) or a comparison (else) of the row; work on the candidates. About ten passes
        over rows that are looked at whole.
    """
    kth: Tensor | None = None
    if n_best:
        best, ids = logits.topk(n_best, dim=-1)
        kth = best.gather(1, (top_k.clamp(1, n_best) - 1).unsqueeze(1)).squeeze(1)
        few = (kth > best[:, -1]) | (
            n_best == logits.shape[1]
        )  # else others are tied with the k-th
        ids, order = ids.sort(dim=-1)  # vocabulary order
        mass = distribution(best.gather(1, order), kth)
    else:
        mass, ids, few = _likely(logits.softmax(-1), top_p, min_p)
    at = pick(survivors(mass, top_p, min_p), draws)
    tokens = torch.where(at < 0, at, ids.gather(1, at.clamp(0).unsqueeze(1)).squeeze(1))
    if not bool(few.all()):
        for rows in torch.nonzero(~few).squeeze(1).split(rows_at_once(logits, WHOLE)):
            whole = distribution(logits[rows], None if kth is None else kth[rows])
            tokens[rows] = pick(survivors(whole, top_p[rows], min_p[rows]), draws[rows])
    return tokens


def rows_at_once(logits: Tensor, n_logits: int) -> int:
    """Rows to work on together: on a CPU about n_logits, so that copies stay in its cache and memory is used again."""
    return max(1, n_logits // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)


def distribution(logits: Tensor, kth: Tensor | None) -> Tensor:
    """[R, n] probabilities among the tokens that top-k leaves, those at or above `kth` [R]; None: all of them."""
    if kth is not None:
        logits = logits.masked_fill(logits < kth.unsqueeze(1), -math.inf)
    return logits.softmax(-1)


def _likely(mass: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that can survive top-p and min-p, in vocabulary order, for the rows where they are few.

    Tokens less probable than (1 - top_p) / V add up to less than what a nucleus leaves out.

    Returns:
        [R, n] their probabilities, padded with 0; [R, n] their ids; [R] bool, whether the row is among them.
    """
    n_vocab = mass.shape[1]
    bound = (
        torch.maximum(mass.amax(-1) * min_p, (1.0 - top_p) / n_vocab) / 2
    )  # rounding stays far from it
    inside = mass >= bound.unsqueeze(1)
    few = inside.sum(-1, dtype=torch.int32) * FEW_SHARE <= n_vocab
    if bool(few.all()):
        return *_listed(mass, inside), few
    rows = torch.nonzero(few).squeeze(1)
    part, part_ids = _listed(mass[rows], inside[rows])
    best, ids = part.new_zeros(len(few), part.shape[1]), part_ids.new_zeros(len(few), part.shape[1])
    best[rows], ids[rows] = part, part_ids
    return best, ids, few


def _listed(mass: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's marked probabilities and their columns, in order, padded to one length with 0."""
    row, column = here.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(here))
    slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    shape = len(mass), max([1, *counts.tolist()])
    values, columns = mass.new_zeros(shape), row.new_zeros(shape)
    values[row, slot] = mass[row, column]
    columns[row, slot] = column
    return values, columns


def survivors(mass: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The probabilities that top-p and then min-p leave; 0 for the others.

    Both keep the best tokens and drop the rest, so their composition is one threshold per row; tokens tied with the
    last survivor survive.

    Args:
        mass: [R, n] float32 probabilities of the vocabulary, or of all candidates, as top-k left them.
        top_p: [R] float32 in (0, 1]; 1: off.
        min_p: [R] float32 in [0, 1]; 0: off.

    Returns:
        [R, n] float32.

    Differs: `TopPLogitsWarper` keeps one of several tied tokens at the edge of the nucleus, whichever its unstable sort
        put last; here all stay, so that the result does not depend on the sort.
    """
    floor = mass.amax(-1) * min_p
    if bool((top_p < 1.0).any()):
        floor = torch.where(top_p < 1.0, torch.maximum(floor, _nucleus(mass, top_p)), floor)
    return mass * (mass >= floor.unsqueeze(1))


def _nucleus(mass: Tensor, top_p: Tensor) -> Tensor:
    """The least probability of each row's nucleus: of the fewest best tokens that add up to top_p.

    A long row is not sorted. Its probabilities are summed by level, the leading bits of their float32; the level in
    which the sum reaches top_p is found among the sums, and only the tokens of that level are put in order.

    Args:
        mass: [R, n] float32.
        top_p: [R] float32.

    Returns:
        [R] float32.
    """
    target = top_p.double()
    before = target.new_zeros(len(mass), 1)
    if mass.shape[1] > SORTED:
        levels = mass.view(torch.int32) >> LEVEL_BITS
        sums = target.new_zeros(len(mass), N_LEVELS)
        sums.scatter_add_(1, levels.long(), mass.double())
        reached = sums.flip(1).cumsum(1)  # from the best down
        at = torch.searchsorted(reached, target.unsqueeze(1)).clamp_(max=N_LEVELS - 1)
        before = torch.where(at > 0, reached.gather(1, (at - 1).clamp_(0)), 0.0)
        mass, _ = _listed(mass, levels == N_LEVELS - 1 - at)
    ordered = mass.sort(-1, descending=True).values
    inside = ordered.double()
    keep = before + inside.cumsum(-1) - inside < target.unsqueeze(1)
    keep[:, 0] = True
    return ordered.gather(1, keep.sum(-1, keepdim=True) - 1).squeeze(1)


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


def pick(mass: Tensor, draws: Tensor) -> Tensor:
    """One token per row, by inverting the cumulative distribution in vocabulary order.

    Args:
        mass: [R, n] float32, probabilities up to a factor; 0 is never drawn.
        draws: [R] float32 in [0, 1), see `uniform`.

    Returns:
        [R] int64 column; -1 where there is no distribution.
    """
    reached = mass.cumsum(-1)
    total = reached[:, -1:]
    # the largest draw times a total near 1 still rounds to less than the total
    token = torch.searchsorted(reached, draws.unsqueeze(1) * total, right=True)
    token = token.clamp_(max=mass.shape[-1] - 1)
    # a parallel scan need not be monotone to the last bit: never land on a token that is out
    landed = mass.gather(1, token) > 0
    if not bool(landed.all()):
        token = torch.where(landed, token, largest(mass)[1].unsqueeze(1))
    return torch.where((total > 0) & total.isfinite(), token, -1).squeeze(1)
