"""The rules of a step, one by one, on a scheduler driven by hand: no engine, no model, a clock that moves when told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.fake_runner import BLOCK_BYTES, Clock, FakeRunner
from quire.engine.intake import output_limit
from quire.engine.params import SamplingParams
from quire.engine.request import Request, Sample, State
from quire.engine.schedule import Plan, SchedulerConfig
from quire.engine.scheduler import Scheduler
from quire.errors import CapacityError, ConfigError, InvariantError, RequestError


@dataclass
class Rig:
    """A scheduler, a runner and a clock, with the engine's part played by hand."""

    runner: FakeRunner
    config: SchedulerConfig = field(default_factory=lambda: SchedulerConfig(watermark=0.0))
    clock: Clock = field(default_factory=Clock)
    cut: Any = None

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.runner, self.config, self.clock, self.cut)
        self.finished: list[str] = []

    def add(
        self, name: str, prompt: int, output: int = 100, *, priority: int = 0, **params: Any
    ) -> Request:
        request = Request(
            name,
            [1] * prompt,
            SamplingParams(max_tokens=output, **params),
            output,
            0,
            priority=priority,
            arrival_s=self.clock(),
        )
        self.scheduler.add(request)
        return request

    def step(self) -> list[tuple[str, int]]:
        """One step; returns who computed how many tokens, in order."""
        plan = self.scheduler.schedule()
        share = shares(plan)
        if plan.samples:
            self.runner.forward([sample.item for sample in plan.samples if sample.item])
        for sample in plan.samples:
            self.scheduler.advance(sample)
            if sample.computed < len(sample.tokens):
                continue
            siblings = [s for s in sample.request.samples if s.state is State.NEW]
            for each in [sample, *siblings]:
                each.tokens.append(2)
            if siblings:
                self.scheduler.fork(sample, siblings)
            for each in [sample, *siblings]:
                if each.output_tokens >= sample.request.max_tokens:
                    self.scheduler.finish(each)
                    self.finished.append(name(each))
        return share

    def running(self) -> list[str]:
        return [name(sample) for sample in self.scheduler.running]

    def waiting(self) -> list[str]:
        return [name(sample) for sample in self.scheduler.waiting]


def name(sample: Sample) -> str:
    rid = sample.request.request_id
    return rid if len(sample.request.samples) == 1 else f"{rid}{sample.index}"


def shares(plan: Plan) -> list[tuple[str, int]]:
    return [(name(s), s.item.stop - s.item.start) for s in plan.samples if s.item]


# ---- the budget -----------------------------------------------------------------------------------------------------


def test_decoding_comes_first_and_prompts_share_what_is_left() -> None:
    rig = Rig(FakeRunner(), SchedulerConfig(step_tokens=10))
    rig.add("a", 4)
    rig.add("b", 13)
    rig.add("c", 3)
    assert rig.step() == [("a", 4), ("b", 6)]
    assert rig.step() == [("a", 1), ("b", 7), ("c", 2)]
    assert rig.step() == [("a", 1), ("b", 1), ("c", 1)]
    rig.add("d", 100)
    assert rig.step() == [("a", 1), ("b", 1), ("c", 1), ("d", 7)]


def test_prompts_are_read_in_small_chunks_beside_those_that_decode() -> None:
    rig = Rig(FakeRunner(), SchedulerConfig(step_tokens=64, beside_tokens=8, watermark=0.0))
    rig.add("a", prompt=50, output=3)
    rig.add("b", prompt=60)
    assert rig.step() == [("a", 50), ("b", 14)]
    assert rig.step() == [("a", 1), ("b", 8)]
    assert rig.step() == [("a", 1), ("b", 8)]
    assert rig.finished == ["a"]
    assert rig.step() == [("b", 30)]
    with pytest.raises(ConfigError, match="starve"):
        SchedulerConfig(beside_tokens=0)


def test_logits_are_asked_only_where_a_token_is_sampled() -> None:
    rig = Rig(FakeRunner(), SchedulerConfig(step_tokens=10))
    rig.add("a", 13)
    rig.step()
    rig.step()
    rig.step()
    assert rig.runner.steps == [[(0, 10, 0)], [(10, 13, 1)], [(13, 14, 1)]]


