"""Published compactions in tiers: down when evicted or at the end, up again to the same tokens; a bad one is a miss."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import zoo
from quire.engine import Engine, SamplingParams
from quire.engine.schedule import SchedulerConfig
from quire.errors import CapacityError
from quire.models.open import open_runner
from quire.store import whole_tiers
from quire.store.tiering import Tiering
from quire.store.tiers import Tier
from quire.store.tiers.faulty import FaultyTier
from quire.store.tiers.host import HostTier
from quire.store.tiers.stack import TierStack
from retention.kept import drain, prompts, small
from retention.test_whole import KIVI, model

DOC, Q1, Q2 = prompts((90, 17, 11), zoo.VOCAB, seed=4)
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
LARGE = 64 << 20


@pytest.fixture(autouse=True)
def _time_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what a busy machine drops for want of time does not decide what is tested; and parts are many."""
    monkeypatch.setattr("quire.store.pace.STEP_S", 10.0)
    monkeypatch.setattr(whole_tiers, "PART_BYTES", 16 << 10)


@pytest.fixture
def opened() -> Iterator[Callable[..., Any]]:
    runners: list[Any] = []

    def make(name: str = "llama", stack: Sequence[Tier] | None = None, **options: Any) -> Any:
        for runner in runners:
            runner.close()
        given = {"memory": "32MiB", "block_tokens": 8, "attention": "reference", "share": "prefix"}
        runner = open_runner(model(name), **{**given, **options})
        if stack is not None:
            runner.tiering = Tiering(runner.sharing, TierStack(stack, b"n" * 32), 5.0)
        runners.append(runner)
        return runner

    yield make
    for runner in runners:
        runner.close()


def ask(runner: Any, question: list[int], keep: str, doc: list[int] = DOC) -> Any:
    with Engine(runner, config=SchedulerConfig(step_tokens=48)) as engine:
        name = engine.add_request(doc + question, PARAMS, keep=keep, context=len(doc))
        out = drain(engine)[name]
        assert engine.stats().checks["violations"] == {}
    assert runner.usage().held_bytes == 0
    return out


def give_up(runner: Any) -> None:
    """All that is cached leaves the device."""
    runner.tiering.begin_step()
    for whole in list(runner.sharing.wholes):
        pool, block = whole.blocks[0]
        pool.evict(block)
    runner.sharing.index.clear()
    assert runner.usage().cached_bytes == 0
    assert runner.tiering.stack.drain(time.monotonic() + 10)


def stats(runner: Any) -> dict[str, Any]:
    found: dict[str, Any] = runner.tiering.report()["wholes"]
    return found


CASES = [("llama", "auto", "kvzip"), ("llama", KIVI, "ada(keydiff)")]
MORE = [
    ("llama", "int4;sinks=2", "ada(kvzip)"),
    ("llama", "auto", "pyramid(ada(expected))"),
    ("gemma2", "auto", "ada(keydiff)"),
    ("deepseek_v3", "auto", "pyramid(keydiff)"),
    ("falcon_h1", "auto", "ada(keydiff)"),
]


@pytest.mark.parametrize(
    ("name", "kv", "policy"), [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in MORE)]
)
def test_it_goes_down_and_comes_up(
    opened: Callable[..., Any], name: str, kv: str, policy: str
) -> None:
    keep, size = small(policy), 8 if kv == "auto" else 16
    runner = opened(name, [HostTier(LARGE)], kv=kv, block_tokens=size)
    ask(runner, Q1, keep)
    want = ask(runner, Q2, keep)
    assert want.figures.cached_tokens == 90
    give_up(runner)
    assert stats(runner) == {"sent": 1, "dropped": 0, "loaded": 0, "truncated": {}}
    again = ask(runner, Q2, keep)
    assert again.token_ids == want.token_ids
    assert (again.figures.cached_tokens, again.figures.loaded_tokens) == (90, 90)
    assert again.figures.computed_tokens == want.figures.computed_tokens
    assert stats(runner)["loaded"] == 1
    assert ask(runner, Q1, keep).figures.loaded_tokens == 0, "it is there again"
    runner.sharing.clear()
    assert runner.usage().cached_bytes == 0


def test_after_a_restart(opened: Callable[..., Any], tmp_path: Path) -> None:
    keep = small("kvzip")
    options = {"tiers": f"host:1MiB,disk:64MiB@{tmp_path}"}
    first = opened(**options)
    want = ask(first, Q1, keep)
    second = opened(**options)
    found = ask(second, Q1, keep)
    assert found.token_ids == want.token_ids
    assert (found.figures.cached_tokens, found.figures.loaded_tokens) == (90, 90)
    other = ask(second, Q1, small("kvzip", "0.5"))
    assert other.figures.cached_tokens < 90, "another policy's"
    changed = [DOC[0] + 1, *DOC[1:]]
    assert ask(second, Q1, keep, changed).figures.cached_tokens == 0


