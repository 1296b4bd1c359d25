"""What the engine refuses at the door, and what is left when something breaks within."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from engine.fake_runner import FakeRunner, by_hand
from engine.tokenizers_made_here import byte_level
from quire.engine import Delta, Engine, Item, SamplingParams
from quire.errors import CapacityError, RequestError

GREEDY = SamplingParams(max_tokens=8)


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "hint"),
    [
        ([], GREEDY, "empty"),
        ([99], GREEDY, "vocabulary of 40"),
        ([-1], GREEDY, "vocabulary of 40"),
        ([1.5], GREEDY, "integer token ids"),
        ([[1]], GREEDY, "flat list"),
        (None, GREEDY, "flat list"),
        (torch.tensor(5), GREEDY, "flat list"),
        ("text", GREEDY, "needs a tokenizer"),
        ([1] * 50, GREEDY, "at most 49 leave room"),
        ([1], SamplingParams(stop="x"), "need a tokenizer"),
        ([1], SamplingParams(stop_token_ids=[40]), "vocabulary of 40"),
        ([1], SamplingParams(logit_bias={40: 1.0}), "vocabulary of 40"),
    ],
)
def test_refuses_at_the_door(prompt: Any, params: SamplingParams, hint: str) -> None:
    engine = Engine(FakeRunner(max_context_tokens=50))
    with pytest.raises(RequestError, match=hint) as caught:
        engine.add_request(prompt, params)
    assert "\n" not in str(caught.value)
    assert not engine.has_work


def test_half_a_character_is_refused_in_words() -> None:
    engine = Engine(FakeRunner(vocab_size=300), byte_level())
    with pytest.raises(RequestError, match=r"not Unicode: .* at character 3 is half a character"):
        engine.generate("ab\udcff", GREEDY)
    assert not engine.has_work


def test_an_adapter_that_is_not_there_is_refused_before_it_can_end_other_requests() -> None:
    class Adapted(FakeRunner):
        def check_adapter(self, name: str) -> None:
            if name != "ada":
                raise RequestError(f"adapter {name!r} is not one of this model's")

    engine = Engine(Adapted())
    engine.add_request([1, 2], GREEDY, adapter="ada")
    with pytest.raises(RequestError, match="'eve' is not one"):
        engine.add_request([1, 2], GREEDY, adapter="eve")
    assert engine.stats().live_requests == 1


def test_refuses_what_never_fits_and_bad_names() -> None:
    engine = Engine(FakeRunner(4))
    with pytest.raises(CapacityError, match="max_tokens=7 would"):
        engine.add_request([1] * 10, GREEDY)
    with pytest.raises(RequestError, match="priority"):
        engine.add_request([1], GREEDY, priority=10**9)
    engine.add_request([1], GREEDY, request_id="twin")
    with pytest.raises(RequestError, match="in use"):
        engine.add_request([1], GREEDY, request_id="twin")


def test_generate_refuses_before_any_runs() -> None:
    runner = FakeRunner(max_context_tokens=50)
    engine = Engine(runner)
    with pytest.raises(RequestError, match="prompt 1: "):
        engine.generate([[1], [1] * 60], GREEDY)
    assert not engine.has_work
    assert runner.steps == []


# ---- broken ---------------------------------------------------------------------------------------------------------


def test_a_failing_forward_releases_all_tells_all_and_the_engine_goes_on() -> None:
    runner = FakeRunner()
    engine = Engine(runner)
    seen: list[Delta] = []
    engine.add_request([1, 2], SamplingParams(max_tokens=50, n=2), on_delta=seen.append)
    engine.add_request([1, 2], SamplingParams(max_tokens=50))
    runner.fail_at = 2
    engine.step(), engine.step()
    with pytest.raises(RuntimeError, match="caught fire"):
        engine.step()
    assert isinstance(seen[-1].error, RuntimeError)
    assert seen[-1].output is not None
    assert len(seen[-1].output.token_ids) == 2
    [told] = engine.step()
    assert isinstance(told.error, RuntimeError)
    assert runner.pool.opened == 0
    assert not engine.has_work
    with pytest.raises(RuntimeError, match="caught fire"):
        engine.generate([[1]], GREEDY)
    runner.fail_at = None
    [output] = engine.generate([[1]], GREEDY)
    assert output.token_ids == by_hand(runner, [1], 8)


def test_an_interrupt_leaves_nothing_behind() -> None:
    class Interrupted(FakeRunner):
        def forward(self, items: Any, adapter: str | None = None) -> torch.Tensor:
            if len(self.steps) == 3:
                raise KeyboardInterrupt
            return super().forward(items, adapter)

    runner = Interrupted()
    engine = Engine(runner)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1], [2]], SamplingParams(max_tokens=50))
    assert runner.pool.opened == 0
    assert not engine.has_work


def test_an_interrupt_while_a_request_is_admitted_leaves_nothing_behind() -> None:
    class Interrupted(FakeRunner):
        def open(self) -> Any:
            table = super().open()
            append = table.append

            def interrupted(n_tokens: int, **options: Any) -> None:
                append(n_tokens, **options)
                raise KeyboardInterrupt

            table.append = interrupted  # type: ignore[method-assign]
            return table

    runner = Interrupted()
    engine = Engine(runner)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2]], GREEDY)
    assert (runner.pool.opened, runner.pool.refs) == (0, {})
    assert not engine.has_work


def test_generate_interrupted_between_steps_cancels_what_it_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = FakeRunner()
    engine = Engine(runner)
    other = engine.add_request([3], GREEDY)
    turn, turns = engine._turn, 0

    def impatient() -> None:
        nonlocal turns
        turns += 1
        if turns == 4:
            raise KeyboardInterrupt
        turn()

    monkeypatch.setattr(engine, "_turn", impatient)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1], [2]], SamplingParams(max_tokens=50))
    assert list(engine.held_bytes()) == [other]
    assert runner.pool.opened == 1


def test_logits_that_are_not_numbers_fail_their_request_only() -> None:
    class Overflowing(FakeRunner):
        def forward(self, items: Any, adapter: str | None = None) -> torch.Tensor:
            logits = super().forward(items, adapter)
            for row, item in enumerate(items):
                if item.tokens[0] == 7 and item.stop > 4:
                    logits[row, 0] = math.nan
            return logits

    for params in (
        SamplingParams(max_tokens=9),
        SamplingParams(max_tokens=9, n=3, temperature=1.0),
    ):
        runner = Overflowing()
        engine = Engine(runner)
        seen: list[Delta] = []
        engine.add_request([7, 1], params, on_delta=seen.append)
        [fine] = engine.generate([[1]], GREEDY)
        assert fine.finish_reason == "length"
        assert "not numbers at output position 3" in str(seen[-1].error)
        assert seen[-1].output is not None
        assert runner.pool.opened == 0
    engine = Engine(Overflowing())
    with pytest.raises(RequestError, match="not numbers"):
        engine.generate([[7, 1, 1, 1, 1]], SamplingParams(n=2))


def test_one_broken_sample_ends_its_request_once() -> None:
    class Half(FakeRunner):
        def forward(self, items: Any, adapter: str | None = None) -> torch.Tensor:
            logits = super().forward(items, adapter)
            if len(self.steps) == 4:
                logits[1] = math.nan
            return logits

    runner = Half()
    engine = Engine(runner)
    seen: list[Delta] = []
    params = SamplingParams(max_tokens=4, n=3, temperature=1.0)
    engine.add_request([1, 2], params, on_delta=seen.append)
    while engine.has_work:
        engine.step()
    assert [delta.output is not None for delta in seen] == [False] * (len(seen) - 1) + [True]
    assert isinstance(seen[-1].error, RequestError)
    assert runner.pool.opened == 0
    assert sum(engine.stats().finished.values()) == 3


def test_a_pool_that_promised_too_much_fails_one_request_clearly() -> None:
    class Optimist(FakeRunner):
        def fits(self, n_tokens: int) -> bool:
            return True

    runner = Optimist(4)
    engine = Engine(runner)
    seen: list[Delta] = []
    engine.add_request([1] * 30, GREEDY, on_delta=seen.append)
    [fine] = engine.generate([[1]], GREEDY)
    assert fine.finish_reason == "length"
    assert isinstance(seen[-1].error, CapacityError)
    assert runner.pool.opened == 0


def test_closing() -> None:
    runner = FakeRunner()
    with Engine(runner) as engine:
        seen: list[Delta] = []
        engine.add_request([1], SamplingParams(max_tokens=50), on_delta=seen.append)
        engine.step()
    assert "closed" in str(seen[-1].error)
    assert runner.pool.opened == 0
    engine.close()
    with pytest.raises(RequestError, match="closed"):
        engine.add_request([1], GREEDY)


def test_a_request_that_comes_while_closing_is_told() -> None:
    engine = Engine(FakeRunner())
    request = engine._prepare([1], GREEDY)
    engine.close()
    seen: list[Delta] = []
    engine._submit(request, seen.append)
    assert "closed" in str(seen[-1].error)
    assert not engine.has_work


def test_an_item_is_what_the_runner_documents() -> None:
    item = Item(table=FakeRunner().open(), tokens=[1, 2], start=0, stop=2, logits=1)
    assert not hasattr(item, "__dict__")