def test_prompt_logprobs_ask_for_each_position_once() -> None:
    rig = Rig(FakeRunner(), SchedulerConfig(step_tokens=100, logits_tokens=5))
    request = rig.add("a", 12, prompt_logprobs=0)
    assert request.prompt_logprobs == [None]
    for logits, scored in ((5, 5), (5, 5), (2, 1)):
        rig.step()
        assert rig.runner.steps[-1][0][2] == logits
        request.prompt_logprobs += [None] * scored
    assert len(request.prompt_logprobs) == 12
    [sample] = rig.scheduler.running
    rig.scheduler.growth.preempt(sample, Plan(0))
    rig.step()
    assert rig.runner.steps[-1] == [(0, 13, 1)]  # recomputed, not scored again


def test_a_whole_prompt_runner_gets_one_prompt_at_a_time_beyond_the_budget() -> None:
    rig = Rig(FakeRunner(chunked_prefill=False), SchedulerConfig(step_tokens=8))
    rig.add("a", 20)
    rig.add("b", 9)
    rig.add("c", 1)
    assert rig.step() == [("a", 20)]
    assert rig.step() == [("a", 1), ("b", 9)]
    assert rig.step() == [("a", 1), ("b", 1), ("c", 1)]
    rig.scheduler.growth.preempt(rig.scheduler.running[0], Plan(0))
    assert rig.step() == [("b", 1), ("c", 1), ("a", 23)]


def test_whole_prompts_do_not_share_a_step_even_when_they_would_fit() -> None:
    rig = Rig(FakeRunner(chunked_prefill=False))
    rig.add("a", 3)
    rig.add("b", 3)
    assert rig.step() == [("a", 3)]
    assert rig.step() == [("a", 1), ("b", 3)]


def test_chunks_are_cut_where_the_runner_says() -> None:
    def every_eight(table: Any, start: int, stop: int) -> int:
        edges = [e for e in (*range(8, 64, 8), 19) if start < e <= stop]
        return min([stop, *edges])

    rig = Rig(FakeRunner(), SchedulerConfig(step_tokens=100), cut=every_eight)
    rig.add("a", 19)
    assert [rig.step() for _ in range(4)] == [[("a", 8)], [("a", 8)], [("a", 3)], [("a", 1)]]
    rig.scheduler.growth.preempt(rig.scheduler.running[0], Plan(0))
    assert [rig.step()[0][1] for _ in range(4)] == [8, 8, 3, 2]  # the prompt's end again


def test_rows_are_limited() -> None:
    for runner, config in (
        (FakeRunner(max_rows=2), SchedulerConfig()),
        (FakeRunner(), SchedulerConfig(max_running=2)),
        (FakeRunner(), SchedulerConfig(step_tokens=2)),
    ):
        rig = Rig(runner, config)
        for each in "abc":
            rig.add(each, 1, 2)
        assert [who for who, _ in rig.step()] == ["a", "b"]
        assert [who for who, _ in rig.step()] == ["a", "b"]
        assert [who for who, _ in rig.step()] == ["c"]


# ---- order ----------------------------------------------------------------------------------------------------------


def test_higher_priority_goes_first_and_equal_ones_in_order_of_arrival() -> None:
    rig = Rig(FakeRunner(max_rows=1))
    for each, priority in (("a", 0), ("b", 1), ("c", 0), ("d", 1)):
        rig.add(each, 3, 2, priority=priority)
    while rig.scheduler.unfinished:
        rig.step()
    assert rig.finished == ["b", "d", "a", "c"]


@pytest.mark.parametrize(("waited_s", "first"), [(9.0, "new"), (11.0, "old")])
def test_ten_seconds_of_waiting_are_worth_a_level(waited_s: float, first: str) -> None:
    rig = Rig(FakeRunner(max_rows=1), SchedulerConfig(priority_step_s=10.0))
    rig.add("busy", 3, 3)
    rig.step()
    rig.add("old", 3, 1)
    rig.clock.now_s += waited_s
    rig.add("new", 3, 1, priority=1)
    while rig.scheduler.unfinished:
        rig.step()
    assert rig.finished[1] == first


