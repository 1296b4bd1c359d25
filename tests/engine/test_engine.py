"""The engine around the scheduler: what users call, what they get back, and what happens when something breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.fake_runner import FakeRunner, by_hand
from engine.tokenizers_made_here import byte_level
from quire.engine import Delta, Engine, SamplingParams, SchedulerConfig
from quire.errors import RequestError

GREEDY = SamplingParams(max_tokens=8)


class Typist(FakeRunner):
    """A model that types given texts: after the prompt `[k]` comes the k-th script, then end-of-sequence."""

    def __init__(self, *scripts: str, **kwargs: Any) -> None:
        self.tokenizer = byte_level()
        super().__init__(vocab_size=len(self.tokenizer), **kwargs)
        self.scripts = [self.tokenizer.encode(script) for script in scripts]

    def forward(self, items: Any, adapter: str | None = None) -> torch.Tensor:
        super().forward(items, adapter)
        rows = []
        for item in items:
            for at in range(item.stop - item.logits, item.stop):
                script = self.scripts[item.tokens[0]]
                logits = torch.zeros(self.vocab_size)
                logits[script[at] if at < len(script) else self.tokenizer.eos_token_id] = 50.0
                rows.append(logits)
        return torch.stack(rows) if rows else torch.zeros(0, self.vocab_size)


def typed(script: str, params: SamplingParams, **kwargs: Any) -> Any:
    runner = Typist(script)
    [output] = Engine(runner, runner.tokenizer, **kwargs).generate([[0]], params)
    return output


# ---- generate -------------------------------------------------------------------------------------------------------


def test_generate_is_greedy_decoding() -> None:
    runner = FakeRunner()
    prompts = [[1, 2, 3], [4], [5] * 30]
    outputs = Engine(runner).generate(prompts, GREEDY)
    assert [o.token_ids for o in outputs] == [by_hand(runner, p, 8) for p in prompts]
    assert [o.prompt_token_ids for o in outputs] == prompts
    assert {o.finish_reason for o in outputs} == {"length"}


def test_one_prompt_or_many_one_params_or_each() -> None:
    engine = Engine(FakeRunner())
    [one] = engine.generate([1, 2, 3], GREEDY)
    [same] = engine.generate([[1, 2, 3]], GREEDY)
    [array] = engine.generate([torch.tensor([1, 2, 3])], GREEDY)  # type: ignore[list-item]
    assert one.token_ids == same.token_ids == array.token_ids
    for arrays in (torch.tensor([1, 2, 3]), torch.tensor([[1, 2, 3]])):
        [array] = engine.generate(arrays, GREEDY)  # type: ignore[arg-type]
        assert array.token_ids == one.token_ids
    each = engine.generate([[1], [1]], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=3)])
    assert [len(o.token_ids) for o in each] == [2, 3]
    assert engine.generate([], GREEDY) == []
    with pytest.raises(RequestError, match="2 prompts and 1 params"):
        engine.generate([[1], [2]], [GREEDY])


def test_text_in_text_out() -> None:
    tokenizer = byte_level()
    engine = Engine(FakeRunner(vocab_size=len(tokenizer)), tokenizer)
    [output] = engine.generate("the quick fox", SamplingParams(max_tokens=20))
    assert output.prompt == "the quick fox"
    assert output.prompt_token_ids == tokenizer.encode("the quick fox")
    assert output.text == tokenizer.decode(output.token_ids, skip_special_tokens=True)


def test_a_seed_decides_and_is_reported() -> None:
    engine = Engine(FakeRunner())
    free = SamplingParams(max_tokens=12, temperature=1.0)
    [first], [second] = engine.generate([[1]], free), engine.generate([[1]], free)
    assert first.token_ids != second.token_ids
    [again] = engine.generate(
        [[1]], SamplingParams(max_tokens=12, temperature=1.0, seed=first.seed)
    )
    assert again.token_ids == first.token_ids


def test_samples_differ_and_are_what_they_are_alone() -> None:
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=3, n=4)
    runner = FakeRunner()
    [output] = Engine(runner).generate([[1, 2, 3, 4, 5]], params)
    assert [o.index for o in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in output.outputs}) == 4
    assert sum(stop - start for step in runner.steps for start, stop, _ in step) == 5 + 4 * 9
    [unforked] = Engine(FakeRunner(fork=False)).generate([[1, 2, 3, 4, 5]], params)
    assert [o.token_ids for o in unforked.outputs] == [o.token_ids for o in output.outputs]
    [one] = Engine(FakeRunner()).generate(
        [[1, 2, 3, 4, 5]], SamplingParams(max_tokens=10, temperature=1.0, seed=3)
    )
    assert one.token_ids == output.token_ids


def test_a_sample_that_ends_at_once_is_not_forked() -> None:
    runner = FakeRunner()
    engine = Engine(runner)
    [output] = engine.generate([[1, 2]], SamplingParams(max_tokens=1, n=5, temperature=1.0))
    assert [len(o.token_ids) for o in output.outputs] == [1] * 5
    assert engine.stats().scheduler.forks == 0
    assert runner.pool.opened == 0


def test_one_adapter_per_forward() -> None:
    runner = FakeRunner()
    engine = Engine(runner)
    for adapter in (None, "x", None, "y"):
        engine.add_request([1, 2], GREEDY, adapter=adapter)
    engine.step()
    assert runner.adapters == [None, "x", "y"]
    assert [len(step) for step in runner.steps] == [2, 1, 1]
    assert engine.stats().forwards == 3
    assert engine.stats().steps == 1


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_prompt_logprobs(chunk: int) -> None:
    runner = FakeRunner()
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    engine = Engine(runner, config=SchedulerConfig(step_tokens=chunk))
    params = SamplingParams(max_tokens=2, prompt_logprobs=2, logprobs=1)
    [output] = engine.generate([prompt], params)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for at in range(1, len(prompt)):
        told = output.prompt_logprobs[at]
        expected = runner.logits_after(prompt[:at]).log_softmax(-1)
        assert told is not None
        assert told.token_id == prompt[at]
        assert told.logprob == pytest.approx(float(expected[prompt[at]]), abs=1e-5)
        assert [token for token, _ in told.top] == expected.topk(2).indices.tolist()
    told = output.outputs[0].logprobs
    assert told is not None
    assert [t.token_id for t in told] == output.token_ids
    assert all(t.rank == 1 and t.top[0] == (t.token_id, t.logprob) for t in told)


def test_scoring_without_output_ends_every_sample() -> None:
    engine = Engine(FakeRunner())
    asked = SamplingParams(max_tokens=0, prompt_logprobs=0, n=3)
    engine.add_request([1, 2, 3], asked)
    deltas = [delta for _ in range(3) for delta in engine.step()]
    assert not engine.has_work, "siblings that nobody forks must not be waited for"
    assert [delta.index for delta in deltas] == [0, 1, 2]
    assert engine.stats().live_requests == 0


def test_scoring_without_output() -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    [output] = Engine(FakeRunner(max_context_tokens=4)).generate([[1, 2, 3, 4]], params)
    assert output.token_ids == []
    assert output.finish_reason == "length"
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 4


# ---- the end --------------------------------------------------------------------------------------------------------


def test_end_of_sequence() -> None:
    output = typed("the fox", SamplingParams(max_tokens=50))
    assert (output.text, output.finish_reason) == ("the fox", "stop")
    assert output.token_ids[-1] == byte_level().eos_token_id
    assert output.outputs[0].stop_reason is None
    on = typed("the fox", SamplingParams(max_tokens=50, ignore_eos=True))
    assert (on.text, on.finish_reason, len(on.token_ids)) == ("the fox", "length", 50)


def test_end_of_sequence_can_be_named() -> None:
    script = byte_level().encode("the lazy fox")
    output = typed("the lazy fox", SamplingParams(max_tokens=50), eos_token_ids=[script[2], 1])
    assert output.token_ids == script[:3]
    assert output.text == byte_level().decode(script[:2])
    assert output.outputs[0].stop_reason is None
    none = typed("the fox", SamplingParams(max_tokens=9), eos_token_ids=[])
    assert none.finish_reason == "length"


def test_stop_id() -> None:
    script = byte_level().encode("the lazy dog")
    output = typed("the lazy dog", SamplingParams(max_tokens=50, stop_token_ids=[script[3]]))
    assert output.finish_reason == "stop"
    assert output.outputs[0].stop_reason == script[3]
    assert output.token_ids == script[:4]
    assert output.text == byte_level().decode(script[:3])


def test_stop_string() -> None:
    output = typed(
        "the lazy dog, again and again", SamplingParams(max_tokens=50, stop=["zebra", "g, ag"])
    )
    assert output.text == "the lazy do"
    assert output.finish_reason == "stop"
    assert output.outputs[0].stop_reason == "g, ag"


def test_minimum_tokens_outlast_every_stop() -> None:
    text = "a dog a dog a dog a dog"
    params = SamplingParams(max_tokens=50, min_tokens=12, stop=["dog"])
    output = typed(text, params)
    assert len(output.token_ids) >= 12
    assert output.finish_reason == "stop"
    assert output.text.count("dog") >= 1
    short = typed("a", SamplingParams(max_tokens=50, min_tokens=5))
    assert len(short.token_ids) == 6  # five that are not the end, then the end
    assert byte_level().eos_token_id not in short.token_ids[:5]


def test_the_context_ends_it() -> None:
    [output] = Engine(FakeRunner(max_context_tokens=10)).generate(
        [[1, 2, 3]], SamplingParams(max_tokens=None)
    )
    assert len(output.token_ids) == 7
    assert output.finish_reason == "length"


# ---- step by step ---------------------------------------------------------------------------------------------------


def test_deltas_add_up() -> None:
    script = "hearts: ❤️ and 日本語 and a fox"
    runner = Typist(script, "the fox")
    engine = Engine(runner, runner.tokenizer, config=SchedulerConfig(step_tokens=4))
    names = [engine.add_request([k], SamplingParams(max_tokens=60, logprobs=0)) for k in (0, 1)]
    deltas: dict[str, list[Delta]] = {name: [] for name in names}
    while engine.has_work:
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    for name in names:
        last = deltas[name][-1]
        assert last.output is not None
        assert [d.output for d in deltas[name][:-1]] == [None] * (len(deltas[name]) - 1)
        assert "".join(d.text for d in deltas[name]) == last.output.text
        assert [t for d in deltas[name] for t in d.token_ids] == last.output.token_ids
        assert [x for d in deltas[name] for x in d.logprobs or []] == last.output.outputs[
            0
        ].logprobs
        assert last.finish_reason == last.output.finish_reason
        times = last.output.outputs[0].token_times_s
        assert times == sorted(times)
        assert last.output.figures.first_token_s == times[0]


@given(
    script=st.text("abc ❤é", min_size=1, max_size=30),
    stops=st.lists(st.text("abc ", min_size=1, max_size=4), max_size=2),
    max_tokens=st.integers(1, 40),
)
@settings(max_examples=40)
def test_streamed_text_is_the_cut_decode(script: str, stops: list[str], max_tokens: int) -> None:
    runner = Typist("x" + script)
    engine = Engine(runner, runner.tokenizer)
    engine.add_request([0], SamplingParams(max_tokens=max_tokens, stop=stops))
    text, output = "", None
    while engine.has_work:
        for delta in engine.step():
            text += delta.text
            output = delta.output
    assert output is not None
    assert text == output.text
    full = runner.tokenizer.decode(output.token_ids, skip_special_tokens=True)
    assert full.startswith(text)
    if output.outputs[0].stop_reason is None:
        assert text == full
        assert not any(stop in text for stop in stops)
    else:
        assert full[len(text) :].startswith(str(output.outputs[0].stop_reason))


def test_requests_join_at_any_step() -> None:
    runner = FakeRunner()
    engine = Engine(runner)
    done = {}
    for step in range(40):
        if step % 3 == 0 and step < 20:
            engine.add_request([step, 1], GREEDY, request_id=f"at {step}")
        for delta in engine.step():
            if delta.output:
                done[delta.request_id] = delta.output
    assert not engine.has_work
    for name, output in done.items():
        assert output.token_ids == by_hand(runner, [int(name[3:]), 1], 8)
    assert len(done) == 7


def test_cancel_releases_at_once_and_tells() -> None:
    runner = FakeRunner()
    engine = Engine(runner)
    name = engine.add_request([1] * 9, SamplingParams(max_tokens=50, n=2))
    waiting = engine.add_request([1] * 9, GREEDY)
    [*_] = engine.step()
    assert engine.held_bytes()[name] > 0
    assert engine.cancel(name)
    assert engine.cancel(waiting)
    assert engine.held_bytes() == {}
    assert runner.pool.opened == 0
    deltas = engine.step()
    assert [d.finish_reason for d in deltas] == ["cancelled"] * 3
    assert deltas[1].output is not None
    assert deltas[1].output.finish_reason == "cancelled"
    assert len(deltas[1].output.token_ids) == 1
    assert not engine.cancel(name)
    assert not engine.cancel("nobody")
    assert engine.stats().finished == {"cancelled": 3}


def test_a_callback_may_cancel_and_submit() -> None:
    engine = Engine(FakeRunner())
    seen: list[Delta] = []

    def on_delta(delta: Delta) -> None:
        seen.append(delta)
        if len(seen) == 3:
            engine.cancel("r")
            engine.add_request([2], GREEDY, request_id="next")

    engine.add_request([1], SamplingParams(max_tokens=50), request_id="r", on_delta=on_delta)
    out = []
    while engine.has_work:
        out += engine.step()
    assert seen[-1].finish_reason == "cancelled"
    assert len(seen) == 4
    assert {d.request_id for d in out} == {"next"}


def test_a_callback_that_fails_cancels_its_own_request_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Engine(FakeRunner())

    def on_delta(delta: Delta) -> None:
        raise OSError("the pipe is gone")

    engine.add_request([1], SamplingParams(max_tokens=50), on_delta=on_delta)
    [other] = engine.generate([[1]], GREEDY)
    assert other.finish_reason == "length"
    assert engine.stats().finished == {"length": 1, "cancelled": 1}
    assert "on_delta" in caplog.text


def test_stats_are_a_snapshot() -> None:
    engine = Engine(FakeRunner())
    before = engine.stats()
    engine.generate([[1, 2]], GREEDY)
    now = engine.stats()
    assert (before.steps, before.requests, before.output_tokens) == (0, 0, 0)
    assert (now.steps, now.requests, now.output_tokens) == (8, 1, 8)
    assert now.finished == {"length": 1}
    assert now.live_requests == 0
    assert not engine.core.live
    assert now.scheduler.decode_tokens == 7
