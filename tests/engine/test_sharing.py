"""Law 8 with prefixes found: the same tokens with and without, for plain and lossy codecs, preempted and forked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from quire.engine import Engine, RequestOutput, SamplingParams, SchedulerConfig
from quire.engine.isolation import check_isolation
from quire.engine.params import SamplingParams as Params
from quire.engine.sharing import sharing_report
from quire.errors import ConfigError, InvariantError, RequestError
from quire.models.open import open_runner
from quire.store.namespace import Hints, Namespace, Tenants
from tiny_model import chaotic_model

RECIPES = [
    "fp32",
    "bf16",
    "int8",
    "int4;sinks=2",
    "kivi:bits=2,group=16,residual=16",
    "k=int8,v=fp32",
]


@pytest.fixture(scope="module", params=["full", "window"])
def model(request: pytest.FixtureRequest) -> Any:
    return chaotic_model(None if request.param == "full" else 40)


def prompts(n: int = 6) -> list[list[int]]:
    g = torch.Generator().manual_seed(5)
    draw = torch.randint(0, 97, (40, 60), generator=g).tolist()
    common = [*draw[0], *draw[1][:15]]
    many = [[*common, *draw[2 + i][: 5 + 3 * i]] for i in range(n - 2)]
    return [*many, list(many[0]), draw[30][:20]]


@pytest.fixture
def opened(model: Any) -> Iterator[Any]:
    runners: list[Any] = []

    def make(**options: Any) -> Any:
        given = {"memory": "8MiB", "attention": "reference", "block_tokens": 16, "weights": "plain"}
        for runner in runners:  # a model serves one at a time
            runner.close()
        runners.append(open_runner(model, **{**given, **options}))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


def texts(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[o.token_ids for o in output.outputs] for output in outputs]


def served(runner: Any, params: Params, rounds: int = 2, tokens: int = 40) -> list[Any]:
    """The prompts twice, the second time behind what the first left; at the end nothing is held."""
    with Engine(runner, config=SchedulerConfig(step_tokens=tokens)) as engine:
        out: list[Any] = [engine.generate(prompts(), params) for _ in range(rounds)]
        out.append(engine.stats())
    assert runner.usage().held_bytes == 0
    return out


@pytest.mark.parametrize("kv", RECIPES)
def test_found_prefixes_change_no_token(opened: Any, kv: str) -> None:
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=7, n=2, ignore_eos=True)
    cold = served(opened(kv=kv), params)
    runner = opened(kv=kv, share="prefix")
    warm = served(runner, params)
    assert texts(cold[0]) == texts(warm[0])
    assert texts(cold[1]) == texts(warm[1])
    found = [o.figures.cached_tokens for o in warm[1]]
    assert all(n >= 64 for n in found[:-1])
    assert found[-1] >= 16
    assert all(o.figures.cached_tokens == 0 for o in cold[1])
    assert runner.sharing.stats.hit_tokens >= sum(found)
    assert not runner.sharing.promised


@pytest.mark.parametrize("kv", ["fp32", "int8", "kivi:bits=2,group=16,residual=16"])
def test_preemption_finds_what_it_lost(opened: Any, kv: str) -> None:
    """A pool for about two of the six: they lose their blocks, and find what nobody needed meanwhile."""
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    cold = served(opened(kv=kv), params)
    roomy = opened(kv=kv)
    memory = int(1.6 * roomy.bridge.layout.spec.bytes_for(150, chunk_tokens=40))
    runner = opened(kv=kv, share="prefix", memory=memory)
    warm = served(runner, params)
    assert texts(cold[0]) == texts(warm[0])
    assert texts(cold[1]) == texts(warm[1])
    windows = roomy.model.config.model_type == "mistral"  # its sequences hardly grow
    assert windows or warm[2].scheduler.preemptions > 0
    assert runner.sharing.stats.evicted_blocks > 0


def test_a_prefix_that_all_bring_at_once_is_computed_once(opened: Any) -> None:
    runner = opened(kv="fp32", share="prefix")
    common, own = prompts()[0][:64], 10
    many = [[*common, *[i] * own] for i in range(8)]
    with Engine(runner, config=SchedulerConfig(step_tokens=100)) as engine:
        outputs = engine.generate(many, SamplingParams(max_tokens=2, ignore_eos=True))
    assert [o.figures.cached_tokens for o in outputs] == [0] + [64] * 7
    assert sum(o.figures.computed_tokens for o in outputs) == 64 + 8 * (own + 1)
    assert runner.sharing.stats.waits == 7


def test_who_is_first_may_leave(opened: Any) -> None:
    """The others do not wait for one that was cancelled half way."""
    runner = opened(kv="fp32", share="prefix")
    common = prompts()[0]
    with Engine(runner, config=SchedulerConfig(step_tokens=16)) as engine:
        first = engine.add_request(common, SamplingParams(max_tokens=4, ignore_eos=True))
        for i in range(3):
            engine.add_request([*common, i], SamplingParams(max_tokens=4, ignore_eos=True))
        engine.step()
        engine.step()
        assert engine.stats().scheduler.waiting == 3
        engine.cancel(first)
        assert not runner.sharing.promised
        done = []
        while engine.has_work:
            done += [d.output for d in engine.step() if d.output is not None]
    found = sorted(o.figures.cached_tokens for o in done if o.request_id != first)
    assert found[0] == 32
    assert all(n >= 64 for n in found[1:])


def test_scored_prompts_compute_every_position(opened: Any) -> None:
    params = SamplingParams(max_tokens=3, prompt_logprobs=1, ignore_eos=True)
    runner = opened(kv="fp32", share="prefix")
    with Engine(runner) as engine:
        [first] = engine.generate([prompts()[0]], params)
        [again] = engine.generate([prompts()[0]], params)
    assert again.figures.cached_tokens == 0
    assert first.prompt_logprobs is not None
    assert again.prompt_logprobs is not None
    assert len(again.prompt_logprobs) == len(prompts()[0])
    assert [p and p.token_id for p in again.prompt_logprobs] == [
        p and p.token_id for p in first.prompt_logprobs
    ]


def test_share_off_for_one_request(opened: Any) -> None:
    runner = opened(kv="fp32", share="prefix")
    one = SamplingParams(max_tokens=2, ignore_eos=True)
    with Engine(runner) as engine:
        engine.generate([prompts()[0]], one, share="off")
        assert runner.usage().cached_bytes == 0
        engine.generate([prompts()[0]], one)
        [off] = engine.generate([prompts()[0]], one, share="off")
        [on] = engine.generate([prompts()[0]], one, share="prefix")
    assert off.figures.cached_tokens == 0
    assert on.figures.cached_tokens == len(prompts()[0]) - 1 or on.figures.cached_tokens >= 64


def test_namespaces_and_hints_reach_the_cache(opened: Any) -> None:
    runner = opened(kv="fp32", share="prefix")
    one = SamplingParams(max_tokens=2, ignore_eos=True)
    with Engine(runner) as engine:
        engine.generate([prompts()[0]], one, namespace=Namespace(b"a"), hints=Hints(2, 60.0))
        [b] = engine.generate([prompts()[0]], one, namespace=Namespace(b"b"))
        [a] = engine.generate([prompts()[0]], one, namespace=Namespace(b"a"))
    assert b.figures.cached_tokens == 0
    assert a.figures.cached_tokens >= 64


def test_what_cannot_be_shared_is_refused(opened: Any) -> None:
    runner = opened(kv="fp32")
    with Engine(runner) as engine:
        with pytest.raises(RequestError, match="share='prefix'"):
            engine.add_request([1, 2], share="prefix")
        with pytest.raises(RequestError, match="known: off, prefix"):
            engine.add_request([1, 2], share="all")
        with pytest.raises(RequestError, match="drop them"):
            engine.add_request([1, 2], hints=Hints(1))
    lru = opened(kv="fp32", share="prefix:evict=lru")
    with Engine(lru) as engine, pytest.raises(RequestError, match="evict='cost'"):
        engine.add_request([1, 2], hints=Hints(1))
    with pytest.raises(ConfigError, match="drop one of them"):
        opened(kv="none", share="prefix")
    with pytest.raises(ConfigError, match="known: off, prefix"):
        opened(kv="fp32", share="all")


def test_an_engine_proves_that_tenants_are_apart(opened: Any) -> None:
    runner = opened(kv="fp32", share="prefix")
    tenants = Tenants()
    a, b = tenants.of("a"), tenants.of("b")
    with Engine(runner) as engine:
        seen = check_isolation(engine, a, b)
        assert seen.cached_tokens == 0
        assert len(seen.steps) == 2
        with pytest.raises(InvariantError, match="can tell what another has asked"):
            check_isolation(engine, a, a)
        runner.sharing.index.clear()
        runner.sharing.look = _blind(runner.sharing.look)
        with pytest.raises(InvariantError, match="shows nothing"):
            check_isolation(engine, a, b)
    with Engine(opened(kv="fp32")) as engine, pytest.raises(ConfigError, match="share='prefix'"):
        check_isolation(engine, a, b)


def test_prompts_of_the_isolation_test_never_begin_alike(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant's own first token, seen again by chance, is a hit: it must not look like a leak."""
    monkeypatch.setattr("quire.engine.isolation.secrets.randbelow", lambda _: 5)
    tenants = Tenants()
    with Engine(opened(kv="fp32", share="prefix")) as engine:
        assert check_isolation(engine, tenants.of("a"), tenants.of("b")).cached_tokens == 0


