"""Law 8 for models with recurrent state: the same tokens with prefixes found at checkpoints, preempted and forked."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from time import monotonic
from typing import Any

import pytest
import torch

import zoo
from quire.engine import Engine, RequestOutput, SamplingParams, SchedulerConfig
from quire.engine.isolation import check_isolation
from quire.engine.sharing import sharing_report
from quire.models.open import open_runner
from quire.store.namespace import Namespace, Tenants

FAMILIES = zoo.names("rows")
FAST = ["mamba2"]
STEP_TOKENS = 40


@cache
def model_of(name: str) -> Any:
    return zoo.build(name)


@cache
def draws() -> list[list[int]]:
    g = torch.Generator().manual_seed(5)
    made: list[list[int]] = torch.randint(1, zoo.VOCAB, (8, 320), generator=g).tolist()
    return made


def prompts(common: int = 70) -> list[list[int]]:
    """Four that begin alike, for `common` tokens, the first of them twice."""
    begin = draws()[0][:common]
    many = [[*begin, *draws()[1 + i][: 3 * i + 6]] for i in range(4)]
    return [*many, list(many[0])]


@pytest.fixture
def opened() -> Iterator[Any]:
    runners: list[Any] = []

    def make(name: str, **options: Any) -> Any:
        given = {"memory": "16MiB", "attention": "reference", "block_tokens": 16}
        for runner in runners:  # a model serves one at a time
            runner.close()
        made = open_runner(model_of(name), **{**given, "weights": "plain", **options})
        runners.append(made)
        return made

    yield make
    for runner in runners:
        runner.close()


def texts(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[o.token_ids for o in output.outputs] for output in outputs]


def rounds(
    runner: Any, asked: list[list[int]], params: SamplingParams
) -> list[list[RequestOutput]]:
    """The prompts, the prompts again, and a next turn of each behind what was generated."""
    with Engine(runner, config=SchedulerConfig(step_tokens=STEP_TOKENS)) as engine:
        first = engine.generate(asked, params)
        out = [first, engine.generate(asked, params)]
        turns = [[*p, *o.outputs[0].token_ids, 5, 6, 7] for p, o in zip(asked, first, strict=True)]
        out.append(engine.generate(turns, params))
        preempted = engine.stats().scheduler.preemptions
        report = sharing_report(engine)
    assert runner.usage().held_bytes == 0
    if report is not None:
        assert not runner.sharing.promised
        assert report.get("audit", {"diverged": 0})["diverged"] == 0
    rounds.preempted = preempted  # type: ignore[attr-defined]
    return out


def found(outputs: list[RequestOutput]) -> list[int]:
    return [o.figures.cached_tokens for o in outputs]


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES],
)
def test_found_states_change_no_token(opened: Any, name: str) -> None:
    params = SamplingParams(max_tokens=18, ignore_eos=True)
    asked = prompts(70 if zoo.ZOO[name].chunked else 283)
    cold = rounds(opened(name), asked, params)
    runner = opened(name, share="prefix:audit=1")
    warm = rounds(runner, asked, params)
    assert [texts(x) for x in cold] == [texts(x) for x in warm]
    if zoo.ZOO[name].chunked:
        assert found(warm[0]) == [0, 64, 64, 64, 64]  # what all have in common is computed once
        assert min(found(warm[1])) == 64
        assert min(found(warm[2])) == 80  # what was generated is found, too
    else:
        assert found(warm[1]) == [288, 288, 288, 288, 288]
        assert any(found(warm[2]))


@pytest.mark.parametrize("name", ["falcon_h1", pytest.param("jamba", marks=pytest.mark.slow)])
def test_logits_behind_a_state(opened: Any, name: str) -> None:
    """What is drawn from is what a cold run draws from, up to rounding in float32."""
    params = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=3)
    asked = prompts(40 if zoo.ZOO[name].chunked else 283)[:2]
    every = []
    for share in ("off", "prefix"):
        out = rounds(opened(name, share=share), asked, params)
        if share == "prefix":
            assert all(found(out[1]))
        every.append([lp.logprob for x in out for o in x for lp in (o.outputs[0].logprobs or ())])
    assert len(every[0]) == 3 * 2 * 4
    assert every[0] == pytest.approx(every[1], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "swap"), [*((n, False) for n in FAMILIES), ("falcon_h1", True), ("qwen3_next", True)]
)
def test_preemption_and_samples(opened: Any, name: str, swap: bool) -> None:
    """A pool for a few of them: they lose blocks and states, find what is left, and fork behind it."""
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, n=2, ignore_eos=True)
    asked = prompts(70 if zoo.ZOO[name].chunked else 283)
    cold = rounds(opened(name), asked, params)
    share = 3.4 if zoo.ZOO[name].chunked else 2.1  # one whole prompt a step: few run at a time
    runner = opened(name)
    need = runner.bridge.layout.spec.bytes_for(max(map(len, asked)) + 40, chunk_tokens=1)
    options = {"tiers": "host:8MiB;swap=auto"} if swap else {}
    warm = rounds(opened(name, share="prefix", memory=int(share * need), **options), asked, params)
    assert [texts(x) for x in cold] == [texts(x) for x in warm]
    grows = any(not g.recurrent for g in runner.bridge.layout.spec)
    assert rounds.preempted > 0 or not grows  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["falcon_h1", "qwen3_next", "mamba2"])
def test_states_come_back_from_a_tier(
    opened: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.store.pace.STEP_S", 10.0)  # a step may copy all there is
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    asked = prompts(70 if zoo.ZOO[name].chunked else 283)
    cold = rounds(opened(name), asked, params)
    runner = opened(name, share="prefix", tiers="host:64MiB;deadline=60")
    with Engine(runner, config=SchedulerConfig(step_tokens=STEP_TOKENS)) as engine:
        first = engine.generate(asked, params)
        runner.sharing.index.clear()  # all of it goes down
        assert runner.tiering.stack.drain(monotonic() + 30)
        again = engine.generate(asked, params)
        report = sharing_report(engine)
    assert texts(first) == texts(again) == texts(cold[0])
    assert report is not None
    assert report["tiers"]["loaded_tokens"] >= 64
    assert min(found(again)) >= 64


def test_tenants_are_apart(opened: Any) -> None:
    runner, tenants = opened("falcon_h1", share="prefix"), Tenants()
    with Engine(runner) as engine:
        assert check_isolation(engine, tenants.of("a"), tenants.of("b")).cached_tokens == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_no_other_tenant_hits(opened: Any, name: str) -> None:
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    ask = prompts(70 if zoo.ZOO[name].chunked else 283)[0]
    runner = opened(name, share="prefix")
    with Engine(runner, config=SchedulerConfig(step_tokens=STEP_TOKENS)) as engine:
        out = [engine.generate([ask], params, namespace=Namespace(n)) for n in (b"a", b"b", b"a")]
    assert [found(x)[0] > 0 for x in out] == [False, False, True]
    assert texts(out[0]) == texts(out[1]) == texts(out[2])


def test_sharing_off_cuts_no_prompt(opened: Any) -> None:
    """Beside others that share, a request with share=off leaves nothing and is not cut for it."""
    runner = opened("falcon_h1", share="prefix")
    one = SamplingParams(max_tokens=1, ignore_eos=True)
    with Engine(runner) as engine:
        engine.generate(prompts()[:1], one, share="off")
        assert engine.stats().forwards == 1
        assert runner.usage().cached_bytes == 0
        engine.generate(prompts()[:1], one)
        assert engine.stats().forwards == 3
