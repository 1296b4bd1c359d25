"""Each transform against the processor of the same name in transformers, and the draw against its distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from quire.engine import sampler, sampling
from quire.engine.params import SamplingParams
from quire.engine.request import Request, Sample
from quire.engine.sampler import draw, score

VOCAB = 300


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def a_sample(
    params: SamplingParams,
    prompt: list[int],
    output: list[int] | None = None,
    *,
    index: int = 0,
    stop_ids: frozenset[int] = frozenset(),
) -> Sample:
    request = Request("r", prompt, params, 100, params.seed or 0, stop_ids=stop_ids)
    while len(request.samples) <= index:
        request.samples.append(Sample(request, len(request.samples), list(prompt), len(prompt)))
    sample = request.samples[index]
    sample.tokens += output or []
    return sample


def survivors(logits: Tensor, top_k: list[int], top_p: list[float], min_p: list[float]) -> Tensor:
    at = torch.tensor([min(k or VOCAB, logits.shape[1]) - 1 for k in top_k])
    kth = logits.sort(dim=-1, descending=True).values.gather(1, at.unsqueeze(1)).squeeze(1)
    mass = sampling.distribution(logits, kth)
    return sampling.survivors(mass, torch.tensor(top_p), torch.tensor(min_p)) > 0


def theirs(logits: Tensor, *warpers: object) -> Tensor:
    return (
        LogitsProcessorList(warpers)(torch.zeros(len(logits), 1, dtype=torch.int64), logits)
        > -math.inf
    )


# ---- filters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 7, 50, VOCAB, 10 * VOCAB])
def test_top_k(k: int) -> None:
    logits = random_logits(8)
    assert torch.equal(
        survivors(logits, [k] * 8, [1.0] * 8, [0.0] * 8), theirs(logits, TopKLogitsWarper(k))
    )


def test_top_k_keeps_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert torch.equal(survivors(logits, [2], [1.0], [0.0]), theirs(logits, TopKLogitsWarper(2)))
    assert survivors(logits, [2], [1.0], [0.0]).sum() == 3


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.3, 0.5, 0.9, 0.95, 0.999])
def test_top_p(p: float) -> None:
    logits = random_logits(8)
    assert torch.equal(
        survivors(logits, [0] * 8, [p] * 8, [0.0] * 8), theirs(logits, TopPLogitsWarper(p))
    )


@example(seed=1, scale=0.3, coarse=True, filters=(200, 0.5, 0.0))  # ties of the k-th out of sight
@given(
    seed=st.integers(0, 100),
    scale=st.sampled_from([0.01, 0.3, 1.0]),
    coarse=st.booleans(),
    filters=st.tuples(
        st.sampled_from([0, 1, 2, 30, 200, 1500]),
        st.sampled_from([1.0, 0.97, 0.5]),
        st.sampled_from([0.0, 0.01, 0.9]),
    ),
)
def test_choices_are_those_of_the_definition(
    seed: int, scale: float, coarse: bool, filters: tuple[int, float, float]
) -> None:
    """Whether a row's survivors are among the tokens looked at first or found in further rounds."""
    logits = scale * random_logits(6, vocab=3000, seed=seed)
    logits[2] *= 10 / scale
    if coarse:  # as from bfloat16: many ties
        logits = (logits * 4).round() / 4
    k, p, m = filters
    draws = torch.rand(6, generator=torch.Generator().manual_seed(seed))
    chosen = sampling.choose(
        logits,
        torch.tensor([k] * 6),
        torch.tensor([p] * 6),
        torch.tensor([m] * 6),
        draws,
        sampling.width(k, 3000),
    )
    decided = 0
    for row in range(6):
        expected, margin = defined_choice(logits[row].double(), k, p, m, float(draws[row]))
        if margin > 1e-5:  # otherwise float32 may round either way
            decided += 1
            assert chosen[row] == expected
    assert decided > 0


