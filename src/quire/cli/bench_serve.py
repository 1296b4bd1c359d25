"""`quire bench serve URL`: load on a running server, as its clients see it."""

from __future__ import annotations

import asyncio
import json as json_module
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli.console import spinner, write
from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.bench.load import Seen

__all__ = ["Load", "measure_server"]

FORMS = (".png", ".svg")


@dataclass(frozen=True)
class Load:
    """What is sent.

    Args:
        rate, requests, ctx, out, shared: of drawn requests.
        trace, shrink, speed: of a trace instead.
        first, between: seconds that a good answer keeps.
    """

    url: str | None
    model: str | None
    rate: float | None
    requests: int | None
    ctx: int
    out: int
    shared: int | None
    trace: str | None
    shrink: float | None
    speed: float | None
    first: float | None
    between: float | None
    plot: str | None
    seed: int

    def refuse(self, case: str) -> None:
        """Raises ConfigError where an option of this is given to another case."""
        for name in (
            *("rate", "requests", "shared", "trace", "shrink"),
            *("speed", "first", "between", "plot"),
        ):
            if getattr(self, name) is not None:
                flag = {
                    "trace": "--trace-file",
                    "first": "--good-first",
                    "between": "--good-between",
                }.get(name, f"--{name}")
                raise ConfigError(f"{flag} is of bench serve, not of {case}; drop it")


def measure_server(load: Load, *, json: bool) -> None:
    """Runs the command.

    Raises:
        ConfigError: options that exclude each other, or a server that answers nothing.
    """
    from quire.bench.load import Target, poisson, read_asks, run, summary

    if load.url is None:
        raise ConfigError("bench serve needs a server: quire bench serve http://127.0.0.1:8000")
    drawn = {"--rate": load.rate, "--shared": load.shared}
    traced = {"--shrink": load.shrink, "--speed": load.speed}
    for name, value in (drawn if load.trace else traced).items():
        if value is not None:
            other = "drawn requests" if load.trace else "a trace (--trace-file)"
            raise ConfigError(f"{name} is about {other}; drop it")
    plot = None if load.plot is None else Path(load.plot)
    if plot is not None and plot.suffix.lower() not in FORMS:
        raise ConfigError(f"--plot {plot}: the name must end in {', '.join(FORMS)}")
    if load.trace is not None:
        asks = read_asks(
            Path(load.trace),
            most=load.requests,
            shrink=load.shrink or 1.0,
            speed=load.speed or 1.0,
            seed=load.seed,
        )
    else:
        rate = 1.0 if load.rate is None else load.rate
        n = 60 if load.requests is None else load.requests
        asks = poisson(rate, n, load.ctx, load.out, shared=load.shared or 0, seed=load.seed)
    target = Target(load.url, load.model or "packaged", os.environ.get("QUIRE_API_KEY"))
    with spinner(f"sending {len(asks)} requests …"):
        seen = asyncio.run(run(target, asks))
    found = {
        "url": load.url,
        "model": target.model,
        "trace": load.trace,
        "seed": load.seed,
        **summary(seen, first_s=load.first, between_s=load.between),
    }
    if not found["answered"]:
        why = ", ".join(f"{n} × {e}" for e, n in found["errors"].items())
        raise ConfigError(f"{load.url} answered none of {len(asks)} requests: {why}")
    if plot is not None:
        draw(plot, seen, found)
    write((json_module.dumps(found) if json else _text(found)) + "\n")


def _text(found: dict[str, Any]) -> str:
    head = (
        f"{found['answered']} of {found['requests']} requests answered in {found['seconds']:.1f} s: "
        f"{found['requests_per_s']:.2f} a second, {found['output_tokens_per_s']:,.1f} output tokens a second; "
        f"{found['cached_share']:.0%} of the prompt tokens cached"
    )
    lines = [head]
    for key, name in (
        ("first_token_s", "first token"),
        ("between_tokens_s", "between tokens"),
        ("whole_s", "whole answer"),
    ):
        if found[key] is not None:
            shown = ", ".join(f"{n} {1000 * v:,.1f}" for n, v in found[key].items())
            lines.append(f"{name}, ms: {shown}")
    good = found["goodput"]
    if good["first_token_s"] is not None or good["between_tokens_s"] is not None:
        lines.append(f"good answers: {good['share']:.0%}, {good['per_s']:.2f} a second")
    if found["errors"]:
        lines.append("errors: " + ", ".join(f"{n} × {e}" for e, n in found["errors"].items()))
    return "\n".join(lines)


def draw(path: Path, seen: Sequence[Seen], found: dict[str, Any]) -> None:
    """Writes the distributions of the waits. Raises ConfigError: no matplotlib, or no such folder."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError("--plot needs matplotlib; pip install 'quire[plot]'") from e
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    sides = figure.subplots(1, 2)
    done = [s for s in seen if s.ok and s.token_s]
    for axes, name, values in (
        (sides[0], "first token", [s.token_s[0] for s in done]),
        (sides[1], "between tokens", [gap for s in done for gap in s.gaps_s]),
    ):
        ordered = sorted(1000 * v for v in values)
        share = [(i + 1) / len(ordered) for i in range(len(ordered))]
        axes.plot(ordered, share)
        axes.set_xlabel(f"{name}, ms")
        axes.set_ylabel("share of all")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{found['answered']} of {found['requests']} requests, {found['model']}")
    try:
        figure.savefig(path)
    except OSError as e:
        raise ConfigError(f"--plot {path}: {e.strerror or e}") from e
