"""One step's draws for a whole batch: rows are grouped so that each pays only for what it asked.

Greedy rows without processors cost one argmax, together. The others are copied, transformed by the functions of
`sampling`, and drawn at once. What a row gets does not depend on which rows stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quire.engine.constraint import constrain_
from quire.engine.params import SamplingParams
from quire.engine.request import Sample, TokenLogprob
from quire.engine.sampling import (
    TokenCounts,
    add_bias_,
    choose,
    forbid_,
    largest,
    pick,
    repetition_penalty_,
    rows_at_once,
    subtract_penalties_,
    uniform,
    width,
)

__all__ = ["draw", "score"]

AT_ONCE = 1 << 19
"""Logits that a CPU transforms together, see `rows_at_once`."""


@torch.inference_mode()
def draw(
    logits: Tensor, samples: Sequence[Sample], rows: Sequence[int] | None
) -> tuple[list[int], list[TokenLogprob | None] | None]:
    """Choose the next token of each sample.

    Args:
        logits: [T, V] float32, on any device; not changed.
        samples: [R] whose next token is wanted; the position in the random stream is its number of output tokens.
        rows: [R] row of the logits for each; None: one each, in order.

    Returns:
        The tokens, -1 where the logits are not numbers; and the log-probabilities asked for, None if none were.

    Cost: all plain greedy: one argmax and one transfer. Otherwise R·V floats are copied.
    """
    plain = [sample.request.params.plain for sample in samples]
    mine = logits if rows is None else logits[_index(rows, logits)]
    if all(plain):
        return _greedy(mine), None
    tokens = [0] * len(samples)
    calm = [i for i, yes in enumerate(plain) if yes]
    busy = [i for i, yes in enumerate(plain) if not yes]
    if calm:
        for i, token in zip(calm, _greedy(mine[_index(calm, logits)]), strict=True):
            tokens[i] = token
    n = rows_at_once(logits, AT_ONCE)
    for piece in (busy[at : at + n] for at in range(0, len(busy), n)):
        chosen = [samples[i] for i in piece]
        work = mine.clone() if len(piece) == len(mine) else mine[_index(piece, logits)]
        _process(work, chosen)
        for i, token in zip(piece, _choose(work, chosen), strict=True):
            tokens[i] = token
    asked = [i for i in busy if samples[i].request.params.logprobs is not None and tokens[i] >= 0]
    if not asked:
        return tokens, None
    found: list[TokenLogprob | None] = [None] * len(samples)
    widths = [samples[i].request.params.logprobs or 0 for i in asked]
    scores = score(mine[_index(asked, logits)], [tokens[i] for i in asked], widths)
    for i, logprob in zip(asked, scores, strict=True):
        found[i] = logprob
    return tokens, found


@torch.inference_mode()
def score(logits: Tensor, tokens: Sequence[int], widths: Sequence[int]) -> list[TokenLogprob]:
    """Log-probabilities of given tokens under the model's own distribution, and of the best alternatives.

    Args:
        logits: [R, V] float32, untransformed.
        tokens: [R] the token at each row.
        widths: [R] how many alternatives each wants.
    """
    logprobs = logits.log_softmax(-1)
    at = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    own = logprobs.gather(1, at)
    ranks = ((logprobs > own).sum(-1) + 1).tolist()
    most = min(max(widths), logits.shape[-1])
    ids: list[list[int]] = [[]] * len(tokens)
    values: list[list[float]] = [[]] * len(tokens)
    if most:
        best = logprobs.topk(most, dim=-1)
        ids, values = best.indices.tolist(), best.values.tolist()
    return [
        TokenLogprob(token, logprob, rank, tuple(zip(row[:width], value[:width], strict=True)))
        for token, logprob, rank, row, value, width in zip(
            tokens, own.squeeze(1).tolist(), ranks, ids, values, widths, strict=True
        )
    ]


def _index(rows: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=like.device)


def _greedy(logits: Tensor) -> list[int]:
    """[R, V] → R tokens; NaN wins every maximum, so looking for it costs nothing more."""
    best, at = largest(logits)
    return torch.where(best.isnan(), -1, at).tolist()


def _choose(logits: Tensor, samples: Sequence[Sample]) -> list[int]:
    """Tokens from transformed logits: greedy rows by argmax, the others by their own random number."""
    warm = [i for i, sample in enumerate(samples) if not sample.request.params.greedy]
    if not warm:
        return _greedy(logits)
    tokens = [0] * len(samples)
    if len(warm) < len(samples):
        cold = [i for i, sample in enumerate(samples) if sample.request.params.greedy]
        for i, token in zip(cold, _greedy(logits[_index(cold, logits)]), strict=True):
            tokens[i] = token
        logits = logits[_index(warm, logits)]
    params = [samples[i].request.params for i in warm]
    logits /= _column([p.temperature for p in params], logits).unsqueeze(1)
    groups: dict[int, list[int]] = {}
    for at, p in enumerate(params):
        groups.setdefault(width(p.top_k, logits.shape[-1]), []).append(at)
    for n_best, rows in groups.items():
        part = logits if len(groups) == 1 else logits[_index(rows, logits)]
        for at, token in zip(
            rows, _filtered(part, [samples[warm[r]] for r in rows], n_best), strict=True
        ):
            tokens[warm[at]] = token
    return tokens


def _filtered(logits: Tensor, samples: Sequence[Sample], n_best: int) -> list[int]:
    """Draw from rows whose filters look at equally many tokens."""
    params = [sample.request.params for sample in samples]
    draws = [uniform(s.request.seed, s.index, s.output_tokens) for s in samples]
    at = _column(draws, logits)
    if not n_best and not any(p.min_p or p.top_p < 1.0 for p in params):
        return pick(logits.softmax(-1), at).tolist()
    return choose(
        logits,
        _index([p.top_k for p in params], logits),
        _column([p.top_p for p in params], logits),
        _column([p.min_p for p in params], logits),
        at,
        n_best,
    ).tolist()


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


def _process(logits: Tensor, samples: Sequence[Sample]) -> None:
    """Penalties, bias, minimum tokens and grammars, in place, for the rows that ask for them."""
    _penalise(logits, [(r, s) for r, s in enumerate(samples) if s.request.params.penalised])
    biased = [
        (row, token, value)
        for row, sample in enumerate(samples)
        for token, value in sample.request.params.logit_bias.items()
    ]
    if biased:
        rows, ids, values = zip(*biased, strict=True)
        add_bias_(logits, _index(rows, logits), _index(ids, logits), _column(values, logits))
    early = [
        (row, token)
        for row, sample in enumerate(samples)
        if sample.output_tokens < sample.request.params.min_tokens
        for token in sample.request.stop_ids
    ]
    if early:
        rows, ids = zip(*early, strict=True)
        forbid_(logits, _index(rows, logits), _index(ids, logits))
    constrain_(logits, samples)


def _penalise(logits: Tensor, rows: list[tuple[int, Sample]]) -> None:
    """Repetition, then frequency and presence penalties, over the tokens each row has seen."""
    if not rows:
        return
    counts = [_counts(sample) for _, sample in rows]
    lengths = [c.n_distinct for c in counts]
    params: list[SamplingParams] = [sample.request.params for _, sample in rows]

    def spread(values: Sequence[float], dtype: type) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=dtype), lengths)).to(logits.device)

    at = spread([row for row, _ in rows], np.int64)
    ids = torch.from_numpy(np.concatenate([c.seen() for c in counts])).to(logits.device)
    if any(p.repetition_penalty != 1.0 for p in params):
        repetition_penalty_(
            logits, at, ids, spread([p.repetition_penalty for p in params], np.float32)
        )
    if any(p.frequency_penalty or p.presence_penalty for p in params):
        occurrences = torch.from_numpy(np.concatenate([c.output_counts() for c in counts]))
        subtract_penalties_(
            logits,
            at,
            ids,
            occurrences.to(logits.device),
            spread([p.frequency_penalty for p in params], np.float32),
            spread([p.presence_penalty for p in params], np.float32),
        )


def _counts(sample: Sample) -> TokenCounts:
    """The sample's counts, up to its last token; a function of its tokens, so a preemption changes nothing."""
    counts: TokenCounts | None = sample.counts
    if counts is None:
        counts = sample.counts = TokenCounts(sample.tokens[: sample.prompt_tokens])
    counts.extend(sample.tokens[sample.prompt_tokens + counts.n_output :])
    return counts
