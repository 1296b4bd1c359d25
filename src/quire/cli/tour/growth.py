"""Panel 2: the same requests with and without the cache, and what a step takes as the text grows."""

from __future__ import annotations

import statistics
from typing import Any

from rich.text import Text

from quire.cli.compare import Comparison, cached_runs, judge, plain_runs, step_seconds
from quire.cli.tour.page import Page, columns
from quire.cli.tour.stage import PROMPT, Stage

TITLE = "With the cache and without"

WORDS = (
    "The same requests twice: reading the cache, and computing every position anew at every step. "
    "Bars are the middle time of a decode step behind a text of so many tokens, both on one scale."
)


def run(stage: Stage) -> dict[str, Any]:
    """One continuation for its tokens, then short ones at growing lengths for their times."""
    page, pace = stage.page, stage.pace
    if page is not None:
        page.words(WORDS)
        page.line()
    longest = min(pace.longest_tokens, stage.room - pace.point_tokens)
    lengths = sorted({max(1, longest * (i + 1) // pace.points) for i in range(pace.points)})
    asks = [stage.ask(PROMPT, pace.same_tokens)]
    asks += [stage.ask(stage.ids[:n], pace.point_tokens) for n in lengths]
    with stage.working("the same requests with the cache and without …"):
        _, cached = cached_runs(stage.loaded, asks, stage.options)
        plain = plain_runs(stage.loaded, asks, cached, stage.options, stage.limit_s(pace.curve_s))
    pairs = [judge(a.outputs[0], b.outputs[0]) for a, b in zip(cached, plain, strict=False)]
    first, points = pairs[0], pairs[1:]
    curve = [_point(n, found) for n, found in zip(lengths, points, strict=False)]
    found = {
        "token_ids": first.cached.token_ids,
        "without_token_ids": first.plain.token_ids,
        "same_tokens": first.same_tokens,
        "identical": first.identical,
        "seconds": cached[0].seconds,
        "without_seconds": plain[0].seconds,
        "identical_points": sum(p.identical for p in points),
        "points": curve,
        "left_out": lengths[len(curve) :],
        "more": stage.command(
            "run", PROMPT, "--max-tokens", 200, "--ignore-eos", "--compare", "none"
        ),
    }
    if page is not None:
        _show(page, found)
    return found


def _point(n_tokens: int, found: Comparison) -> dict[str, Any]:
    """Decode steps only: the first one is the prompt's."""
    with_s, without_s = (
        statistics.median(step_seconds(o)[1:]) for o in (found.cached, found.plain)
    )
    return {"context": n_tokens, "with_s": with_s, "without_s": without_s}


def _show(page: Page, found: dict[str, Any]) -> None:
    n, points = len(found["token_ids"]), found["points"]
    if found["identical"]:
        said = f"all {n} tokens of “{PROMPT} …” are identical"
    else:
        said = f"“{PROMPT} …” is the same for {found['same_tokens']} of {n} tokens"
    if points:
        said += f", and so are {found['identical_points']} of {len(points)} continuations behind the bars"
        charts = [
            (name, [1000 * p[key] for p in points], colour)
            for name, key, colour in (
                ("a step without the cache", "without_s", "yellow"),
                ("a step with the cache", "with_s", "green"),
            )
        ]
        at = [p["context"] for p in points]
        for line in columns(charts, at, width=page.width, plain=page.plain):
            page.line(line)
        page.line()
    page.words(
        f"Tokens: {said}. The first took {found['seconds']:.2f} s with the cache and "
        f"{found['without_seconds']:.2f} s without."
    )
    if points:
        page.line()
        page.table(
            ("tokens before the step", "with", "without", "without / with"),
            [_row(p) for p in (points[0], points[-1])],
        )
    if found["left_out"]:
        shown = ", ".join(f"{x:,}" for x in found["left_out"])
        page.words(f"Left out to save time: {shown} tokens.", "dim")


def _row(point: dict[str, Any]) -> tuple[Text, ...]:
    a, b = point["with_s"], point["without_s"]
    cells = (
        f"{point['context']:,}",
        f"{1000 * a:,.1f} ms",
        f"{1000 * b:,.1f} ms",
        f"{b / a:,.1f}×",
    )
    return tuple(Text(c) for c in cells)
