"""Law 8 with tiers: the same tokens with and without, whatever a tier does to its blocks; and none waits for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.engine import Engine, SamplingParams, SchedulerConfig
from quire.engine.sharing import sharing_report
from quire.errors import ConfigError
from quire.models.open import open_runner
from quire.store.namespace import Namespace
from quire.store.tiering import Tiering
from quire.store.tiers import Block, Outcome, Tier
from quire.store.tiers.checked import Checked
from quire.store.tiers.disk import DiskTier
from quire.store.tiers.faulty import FaultyTier
from quire.store.tiers.host import HostTier
from quire.store.tiers.stack import TierStack
from tiny_model import chaotic_model

RECIPES = ["fp32", "int8"]
MORE = ["bf16", "int4;sinks=2", "kivi:bits=2,group=16,residual=16"]
EACH = [*RECIPES, *(pytest.param(kv, marks=pytest.mark.slow) for kv in MORE)]
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
SMALL, LARGE = "200KiB", "8MiB"
"""Room for about two of the prompts, or for all of them many times."""


both = pytest.mark.parametrize("model", ["full", "window"], indirect=True)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    kind = getattr(request, "param", "full")
    return chaotic_model(None if kind == "full" else 40)


def prompts(n: int = 4) -> list[list[int]]:
    """Prompts of 150 to 200 tokens; pairs of them begin alike."""
    g = torch.Generator().manual_seed(5)
    draw = torch.randint(0, 97, (40, 200), generator=g).tolist()
    return [[*draw[i // 2][:130], *draw[10 + i][: 20 + 10 * i]] for i in range(n)]


Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _time_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what a busy machine drops for want of time does not decide what is tested."""
    monkeypatch.setattr("quire.store.pace.STEP_S", 10.0)


def push_down(runner: Any) -> None:
    """Everything that is cached leaves the device; the tiers have it then."""
    runner.tiering.begin_step()
    runner.sharing.index.clear()
    assert runner.usage().cached_bytes == 0
    assert runner.tiering.stack.drain(time.monotonic() + 10)


@pytest.fixture
def opened(model: Any) -> Iterator[Make]:
    runners: list[Any] = []

    def make(stack: Sequence[Tier] | None = None, deadline_s: float = 5.0, **options: Any) -> Any:
        """A runner; over these tiers, where given."""
        given = {"memory": LARGE, "attention": "reference", "block_tokens": 16, "weights": "plain"}
        for runner in runners:  # a model serves one at a time
            runner.close()
        runner = open_runner(model, **{**given, "share": "prefix", **options})
        if stack is not None:
            runner.tiering = Tiering(runner.sharing, TierStack(stack, b"n" * 32), deadline_s)
        runners.append(runner)
        return runner

    yield make
    for runner in runners:
        runner.close()


def served(runner: Any, rounds: int = 1, each: bool = True) -> list[list[int]]:
    """The prompts, one after another or all at once; at the end nothing is held."""
    out = []
    with Engine(runner, config=SchedulerConfig(step_tokens=128)) as engine:
        for _ in range(rounds):
            batches = [[p] for p in prompts()] if each else [prompts()]
            for batch in batches:
                out += [o.token_ids for o in engine.generate(batch, PARAMS)]
    assert runner.usage().held_bytes == 0
    return out


def report(runner: Any) -> dict[str, Any]:
    return runner.tiering.report()


@pytest.fixture(scope="module")
def plain(model: Any) -> Callable[[str], list[list[int]]]:
    """Tokens without tiers or sharing, by recipe."""
    runner = open_runner(
        model, memory=LARGE, attention="reference", block_tokens=16, weights="plain"
    )
    known = {"fp32": served(runner)}
    runner.close()
    return lambda kv="fp32": known[kv]


# -- round trips -------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kv", EACH)
def test_what_was_evicted_comes_back_from_the_host(opened: Make, kv: str) -> None:
    small = {"fp32": SMALL, "bf16": "100KiB"}
    want = served(opened(kv=kv, share="off"))
    runner = opened([HostTier(8 << 20)], kv=kv, memory=small.get(kv, "160KiB"))
    assert served(runner) == want
    assert report(runner)["demoted_blocks"] > 0
    push_down(runner)
    assert served(runner) == want
    found = report(runner)
    assert found["loaded_tokens"] > 300
    assert not found["truncated"]
    assert not found["dropped_blocks"]
    assert found["levels"][0]["hit"] >= found["loaded_blocks"] > 0