def _blind(look: Any) -> Any:
    def nothing(*args: Any, **options: Any) -> Any:
        return look(*args, **{**options, "limit": 0})

    return nothing


@pytest.mark.parametrize("kv", ["fp32", "int8", "kivi:bits=2,group=16,residual=16"])
def test_the_audit_finds_nothing_until_a_block_is_spoiled(opened: Any, kv: str) -> None:
    runner = opened(kv=kv, share="prefix:audit=1,explain=on")
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    with Engine(runner, config=SchedulerConfig(step_tokens=60)) as engine:
        outputs = [*engine.generate(prompts(), params), *engine.generate(prompts(), params)]
        report = sharing_report(engine)
        assert report is not None
        hits = [o for o in outputs if o.figures.cached_tokens]
        audit = report["audit"]
        assert (audit["audited"], audit["diverged"], audit["skipped"]) == (len(hits), 0, 0)
        assert audit["tokens"] == sum(o.figures.cached_tokens for o in hits)
        assert audit["worst"] < 1e-2
        sharing = runner.sharing
        path = sharing.look(prompts()[0])
        pool = sharing.index.pools[0]
        one, other = (pool.byte_offset(sharing.index.block(0, path.nodes[i])) for i in (2, 3))
        with torch.inference_mode():
            buffer, n = runner.bridge.store.arena.buffer, pool.block_bytes
            buffer[one : one + n] = buffer[other : other + n]  # another chunk's content
        [found] = engine.generate([prompts()[0]], params)
        assert found.figures.cached_tokens >= 64
        report = sharing_report(engine)
        assert report is not None
        [divergence] = report["audit"]["divergences"]
    assert report["audit"]["diverged"] == 1
    assert divergence["position"] == 32
    assert divergence["request_id"] == found.request_id
    assert runner.usage().held_bytes == 0