def defined_choice(logits: Tensor, k: int, p: float, m: float, u: float) -> tuple[int, float]:
    """The filters and the draw by their definitions, in float64; and how far the decision was from another."""
    margin = math.inf
    ordered = logits.sort(descending=True).values
    kept = logits >= ordered[min(k, len(logits)) - 1] if k else torch.ones_like(logits).bool()
    if p < 1.0:
        mass = logits.masked_fill(~kept, -math.inf).softmax(-1)
        levels, counts = (x.flip(0) for x in logits.unique(return_counts=True))
        above = torch.cat(
            [torch.zeros(1), counts.cumsum(0)[:-1]]
        ).long()  # ties stand or fall together
        ranked = torch.cat([torch.zeros(1).double(), mass.sort(descending=True).values.cumsum(0)])
        before = ranked[above]
        margin = min(margin, float((before - p).abs().min()))
        kept &= logits >= levels[before < p][-1]
    if m > 0.0:
        limit = float(logits.max()) + math.log(m)
        margin = min(margin, float((logits - limit).abs().min()))
        kept &= logits >= limit
    reached = logits.masked_fill(~kept, -math.inf).softmax(-1).cumsum(-1)
    margin = min(margin, float((reached - u).abs().min()))
    return int((reached > u).nonzero()[0]), margin


def test_a_row_is_looked_at_alike_in_every_batch() -> None:
    assert sampling.width(0, 5000) == 0
    assert sampling.width(50, 5000) == 128
    assert sampling.width(50, 100) == 100


@pytest.mark.parametrize("scale", [0.01, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("p", [0.05, 0.9, 0.999])
def test_a_nucleus_found_by_levels_is_the_sorted_one(scale: float, p: float) -> None:
    logits = scale * random_logits(5, vocab=20_000)
    logits[3] = logits[3].bfloat16().float()  # many ties
    logits[4] = 1.0  # nothing else
    mass = logits.softmax(-1)
    ones = torch.ones(5)
    kept = sampling.survivors(mass, p * ones, 0 * ones) > 0
    for row in range(5):
        ordered = mass[row].double().sort(descending=True).values
        before = ordered.cumsum(0) - ordered
        least = ordered[before < float(torch.tensor(p))][-1]  # p as float32 has it
        assert torch.equal(kept[row], mass[row].double() >= least)


def test_the_likely_tokens_are_all_that_can_survive() -> None:
    logits = random_logits(6, vocab=2000) * torch.tensor([0.01, 0.5, 1.0, 2.0, 4.0, 9.0]).unsqueeze(
        1
    )
    mass = logits.softmax(-1)
    for p, m in ((0.5, 0.0), (0.99, 0.0), (1.0, 0.2), (0.9, 0.01)):
        top_p, min_p = torch.full((6,), p), torch.full((6,), m)
        best, ids, few = sampling._likely(mass, top_p, min_p)
        assert few.any()
        kept = sampling.survivors(mass, top_p, min_p)
        for row in few.nonzero().squeeze(1).tolist():
            there = torch.zeros(2000).scatter_add_(0, ids[row], best[row])
            assert torch.equal(there[kept[row] > 0], kept[row][kept[row] > 0])
            named = ids[row][best[row] > 0]
            assert torch.equal(named, named.sort().values)  # vocabulary order


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 1.0])
def test_min_p(p: float) -> None:
    logits = random_logits(8)
    assert torch.equal(
        survivors(logits, [0] * 8, [1.0] * 8, [p] * 8), theirs(logits, MinPLogitsWarper(p))
    )


@given(
    k=st.integers(1, 60),
    p=st.floats(0.01, 0.99),
    m=st.floats(0.001, 0.9),
    temperature=st.floats(0.2, 5.0),
    seed=st.integers(0, 50),
)
def test_filters_compose_in_their_order(
    k: int, p: float, m: float, temperature: float, seed: int
) -> None:
    logits = random_logits(3, seed=seed)
    mine = survivors(logits / temperature, [k] * 3, [p] * 3, [m] * 3)
    reference = theirs(
        logits,
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(k),
        TopPLogitsWarper(p),
        MinPLogitsWarper(m),
    )
    assert (mine != reference).sum(-1).max() <= 1  # one token on the very edge may round either way
    assert (mine != reference).float().mean() < 0.005


def test_order_matters() -> None:
    """The nucleus is taken among what top-k left, not among all."""
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    assert survivors(logits, [2], [0.55], [0.0]).tolist() == [[True, False, False, False]]
    assert survivors(logits, [0], [0.55], [0.0]).tolist() == [[True, True, False, False]]


