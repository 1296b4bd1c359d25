"""Invariants looked at while an engine runs: nothing is found where all is well, and each breach by its name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from quire.engine import Engine, SamplingParams
from quire.models.open import open_runner
from tiny_model import chaotic_model

NAMES = {
    "held": "a chain counts the blocks that it holds",
    "freed": "a block that a sequence holds is held",
    "twice": "a chain holds a block once",
    "computed": "what is computed is committed",
    "lengths": "committed, accepted and reserved tokens in this order",
    "pool": "a pool's blocks lie in its slabs",
    "usage": "free, cached and held bytes are the total",
    "parked": "host memory in use is that of parked sequences",
    "seats": "running samples in the order of their seats",
}


@pytest.fixture
def engine() -> Iterator[Engine]:
    runner = open_runner(chaotic_model(), memory="1MiB", attention="reference", block_tokens=8)
    with Engine(runner) as engine:
        for n in (20, 30):
            engine.add_request(list(range(1, n)), SamplingParams(max_tokens=40, ignore_eos=True))
        for _ in range(4):
            engine.step()
        yield engine
    runner.close()


def breach(engine: Engine, what: str, patch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Breaks one thing; returns what mends it."""
    sample, other = engine.scheduler.running[:2]
    table: Any = sample.table
    chain, pool = table.chains[0], table.chains[0].pool
    ids, refs = chain.ids.copy(), pool._refs[:]
    if what == "held":
        patch.setattr(chain, "held", chain.held + 1)
    elif what == "freed":
        pool._refs[int(chain.ids[0])] = 0
    elif what == "twice":
        chain.ids[1] = chain.ids[0]
    elif what == "computed":
        patch.setattr(sample, "computed", sample.computed - 1)
    elif what == "lengths":
        patch.setattr(table, "accepted", table.length + 1)
    elif what == "pool":
        patch.setattr(pool, "held", pool.capacity + 1)
    elif what == "usage":
        wrong = type(engine.runner.usage())(10, 4, 4, 4)
        patch.setattr(engine.runner, "usage", lambda: wrong)
    elif what == "parked":
        patch.setattr(engine.scheduler.ladder.stats, "parked_bytes", 1)
    elif what == "seats":
        patch.setattr(other, "seat", sample.seat)

    def mend() -> None:
        patch.undo()
        chain.ids, pool._refs = ids, refs

    return mend


def test_all_is_well(engine: Engine) -> None:
    checks = engine.core.checks
    before = checks.done
    for _ in range(2 * checks.every):
        engine.step()
    assert checks.done == before + 2
    assert engine.stats().checks == {"looks": checks.done, "violations": {}}


@pytest.mark.parametrize("what", NAMES)
def test_a_breach_is_counted_by_its_name_and_logged_once(
    engine: Engine, what: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend = breach(engine, what, monkeypatch)
    checks = engine.core.checks
    with caplog.at_level(logging.ERROR, "quire.engine.checks"):
        for _ in range(4):  # each running sequence gets its turn
            checks.look()
    mend()
    assert checks.violations[NAMES[what]] >= 2
    assert sum(NAMES[what] in m for m in caplog.messages) == 1


def test_what_is_held_by_nobody_is_found() -> None:
    runner = open_runner(chaotic_model(), memory="1MiB", attention="reference", block_tokens=8)
    with Engine(runner) as engine:
        engine.core.checks.look()
        assert not engine.core.checks.violations
        pool = next(iter(runner.bridge.store.pools.values()))
        block = pool.take()
        engine.core.checks.look()
        assert engine.core.checks.violations == {"nothing is held when nobody runs": 1}
        pool.release(block)
    runner.close()