def test_an_endless_stream_of_high_priority_does_not_starve_the_low() -> None:
    rig = Rig(FakeRunner(8, max_rows=2), SchedulerConfig(priority_step_s=5.0, watermark=0.0))
    rig.add("low", 6, 6, priority=-3)
    steps = 0
    while "low" not in rig.finished:
        for _ in range(2):
            rig.add(f"high{steps}", 8, 4, priority=3)
        rig.step()
        rig.clock.now_s += 0.5
        steps += 1
        assert steps < 300
    assert steps > 30  # it did wait while they were fresher


def test_nobody_is_skipped_at_the_door() -> None:
    rig = Rig(FakeRunner(4))
    rig.add("a", 9)
    rig.step()
    rig.add("big", 12)
    rig.add("small", 1)
    rig.step()
    assert rig.running() == ["a"]
    assert rig.waiting() == ["big", "small"]


# ---- a full pool ----------------------------------------------------------------------------------------------------


def test_the_youngest_of_the_lowest_priority_gives_way() -> None:
    rig = Rig(FakeRunner(5))
    for each, priority in (("old", 0), ("young", 0), ("high", 1), ("older-high", 1)):
        rig.add(each, 4, priority=priority)
    rig.step()
    assert rig.running() == ["high", "older-high", "old", "young"]
    share = rig.step()  # every one of them needs a second block; one is free, and young has one
    assert share == [("high", 1), ("older-high", 1)]
    assert rig.running() == ["high", "older-high", "old"]
    assert rig.waiting() == ["young"]
    assert rig.scheduler.stats().preemptions == 1
    assert rig.runner.pool.opened == 3  # the victim's table was released wholly


def test_a_preempted_one_comes_back_before_later_arrivals_and_recomputes_all() -> None:
    rig = Rig(FakeRunner(4))
    rig.add("a", 8, 8)
    rig.add("b", 7, 8)
    rig.step()
    [_, b] = rig.scheduler.running
    rig.add("c", 4, 4)
    rig.step()
    assert (rig.running(), rig.waiting()) == (["a"], ["b", "c"])
    assert b.computed == 0
    assert b.table is None
    n_tokens = len(b.tokens)
    while b.state is not State.RUNNING:
        assert rig.waiting()[0] == "b"
        share = rig.step()
    assert ("b", n_tokens) in share
    while rig.scheduler.unfinished:
        rig.step()
    assert rig.finished == ["a", "b", "c"]
    assert b.request.figures.preemptions == 1
    assert b.request.figures.recomputed_tokens == n_tokens - 1
    assert b.request.figures.computed_tokens == 7 + 8 - 1 + n_tokens - 1


def test_the_last_one_waits_with_what_it_holds() -> None:
    """Without room and with nobody behind it, a sample stalls; preempting itself would only cost a recomputation."""
    rig = Rig(FakeRunner(3))
    rig.add("a", 4, 5)
    rig.add("b", 4, 5)
    rig.step()
    assert rig.step() == [("a", 1)]
    assert rig.scheduler.stats().stalls == 1
    assert rig.running() == ["a", "b"]
    rig.step(), rig.step(), rig.step()
    assert rig.finished == ["a"]
    assert rig.step() == [("b", 1)]
    assert rig.scheduler.stats().preemptions == 0


def test_nobody_enters_behind_a_stalled_one() -> None:
    """The little room there is belongs to the one that waits for more of it."""
    rig = Rig(FakeRunner(20), SchedulerConfig(step_tokens=8, watermark=0.0))
    foreign = rig.runner.open()
    foreign.append(4 * 15)
    rig.add("a", 4)
    rig.add("b", 40)
    rig.step()
    assert rig.step() == [("a", 1), ("b", 7)]  # five blocks; b's next chunk wants two more
    foreign.truncate(4 * 14)
    rig.add("c", 3)
    assert rig.step() == [("a", 1)]
    assert (rig.running(), rig.waiting()) == (["a", "b"], ["c"])
    rig.add("high", 3, priority=1)  # before the stalled one it may be served
    assert rig.step() == [("a", 1), ("high", 3)]


