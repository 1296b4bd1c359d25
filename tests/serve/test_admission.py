"""Limits under a clock of our own, and as a client meets them."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from quire.serve.admission import Gate
from quire.serve.config import ServeConfig
from quire.serve.errors import ApiError
from quire.serve.keys import Caller, Limits
from served import serving


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def gate(clock: Clock | None = None, **limits: Any) -> Gate:
    most = limits.pop("max_requests", 100)
    return Gate(ServeConfig(max_requests=most, limits=Limits(**limits)), clock or Clock())


ALICE, BOB = Caller("alice"), Caller("bob")


def refused(gate: Gate, caller: Caller = ALICE, n_tokens: int = 1) -> ApiError:
    with pytest.raises(ApiError) as caught:
        gate.enter(caller, n_tokens)
    return caught.value


def test_a_full_house_says_later() -> None:
    clock = Clock()
    door = gate(clock, max_requests=2)
    first = door.enter(ALICE, 1)
    door.enter(BOB, 1)
    error = refused(door)
    assert error.status == 429
    assert error.retry_after_s is not None
    assert 1 <= error.retry_after_s <= 60
    first.leave(1)
    first.leave(1)
    assert door.live == 1
    door.enter(ALICE, 1)
    assert refused(door).status == 429


def test_each_tenant_has_its_own_places() -> None:
    door = gate(concurrent=1)
    mine = door.enter(ALICE, 1)
    assert refused(door).code == "concurrency"
    door.enter(BOB, 1)
    mine.leave(1)
    door.enter(ALICE, 1)


def test_requests_per_minute_come_back_with_time() -> None:
    clock = Clock()
    door = gate(clock, requests_per_minute=6)
    for _ in range(6):
        door.enter(ALICE, 1).leave(1)
    error = refused(door)
    assert (error.status, error.code) == (429, "requests_per_minute")
    assert error.retry_after_s == pytest.approx(10)
    door.enter(BOB, 1)
    clock.now += 9.9
    refused(door)
    clock.now += 0.2
    door.enter(ALICE, 1)
    refused(door)
    clock.now += 1e6
    for _ in range(6):
        door.enter(ALICE, 1)
    refused(door)


def test_tokens_that_were_not_used_come_back() -> None:
    door = gate(tokens_per_minute=100)
    entry = door.enter(ALICE, 80)
    assert refused(door, n_tokens=30).code == "tokens_per_minute"
    entry.leave(10)
    door.enter(ALICE, 90)
    assert refused(door, n_tokens=1).status == 429
    assert refused(door, BOB, n_tokens=101).status == 400


def test_a_refusal_costs_nothing() -> None:
    door = gate(requests_per_minute=2, tokens_per_minute=10)
    entry = door.enter(ALICE, 10)
    for _ in range(5):
        assert refused(door).code == "tokens_per_minute"
    entry.leave(0)
    door.enter(ALICE, 10)


def test_a_keys_own_limits_count_before_the_servers() -> None:
    door = gate(concurrent=1)
    strong = Caller("strong", limits=Limits(concurrent=2))
    door.enter(strong, 1)
    door.enter(strong, 1)
    assert refused(door, strong).status == 429


def test_nobody_enters_while_it_drains() -> None:
    door = gate()
    door.draining = True
    assert refused(door).status == 503


def test_forgotten_tenants_leave_no_record() -> None:
    clock = Clock()
    door = gate(clock)
    for i in range(50):
        door.enter(Caller(f"t{i}"), 1).leave(1)
    clock.now += 1000
    door.enter(ALICE, 1)
    assert set(door.tenants) == {"alice"}


# -- through the API ---------------------------------------------------------------------------------------------


def ask(served: Any, who: str, **more: Any) -> Any:
    wanted = {"model": "tiny", "prompt": "hello", "max_tokens": 4} | more
    return served.client(who).completions.create(**wanted)


def test_a_client_is_told_when_to_come_back(keyed: Any) -> None:
    for _ in range(4):
        ask(keyed, "carol")
    with pytest.raises(openai.RateLimitError) as caught:
        ask(keyed, "carol")
    assert caught.value.code == "requests_per_minute"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 15
    with pytest.raises(openai.BadRequestError, match="100 a minute"):
        ask(keyed, "carol", max_tokens=200)
    ask(keyed, "alice")
    with keyed.http("root") as http:
        refusals = http.get("/metrics").text
    assert 'tenant="carol"' in refusals
    assert 'reason="requests_per_minute"' in refusals


def test_more_than_fits_gets_429_and_not_an_error_of_memory(keyed: Any) -> None:
    """The sixteen that are let in all end."""
    told: list[int] = []

    def one(i: int) -> None:
        body = {"model": "tiny", "prompt": f"{i} " * 100, "max_tokens": 100, **IGNORE}
        with keyed.http("alice") as http:
            answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 200 or "retry-after" in answer.headers
        told.append(answer.status_code)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told.count(200) >= 16
    assert told.count(429) >= 1
    assert len(told) == told.count(200) + told.count(429) == 40
    keyed.wait_idle()


IGNORE = {"ignore_eos": True}


def test_a_request_that_takes_too_long_is_ended(tiny_folder: Any) -> None:
    config = ServeConfig(port=0, request_timeout_s=0.3, queue_timeout_s=0.3)
    with serving(str(tiny_folder), config, name="tiny") as served:
        with pytest.raises(openai.InternalServerError) as caught:
            ask_plain(served, max_tokens=1900)
        assert caught.value.status_code == 504
        stream = ask_plain(served, max_tokens=1900, stream=True)
        with pytest.raises(openai.APIError, match="not done after"):
            for _ in stream:
                pass
        served.wait_idle()


def ask_plain(served: Any, **more: Any) -> Any:
    wanted = {"model": "tiny", "prompt": "hello", "extra_body": IGNORE} | more
    return served.client().completions.create(**wanted)
