"""How the tests of retention run requests, and what they see of what was kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from quire.engine import Engine, SamplingParams
from quire.engine.schedule import SchedulerConfig
from quire.models import keeper as module
from quire.models.open import open_runner
from quire.models.runner import ModelRunner
from quire.retention import available, parse_keep
from quire.retention.contract import Scored
from quire.retention.recipe import policy_class
from quire.spec import Coord
from quire.store.compact import families

SMALL = "sinks=2,window=4,boundary=3,every=8"
"""Protects little, so that short prompts have something to lose."""
OWN_TESTS = ("kvzip", "kvzap", "press")
"""What reads a prompt twice, needs a map of its model, or somebody else's code, has files of its own."""
PLAIN = tuple(n for n in available() if issubclass(policy_class(n), Scored) and n not in OWN_TESTS)
"""Policies that score."""
WRAPPED = ("ada(h2o)", "pyramid(snapkv)", "ada(pyramid(keydiff))", "pyramid(ada(expected))")


def small(text: str, budget: str = "0.4") -> str:
    """A policy, wrapped or not, with small parameters."""
    inner = text.rpartition("(")[2].rstrip(")")
    return text.replace(inner, f"{inner}:budget={budget},{SMALL}", 1)


@dataclass
class Seen:
    """What each request kept each time: (prompt tokens, length) to each head's positions."""

    kept: dict[tuple[int, int], dict[Coord, tuple[int, ...]]] = field(default_factory=dict)
    again: int = 0
    """How often a request came to a length that it had been at before."""

    def of(self, prompt_tokens: int) -> dict[int, dict[Coord, tuple[int, ...]]]:
        return {n: kept for (p, n), kept in self.kept.items() if p == prompt_tokens}


@contextmanager
def watching() -> Iterator[Seen]:
    """Notes what is kept; a request computed anew must keep the same again. Prompts are told apart by their lengths."""
    seen, compact = Seen(), module.compact

    def noting(table: Any, wanted: Any, move: Any) -> None:
        kept: dict[Coord, tuple[int, ...]] = {}
        for name, chains in families(table).items():
            where = {c: (chain, i) for chain in chains for i, c in enumerate(chain.group.coords)}
            for part in wanted[name]:
                for coord, slots in zip(part.coords, part.slots, strict=True):
                    chain, i = where[coord]
                    every = chain.true_positions(table.length)[i]
                    kept[coord] = tuple(every[slots].tolist())
        key = table.keeper.prompt_tokens, table.length
        seen.again += key in seen.kept
        assert seen.kept.setdefault(key, kept) == kept, "a request computed anew kept other tokens"
        compact(table, wanted, move)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compact", noting)
        yield seen


def check_kept(
    keep: str, n: int, prompt: int, kept: dict[Coord, tuple[int, ...]], share: float
) -> None:
    """Of a sequence of `n` tokens: within the budget, and everything protected is there."""
    policy = parse_keep(keep).policy
    safe = {p for a, b in policy.protect(n, prompt) for p in range(a, b)}
    assert safe == {*range(2), *range(n - 4, n), *(range(prompt - 3, prompt) if n > prompt else ())}
    for positions in kept.values():
        assert list(positions) == sorted(set(positions))
        assert safe <= set(positions) <= set(range(n))
    sizes = {len(x) for x in kept.values()}
    if policy.bounded:  # where sizes differ they are rounded to blocks of 8, up or down
        room = round(share * n) if len(sizes) == 1 else round(share * n) + 4
        assert sum(map(len, kept.values())) <= room * len(kept)
    assert len(sizes) == 1 or "(" in keep or not policy.bounded


@dataclass
class Outcome:
    """Tokens of each request, and what was found and held on the way."""

    tokens: list[list[int]]
    cached: list[int]
    preemptions: int
    seen: Seen


def run(
    model: Any,
    requests: Sequence[tuple[Sequence[int], Any]],
    *,
    n_tokens: int = 20,
    step_tokens: int = 48,
    one_by_one: bool = False,
    **options: Any,
) -> Outcome:
    """Requests (prompt, keep), greedy, as one batch or one after the other."""
    runner = open_runner(model, **{"memory": "32MiB", "block_tokens": 8, **options})
    assert isinstance(runner, ModelRunner)
    params = SamplingParams(max_tokens=n_tokens, ignore_eos=True)
    found: dict[str, Any] = {}
    try:
        with (
            watching() as seen,
            Engine(runner, config=SchedulerConfig(step_tokens=step_tokens)) as engine,
        ):
            names = []
            for prompt, keep in requests:
                names.append(engine.add_request(list(prompt), params, keep=keep))
                if one_by_one:
                    found |= drain(engine)
            found |= drain(engine)
            preemptions = engine.stats().scheduler.preemptions
            assert runner.bridge.store.usage().held_bytes == 0
    finally:
        runner.close()
    outputs = [found[name] for name in names]
    return Outcome(
        [list(o.outputs[0].token_ids) for o in outputs],
        [o.figures.cached_tokens for o in outputs],
        preemptions,
        seen,
    )


def drain(engine: Engine) -> dict[str, Any]:
    """Steps until nothing is left; each request's output."""
    out = {}
    while engine.has_work:
        for delta in engine.step():
            if delta.error is not None:
                raise delta.error
            if delta.output is not None:
                out[delta.request_id] = delta.output
    return out


def prompts(lengths: Sequence[int], vocab: int, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab, n).tolist() for n in lengths]
