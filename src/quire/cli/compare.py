"""`quire run --compare none`: one request with the cache and without it, side by side."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from rich.table import Table

from quire.cli.console import err, spinner, write
from quire.cli.meter import Meter
from quire.cli.options import NO_CACHE, Options, RunOptions
from quire.cli.prepare import open_cache
from quire.cli.prompts import Ask
from quire.cli.report import grid, result, show, show_figures
from quire.cli.run import Outcome, generate
from quire.engine.request import RequestOutput
from quire.models.load import Loaded

__all__ = ["Comparison", "cached_runs", "compare", "judge", "plain_runs", "step_seconds"]

ROWS = 10
"""Rows of the table: steps are put together when there are more."""


@dataclass(frozen=True)
class Comparison:
    """The same request twice.

    Args:
        cached, plain: with the cache and without.
        same_tokens: length of their common beginning.
    """

    cached: RequestOutput
    plain: RequestOutput
    same_tokens: int

    @property
    def identical(self) -> bool:
        """Whether both wrote the same tokens."""
        return self.cached.token_ids == self.plain.token_ids

    def steps(self) -> list[dict[str, Any]]:
        """Seconds of each step, for as long as both went the same way."""
        n_prompt = self.cached.figures.prompt_tokens
        both = zip(step_seconds(self.cached), step_seconds(self.plain), strict=False)
        return [
            {
                "step": i + 1,
                "context": n_prompt + i,
                "with_s": a,
                "without_s": b,
                "ratio": b / a if a else None,
            }
            for i, (a, b) in enumerate(both)
            if i <= self.same_tokens
        ]


def step_seconds(output: RequestOutput) -> list[float]:
    """Time to the first token, then from each token to the next."""
    times = [output.figures.arrival_s, *output.outputs[0].token_times_s]
    return [b - a for a, b in pairwise(times)]


def compare(loaded: Loaded, ask: Ask, options: RunOptions) -> int:
    """Runs the command. Returns the exit code."""
    runner, (outcome,) = cached_runs(loaded, [ask], options, stream=not options.json)
    with spinner("the same without a cache …", shown=not options.quiet):
        (plain,) = plain_runs(loaded, [ask], [outcome], options)
    found = judge(outcome.outputs[0], plain.outputs[0])
    if options.json:
        document = result(loaded, runner, options, outcome) | {"compare": _document(found, plain)}
        write(json.dumps(document, ensure_ascii=False) + "\n")
        return 0
    console = err()
    show_figures(console, loaded, runner, options, outcome)
    console.print()
    show(console, _table(found.steps()))
    show(console, grid(_verdict(loaded, found, outcome, plain)))
    return 0


def cached_runs(
    loaded: Loaded, asks: Sequence[Ask], options: Options, *, stream: bool = False
) -> tuple[Any, list[Outcome]]:
    """Runs requests with the cache, one after the other, each by itself.

    Returns:
        The runner, which has given the model back its own attention, and an outcome per request.
    """
    runner = open_cache(loaded, options)
    try:
        _warm(loaded, runner, asks[0])
        return runner, [generate(loaded, Meter(runner), [a], stream=stream) for a in asks]
    finally:
        runner.bridge.close()


def plain_runs(
    loaded: Loaded,
    asks: Sequence[Ask],
    cached: Sequence[Outcome],
    options: Options,
    limit_s: float = math.inf,
) -> list[Outcome]:
    """The same requests without a cache, by the model's own attention, drawn with the seeds that `cached` used.

    Args:
        limit_s: none is begun after so many seconds, except the first.
    """
    baseline = open_cache(loaded, replace(options, kv=NO_CACHE, keep="full"))
    _warm(loaded, baseline, asks[0])
    began = time.monotonic()
    outcomes: list[Outcome] = []
    for ask, with_cache in zip(asks, cached, strict=True):
        if outcomes and time.monotonic() - began > limit_s:
            break
        params = replace(ask.params, seed=with_cache.outputs[0].seed)
        outcomes.append(generate(loaded, baseline, [replace(ask, params=params)]))
    return outcomes


def _warm(loaded: Loaded, runner: Any, ask: Ask) -> None:
    """Two tokens that nobody sees: what a first forward sets up is not a step's price."""
    few = replace(ask.params, max_tokens=2, min_tokens=0, stop=(), ignore_eos=True)
    generate(loaded, runner, [replace(ask, token_ids=ask.token_ids[:2], params=few)])


def judge(cached: RequestOutput, plain: RequestOutput) -> Comparison:
    """How far both went the same way."""
    same = 0
    for a, b in zip(cached.token_ids, plain.token_ids, strict=False):
        if a != b:
            break
        same += 1
    return Comparison(cached, plain, same)


def _document(found: Comparison, plain: Outcome) -> dict[str, Any]:
    return {
        "identical": found.identical,
        "same_tokens": found.same_tokens,
        "without": {
            "token_ids": found.plain.token_ids,
            "text": found.plain.text,
            "ttft_s": found.plain.figures.ttft_s,
            "tokens_per_s": plain.tokens_per_s,
            "seconds": plain.seconds,
        },
        "steps": found.steps(),
    }


def _table(steps: Sequence[dict[str, Any]]) -> Table:
    """The prompt's step by itself, the others in ten rows at most; the middle time of each."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="cyan")
    for name in ("step", "tokens before it", "with cache", "without", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    per_row = max(1, -(-(len(steps) - 1) // ROWS))
    parts = [steps[:1], *(steps[i : i + per_row] for i in range(1, len(steps), per_row))]
    for part in (p for p in parts if p):
        with_s = statistics.median(s["with_s"] for s in part)
        without_s = statistics.median(s["without_s"] for s in part)
        table.add_row(
            _from_to(part[0]["step"], part[-1]["step"]),
            _from_to(part[0]["context"], part[-1]["context"]),
            f"{1000 * with_s:,.2f} ms",
            f"{1000 * without_s:,.2f} ms",
            f"{without_s / with_s:,.2f}×" if with_s else "–",
        )
    return table


def _from_to(a: int, b: int) -> str:
    return f"{a:,}" if a == b else f"{a:,}–{b:,}"


def _verdict(
    loaded: Loaded, found: Comparison, outcome: Outcome, plain: Outcome
) -> list[tuple[str, str]]:
    n = len(found.cached.token_ids)
    if found.identical:
        tokens = f"identical, all {n:,}"
    else:
        a, b = (_shown(loaded, o, found.same_tokens) for o in (found.cached, found.plain))
        tokens = f"the same for {found.same_tokens:,}, then {a} with the cache and {b} without"
    return [
        ("tokens", tokens),
        ("with cache", f"{outcome.seconds:,.3f} s, {outcome.tokens_per_s:,.1f} tokens per second"),
        ("without", f"{plain.seconds:,.3f} s, {plain.tokens_per_s:,.1f} tokens per second"),
        ("in all", f"{plain.seconds / outcome.seconds:,.2f}× the time without a cache"),
    ]


def _shown(loaded: Loaded, output: RequestOutput, at: int) -> str:
    ids = output.token_ids[at : at + 1]
    if not ids:
        return "the end"
    return repr(loaded.tokenizer.decode(ids)) if loaded.tokenizer is not None else f"token {ids[0]}"