def test_what_a_victim_had_of_the_budget_is_spent_again() -> None:
    rig = Rig(FakeRunner(4), SchedulerConfig(step_tokens=16, watermark=0.0))
    rig.add("low", 12, priority=-1)
    rig.step()
    rig.step()
    rig.add("high", 16)
    assert rig.step() == [("high", 16)]
    assert rig.waiting() == ["low"]


def test_a_chunk_taken_back_leaves_no_trace_in_the_plan() -> None:
    rig = Rig(FakeRunner(), SchedulerConfig(step_tokens=16))
    rig.add("a", 5)
    plan = rig.scheduler.schedule()
    [sample] = plan.samples
    assert (plan.budget, plan.prefills) == (11, 1)
    plan.take_back(sample)
    assert (plan.budget, plan.prefills, plan.samples, sample.item) == (16, 0, [], None)


def test_admission_takes_from_the_lower_only() -> None:
    rig = Rig(FakeRunner(4))
    rig.add("low", 8, priority=-1)
    rig.step()
    rig.add("same", 12, priority=-1)
    rig.step()
    assert rig.running() == ["low"]
    rig.add("high", 8)
    rig.step()
    assert rig.running() == ["high"]
    assert rig.waiting() == ["low", "same"]


def test_admission_leaves_the_watermark() -> None:
    rig = Rig(FakeRunner(10), SchedulerConfig(watermark=0.25))
    rig.add("a", 12)
    rig.add("b", 16)  # 3 + 4 blocks leave 3
    rig.add("c", 4)  # one more would leave 2, under a quarter of ten
    rig.step()
    assert rig.running() == ["a", "b"]
    alone = Rig(FakeRunner(10), SchedulerConfig(watermark=0.25))
    alone.add("a", 40)
    alone.step()
    assert alone.running() == ["a"]  # the watermark is for the others, and there are none


def test_running_ones_keep_room_for_their_next_block() -> None:
    """Without a guess: once a token was seen to take a block, an admission leaves one per running sample."""
    rig = Rig(FakeRunner(12), SchedulerConfig(watermark=0.001))
    for each in "abc":
        rig.add(each, 4)
    rig.step()
    rig.step()  # each took its second block: 6 of 12 used
    rig.add("d", 13)  # 4 blocks would leave 2, fewer than the three that run
    rig.step()
    assert rig.waiting() == ["d"]
    rig.add("e", 8)  # would leave 4, but nobody is skipped
    rig.step()
    assert rig.waiting() == ["d", "e"]


def test_a_preempted_one_waits_until_as_much_is_free_as_it_held() -> None:
    rig = Rig(FakeRunner(6), SchedulerConfig(step_tokens=6, watermark=0.0))
    rig.add("a", 8, 8)
    rig.add("b", 14, 2)
    while rig.scheduler.stats().preemptions == 0:
        rig.step()
    [b] = rig.scheduler.waiting
    assert b.need_bytes == 3 * BLOCK_BYTES
    assert 6 - len(rig.runner.pool.refs) == 2  # room for a chunk, not for what b had
    rig.step()
    assert rig.waiting() == ["b"]
    while rig.scheduler.unfinished:
        rig.step()
    assert rig.finished == ["a", "b"]
    assert rig.scheduler.stats().preemptions == 1


def test_alone_it_takes_smaller_chunks_when_the_pool_is_small() -> None:
    rig = Rig(FakeRunner(4, window=4))  # 16 tokens of room, a window of 4
    rig.add("a", 60, 3)
    sizes = []
    while rig.scheduler.unfinished:
        sizes += [n for _, n in rig.step()]
    assert sum(sizes) == 62
    assert max(sizes) <= 16


