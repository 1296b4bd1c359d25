"""Prefixes under LongRoPE: sequences beyond the original context have other keys, and are named apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import zoo
from quire.engine import Engine, SamplingParams, SchedulerConfig
from quire.engine.sharing import sharing_report
from quire.models.open import open_runner

LIMIT = zoo.ZOO["phi3_longrope"].regime_tokens or 0
DRAWN = torch.randint(1, zoo.VOCAB, (6, 60), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def model() -> Any:
    return zoo.build("phi3_longrope")


@pytest.fixture
def opened(model: Any) -> Iterator[Any]:
    runners: list[Any] = []

    def make(**options: Any) -> Any:
        for runner in runners:
            runner.close()
        given = {"memory": "8MiB", "attention": "reference", "block_tokens": 4}
        runners.append(open_runner(model, **{**given, "weights": "plain", **options}))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


def asked(runner: Any, rounds: list[list[list[int]]], params: SamplingParams) -> Any:
    tokens, found = [], []
    with Engine(runner, config=SchedulerConfig(step_tokens=24)) as engine:
        for prompts in rounds:
            out = engine.generate(prompts, params)
            tokens.append([[x.token_ids for x in o.outputs] for o in out])
            found.append([o.figures.cached_tokens for o in out])
        report = sharing_report(engine)
    assert runner.usage().held_bytes == 0
    return tokens, found, report


@pytest.mark.parametrize("kv", ["fp32", pytest.param("int8", marks=pytest.mark.slow)])
def test_both_regimes_share_among_themselves(opened: Any, kv: str) -> None:
    """Prompts of both, and some that grow from one into the other while they are generated."""
    common, own = DRAWN[0][:28], [DRAWN[1 + i][: 3 + i] for i in range(3)]
    longs = [[*common, *x] for x in own]
    shorts = [[*common[:9], *x] for x in own]
    rounds = [longs, shorts, longs, shorts, [[*common[:12], 5]], [common[:16], common[:17]]]
    params = SamplingParams(max_tokens=10, ignore_eos=True, n=2, temperature=1.0, seed=1)
    options = {"kv": kv, "block_tokens": 4 if kv == "fp32" else 32}
    cold = asked(opened(**options), rounds, params)
    runner = opened(**options, share="prefix:audit=1,explain=on")
    warm = asked(runner, rounds, params)
    assert cold[0] == warm[0]
    assert warm[2]["audit"]["diverged"] == 0
    if kv == "fp32":
        assert warm[2]["audit"]["audited"] >= 6
        assert warm[1][0] == [0, 28, 28]
        assert warm[1][1][0] == 0  # what is long is none of theirs
        assert warm[1][2] == [30, 31, 32]
        assert min(warm[1][3]) >= 8
        assert warm[1][5][0] > 0
        assert warm[1][5][1] == 0  # 17 tokens are long, and only 16 of them could be found


def test_a_beginning_that_is_too_short_is_not_resumed(opened: Any) -> None:
    """A long sequence goes on only behind the original context, or its next forward would be a short one."""
    runner = opened(share="prefix")
    one = SamplingParams(max_tokens=1, ignore_eos=True)
    begin = DRAWN[0][:LIMIT]
    prompts = [[*begin, *DRAWN[1][:9]], [*begin, *DRAWN[2][:9]], [*begin, 1, 2, 3, *DRAWN[2][:9]]]
    _, found, report = asked(runner, [[p] for p in prompts], one)
    assert found == [[0], [0], [0]]
    assert report["waits"] == 0