@both
@pytest.mark.parametrize("kv", EACH)
def test_a_restart_keeps_the_cache(opened: Make, tmp_path: Path, kv: str) -> None:
    tiers = f"disk:8MiB@{tmp_path}/tier"
    texts = served(opened(kv=kv, share="off"))
    assert served(opened(kv=kv, tiers=tiers)) == texts
    runner = opened(kv=kv, tiers=tiers)
    with Engine(runner) as engine:
        for prompt, want in zip(prompts(), texts, strict=True):
            (out,) = engine.generate([prompt], PARAMS)
            assert out.token_ids == want
            assert out.figures.cached_tokens >= (len(prompt) - 1) // 32 * 32
    assert report(runner)["loaded_tokens"] > 300
    other = opened(kv="bf16" if kv == "fp32" else "fp32", tiers=tiers)
    served(other)
    assert report(other)["loaded_tokens"] == 0


def test_what_the_host_gives_up_goes_to_the_disk(opened: Make, plain: Any, tmp_path: Path) -> None:
    runner = opened([HostTier(200 << 10), DiskTier(tmp_path / "t", 8 << 20)])
    assert served(runner) == plain()
    push_down(runner)
    assert served(runner) == plain()
    host, disk = report(runner)["levels"]
    assert host["hit"] > 0
    assert disk["hit"] > 0
    assert disk["stored"] > 0


@both
def test_many_at_once(opened: Make, plain: Any) -> None:
    runner = opened([HostTier(8 << 20)], memory=SMALL)
    assert served(runner, rounds=2, each=False) == plain() * 2
    push_down(runner)
    assert served(runner, each=False) == plain()
    assert report(runner)["loaded_tokens"] > 0


def test_requests_with_one_prefix_load_it_once(opened: Make, tmp_path: Path) -> None:
    tiers = f"disk:8MiB@{tmp_path}/tier"
    served(opened(tiers=tiers))
    runner = opened(tiers=tiers)
    with Engine(runner, config=SchedulerConfig(step_tokens=128)) as engine:
        engine.generate([prompts()[0]] * 5, PARAMS)
    found = report(runner)
    assert found["levels"][0]["hit"] <= found["loaded_blocks"] + 2


def test_the_second_time_it_is_found_a_block_is_written_back(opened: Make, tmp_path: Path) -> None:
    runner = opened([HostTier(8 << 20), DiskTier(tmp_path / "t", 8 << 20)])
    prompt = prompts()[0]
    with Engine(runner) as engine:
        for written in (False, False, True):
            engine.generate([prompt], PARAMS)
            assert (report(runner)["written_back"] > 2) is written
        runner.tiering.stack.drain(time.monotonic() + 5)
        assert report(runner)["levels"][1]["stored"] > 0
        assert report(runner)["levels"][0]["stored"] == 0


