"""A running engine over a redis tier whose server comes to harm: the same tokens, and no request waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from quire.engine import Engine, SamplingParams, SchedulerConfig
from quire.models.open import open_runner
from quire.store.namespace import Namespace
from quire.store.tiers.segments import SECRET
from redis_server import RedisServer, needs_redis, ours, redis_server
from tiny_model import chaotic_model

pytestmark = needs_redis
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
PROMPTS = [[(7 * i + i * i // (3 + n // 2)) % 97 for i in range(150 + 10 * n)] for n in range(4)]


@pytest.fixture(scope="module")
def model() -> Any:
    return chaotic_model(None)


@pytest.fixture(autouse=True)
def _time_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.store.pace.STEP_S", 10.0)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server() as made:
        yield made


Make = Callable[..., Any]


@pytest.fixture
def opened(model: Any) -> Iterator[Make]:
    runners: list[Any] = []

    def make(tiers: str = "", **options: Any) -> Any:
        for runner in runners:  # a model serves one at a time
            runner.close()
        given = {"memory": "200KiB", "attention": "reference", "block_tokens": 16}
        given |= {"weights": "plain", "share": "prefix" if tiers else "off"}
        runners.append(open_runner(model, tiers=tiers, **{**given, **options}))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


def served(runner: Any, between: Callable[[], None] = lambda: None) -> list[list[int]]:
    """All prompts twice, a few at a time; at the end nothing is held."""
    out = []
    with Engine(runner, config=SchedulerConfig(step_tokens=128)) as engine:
        for batch in (PROMPTS[:2], PROMPTS[2:], PROMPTS):
            out += [o.token_ids for o in engine.generate(batch, PARAMS)]
            between()
    assert runner.usage().held_bytes == 0
    return out


@pytest.fixture
def plain(opened: Make) -> list[list[int]]:
    return served(opened(memory="8MiB"))


def level(runner: Any) -> dict[str, Any]:
    found: dict[str, Any] = runner.tiering.report()["levels"][0]
    return found


def push_down(runner: Any) -> None:
    """Everything that is cached leaves the device for the server, and the breaker forgets what was."""
    runner.tiering.begin_step()
    runner.sharing.index.clear()
    assert runner.tiering.stack.drain(time.monotonic() + 10)
    (at,) = runner.tiering.stack.levels
    at.failures, at.paused_until = 0, 0.0


def test_what_one_process_computed_another_finds(
    opened: Make, plain: list[list[int]], server: RedisServer
) -> None:
    """And in it a tenant finds its own only, though both know the same secret."""
    tiers = f"redis:8MiB@{server.place}"
    for who, loads in ((b"a", False), (b"b", False), (b"a", True)):
        runner = opened(tiers, memory="8MiB")
        with Engine(runner) as engine:
            (out,) = engine.generate([PROMPTS[0]], PARAMS, namespace=Namespace(who))
        assert out.token_ids == plain[0]
        assert (out.figures.loaded_tokens > 100) is loads
    assert len({key for _, key, _ in ours(server)}) == 2 * -(-(len(PROMPTS[0]) + 7) // 16)


def test_two_that_run_side_by_side_share(server: RedisServer, plain: list[list[int]]) -> None:
    """What one finds a second time it writes to the server; the other finds it there while both run."""
    tiers = f"redis:8MiB@{server.place}"
    given: dict[str, Any] = {"attention": "reference", "block_tokens": 16, "weights": "plain"}
    given |= {"memory": "8MiB", "share": "prefix", "tiers": tiers}
    one, two = (open_runner(chaotic_model(None), **given) for _ in range(2))
    try:
        with Engine(one) as first, Engine(two) as second:
            for _ in range(3):
                (out,) = first.generate([PROMPTS[0]], PARAMS)
            assert out.token_ids == plain[0]
            assert one.tiering.stack.drain(time.monotonic() + 10)  # type: ignore[union-attr]
            (found,) = second.generate([PROMPTS[0]], PARAMS)
            assert found.token_ids == plain[0]
            assert found.figures.loaded_tokens == len(PROMPTS[0]) // 16 * 16
    finally:
        one.close()
        two.close()


def test_a_tier_far_away_keeps_none_near_from_giving_parts_of_blocks(
    opened: Make, server: RedisServer, tmp_path: Any
) -> None:
    """And what tenants' names depend on is the secret that others share."""
    found, prompt = [], PROMPTS[0]
    for tiers in (f"disk:8MiB@{tmp_path}/t", f"disk:8MiB@{tmp_path}/t,redis:8MiB@{server.place}"):
        runner = opened(tiers, memory="8MiB")
        with Engine(runner) as engine:
            (out,) = engine.generate([prompt], PARAMS)
            found.append(out.figures.cached_tokens)
            prompt = [*prompt, *out.token_ids, 1, 2, 3]  # a conversation goes on
    assert found == [0, len(PROMPTS[0]) + 7]
    with server.client() as client:
        assert runner.tiering.secret() == client.get(SECRET)


def test_killed_stopped_and_started_again(
    opened: Make, plain: list[list[int]], server: RedisServer
) -> None:
    runner = opened(f"redis:8MiB@{server.place};deadline=0.1")
    assert served(runner) == plain
    push_down(runner)
    assert served(runner) == plain
    assert level(runner)["hit"] > 10
    for harm, heal in ((server.stop, server.go_on), (server.kill, server.start)):
        push_down(runner)
        harm()
        assert served(runner) == plain  # while it is stopped, or gone
        found = level(runner)
        assert not found["ok"]
        assert found["failures"] >= 3
        heal()
        push_down(runner)
        assert served(runner) == plain
        push_down(runner)
        before = level(runner)["hit"]
        assert served(runner) == plain
        assert level(runner)["hit"] > before
    assert level(runner)["corrupt"] == 0


def test_harmed_in_the_middle_of_requests(
    opened: Make, plain: list[list[int]], server: RedisServer
) -> None:
    runner = opened(f"redis:8MiB@{server.place};deadline=0.1")
    acts = iter([server.stop, server.go_on, server.kill, server.start, server.stop, server.kill])

    def act() -> None:
        next(acts)()

    assert served(runner, act) == plain
    push_down(runner)
    assert served(runner, act) == plain
    runner.close()


def test_a_server_that_evicts_and_is_full(
    opened: Make, plain: list[list[int]], server: RedisServer
) -> None:
    runner = opened(f"redis:8MiB@{server.place}")
    with server.client() as client:
        used = client.info()["used_memory"]
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", str(used + (150 << 10)))
    for _ in range(3):
        assert served(runner) == plain
        push_down(runner)
    with server.client() as client:
        assert client.info()["evicted_keys"] > 0
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", str(used))
        client.flushall()
    for _ in range(2):
        assert served(runner) == plain
        push_down(runner)
    assert level(runner)["rejected"] > 0
    assert level(runner)["corrupt"] == 0


def test_values_that_were_spoilt(opened: Make, plain: list[list[int]], server: RedisServer) -> None:
    runner = opened(f"redis:8MiB@{server.place}")
    assert served(runner) == plain
    push_down(runner)
    with server.client() as client:
        for number, (name, key, value) in enumerate(list(ours(server))):
            at = number * 977 % len(value)
            if number % 2:
                client.hset(name, key, value[:at] + bytes([value[at] ^ 16]) + value[at + 1 :])
    assert served(runner) == plain
    assert level(runner)["corrupt"] > 0
