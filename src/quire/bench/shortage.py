"""Many small requests for little memory: random arrivals, lengths, priorities, forks and cancels; each is counted."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from quire.engine import Engine, SamplingParams
from quire.errors import CapacityError
from quire.store.cold import Cold
from quire.store.park import Parked
from quire.store.path import Path
from quire.store.sharing import Sharing
from quire.store.table import BlockTable
from quire.store.tiering import Tiering

__all__ = ["Load", "Outcome", "StoreClock", "drive"]

STORE_CALLS = (
    (BlockTable, ("append", "commit", "truncate", "fork", "release", "unreserve")),
    (Sharing, ("look", "take")),
    (Path, ("promise",)),
    (Tiering, ("want", "bind", "end_schedule", "begin_step")),
    (Parked, ("__init__", "out", "take", "fill", "leave", "drop")),
    (Cold, ("grow", "stage", "drop")),
)
"""What the engine asks of the store in a step; eviction, publishing and demotion happen within."""


@dataclass(frozen=True)
class Load:
    """What comes.

    Args:
        requests: in all.
        alive: most that are submitted and unfinished at a time.
        prompt_tokens, output_tokens: (least, most).
        prefixes: of so many beginnings half of the prompts have one; 0: none.
        cancel: chance per step that somebody goes away.
        forks: share of requests with two samples.
        too_large: share of requests that ask for more than the arena could ever hold.
    """

    requests: int = 10_000
    alive: int = 60
    prompt_tokens: tuple[int, int] = (4, 60)
    output_tokens: tuple[int, int] = (1, 24)
    prefixes: int = 8
    cancel: float = 0.05
    forks: float = 0.1
    too_large: float = 0.01

    def bytes_wanted(self, bytes_per_token: float) -> int:
        """What the requests that are alive at a time want together, on average."""
        mean = (sum(self.prompt_tokens) + sum(self.output_tokens)) / 2
        return int(self.alive * mean * bytes_per_token)


@dataclass
class Outcome:
    """What became of them.

    Args:
        ends: how many ended how: finished, cancelled, refused (told why at the door), failed.
        step_s, store_s: of each step, and what of it was spent in calls into the store.
        why: the first reason of each kind that somebody was told.
    """

    ends: Counter[str] = field(default_factory=Counter)
    step_s: list[float] = field(default_factory=list)
    store_s: list[float] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)

    @property
    def accounted(self) -> int:
        """Requests of which the end is known."""
        return sum(self.ends.values())

    def late_steps(self, least_s: float = 0.002, share: float = 0.1) -> list[tuple[float, float]]:
        """(store, step) seconds of the steps in which the store took more than both."""
        both = zip(self.store_s, self.step_s, strict=True)
        return [(a, b) for a, b in both if a > max(least_s, share * b)]


class StoreClock:
    """Seconds spent in `STORE_CALLS`, outermost calls only."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.seconds = clock, 0.0
        self._depth = 0

    @contextmanager
    def running(self) -> Iterator[StoreClock]:
        """While this lasts, calls are timed."""
        kept = [(cls, name, vars(cls)[name]) for cls, names in STORE_CALLS for name in names]
        for cls, name, call in kept:
            setattr(cls, name, self._timed(call))
        try:
            yield self
        finally:
            for cls, name, call in kept:
                setattr(cls, name, call)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return call(*args, **kwargs)
            self._depth = 1
            began = self.clock()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += self.clock() - began
                self._depth = 0

        return timed


def drive(
    engine: Engine,
    load: Load,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Submits, steps and cancels until all requests have ended.

    Args:
        engine: idle.
        progress: told how many have ended, now and then.
        clock: seconds; `time.thread_time` on a busy machine.

    Returns:
        What became of each; nothing is waiting or running afterwards.
    """
    dice, out = random.Random(seed), Outcome()
    vocab = engine.runner.vocab_size
    begins = [
        [dice.randrange(vocab) for _ in range(load.prompt_tokens[1] // 2)]
        for _ in range(load.prefixes)
    ]
    alive: set[str] = set()
    submitted = 0
    with StoreClock(clock).running() as store:
        while submitted < load.requests or alive or engine.has_work:
            for _ in range(dice.randint(0, 6)):  # arrivals of this step
                if submitted == load.requests or len(alive) >= load.alive:
                    break
                submitted += 1
                try:
                    alive.add(_submit(engine, load, dice, begins, submitted))
                except CapacityError as e:
                    out.ends["refused"] += 1
                    out.why.setdefault("refused", str(e))
            began, before = clock(), store.seconds
            for delta in engine.step():
                if delta.output is not None and delta.request_id in alive:
                    alive.discard(delta.request_id)
                    out.ends["finished" if delta.error is None else "failed"] += 1
                    if delta.error is not None:
                        out.why.setdefault("failed", str(delta.error))
            out.step_s.append(clock() - began)
            out.store_s.append(store.seconds - before)
            if alive and dice.random() < load.cancel:
                victim = dice.choice(sorted(alive))
                engine.cancel(victim)
                alive.discard(victim)
                out.ends["cancelled"] += 1
            if progress is not None and len(out.step_s) % 500 == 0:
                progress(out.accounted)
    return out


def _submit(
    engine: Engine, load: Load, dice: random.Random, begins: list[list[int]], number: int
) -> str:
    vocab = engine.runner.vocab_size
    prompt = [dice.randrange(vocab) for _ in range(dice.randint(*load.prompt_tokens))]
    if begins and dice.random() < 0.5:
        prompt = (dice.choice(begins) + prompt)[: load.prompt_tokens[1]]
    n_out = dice.randint(*load.output_tokens)
    if dice.random() < load.too_large:
        usage = engine.runner.usage()
        n_out += int(
            2 * usage.total_bytes / max(1.0, getattr(engine.runner, "bytes_per_token", 1.0))
        )
    params = SamplingParams(
        max_tokens=n_out,
        temperature=dice.choice([0.0, 1.0]),
        n=2 if dice.random() < load.forks else 1,
        seed=number,
        ignore_eos=True,
    )
    return engine.add_request(prompt, params, priority=dice.randint(0, 2))
