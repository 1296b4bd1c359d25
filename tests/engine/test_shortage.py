"""A crowd of small requests for a tenth of the memory that they want: all end, or are told why, and nothing is left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from quire.bench.shortage import Load, drive
from quire.engine import Engine, SchedulerConfig
from quire.models.open import open_runner
from quire.store.tiering import Tiering
from tiny_model import chaotic_model

PER_TOKEN = 512
TIERS = "host:256KiB;swap={}"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many are admitted at once, and so preempted, is not a matter of how busy the machine is."""
    monkeypatch.setattr("quire.store.pace.STEP_S", 10.0)
    monkeypatch.setattr(Tiering, "ready", lambda _, fetch: fetch.done.wait(10.0))


def crowd(n: int, **options: Any) -> tuple[Any, Any]:
    load = Load(requests=n, too_large=0.02)
    model = chaotic_model()
    runner = open_runner(
        model, block_tokens=8, weights="plain", memory=load.bytes_wanted(PER_TOKEN) // 10, **options
    )
    assert runner.bytes_per_token == PER_TOKEN
    try:
        with Engine(runner, config=SchedulerConfig(step_tokens=96)) as engine:
            out = drive(engine, load, seed=n)
            stats = engine.stats()
            assert not engine.scheduler.unfinished
        usage = runner.usage()
        assert usage.held_bytes == 0
        assert usage.cached_bytes + usage.free_bytes == usage.total_bytes
        assert not runner.bridge.store.tables
        assert runner.below is None or runner.below.used_bytes == 0
    finally:
        runner.close()
    assert out.accounted == n
    assert out.ends["failed"] == 0
    assert out.ends["cancelled"] > n // 50
    assert out.ends["refused"] > 0
    assert "does not fit" in out.why["refused"] or "do not fit" in out.why["refused"]
    assert stats.checks["looks"] > 10
    assert stats.checks["violations"] == {}
    assert stats.scheduler.preemptions > n // 100, "the arena is too large for this to say anything"
    assert stats.ladder.queued > n // 10
    return out, stats


@pytest.mark.parametrize("share", ["off", "prefix"])
def test_all_end_or_are_told_why(share: str) -> None:
    _, stats = crowd(80, share=share, tiers=TIERS.format("always"))
    assert stats.ladder.swapped >= stats.ladder.returned > 0, "some may be cancelled while away"
    assert stats.ladder.recomputed == 0


def test_all_end_without_a_tier() -> None:
    _, stats = crowd(60)
    assert stats.ladder.recomputed == stats.scheduler.preemptions


@pytest.mark.slow
def test_ten_thousand() -> None:
    crowd(10_000, share="prefix", tiers=TIERS.format("auto"))