def test_an_audit_without_room_is_skipped(opened: Any) -> None:
    roomy = opened(kv="fp32")
    memory = int(1.3 * roomy.bridge.layout.spec.bytes_for(120, chunk_tokens=120))
    runner = opened(kv="fp32", share="prefix:audit=1", memory=memory)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    with Engine(runner) as engine:
        for _ in range(3):
            engine.generate([prompts()[0], prompts()[1]], params)
        report = sharing_report(engine)
    assert report is not None
    assert report["audit"]["diverged"] == 0
    assert report["audit"]["audited"] + report["audit"]["skipped"] >= 2
    assert runner.usage().held_bytes == 0


def test_a_request_says_why_it_missed(opened: Any) -> None:
    runner = opened(kv="fp32", share="prefix:explain=on,ghost=1")
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    with Engine(runner) as engine:
        [first] = engine.generate([prompts()[0]], params)
        changed = list(prompts()[0])
        changed[50] = (changed[50] + 1) % 97
        [second] = engine.generate([changed], params)
        report = sharing_report(engine)
    assert first.figures.miss is not None
    assert first.figures.miss.reason == "never stored"
    assert second.figures.miss is not None
    assert second.figures.miss.reason == "differs"
    assert second.figures.miss.position == 50
    assert report is not None
    assert [g["factor"] for g in report["ghost"]] == [0.5, 1.0, 2.0]
    assert report["hit_tokens"] == second.figures.cached_tokens