def test_what_cannot_run_even_alone_is_named_instead_of_waiting_for_ever() -> None:
    rig = Rig(FakeRunner(4))
    foreign = rig.runner.open()
    foreign.append(16)
    request = rig.add("a", 4)
    plan = rig.scheduler.schedule()
    assert plan.samples == []
    assert plan.failed == request.samples
    foreign.release()
    assert rig.step() == [("a", 4)]


# ---- siblings -------------------------------------------------------------------------------------------------------


def test_siblings_fork_after_the_prompt_and_share_it() -> None:
    rig = Rig(FakeRunner())
    rig.add("a", 9, 3, n=3)
    assert rig.step() == [("a0", 9)]
    assert rig.running() == ["a0", "a1", "a2"]
    assert len(rig.runner.pool.refs) == 2 + 3  # two full blocks shared, three tails
    assert rig.step() == [("a0", 1), ("a1", 1), ("a2", 1)]
    while rig.scheduler.unfinished:
        rig.step()
    assert not rig.runner.pool.refs
    assert rig.scheduler.stats().forks == 2


def test_siblings_without_a_row_or_room_wait_and_recompute() -> None:
    rows = Rig(FakeRunner(max_rows=2))
    rows.add("a", 9, 3, n=3)
    rows.step()
    assert (rows.running(), rows.waiting()) == (["a0", "a1"], ["a2"])
    room = Rig(FakeRunner(4))
    room.add("a", 9, 3, n=3)
    room.step()
    assert (room.running(), room.waiting()) == (["a0", "a1"], ["a2"])
    for rig in (rows, room):
        while rig.scheduler.unfinished:
            rig.step()
        assert sorted(rig.finished) == ["a0", "a1", "a2"]
        assert not rig.runner.pool.refs


def test_a_prompt_takes_the_rows_of_its_siblings() -> None:
    rig = Rig(FakeRunner(max_rows=4), SchedulerConfig(step_tokens=8))
    rig.add("a", 12, 3, n=3)
    rig.add("b", 2, 3, n=2)
    rig.add("c", 2, 3)
    assert rig.step() == [("a0", 8)]
    assert rig.step() == [("a0", 4)]  # b wants two rows, one is left, and c does not pass it
    assert rig.waiting() == ["b0", "c"]


def test_fork_and_advance_insist_on_their_order() -> None:
    rig = Rig(FakeRunner())
    request = rig.add("a", 2, n=2)
    with pytest.raises(InvariantError):
        rig.scheduler.fork(request.samples[0], request.samples[1:])
    with pytest.raises(InvariantError):
        rig.scheduler.advance(request.samples[0])


# ---- the seam for drafts --------------------------------------------------------------------------------------------


def test_a_shorter_advance_takes_rejected_tokens_back() -> None:
    rig = Rig(FakeRunner())
    rig.add("a", 5)
    plan = rig.scheduler.schedule()
    [sample] = plan.samples
    assert sample.item is not None
    rig.runner.forward([sample.item])
    rig.scheduler.advance(sample, 3)
    assert sample.computed == 3
    assert sample.table is not None
    assert sample.table.length == 3
    assert rig.step() == [("a", 2)]


# ---- leaving and books ----------------------------------------------------------------------------------------------


def test_leaving_from_anywhere_gives_everything_back() -> None:
    rig = Rig(FakeRunner(max_rows=2))
    requests = [rig.add(each, 4, n=2 if each == "a" else 1) for each in "abc"]
    rig.step()
    for request in requests:
        for sample in request.samples:
            rig.scheduler.finish(sample)
            rig.scheduler.finish(sample)
        assert request.unfinished == 0
        assert request.figures.kv_bytes_held == 0
    assert not rig.scheduler.unfinished
    assert rig.runner.pool.opened == 0
    assert not rig.runner.pool.refs
    assert rig.step() == []


def test_cancelled_entries_do_not_pile_up() -> None:
    rig = Rig(FakeRunner(max_rows=1))
    rig.add("busy", 1)
    rig.step()
    for i in range(1000):
        request = rig.add(f"r{i}", 1)
        rig.scheduler.finish(request.samples[0])
    assert len(rig.scheduler.seats._waiting) < 200
    assert rig.scheduler.stats().waiting == 0


