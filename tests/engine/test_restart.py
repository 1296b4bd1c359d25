"""Sequences that are computed anew once they grow past a length (LongRoPE): by the scheduler, like any other work."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from engine.fake_runner import FakeRunner, by_hand
from quire.engine import Engine, SamplingParams, SchedulerConfig

PAST = 16


class Turning(FakeRunner):
    """Refuses a step that leads a sequence past `PAST` tokens from anywhere but its start."""

    restart_tokens = PAST

    def forward(self, items: Any, adapter: str | None = None) -> Any:
        for item in items:
            assert not 0 < item.start <= PAST < item.stop, "keys of two kinds in one sequence"
        return super().forward(items, adapter)


def engine_over(runner: FakeRunner, step_tokens: int = 64) -> Engine:
    return Engine(runner, config=SchedulerConfig(step_tokens=step_tokens, watermark=0.0))


@pytest.mark.parametrize("step_tokens", [5, 64])
@pytest.mark.parametrize("n_prompt", [PAST - 3, PAST, PAST + 1, 3 * PAST])
def test_each_position_past_the_turn_is_computed_once(n_prompt: int, step_tokens: int) -> None:
    runner = Turning()
    [output] = engine_over(runner, step_tokens).generate(
        [[1] * n_prompt], SamplingParams(max_tokens=8)
    )
    assert output.token_ids == by_hand(runner, [1] * n_prompt, 8)
    shares = [(start, stop) for [(start, stop, _)] in runner.steps]
    turns = [i for i, (start, stop) in enumerate(shares) if start == 0 and stop > PAST]
    assert len(turns) == (n_prompt + 7 > PAST), "the whole is computed once, and not in vain before"
    for (_, stop), (start, _) in pairwise(shares[turns[0] :] if turns else shares):
        assert start == stop
    if n_prompt > PAST:
        assert turns == [0]
        assert shares[0][1] == max(PAST + 1, min(step_tokens, n_prompt))


@pytest.mark.parametrize("n_blocks", [9, 12, 14])
def test_a_restart_without_room_preempts_like_any_other_shortage(n_blocks: int) -> None:
    """Forked samples share their prompt until they turn; then each needs all of its own."""
    runner = Turning(n_blocks, window=None)
    engine = engine_over(runner)
    params = SamplingParams(max_tokens=12, n=3, temperature=1.0, seed=5)
    engine.add_request([1] * (PAST - 2), params, request_id="turns")
    engine.add_request([2, 3], SamplingParams(max_tokens=12), request_id="short")
    done: dict[str, Any] = {}
    for _ in range(300):
        for delta in engine.step():
            assert delta.error is None
            if delta.output is not None:
                done[delta.request_id] = delta.output
        if not engine.has_work:
            break
    assert not engine.has_work
    assert done["short"].token_ids == by_hand(runner, [2, 3], 12)
    [alone] = engine_over(Turning()).generate([[1] * (PAST - 2)], params)
    assert [o.token_ids for o in done["turns"].outputs] == [o.token_ids for o in alone.outputs]
    assert engine.stats().scheduler.preemptions > 0
    assert runner.pool.opened == 0


def test_a_window_that_moved_on_takes_its_blocks_again() -> None:
    """What lies behind a window was given back, and is needed once more: alone it fits, so the other must wait."""
    runner = Turning(6, window=4)
    engine = engine_over(runner)
    outputs = engine.generate([[1] * 12, [2] * 12], SamplingParams(max_tokens=12))
    assert [o.token_ids for o in outputs] == [by_hand(runner, [k] * 12, 12) for k in (1, 2)]
    assert engine.stats().scheduler.stalls > 0
    assert runner.pool.opened == 0
