"""Random programs on a tiny pool: join, leave, cancel, preempt. Whatever happens, the laws hold.

- Everybody who is not cancelled finishes, with the tokens that it gets alone in a pool without end (law 8).
- In every step the first seat among the unfinished runs, unless it waits for a row (progress).
- Within a priority requests are admitted in order of arrival.
- Nothing runs twice in a step, beyond the budget or the rows; references recounted from the tables are the pool's.
- Afterwards nothing is held (law 9).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.fake_runner import Clock, FakeRunner, FlatRunner
from quire.engine import Engine, RequestOutput, SamplingParams, SchedulerConfig
from quire.engine.request import Delta, State
from quire.errors import CapacityError

PARAMS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 8, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.5, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"presence_penalty": 0.7, "logit_bias": {3: 2.0}, "min_tokens": 2},
    {"logprobs": 2},
    {"prompt_logprobs": 1},
    {"temperature": 1.0, "stop_token_ids": [5, 6, 7, 8]},
]


@dataclass(frozen=True)
class Wish:
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int
    adapter: str | None


@st.composite
def wishes(draw: st.DrawFn) -> Wish:
    prompt = draw(st.lists(st.integers(0, 39), min_size=1, max_size=30))
    more = draw(st.sampled_from(PARAMS))
    params = SamplingParams(
        max_tokens=draw(st.integers(2, 14)),
        seed=draw(st.integers(0, 3)),
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        **more,  # type: ignore[arg-type]
    )
    return Wish(
        tuple(prompt), params, draw(st.integers(-2, 2)), draw(st.sampled_from([None, None, "lora"]))
    )


ops = st.one_of(
    st.tuples(st.just("add"), wishes()),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("wait"), st.floats(0.0, 30.0)),
)
runners = st.fixed_dictionaries(
    {
        "n_blocks": st.integers(3, 24),
        "block_tokens": st.sampled_from([1, 2, 4, 8]),
        "max_rows": st.sampled_from([None, 1, 2, 3, 5]),
        "chunked_prefill": st.sampled_from([True, True, False]),
        "window": st.sampled_from([None, None, 6]),
        "fork": st.sampled_from([True, True, False]),
    }
)
configs = st.builds(
    SchedulerConfig,
    step_tokens=st.sampled_from([1, 2, 3, 7, 16, 64]),
    max_running=st.sampled_from([1, 2, 4, 64]),
    watermark=st.sampled_from([0.0, 0.01, 0.3]),
    priority_step_s=st.sampled_from([0.1, 10.0]),
    logits_tokens=st.sampled_from([1, 3, 100]),
)


def alone(wish: Wish) -> RequestOutput:
    engine = Engine(FakeRunner(), eos_token_ids=[1])
    [output] = engine.generate([wish.prompt], wish.params)
    return output


class Watched:
    """An engine whose every step is checked."""

    def __init__(self, runner: FakeRunner, config: SchedulerConfig) -> None:
        self.runner, self.config, self.clock = runner, config, Clock()
        self.engine = Engine(runner, config=config, clock=self.clock, eos_token_ids=[1])
        self.outputs: dict[str, RequestOutput] = {}
        self.seen: dict[tuple[str, int], list[int]] = {}
        self.wanted: dict[str, Wish] = {}
        self.cancelled: set[str] = set()

    def run(self, op: str, argument: Any) -> None:
        if op == "add":
            self.add(argument)
        elif op == "cancel" and self.wanted:
            name = list(self.wanted)[argument % len(self.wanted)]
            if self.engine.cancel(name):
                self.cancelled.add(name)
                assert name not in self.engine.held_bytes()
        elif op == "wait":
            self.clock.now_s += argument
        elif op == "step":
            for _ in range(argument):
                self.step()

    def add(self, wish: Wish) -> None:
        try:
            name = self.engine.add_request(
                wish.prompt, wish.params, priority=wish.priority, adapter=wish.adapter
            )
        except CapacityError:
            assert not self.runner.fits(len(wish.prompt) + (wish.params.max_tokens or 0) - 1)
        else:
            self.wanted[name] = wish

    def compare(self, name: str) -> None:
        """With what the same request gets alone, as far as it came."""
        output, expected = self.outputs[name], alone(self.wanted[name])
        for mine, reference in zip(output.outputs, expected.outputs, strict=True):
            assert self.seen.get((name, mine.index), []) == mine.token_ids
            if name in self.cancelled:
                assert mine.token_ids == reference.token_ids[: len(mine.token_ids)]
                continue
            assert mine.token_ids == reference.token_ids
            assert mine.finish_reason == reference.finish_reason
            assert mine.stop_reason == reference.stop_reason
            assert mine.logprobs == reference.logprobs
            assert output.prompt_logprobs == expected.prompt_logprobs

    def check_figures(self, name: str) -> None:
        output, figures = self.outputs[name], self.outputs[name].figures
        assert figures.output_tokens == sum(len(o.token_ids) for o in output.outputs)
        assert figures.kv_bytes_held == 0
        assert figures.kv_bytes_peak > 0
        times = [figures.queue_s, figures.ttft_s, figures.total_s]
        assert None not in times
        assert [0.0, *times] == sorted([0.0, *times])  # type: ignore[type-var, list-item]
        assert all(len(o.token_times_s) == len(o.token_ids) for o in output.outputs)
        # each position but the last of a sample is new once; a sibling's prompt never is
        new = figures.computed_tokens - figures.recomputed_tokens
        samples = sum(len(o.token_ids) - 1 for o in output.outputs)
        assert new == figures.prompt_tokens + samples

    def take(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            assert delta.error is None
            self.seen.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
            if delta.output is not None:
                assert delta.request_id not in self.outputs
                self.outputs[delta.request_id] = delta.output

    def step(self) -> None:
        scheduler, runner = self.engine.scheduler, self.runner
        live = (*scheduler.running, *scheduler.waiting)
        first = min(live, key=lambda s: s.seat, default=None)
        before, rows = len(runner.steps), sum(s.rows for s in scheduler.running)
        progress = None if first is None else (first.computed, len(first.tokens))
        free_row = first is not None and (
            first.state is State.RUNNING or rows + first.rows <= scheduler.seats.max_rows
        )
        self.clock.now_s += 0.1
        self.take(self.engine.step())
        if first is not None and free_row:
            assert first.state is State.FINISHED or progress != (first.computed, len(first.tokens))
        computed = [stop - start for step in runner.steps[before:] for start, stop, _ in step]
        assert len(computed) <= scheduler.seats.max_rows
        if self.runner.chunked_prefill:
            assert sum(computed) <= self.config.step_tokens
        else:
            assert sum(n > 1 for n in computed) <= 1
        self.recount()

    def recount(self) -> None:
        """References, rows and bytes from the tables themselves."""
        scheduler = self.engine.scheduler
        refs: Counter[int] = Counter()
        for sample in scheduler.running:
            assert sample.state is State.RUNNING
            assert sample.item is None
            assert sample.table is not None
            refs.update(block for block in sample.table.blocks if block is not None)  # type: ignore[attr-defined]
        assert dict(refs) == self.runner.pool.refs
        assert self.runner.pool.opened == len(scheduler.running)
        assert (
            scheduler.seats.rows
            == sum(s.rows for s in scheduler.running)
            <= scheduler.seats.max_rows
        )
        assert [s.seat for s in scheduler.running] == sorted(s.seat for s in scheduler.running)
        for sample in scheduler.waiting:
            assert sample.table is None
            assert sample.computed == 0
            assert sample.held_bytes == 0
        assert scheduler.stats().waiting == len(scheduler.waiting)
        held = self.engine.held_bytes()
        assert sum(held.values()) == sum(s.table.held_bytes() for s in scheduler.running if s.table)


@given(program=st.lists(ops, max_size=40), runner=runners, config=configs)
def test_everybody_finishes_with_the_tokens_they_get_alone(
    program: list[Any], runner: dict[str, Any], config: SchedulerConfig
) -> None:
    watched = Watched(FakeRunner(**runner), config)
    for op, argument in program:
        watched.run(op, argument)
    steps, wanted = 0, watched.wanted
    work = sum((len(w.prompt) + (w.params.max_tokens or 0)) * w.params.n for w in wanted.values())
    while watched.engine.has_work:
        watched.step()
        steps += 1
        assert steps < 10 + work * (1 + len(wanted))
    watched.take(watched.engine.step())

    assert watched.runner.pool.opened == 0
    assert not watched.runner.pool.refs
    assert not watched.engine.core.live
    assert set(watched.outputs) == set(wanted)
    for name in wanted:
        watched.compare(name)
        if name not in watched.cancelled:
            watched.check_figures(name)
    for priority in range(-2, 3):  # first come, first served
        names = [n for n, w in wanted.items() if w.priority == priority]
        done = [watched.outputs[n].figures for n in names if n not in watched.cancelled]
        starts = [figures.admitted_s for figures in done]
        assert starts == sorted(starts)  # type: ignore[type-var]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=12),
    spare=st.integers(0, 2),
)
def test_any_set_that_fits_one_by_one_finishes(lengths: list[tuple[int, int]], spare: int) -> None:
    """The tightest pool: the largest request fills it alone."""
    n_blocks = max(-(-(prompt + output - 1) // 2) for prompt, output in lengths) + spare
    watched = Watched(FakeRunner(n_blocks, block_tokens=2), SchedulerConfig(watermark=0.0))
    for prompt, output in lengths:
        watched.engine.add_request([3] * prompt, SamplingParams(max_tokens=output, ignore_eos=True))
    while watched.engine.has_work:
        watched.step()
    got = [len(watched.outputs[str(i)].token_ids) for i in range(len(lengths))]
    assert got == [output for _, output in lengths]


def test_recomputation_stays_small_under_steady_pressure() -> None:
    """Forty requests in a pool for about six: no thrash, the waste is a fraction of the work."""
    runner = FakeRunner(60, block_tokens=4)
    engine = Engine(runner, config=SchedulerConfig(step_tokens=64))
    prompts = [[i % 40] * (20 + i % 7) for i in range(40)]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=25, ignore_eos=True))
    stats = engine.stats().scheduler
    assert stats.preemptions > 0
    again = sum(o.figures.recomputed_tokens for o in outputs)
    total = sum(o.figures.computed_tokens for o in outputs)
    assert again == stats.recomputed_tokens
    assert again < 0.25 * total


@pytest.mark.parametrize("n", [1, 3])
def test_a_runner_that_keeps_nothing(n: int) -> None:
    """`--kv none`: no bytes anywhere, and the same tokens."""
    params = SamplingParams(max_tokens=6, n=n, temperature=1.0, seed=4)
    prompts = [[1, 2, 3], [4] * 10]
    flat = Engine(FlatRunner(), config=SchedulerConfig(step_tokens=4)).generate(prompts, params)
    kept = Engine(FakeRunner()).generate(prompts, params)
    for mine, reference in zip(flat, kept, strict=True):
        assert [o.token_ids for o in mine.outputs] == [o.token_ids for o in reference.outputs]
        assert mine.figures.kv_bytes_peak == 0