def test_figures_follow_the_bytes_and_the_clock() -> None:
    rig = Rig(FakeRunner(), SchedulerConfig(step_tokens=8))
    rig.add("first", 8, 1)
    request = rig.add("a", 10, 4)
    rig.step()
    rig.clock.now_s = 2.5
    rig.step()
    figures = request.figures
    assert figures.queue_s == 2.5
    assert figures.kv_bytes_held == 2 * BLOCK_BYTES
    while rig.scheduler.unfinished:
        rig.step()
    assert figures.computed_tokens == 10 + 4 - 1
    assert figures.kv_bytes_peak == figures.kv_bytes_end == 4 * BLOCK_BYTES
    stats = rig.scheduler.stats()
    assert stats.prefill_tokens == 18
    assert stats.decode_tokens == 3
    assert (stats.running, stats.waiting, stats.admissions) == (0, 0, 2)


def test_peak_counts_what_a_window_gives_back() -> None:
    rig = Rig(FakeRunner(window=4), SchedulerConfig(step_tokens=20))
    request = rig.add("a", 20, 2)
    rig.step()
    rig.step()
    assert request.figures.kv_bytes_peak == 5 * BLOCK_BYTES
    assert request.figures.kv_bytes_end < 3 * BLOCK_BYTES


def test_tokens_already_in_an_opened_table_are_not_computed() -> None:
    class Warm(FakeRunner):
        def open(self) -> Any:
            table = super().open()
            table.append(len(self.known))
            table.hashes = list(self.known)
            return table

    from engine.fake_runner import prefix_hashes

    runner = Warm()
    runner.known = prefix_hashes([1] * 8)  # type: ignore[attr-defined]
    rig = Rig(runner)
    request = rig.add("a", 10, 2)
    assert rig.step() == [("a", 2)]
    assert request.figures.cached_tokens == 8
    rig.scheduler.growth.preempt(request.samples[0], Plan(0))
    runner.known = prefix_hashes([1] * 9)  # type: ignore[attr-defined]
    assert rig.step() == [("a", 2)]
    assert request.figures.cached_tokens == 8  # a recomputation is no hit


# ---- refused at the door --------------------------------------------------------------------------------------------


def limit(runner: FakeRunner, prompt: int, **params: Any) -> int:
    return output_limit(runner, prompt, SamplingParams(**params))


def test_limits() -> None:
    context = FakeRunner(max_context_tokens=100)
    assert limit(context, 10, max_tokens=20) == 20
    assert limit(context, 10, max_tokens=None) == 90
    assert limit(context, 95, max_tokens=20) == 5
    assert limit(context, 100, max_tokens=0, prompt_logprobs=0) == 0
    with pytest.raises(RequestError, match="empty"):
        limit(context, 0)
    with pytest.raises(RequestError, match="at most 99 leave room"):
        limit(context, 100)
    with pytest.raises(RequestError, match="min_tokens"):
        limit(context, 95, max_tokens=20, min_tokens=10)


def test_limits_of_the_pool() -> None:
    pool = FakeRunner(4)  # 16 tokens; the last sampled one needs no room
    assert limit(pool, 10, max_tokens=7) == 7
    assert limit(pool, 10, max_tokens=None) == 7
    assert limit(pool, 16, max_tokens=1) == 1
    with pytest.raises(CapacityError, match="max_tokens=7 would"):
        limit(pool, 10, max_tokens=8)
    with pytest.raises(CapacityError, match="prompt of 17 tokens does not fit"):
        limit(pool, 17, max_tokens=1)
    with pytest.raises(CapacityError, match="does not fit"):
        limit(pool, 17, max_tokens=None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"step_tokens": 0},
        {"max_running": 0},
        {"priority_step_s": 0.0},
        {"priority_step_s": math.inf},
        {"watermark": 1.0},
        {"logits_tokens": 0},
    ],
)
def test_config_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SchedulerConfig(**wrong)