def test_each_row_has_its_own_filters() -> None:
    logits = random_logits(4)
    mixed = survivors(logits, [0, 5, 0, 0], [1.0, 1.0, 0.5, 1.0], [0.0, 0.0, 0.0, 0.2])
    assert mixed[0].all()
    assert torch.equal(mixed[1:2], theirs(logits[1:2], TopKLogitsWarper(5)))
    assert torch.equal(mixed[2:3], theirs(logits[2:3], TopPLogitsWarper(0.5)))
    assert torch.equal(mixed[3:4], theirs(logits[3:4], MinPLogitsWarper(0.2)))


# ---- processors -----------------------------------------------------------------------------------------------------


def processed(logits: Tensor, samples: list[Sample]) -> Tensor:
    work = logits.clone()
    sampler._process(work, samples)
    return work


def test_repetition_penalty() -> None:
    logits = random_logits(3)
    prompts, outputs = [[1, 2, 3, 2], [5], [7, 7]], [[9, 9, 1], [], [250]]
    penalties = [1.3, 0.7, 2.0]
    samples = [
        a_sample(SamplingParams(repetition_penalty=x), p, o)
        for x, p, o in zip(penalties, prompts, outputs, strict=True)
    ]
    mine = processed(logits, samples)
    for row, (x, p, o) in enumerate(zip(penalties, prompts, outputs, strict=True)):
        reference = RepetitionPenaltyLogitsProcessor(x)(
            torch.tensor([p + o]), logits[row : row + 1]
        )
        torch.testing.assert_close(mine[row : row + 1], reference, rtol=0, atol=0)


def test_frequency_and_presence_penalties_count_the_output_only() -> None:
    logits = random_logits(2)
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    mine = processed(logits, [a_sample(params, [4, 4, 6], [6, 6, 8]), a_sample(params, [4], [])])
    expected = logits.clone()
    expected[0, 6] -= 2 * 0.5 + 0.25
    expected[0, 8] -= 0.5 + 0.25
    torch.testing.assert_close(mine, expected)


def test_penalties_come_in_order_and_follow_new_tokens() -> None:
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, logit_bias={3: 10.0})
    sample = a_sample(params, [3], [])
    logits = torch.full((1, 5), 4.0)
    assert processed(logits, [sample])[0].tolist() == [4.0, 4.0, 4.0, 12.0, 4.0]
    sample.tokens += [3, 4]
    assert processed(logits, [sample])[0].tolist() == [4.0, 4.0, 4.0, 11.0, 1.0]
    often = a_sample(SamplingParams(frequency_penalty=1.0), [3], [])
    for n_output in range(4):
        assert processed(logits, [often])[0, 3] == 4.0 - n_output
        assert processed(logits, [often])[0, 3] == 4.0 - n_output
        often.tokens.append(3)


def test_logit_bias() -> None:
    logits = random_logits(2)
    bias = {5: 4.0, 17: -100.0}
    mine = processed(logits, [a_sample(SamplingParams(logit_bias=bias), [1])] * 2)
    theirs_ = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    torch.testing.assert_close(mine, theirs_(torch.ones(2, 1, dtype=torch.int64), logits.clone()))


def test_min_tokens_forbids_the_end() -> None:
    logits = random_logits(1)
    params, stops = SamplingParams(min_tokens=2), frozenset({3, 8})
    for n_output in range(4):
        sample = a_sample(params, [1], [2] * n_output, stop_ids=stops)
        reference = MinNewTokensLengthLogitsProcessor(1, 2, [3, 8])(
            torch.ones(1, 1 + n_output, dtype=torch.int64), logits
        )
        assert torch.equal(processed(logits, [sample]), reference)


def test_counts_grow_beyond_their_first_room() -> None:
    counts = sampling.TokenCounts([5, 5, 7])
    counts.extend(range(500))
    counts.extend([7, 499])
    told = dict(zip(counts.seen().tolist(), counts.output_counts().tolist(), strict=True))
    assert told == {token: 1 + (token in (7, 499)) for token in range(500)}
    assert counts.n_output == 502