def test_several_wait_for_one(opened: Callable[..., Any]) -> None:
    keep = small("keydiff")
    runner = opened(stack=[HostTier(LARGE)])
    ask(runner, Q1, keep)
    give_up(runner)
    with Engine(runner) as engine:
        names = [engine.add_request(DOC + q, PARAMS, keep=keep, context=90) for q in (Q1, Q2)]
        found = drain(engine)
    assert [found[n].figures.cached_tokens for n in names] == [90, 90]
    assert stats(runner)["loaded"] == 1


FAULTS: dict[str, tuple[dict[str, float], dict[str, int]]] = {
    "flip": ({"flip": 1.0}, {"corrupt": 1}),
    "swap": ({"swap": 1.0}, {"corrupt": 1}),
    "cut": ({"cut": 1.0}, {"corrupt": 1}),
    "fail": ({"fail": 1.0}, {}),
    "slow": ({"bytes_per_s": 1000.0}, {"timeout": 1}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_part_is_a_miss(opened: Callable[..., Any], fault: str) -> None:
    """Also from a tier that lies: it calls a hit what it has spoilt."""
    keep = small("kvzip")
    tier = FaultyTier(HostTier(LARGE), seed=1)
    runner = opened(stack=[tier])
    runner.tiering.deadline_s = 0.2
    want = ask(runner, Q1, keep).token_ids
    give_up(runner)
    runner.tiering.stack.ask(tier.inner.drop(b"n" * 32, below(runner)))
    faults, counted = FAULTS[fault]
    for name, share in faults.items():
        setattr(tier, name, share)
    again = ask(runner, Q1, keep)
    assert again.token_ids == want
    assert again.figures.loaded_tokens == 0
    assert stats(runner)["truncated"] == counted


def below(runner: Any) -> list[bytes]:
    """Keys of what is no compaction's: so that only that is spoilt."""
    tier = runner.tiering.stack.levels[0].tier.inner
    return [b.key for _, b in tier.oldest_first() if len(b.data) != whole_tiers.PART_BYTES]


@pytest.mark.parametrize("lost", ["first", "last"])
def test_a_lost_part_is_a_miss(opened: Callable[..., Any], lost: str) -> None:
    keep, tier = small("kvzip"), HostTier(LARGE)
    runner = opened(stack=[tier])
    want = ask(runner, Q1, keep)
    parts = runner.tiering.wholes._parts(next(iter(runner.sharing.wholes)))
    assert len(parts) > 2
    give_up(runner)
    key = parts[-1 if lost == "first" else -2].key
    asyncio.run(tier.drop(b"n" * 32, [key]))
    again = ask(runner, Q1, keep)
    assert again.token_ids == want.token_ids
    assert again.figures.loaded_tokens < 90, "what came are the prefix's own blocks"
    assert stats(runner)["loaded"] == 0
    assert stats(runner)["truncated"] == ({} if lost == "first" else {"miss": 1})


@pytest.mark.parametrize("error", [CapacityError("full"), ValueError("another form")])
def test_what_was_taken_for_it_goes_back(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    keep = small("ada(keydiff)")
    runner = opened(stack=[HostTier(LARGE)])
    want = ask(runner, Q1, keep)
    give_up(runner)
    restore, left = whole_tiers.restore_chain, [2]

    def second_fails(*given: Any) -> Any:
        chain = restore(*given)
        left[0] -= 1
        if not left[0]:
            raise error
        return chain

    monkeypatch.setattr(whole_tiers, "restore_chain", second_fails)
    again = ask(runner, Q1, keep)
    assert again.token_ids == want.token_ids
    assert again.figures.loaded_tokens < 90, "what came are the prefix's own blocks"
    assert stats(runner)["loaded"] == 0
    reason = "no room" if isinstance(error, CapacityError) else "corrupt"
    assert stats(runner)["truncated"] == {reason: 1}


def test_who_leaves_takes_nothing_along(opened: Callable[..., Any]) -> None:
    keep = small("keydiff")
    tier = FaultyTier(HostTier(LARGE))
    runner = opened(stack=[tier])
    ask(runner, Q1, keep)
    give_up(runner)
    tier.bytes_per_s = 200_000.0
    with Engine(runner) as engine:
        name = engine.add_request(DOC + Q1, PARAMS, keep=keep, context=90)
        engine.step()
        assert not engine.core.scheduler.running, "it waits for its compaction"
        engine.cancel(name)
        drain(engine)
    assert runner.usage().held_bytes == 0
    assert not runner.tiering.wholes._coming


def test_no_time_no_copy(opened: Callable[..., Any]) -> None:
    runner = opened(stack=[HostTier(LARGE)])
    ask(runner, Q1, small("keydiff"))
    runner.tiering.pace.spent(1e9)
    [whole] = runner.sharing.wholes
    pool, block = whole.blocks[0]
    pool.evict(block)
    assert (stats(runner)["sent"], stats(runner)["dropped"]) == (0, 1)
    assert not len(runner.sharing.wholes)