def test_what_a_step_has_no_time_to_write_back_is_owed(
    opened: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look-up that makes a block worth it falls into a step without time; later steps write, once."""
    runner = opened([DiskTier(tmp_path / "t", 8 << 20)])
    prompt = prompts()[0]
    monkeypatch.setattr("quire.store.pace.ALONE_S", 0.0)
    monkeypatch.setattr("quire.store.pace.STEP_S", 0.0)
    monkeypatch.setattr("quire.store.pace.STEP_SHARE", 0.0)
    with Engine(runner) as engine:
        for _ in range(5):
            engine.generate([prompt], PARAMS)
        owed = report(runner)["owed_blocks"]
        assert owed > 2
        assert report(runner)["written_back"] == 0
        monkeypatch.setattr("quire.store.pace.STEP_S", 10.0)
        engine.generate([prompts()[3]], PARAMS)
        assert report(runner)["owed_blocks"] == 0
        assert report(runner)["written_back"] == owed
        engine.generate([prompt], PARAMS)
        assert report(runner)["written_back"] == owed, "what was written is not written again"


def test_a_tenant_finds_only_its_own(opened: Make, tmp_path: Path) -> None:
    tiers, prompt = f"disk:8MiB@{tmp_path}/tier", prompts()[0]
    for who, loads in ((b"a", False), (b"b", False), (b"a", True)):
        runner = opened(tiers=tiers)
        with Engine(runner) as engine:
            (out,) = engine.generate([prompt], PARAMS, namespace=Namespace(who))
            assert (out.figures.loaded_tokens > 0) is loads
            assert (out.figures.cached_tokens > 0) is loads


def test_one_changed_weight_is_a_miss(opened: Make, model: Any, tmp_path: Path) -> None:
    """Any of them, not only those of a sample."""
    tiers = f"disk:8MiB@{tmp_path}/tier"
    served(opened(tiers=tiers))
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[1, 1] += 1e-3
    try:
        runner = opened(tiers=tiers)
        served(runner)
        assert report(runner)["loaded_tokens"] == 0
        assert report(runner)["levels"][0]["blocks"] > 0
    finally:
        with torch.no_grad():
            weight[1, 1] -= 1e-3


@both
def test_what_comes_back_reads_as_if_computed(opened: Make) -> None:
    """The shadow audit computes every hit again, those from a tier as well, in a lossy codec."""
    runner = opened([HostTier(8 << 20)], kv="int8", share="prefix:audit=1")
    served(runner)
    push_down(runner)
    with Engine(runner, config=SchedulerConfig(step_tokens=128)) as engine:
        engine.generate(prompts(), PARAMS)
        found = sharing_report(engine)
    assert found is not None
    assert found["tiers"]["loaded_tokens"] > 300
    assert found["audit"]["audited"] >= 2
    assert found["audit"]["diverged"] == 0


# -- faults ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "faults",
    [
        {"flip": 0.3},
        {"swap": 0.8},
        {"cut": 0.3},
        {"fail": 0.2},
        {"flip": 0.2, "swap": 0.2, "cut": 0.2, "fail": 0.05},
    ],
    ids="-".join,
)
def test_a_tier_that_lies_changes_no_token(opened: Make, plain: Any, faults: Any) -> None:
    faulty = FaultyTier(HostTier(8 << 20), **faults)
    runner = opened([Checked(faulty)])
    for _ in range(3):
        assert served(runner) == plain()
        push_down(runner)
        runner.tiering.stack.levels[0].paused_until = 0.0
    assert faulty.spoilt > 1


@both
@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_on_the_disk_change_no_token(
    opened: Make, plain: Any, tmp_path: Path, seed: int
) -> None:
    """125 of them each time, over everything that was written."""
    tiers = f"disk:8MiB@{tmp_path}/tier"
    served(opened(tiers=tiers))
    opened().close()
    files = [p for p in (tmp_path / "tier").glob("*.seg") if any(p.read_bytes())]
    g = torch.Generator().manual_seed(seed)
    for path in files:
        raw = bytearray(path.read_bytes())
        written = len(raw.rstrip(b"\0"))
        for at in torch.randint(0, written, (125,), generator=g).tolist():
            raw[at] ^= 1 << at % 8
        path.write_bytes(raw)
    runner = opened(tiers=tiers)
    assert served(runner) == plain()
    levels = report(runner)["levels"]
    assert levels[0]["corrupt"] > 0 or runner.tiering.stack.levels[0].tier.bad_slots > 0


def test_a_disk_of_one_megabyte_a_second(opened: Make, plain: Any, tmp_path: Path) -> None:
    """It is asked, it is late, it is left alone; requests compute, each delayed by its deadline at most."""
    slow = FaultyTier(DiskTier(tmp_path / "t", 8 << 20), bytes_per_s=1e6)
    runner = opened([slow], deadline_s=0.02)
    assert served(runner) == plain()
    push_down(runner)
    assert served(runner) == plain()
    found = report(runner)
    assert found["truncated"]["timeout"] >= 1
    assert runner.tiering.stack.queued_bytes <= runner.tiering.stack.queue_bytes


def test_a_full_disk(opened: Make, plain: Any) -> None:
    runner = opened([FaultyTier(HostTier(8 << 20), full=True)])
    assert served(runner) == plain()
    push_down(runner)
    assert served(runner) == plain()
    assert report(runner)["levels"][0]["rejected"] > 0


class Hanging(FaultyTier):
    """Answers nothing any more once `stuck`."""

    stuck = False

    async def lookup(self, ns: bytes, keys: Sequence[bytes]) -> int:
        return await super().lookup(ns, keys)

    async def load(self, ns: bytes, wanted: Sequence[Block], *, deadline: float) -> list[Outcome]:
        if self.stuck:
            await asyncio.sleep(3600)
        return await super().load(ns, wanted, deadline=deadline)


def test_a_tier_that_hangs_is_left_alone(opened: Make, plain: Any) -> None:
    hanging = Hanging(HostTier(8 << 20))
    runner = opened([hanging], deadline_s=0.05)
    assert served(runner) == plain()
    push_down(runner)
    hanging.stuck = True
    assert served(runner) == plain()
    found = report(runner)
    assert found["truncated"]["timeout"] >= 3
    assert not found["levels"][0]["ok"]
    assert found["levels"][0]["timeout"] > 0


def test_a_tier_that_blocks_its_loop_is_given_up(opened: Make, plain: Any) -> None:
    """Somebody else's, written as if it were alone: the engine waits no longer than it said."""

    class Blocking(FaultyTier):
        stuck = False

        async def load(
            self, ns: bytes, wanted: Sequence[Block], *, deadline: float
        ) -> list[Outcome]:
            if self.stuck:
                time.sleep(1.6)  # noqa: ASYNC251 - the mistake that is meant
            return await super().load(ns, wanted, deadline=deadline)

    blocking = Blocking(HostTier(8 << 20))
    runner = opened([blocking], deadline_s=0.01)
    served(runner)
    push_down(runner)
    blocking.stuck = True
    with Engine(runner) as engine:
        (out,) = engine.generate([prompts()[0]], PARAMS)
    assert out.token_ids == plain()[0]
    assert report(runner)["truncated"]["abandoned"] == 1


# -- waiting -----------------------------------------------------------------------------------------------------


def test_others_run_while_one_loads(opened: Make, plain: Any) -> None:
    hanging = Hanging(HostTier(8 << 20))
    runner = opened([hanging], deadline_s=30.0)
    served(runner)
    push_down(runner)
    hanging.stuck = True
    with Engine(runner) as engine:
        first = engine.add_request(prompts()[0], PARAMS)
        second = engine.add_request([5, 6, 7], PARAMS)
        done: list[str] = []
        while second not in done:
            done += [d.request_id for d in engine.step() if d.output is not None]
        assert first not in done
        assert engine.stats().scheduler.loading == 1
        assert runner.usage().held_bytes == 0
        assert engine.cancel(first)
        assert not engine.has_work
        assert engine.stats().scheduler.loading == 0
        hanging.stuck = False
        third = engine.add_request(prompts()[1], PARAMS)
        outputs = [d.output for d in run(engine) if d.output is not None]
        (last,) = [o for o in outputs if o.request_id == third]
        assert last.token_ids == plain()[1]
    assert runner.usage().held_bytes == 0


def test_who_waits_long_in_the_queue_is_not_given_up(opened: Make, plain: Any) -> None:
    """A prefetched prefix may take its time: the clock runs from when somebody waits for it."""
    runner = opened([HostTier(8 << 20)], deadline_s=0.3)
    served(runner)
    push_down(runner)
    permits = runner.tiering.fetcher._permits
    for _ in range(4):
        runner.tiering.stack.ask(permits.acquire())
    with Engine(runner, config=SchedulerConfig(max_running=1)) as engine:
        engine.add_request([5, 6, 7], SamplingParams(max_tokens=60, ignore_eos=True))
        while not engine.stats().scheduler.running:
            engine.step()
        name = engine.add_request(prompts()[0], PARAMS)
        engine.step()  # the second's prefix is asked for, and has no place
        assert engine.stats().scheduler.loading == 0
        time.sleep(2.1)
        for _ in range(4):
            runner.tiering.stack._loop.call_soon_threadsafe(permits.release)
        (out,) = [d.output for d in run(engine) if d.request_id == name and d.output is not None]
    assert out.token_ids == plain()[0]
    assert out.figures.loaded_tokens > 100
    assert not report(runner)["truncated"]


def run(engine: Any) -> list[Any]:
    out = []
    while engine.has_work:
        out += engine.step()
    return out


def test_cancelled_loads_give_their_places_back(opened: Make, plain: Any) -> None:
    hanging = Hanging(HostTier(8 << 20))
    runner = opened([hanging], deadline_s=0.5)
    served(runner)
    push_down(runner)
    hanging.stuck = True
    with Engine(runner) as engine:
        for prompt in [*prompts(), *prompts()]:
            name = engine.add_request(prompt, PARAMS)
            engine.step()
            engine.cancel(name)
        hanging.stuck = False
        level = runner.tiering.stack.levels[0]
        deadline = time.monotonic() + 10
        while runner.tiering.fetcher.free_permits < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        level.failures, level.paused_until = 0, 0.0
        outs = [engine.generate([p], PARAMS)[0] for p in prompts()]
        assert [o.token_ids for o in outs] == plain()
        assert sum(o.figures.loaded_tokens for o in outs) > 0


def test_a_stream_waits_for_its_blocks(opened: Make, plain: Any, tmp_path: Path) -> None:
    tiers = f"disk:8MiB@{tmp_path}/tier"
    served(opened(tiers=tiers))
    runner = opened(tiers=tiers)

    async def call() -> list[int]:
        tokens: list[int] = []
        with Engine(runner) as engine:
            async for delta in engine.stream(prompts()[0], PARAMS):
                tokens += delta.token_ids
        return tokens

    assert asyncio.run(call()) == plain()[0]
    assert report(runner)["loaded_tokens"] > 100


@both
def test_long_prefixes_come_in_parts(
    opened: Make, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.store.fetching.PART_BYTES", 30_000)
    tiers = f"disk:8MiB@{tmp_path}/tier"
    served(opened(tiers=tiers))
    runner = opened(tiers=tiers)
    assert served(runner) == plain()
    found = report(runner)
    assert found["loaded_tokens"] > 300
    if len(runner.tiering.fetcher._full) == len(runner.sharing.index.columns):
        assert found["fetches"] > 8


def test_copies_that_a_step_has_no_time_for_are_dropped(
    opened: Make, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.store.pace.STEP_S", 0.0)
    monkeypatch.setattr("quire.store.pace.STEP_SHARE", 0.0)
    runner = opened([HostTier(8 << 20)], memory=SMALL)
    assert served(runner, rounds=2, each=False) == plain() * 2
    found = report(runner)
    assert found["dropped_blocks"] > 0
    sent = found["demoted_blocks"] + found["written_back"]
    assert found["levels"][0]["stored"] <= sent


def test_a_step_without_time_puts_off_and_fails_nobody(
    opened: Make, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several whose prefixes lie in a tier, nobody who runs, and time for one look a step."""
    runner = opened([HostTier(8 << 20)])
    served(runner)
    push_down(runner)
    for name in ("STEP_S", "STEP_SHARE", "ALONE_S"):
        monkeypatch.setattr(f"quire.store.pace.{name}", 0.0)
    assert served(runner, each=False) == plain()
    assert report(runner)["loaded_tokens"] > 0


def test_a_queue_that_is_full_drops(opened: Make, plain: Any) -> None:
    runner = opened([FaultyTier(HostTier(8 << 20), bytes_per_s=1e5)], memory=SMALL)
    runner.tiering.stack.queue_bytes = 20_000
    assert served(runner, rounds=2) == plain() * 2
    assert report(runner)["dropped_blocks"] > 0
    assert runner.tiering.stack.queued_bytes <= 20_000


# -- asked -------------------------------------------------------------------------------------------------------


def test_tiers_need_names(opened: Make) -> None:
    with pytest.raises(ConfigError, match="add share='prefix'"):
        opened(tiers="host:8MiB", share="off")


def test_the_report_tells_of_tiers(opened: Make) -> None:
    runner = opened(tiers="host:8MiB")
    with Engine(runner) as engine:
        found = sharing_report(engine)
    assert found is not None
    assert [level["tier"] for level in found["tiers"]["levels"]] == ["host"]