@given(st.integers(1, 400), st.integers(1, 5), st.integers(0, 100), st.booleans())
def test_the_largest_is_the_first_largest(vocab: int, rows: int, seed: int, coarse: bool) -> None:
    logits = random_logits(rows, vocab, seed)
    if coarse:
        logits = logits.round()
    expected = [row.tolist().index(max(row.tolist())) for row in logits]
    broken = logits.clone()
    where = 7919 * (seed + 1) % vocab
    broken[0, where] = math.nan
    with pytest.MonkeyPatch.context() as patch:
        for few in (0, 1 << 30):
            patch.setattr(sampling, "FEW", few)
            best, at = sampling.largest(logits)
            assert torch.equal(best, logits.amax(-1))
            assert at.tolist() == expected
            best, at = sampling.largest(broken)
            assert best.isnan().tolist() == [True] + [False] * (rows - 1)
            assert at.tolist() == [where, *expected[1:]]


# ---- the draw -------------------------------------------------------------------------------------------------------


def test_uniform_is_a_function_of_all_three_and_uniform() -> None:
    assert sampling.uniform(1, 2, 3) == sampling.uniform(1, 2, 3)
    near = {sampling.uniform(s, i, p) for s in (1, 2) for i in (0, 1) for p in (0, 1)}
    assert len(near) == 8
    draws = torch.tensor([sampling.uniform(11, 0, p) for p in range(20_000)], dtype=torch.float64)
    assert 0 <= float(draws.min()) < float(draws.max()) < 1
    assert (torch.histc(draws, 20, 0, 1) - 1000).abs().max() < 150  # 5 sigma
    assert all(float(torch.tensor(x, dtype=torch.float32)) == x for x in draws[:100].tolist())


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    logits = probabilities.log().repeat(20_000, 1)
    draws = torch.tensor([sampling.uniform(3, 0, p) for p in range(20_000)])
    share = torch.bincount(sampling.pick(logits.softmax(-1), draws), minlength=5) / 20_000
    assert share[1] == 0
    torch.testing.assert_close(share, probabilities, rtol=0, atol=0.015)


def test_draws_at_the_ends_stay_inside() -> None:
    mass = torch.tensor([[0.0, 0.2, 0.8, 0.0]]).repeat(2, 1)
    ends = torch.tensor([0.0, 1 - 2.0**-24])
    assert sampling.pick(mass, ends).tolist() == [1, 2]
    assert sampling.pick(mass * (mass > 0.5), ends).tolist() == [2, 2]
    for seed in range(200):  # sums that round to a little more or less than one
        many = random_logits(1, seed=seed)
        many[0, -3:] = -math.inf
        assert sampling.pick(many.softmax(-1), ends[1:]).item() == VOCAB - 4


