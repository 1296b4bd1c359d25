"""Sampling parameters refuse what cannot work, in one line that says what would."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys

import pytest

from quire.engine import SamplingParams
from quire.errors import RequestError


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"max_tokens": -1}, "at least 0"),
        ({"max_tokens": 2.5}, "integer"),
        ({"max_tokens": True}, "integer"),
        ({"max_tokens": 0}, "prompt_logprobs"),
        ({"min_tokens": 20}, "max_tokens=16"),
        ({"min_tokens": -1}, "at least 0"),
        ({"temperature": -0.1}, "between 0 and 100"),
        ({"temperature": float("nan")}, "between 0 and 100"),
        ({"temperature": "hot"}, "number"),
        ({"temperature": 1e-7}, "0 for greedy"),
        ({"top_k": -1}, "between 0 and 2147483647"),
        ({"top_k": 2**63}, "between 0 and 2147483647"),
        ({"top_p": 0.0}, "above 0 and at most 1"),
        ({"top_p": 1.5}, "above 0 and at most 1"),
        ({"min_p": -0.5}, "between 0 and 1"),
        ({"min_p": float("inf")}, "between 0 and 1"),
        ({"repetition_penalty": 0.0}, "above 0"),
        ({"presence_penalty": 1e9}, "between -100 and 100"),
        ({"frequency_penalty": None}, "number"),
        ({"logit_bias": {-1: 1.0}}, "at least 0"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias value"),
        ({"seed": -1}, "between 0 and"),
        ({"seed": 2**64}, "between 0 and"),
        ({"n": 0}, "between 1 and"),
        ({"stop": ["fine", ""]}, "non-empty"),
        ({"stop": [3]}, "non-empty"),
        ({"stop": 3}, "must be a list"),
        ({"stop_token_ids": 3}, "stop_token_ids=[3]"),
        ({"stop_token_ids": [1.0]}, "integer"),
        ({"logprobs": -1}, "or None"),
        ({"prompt_logprobs": 10**6}, "between 0 and 1000"),
    ],
)
def test_refuses(wrong: dict[str, object], hint: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**wrong)  # type: ignore[arg-type]
    message = str(caught.value)
    assert hint in message
    assert "\n" not in message


def test_normalises_and_stays_frozen() -> None:
    bias = {3: 1.5}
    params = SamplingParams(stop="end", stop_token_ids=[1, 2], logit_bias=bias, temperature=0.5)
    bias[3] = 9.0
    assert params.stop == ("end",)
    assert params.stop_token_ids == (1, 2)
    assert params.logit_bias == {3: 1.5}
    assert not params.greedy
    assert dataclasses.replace(params, temperature=0.0).greedy
    assert pickle.loads(pickle.dumps(params)) == params
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("wish", "plain"),
    [
        ({}, True),
        ({"top_k": 5, "top_p": 0.5}, True),  # filters cannot change the best token
        ({"temperature": 1.0}, False),
        ({"min_tokens": 1}, False),
        ({"logprobs": 0}, False),
        ({"logit_bias": {1: 1.0}}, False),
        ({"frequency_penalty": 0.1}, False),
    ],
)
def test_knows_when_an_argmax_is_enough(wish: dict[str, object], plain: bool) -> None:
    assert SamplingParams(**wish).plain is plain  # type: ignore[arg-type]


def test_requests_and_scheduling_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from quire.engine import (SamplingParams, Request, RequestOutput, Scheduler, SchedulerConfig, Plan,\n"
        "    Intake, Item, Runner, Detokenizer, StopMatcher)\n"
        "SamplingParams(temperature=1.0)\n"
        "try:\n"
        "    from quire.engine import Engine\n"
        "except ImportError:\n"
        "    print('engine needs it')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "engine needs it\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    import quire.engine

    assert "Engine" in dir(quire.engine)
    with pytest.raises(AttributeError, match="Motor"):
        _ = quire.engine.Motor
