"""A thousand requests that come, go, are cancelled and preempted: nothing is left behind."""

from __future__ import annotations

import gc
import random

import psutil

import zoo
from models.driving import runner_for
from quire.engine import Engine, SamplingParams
from quire.engine.schedule import SchedulerConfig

REQUESTS = 1000
WARM = 300
"""Requests after which allocators have what they will ever want."""


def test_a_thousand_requests_leave_nothing_behind() -> None:
    dice = random.Random(5)
    runner = runner_for(zoo.build("mistral"), memory="160KiB")
    engine = Engine(runner, config=SchedulerConfig(step_tokens=48, max_running=12))
    process, alive = psutil.Process(), set()
    finished = cancelled = submitted = 0
    rss_warm = 0
    while submitted < REQUESTS or alive:
        while submitted < REQUESTS and len(alive) < 20:
            prompt = [dice.randrange(1, zoo.VOCAB) for _ in range(dice.randint(2, 30))]
            params = SamplingParams(
                max_tokens=dice.randint(1, 12),
                temperature=dice.choice([0.0, 1.0]),
                n=dice.choice([1, 1, 1, 2]),
                seed=submitted,
                ignore_eos=True,
            )
            alive.add(engine.add_request(prompt, params, priority=dice.randint(0, 2)))
            submitted += 1
        for delta in engine.step():
            if delta.output is not None:
                alive.discard(delta.request_id)
                finished += 1
        if alive and dice.random() < 0.15:
            victim = dice.choice(sorted(alive))
            assert engine.cancel(victim)
            alive.discard(victim)
            cancelled += 1
        if not rss_warm and submitted >= WARM:
            gc.collect()
            rss_warm = process.memory_info().rss
    engine.step()
    gc.collect()
    stats = engine.stats().scheduler
    usage = runner.usage()
    assert usage.held_bytes == 0
    assert usage.cached_bytes + usage.free_bytes == usage.total_bytes
    assert not runner.bridge.store.tables
    assert finished + cancelled >= REQUESTS
    assert cancelled > 50
    assert stats.preemptions > 50, "the arena is too large for this test to say anything"
    assert process.memory_info().rss - rss_warm < 16 << 20