def test_a_scan_that_is_not_monotone_never_lands_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parallel prefix sum may be off in the last bit, between two tokens of which one is out."""
    cumsum = torch.Tensor.cumsum

    def wobbly(self: Tensor, dim: int) -> Tensor:
        reached = cumsum(self, dim)
        reached[:, 1] += 1e-6
        return reached

    monkeypatch.setattr(torch.Tensor, "cumsum", wobbly)
    mass = torch.tensor([[0.5, 0.0, 0.5]])
    assert sampling.pick(mass, torch.tensor([0.5000005])).item() in (0, 2)
    assert sampling.pick(torch.zeros(1, 3), torch.tensor([0.5])).item() == -1


@given(seed=st.integers(0, 2**64 - 1), data=st.data())
def test_a_row_gets_the_same_token_alone_and_in_any_batch(seed: int, data: st.DataObject) -> None:
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=seed),
        SamplingParams(temperature=0.7, top_p=0.9, seed=seed),
        SamplingParams(temperature=5.0, top_p=0.95, seed=seed),
        SamplingParams(temperature=0.1, top_p=0.6, min_p=0.01, seed=seed),
        SamplingParams(temperature=2.0, top_k=10, min_p=0.01, seed=seed),
        SamplingParams(temperature=1.0, repetition_penalty=1.5, frequency_penalty=0.2, seed=seed),
        SamplingParams(logit_bias={4: 3.0}, min_tokens=5, logprobs=2),
        SamplingParams(temperature=1.0, top_k=3, logprobs=0, seed=seed),
    ]
    rows = data.draw(st.lists(st.sampled_from(range(len(kinds))), min_size=1, max_size=9))
    logits = random_logits(len(rows), seed=seed % 1000)

    def samples() -> list[Sample]:
        return [
            a_sample(kinds[kind], [1, 2, row], [3] * row, index=row % 3, stop_ids=frozenset({0}))
            for row, kind in enumerate(rows)
        ]

    together, logprobs = draw(logits, samples(), None)
    order = data.draw(st.permutations(range(len(rows))))
    shuffled, _ = draw(logits, [samples()[i] for i in order], list(order))
    assert shuffled == [together[i] for i in order]
    for row, sample in enumerate(samples()):
        alone, alone_logprobs = draw(logits[row : row + 1], [sample], None)
        assert alone == [together[row]]
        if alone_logprobs is not None:
            assert logprobs is not None
            assert alone_logprobs[0] == logprobs[row]


def test_rows_in_pieces_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(7)
    params = [SamplingParams(temperature=3.0, top_p=0.9, seed=s) for s in range(7)]
    params[2] = SamplingParams(temperature=1.0, presence_penalty=3.0, seed=1, logprobs=1)
    samples = [a_sample(p, [1], [2]) for p in params]
    at_once = draw(logits, samples, None)
    assert len(set(at_once[0])) > 3
    monkeypatch.setattr(sampler, "AT_ONCE", 3 * VOCAB)
    monkeypatch.setattr(sampling, "WHOLE", 2 * VOCAB)
    assert draw(logits, samples, None) == at_once


@pytest.mark.parametrize("mode", ["plain", "inference", "grad"])
def test_logits_are_left_alone(mode: str) -> None:
    """Whatever the runner computed them under."""
    with torch.inference_mode(mode == "inference"):
        logits = random_logits(2)
    logits.requires_grad_(mode == "grad")
    before = logits.clone()
    params = SamplingParams(temperature=0.5, repetition_penalty=2.0, logit_bias={1: 1.0}, seed=1)
    draw(logits, [a_sample(params, [1, 2])] * 2, None)
    assert torch.equal(logits, before)


def test_greedy_with_processors_takes_the_best_of_what_they_leave() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, 3.0]])
    assert draw(logits, [a_sample(SamplingParams(), [0])], None)[0] == [1]
    assert draw(logits, [a_sample(SamplingParams(logit_bias={1: -2.0}), [0])], None)[0] == [2]
    assert draw(logits, [a_sample(SamplingParams(presence_penalty=9.0), [0], [1, 2])], None)[0] == [
        3
    ]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=5),
        SamplingParams(temperature=1.0, top_p=0.9, seed=5),
        SamplingParams(temperature=1.0, top_k=5, seed=5),
        SamplingParams(temperature=1.0, min_p=0.1, seed=5),
    ],
)
def test_not_a_number_is_told_apart(params: SamplingParams) -> None:
    logits = random_logits(3)
    logits[1, 7] = math.nan
    tokens, _ = draw(logits, [a_sample(params, [1]) for _ in range(3)], None)
    assert tokens[1] == -1
    assert min(tokens[0], tokens[2]) >= 0


def test_logprobs_are_of_the_model_not_of_the_sampler() -> None:
    logits = random_logits(2)
    params = SamplingParams(temperature=0.3, top_k=2, logprobs=3, seed=9)
    tokens, found = draw(logits, [a_sample(params, [1]), a_sample(SamplingParams(), [1])], None)
    assert found is not None
    assert found[1] is None
    expected = logits[0].log_softmax(-1)
    assert found[0] is not None
    assert found[0].token_id == tokens[0]
    assert found[0].logprob == pytest.approx(float(expected[tokens[0]]))
    assert found[0].rank == 1 + int((expected > expected[tokens[0]]).sum())
    assert [token for token, _ in found[0].top] == expected.topk(3).indices.tolist()


def test_scores_of_different_widths() -> None:
    logits = random_logits(3)
    scores = score(logits, [5, 6, 7], [0, 2, VOCAB + 5])
    assert [len(s.top) for s in scores] == [0, 2, VOCAB]
    assert [s.token_id for s in scores] == [5, 6, 7]
    assert sum(math.exp(lp) for _, lp in scores[2].top) == pytest.approx(1.0, abs=1e-4)
