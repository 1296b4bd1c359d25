"""Output that follows a grammar: nothing else is drawn, alone or preempted; and a broken grammar harms nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from engine.fake_runner import FakeRunner, by_hand
from quire.engine import Engine, SamplingParams, SchedulerConfig
from quire.errors import RequestError

V = 40


class Ascending:
    """A grammar: each token is larger than the last; the last token of the vocabulary ends it."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.breaks_at = breaks_at
        self.opened = 0

    def open(self) -> Walk:
        self.opened += 1
        return Walk(self.breaks_at)


class Walk:
    def __init__(self, breaks_at: int | None) -> None:
        self.breaks_at = breaks_at
        self.seen: list[int] = []

    @property
    def n_tokens(self) -> int:
        return len(self.seen)

    @property
    def error(self) -> str | None:
        broken = self.breaks_at is not None and len(self.seen) >= self.breaks_at
        return "too complex" if broken else None

    def accept(self, tokens: Sequence[int]) -> None:
        self.seen += tokens

    def allowed(self) -> np.ndarray:
        last = self.seen[-1] if self.seen else -1
        return np.arange(V) > last


def climb(runner: FakeRunner, prompt: list[int]) -> list[int]:
    """Greedy under the grammar, by hand."""
    tokens, last = list(prompt), -1
    while last != V - 1:
        logits = runner.logits_after(tokens).clone()
        logits[: last + 1] = -np.inf
        last = int(logits.argmax())
        tokens.append(last)
    return tokens[len(prompt) :]


def params(grammar: Ascending | None, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=V, constraint=grammar, **more)  # type: ignore[arg-type]


def test_greedy_takes_the_best_of_what_is_allowed() -> None:
    runner = FakeRunner()
    engine = Engine(runner, eos_token_ids=[V - 1])
    (out,) = engine.generate([[1, 2]], params(Ascending()))
    assert out.token_ids == climb(runner, [1, 2])
    assert out.finish_reason == "stop"
    assert out.token_ids != by_hand(runner, [1, 2], len(out.token_ids))


def test_its_neighbours_are_not_constrained_and_preemption_changes_nothing() -> None:
    runner = FakeRunner(24)
    engine = Engine(runner, config=SchedulerConfig(step_tokens=16), eos_token_ids=[V - 1])
    grammar = Ascending()
    prompts = [[i, 1, 2, 3] for i in range(8)]
    wanted = [params(grammar), SamplingParams(max_tokens=30, ignore_eos=True)] * 4
    outs = engine.generate(prompts, wanted)
    assert engine.stats().scheduler.preemptions > 0
    for prompt, its, out in zip(prompts, wanted, outs, strict=True):
        if its.constraint is None:
            assert out.token_ids == by_hand(runner, prompt, 30)
        else:
            assert out.token_ids == climb(runner, prompt)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_sample_has_its_own_place_in_the_grammar(temperature: float) -> None:
    engine = Engine(FakeRunner(), eos_token_ids=[V - 1])
    grammar = Ascending()
    (out,) = engine.generate(
        [[3]], params(grammar, n=5, temperature=temperature, seed=4, logprobs=2)
    )
    assert grammar.opened == 5
    for sample in out.outputs:
        assert sample.token_ids == sorted(set(sample.token_ids))
        assert sample.finish_reason == "stop"
        assert all(np.isfinite(one.logprob) for one in sample.logprobs or ())


def test_a_grammar_that_fails_ends_its_request_and_no_other() -> None:
    runner = FakeRunner()
    engine = Engine(runner, eos_token_ids=[V - 1])
    name = engine.add_request([1], params(Ascending(breaks_at=1)))
    other = engine.add_request([2], SamplingParams(max_tokens=6, ignore_eos=True))
    last = {}
    while engine.has_work:
        for delta in engine.step():
            last[delta.request_id] = delta
    assert isinstance(last[name].error, RequestError)
    assert "too complex" in str(last[name].error)
    assert last[other].output is not None
    assert last[other].output.token_ids == by_hand(runner, [2], 6)
    assert not engine.held_bytes()


@pytest.mark.parametrize("more", [{"min_tokens": 1}, {"ignore_eos": True}])
def test_what_contradicts_a_grammar_is_refused(more: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="grammar"):
        params(Ascending(), **more)


def test_a_request_is_checked_and_queued_when_submit_returns() -> None:
    async def main() -> None:
        with Engine(FakeRunner()) as engine:
            with pytest.raises(RequestError, match="empty"):
                engine.submit([])
            stream = engine.submit([1, 2], SamplingParams(max_tokens=9))
            assert stream.request.prompt_token_ids == [1, 2]
            tokens = [t async for delta in stream for t in delta.token_ids]
            assert tokens == by_hand(FakeRunner(), [1, 2], 9)
            assert [delta async for delta in stream] == []
            stream.close()
            left = engine.submit([1, 2], SamplingParams(max_tokens=100_000))
            await anext(left)
            left.close()
            left.close()
            async with asyncio.timeout(30):
                while engine.has_work:  # noqa: ASYNC110 - another thread makes it true
                    await asyncio.sleep(0.001)
            assert engine.stats().finished == {"length": 1, "cancelled": 1}

    asyncio.run(main())
