"""Two tenants through the API: each finds its own, and never the other's, whatever is asked in whatever order."""

from __future__ import annotations

import random
from typing import Any

import pytest

GRAIN = 16


@pytest.mark.parametrize("seed", range(4))
def test_tenants_never_hit_each_other(keyed: Any, seed: int) -> None:
    """A model of the cache beside it: a tenant may find only whole or copied prefixes of what it sent itself."""
    draw = random.Random(seed)
    alphabet = [chr(c) for c in range(97, 123)]
    stems = ["".join(draw.choices(alphabet, k=draw.randrange(40, 120))) for _ in range(4)]
    seen: dict[tuple[str, str], list[str]] = {}
    hits = others = 0
    clients = {who: keyed.client(who) for who in ("alice", "bob")}
    for _ in range(40):
        who, salt = draw.choice(["alice", "bob"]), draw.choice(["", "", f"s{seed}"])
        stem = draw.choice(stems)
        prompt = stem[: draw.randrange(20, len(stem) + 1)] + "".join(draw.choices(alphabet, k=5))
        body = {"cache": {"salt": salt}} if salt else {}
        done = clients[who].completions.create(
            model="tiny", prompt=f"{seed}{prompt}", max_tokens=2, temperature=0, extra_body=body
        )
        cached = done.usage.prompt_tokens_details.cached_tokens
        mine = seen.setdefault((who, salt), [])
        could = max((common(prompt, old) for old in mine), default=0)
        assert cached <= could + 2, "it found what its namespace never sent"
        if could >= 2 * GRAIN:
            assert cached >= could // GRAIN * GRAIN - GRAIN, "it did not find its own"
            hits += 1
        elsewhere = [old for key, olds in seen.items() if key != (who, salt) for old in olds]
        others += max((common(prompt, old) for old in elsewhere), default=0) > could + GRAIN
        mine.append(prompt + done.choices[0].text)
    assert hits > 5, "the test shows nothing: nobody found anything"
    assert others > 5, "the test shows nothing: nobody could have found another's"


@pytest.mark.parametrize("yields", ["kv=int8", "keydiff:budget=0.5"])
def test_what_yields_says_the_same_while_there_is_room(keyed: Any, yields: str) -> None:
    ask = {"model": "tiny", "prompt": "a cache is a log " * 6, "max_tokens": 8, "temperature": 0}
    client = keyed.client("alice")
    plain, granted = (
        client.completions.create(**ask, extra_body={"cache": {"share": "off", **more}})
        for more in ({}, {"yields": yields})
    )
    assert granted.choices[0].text == plain.choices[0].text


def test_a_compressed_context_is_found_by_its_tenant_alone(keyed: Any) -> None:
    """kvzip computes the last token of a context in any case, so that all of it is found only where it went on."""
    context = "the log of a cache is a context, " * 3
    body = {"keep": "kvzip:budget=0.5,sinks=1,window=4,boundary=2", "context_tokens": 80}
    found = []
    for who, question in (("alice", "why?"), ("alice", "how?"), ("bob", "who?")):
        done = keyed.client(who).completions.create(
            model="tiny", prompt=context + question, max_tokens=2, extra_body={"cache": body}
        )
        found.append(done.usage.prompt_tokens_details.cached_tokens)
    assert found == [0, 80, 0]


def common(a: str, b: str) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def test_sharing_can_be_left_out(keyed: Any) -> None:
    client = keyed.client("alice")
    prompt = "a prompt that nobody else has sent, long enough for blocks " * 2

    def cached(**cache: Any) -> int:
        done = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=2, extra_body={"cache": cache}
        )
        found: int = done.usage.prompt_tokens_details.cached_tokens
        return found

    assert cached(share="off") == 0
    assert cached(priority=1, keep_for_s=5) == 0
    assert cached(share="off") == 0
    assert cached(kv="fp32", keep="full", share="prefix") > GRAIN


def test_a_request_may_choose_what_stays(keyed: Any) -> None:
    client = keyed.client("alice")
    prompt = "words that fill a window and then some more of them " * 3

    def said(**cache: Any) -> str:
        done = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=12, temperature=0, extra_body={"cache": cache}
        )
        text: str = done.choices[0].text
        return text

    full = said()
    assert said(keep="window:1000") == full
    assert said(keep="window:16") != full
    assert said(keep="h2o:budget=40,sinks=2,window=8,boundary=2") != full
    assert said() == full
