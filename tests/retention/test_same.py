"""A request keeps the same tokens, and says the same, whatever runs beside it and whatever happens to it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

import zoo
from quire.retention import available, parse_keep
from retention.kept import PLAIN, WRAPPED, Outcome, check_kept, prompts, run, small

LENGTHS = (150, 171, 90)
TEXTS = prompts(LENGTHS, zoo.VOCAB)
POLICIES = [*PLAIN, *WRAPPED]
NEEDS_MORE = ("kvzap", "duo", "press", "quest")
"""A map of the model, somebody's code or a cache with bounds; their own files hold these tests."""


@cache
def model(name: str = "llama") -> Any:
    return zoo.build(name)


@cache
def alone(policy: str) -> Outcome:
    return run(model(), [(TEXTS[0], small(policy))], attention="reference")


def same(got: Outcome, at: int, policy: str) -> None:
    want = alone(policy)
    assert got.tokens[at] == want.tokens[0]
    assert got.seen.of(LENGTHS[0]) == want.seen.of(LENGTHS[0])


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_go_at_fixed_lengths_within_the_budget(policy: str) -> None:
    found = alone(policy).seen.of(LENGTHS[0])
    assert sorted(found) == [150, 158, 166]
    before: dict[Any, set[int]] = {}
    for n, kept in sorted(found.items()):
        assert sorted(kept) == [(layer, h) for layer in range(3) for h in range(2)]
        check_kept(small(policy), n, LENGTHS[0], kept, 0.4)
        for coord, positions in kept.items():
            assert set(positions) <= before.get(coord, set()) | set(
                range(n - 8 if before else 0, n)
            )
        before = {c: set(x) for c, x in kept.items()}


@pytest.mark.parametrize("policy", POLICIES)
def test_beside_requests_of_other_policies(policy: str) -> None:
    others = [(TEXTS[1][:60], small("random")), (TEXTS[2], "window:20")]
    same(run(model(), [(TEXTS[0], small(policy)), *others], attention="reference"), 0, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_preempted_and_computed_anew(policy: str) -> None:
    keep = small(policy)
    requests = [(TEXTS[2], "full"), (TEXTS[1], keep), (TEXTS[0], keep)]
    memory = 900_000 if parse_keep(keep).policy.bounded else 1_250_000  # which may keep everything
    got = run(model(), requests, attention="reference", memory=memory)
    same(got, 2, policy)
    assert got.preemptions


@pytest.mark.parametrize("policy", POLICIES)
def test_after_a_prefix_hit(policy: str) -> None:
    """Found are as many tokens as leave the queries that the policy needs, and the found ones stay as they are."""
    keep = small(policy)
    first = TEXTS[0][:120] + TEXTS[1][:20]
    requests = [(first, "full"), (TEXTS[0], keep), (first, "full")]
    got = run(model(), requests, attention="reference", one_by_one=True, share="prefix")
    same(got, 1, policy)
    most = parse_keep(keep).policy.hit_limit(LENGTHS[0])
    assert got.cached[1] == min(120, most)
    assert got.tokens[2] == got.tokens[0], "blocks that others may find were changed"
    assert got.cached[2] >= 120


@cache
def everything() -> Outcome:
    return run(model(), [(TEXTS[0], "full")])


@pytest.mark.parametrize("policy", [*(p for p in available() if p not in NEEDS_MORE), *WRAPPED])
def test_a_budget_that_covers_all_gives_what_full_gives(policy: str) -> None:
    full = everything()
    keep = {
        "full": "full",
        "window": "window:4000",
        "sinks": "sinks:4+window:4000",
        "ada": small("ada(keydiff)", "1.0"),
        "pyramid": small("pyramid(keydiff)", "4000"),
    }.get(policy) or small(policy, "1.0")
    assert run(model(), [(TEXTS[0], keep)]).tokens == full.tokens
    if policy not in ("full", "window", "sinks"):
        assert alone("random").tokens != full.tokens, (
            "the control: what is dropped shows in the text"
        )
