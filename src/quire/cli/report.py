"""What a run cost: a short table for people, a document for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from quire.cli.options import NO_CACHE, RunOptions
from quire.engine.request import RequestOutput
from quire.models.load import Loaded

if TYPE_CHECKING:
    from rich.console import Console

    from quire.cli.run import Outcome

__all__ = ["bytes_text", "document", "grid", "result", "show", "show_figures", "way_of"]

SHOWN_REQUESTS = 16
"""Rows of a batch that the table lists; of more it shows the sums."""


def way_of(runner: Any) -> str | None:
    """packed, rows, patched or dense; None without a cache."""
    bridge = getattr(runner, "bridge", None)
    return None if bridge is None else str(bridge.way)


def result(loaded: Loaded, runner: Any, options: RunOptions, outcome: Outcome) -> dict[str, Any]:
    """The keys of `quire run --json`."""
    return {
        "model": loaded.name,
        "way": way_of(runner),
        "kv": options.kv,
        "keep": options.keep,
        "share": options.share,
        "requests": [_request(o, outcome, at) for at, o in enumerate(outcome.outputs)],
        "tokens_per_s": outcome.tokens_per_s,
        "kv_bytes_per_token": runner.bytes_per_token,
        "kv_bytes_peak": outcome.books.peak_bytes,
        "kv_bytes_end": outcome.books.end_bytes,
        "waste": outcome.books.waste,
        "architecture": type(loaded.model).__name__,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "weights": "plain" if runner.weights is None else runner.weights.form,
        "groups": _groups(runner),
        "output_tokens": outcome.output_tokens,
        "steps": outcome.books.steps,
        "seconds": outcome.seconds,
        "shortage": None if outcome.stats is None else asdict(outcome.stats.ladder),
        "checks": None if outcome.stats is None else outcome.stats.checks,
    }


def document(
    loaded: Loaded,
    runner: Any,
    options: RunOptions,
    outcome: Outcome,
    trace: list[dict[str, Any]] | None = None,
) -> str:
    """One line of JSON."""
    found = result(loaded, runner, options, outcome)
    if outcome.sharing is not None:
        found["sharing"] = outcome.sharing
    if trace is not None:
        found["trace"] = trace
    return json.dumps(found, ensure_ascii=False) + "\n"


def _request(output: RequestOutput, outcome: Outcome, at: int) -> dict[str, Any]:
    figures = output.figures
    found: dict[str, Any] = {
        "prompt_tokens": figures.prompt_tokens,
        "cached_tokens": figures.cached_tokens,
        "loaded_tokens": figures.loaded_tokens,
        "token_ids": output.token_ids,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "ttft_s": figures.ttft_s,
        "stop_reason": output.outputs[0].stop_reason,
        "decode_tokens_per_s": decode_rate(output),
        "kv_bytes_peak": figures.kv_bytes_peak,
        "kv_bytes_end": figures.kv_bytes_end,
        "preemptions": figures.preemptions,
        "swaps": figures.swaps,
        "seed": output.seed,
    }
    if figures.miss is not None:
        found["miss"] = asdict(figures.miss) | {"text": figures.miss.text()}
    if at in outcome.errors:
        found["error"] = str(outcome.errors[at])
    return found


def _groups(runner: Any) -> list[dict[str, Any]]:
    bridge = getattr(runner, "bridge", None)
    if bridge is None:
        return []
    return [
        {
            "name": g.name,
            "codec": g.codec,
            "span": type(g.span).__name__.lower(),
            "layers": list(g.layers),
            "block_tokens": g.block_tokens,
            "block_bytes": g.block_bytes,
        }
        for g in bridge.layout.spec.groups
    ]


def decode_rate(output: RequestOutput) -> float | None:
    """Tokens per second after the first; None where there are fewer than two."""
    times = output.outputs[0].token_times_s
    return (
        (len(times) - 1) / (times[-1] - times[0])
        if len(times) > 1 and times[-1] > times[0]
        else None
    )


# -- for people --------------------------------------------------------------------------------------------------


def bytes_text(n: float) -> str:
    """`81,920 B`, and from 10 MiB on `12.3 MiB`."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if n >= max(size, 10 << 20):
            return f"{n / size:,.1f} {unit}"
    return f"{n:,.0f} B"


def grid(rows: Sequence[tuple[str, str]]) -> Table:
    """Names and values, two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def show_figures(
    console: Console, loaded: Loaded, runner: Any, options: RunOptions, outcome: Outcome
) -> None:
    """The table that follows the text."""
    many = len(outcome.outputs) > 1
    if many and len(outcome.outputs) <= SHOWN_REQUESTS:
        show(console, _requests_table(outcome.outputs))
    rows = [
        ("model", _model_line(loaded)),
        *_weights_rows(runner),
        ("way into the model", way_of(runner) or "none: every step recomputes the whole sequence"),
        *(_batch_rows(outcome) if many else _single_rows(outcome)),
        *_cache_rows(runner, options, outcome),
    ]
    show(console, grid(rows))


def show(console: Console, table: Table) -> None:
    """Prints a table; into a file without the blanks that fill its last column."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        console.file.write(line.rstrip() + "\n")


def _model_line(loaded: Loaded) -> str:
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return f"{loaded.name} ({type(loaded.model).__name__}, {dtype}, {loaded.model.device})"


def _weights_rows(runner: Any) -> list[tuple[str, str]]:
    packed = runner.weights
    if packed is None:
        return []
    return [
        ("weights", f"{packed.n_layers} linear layers {packed.form}, {bytes_text(packed.n_bytes)}")
    ]


def _single_rows(outcome: Outcome) -> list[tuple[str, str]]:
    output = outcome.outputs[0]
    figures = output.figures
    cached = f", {figures.cached_tokens} of them cached" if figures.cached_tokens else ""
    rate = decode_rate(output)
    return [
        ("prompt", f"{figures.prompt_tokens:,} tokens{cached}"),
        ("output", f"{figures.output_tokens:,} tokens, {_ending(output)}"),
        ("time to first token", f"{figures.ttft_s or 0:.3f} s"),
        (
            "tokens per second",
            f"{outcome.tokens_per_s:,.1f}" + (f" ({rate:,.1f} after the first)" if rate else ""),
        ),
    ]


def _ending(output: RequestOutput) -> str:
    reason = output.outputs[0].stop_reason
    if output.finish_reason == "length":
        return "ended by their number"
    return "ended by itself" if reason is None else f"ended by {reason!r}"


def _batch_rows(outcome: Outcome) -> list[tuple[str, str]]:
    outputs = outcome.outputs
    ttft = sorted(o.figures.ttft_s or 0.0 for o in outputs)
    again = sum(o.figures.preemptions for o in outputs)
    rows = [
        ("requests", f"{len(outputs):,} in {outcome.books.steps:,} steps"),
        ("prompts", f"{sum(o.figures.prompt_tokens for o in outputs):,} tokens{_cached(outputs)}"),
        ("outputs", f"{outcome.output_tokens:,} tokens"),
        ("time to first token", f"{ttft[len(ttft) // 2]:.3f} s median, {ttft[-1]:.3f} s worst"),
        ("tokens per second", f"{outcome.tokens_per_s:,.1f}, all requests together"),
    ]
    return [*rows, ("preemptions", f"{again:,}")] if again else rows


def _cached(outputs: Sequence[RequestOutput]) -> str:
    found = sum(o.figures.cached_tokens for o in outputs)
    return f", {found:,} of them cached" if found else ""


def _cache_rows(runner: Any, options: RunOptions, outcome: Outcome) -> list[tuple[str, str]]:
    if options.kv == NO_CACHE:
        return [("KV cache", "none")]
    groups = runner.bridge.layout.spec.groups
    codecs = ", ".join(dict.fromkeys(g.codec for g in groups if not g.recurrent))
    books = outcome.books
    per_token = runner.bytes_per_token
    state = runner.bridge.layout.spec.bytes_per_sequence
    rows = [
        (
            "KV cache",
            f"{codecs or 'state'}, keep {options.keep}, blocks of {options.block_tokens} tokens",
        ),
        (
            "KV per token",
            bytes_text(per_token) if per_token else "0 B: it does not grow with the text",
        ),
        (
            "KV in all",
            f"{bytes_text(books.peak_bytes)} at most, {bytes_text(books.end_bytes)} at the end",
        ),
    ]
    if state:
        rows.append(("state per sequence", bytes_text(state)))
    where = "last block" if len(outcome.outputs) == 1 else "last blocks"
    held = sum(h for h, _ in books.ends.values())
    lost = held - sum(u for _, u in books.ends.values())
    rows.append(
        (f"waste in the {where}", f"{bytes_text(lost)}, {100 * books.waste:.1f} % of what is held")
    )
    return rows


def _requests_table(outputs: Sequence[RequestOutput]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="cyan")
    for name in ("#", "prompt", "output", "first token", "tokens/s", "KV at the end"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ended by", no_wrap=True)
    for i, o in enumerate(outputs, 1):
        rate = decode_rate(o)
        table.add_row(
            str(i),
            f"{o.figures.prompt_tokens:,}",
            f"{o.figures.output_tokens:,}",
            f"{o.figures.ttft_s or 0:.3f} s",
            f"{rate:,.1f}" if rate else "–",
            f"{o.figures.kv_bytes_end:,} B",
            Text(str(o.outputs[0].stop_reason or o.finish_reason)),
        )
    return table
