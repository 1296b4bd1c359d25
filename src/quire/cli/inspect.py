"""`quire inspect`: what attention pays, in the terminal and as a page; or what a server does. --help needs no torch."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.cli.console import interruptible, out, quiet_transformers, say, spinner, write
from quire.cli.declared import Json
from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.evaluate.attention import Look

__all__ = ["command"]

STRIP = 48
"""Columns of a layer's strip in the terminal."""

SHADES = " ▁▂▃▄▅▆▇█"
TOP = 8
DEEPEST = 0.45
"""Opacity behind the token that is read most: its text stays legible."""


def command(
    url: Annotated[
        str | None,
        typer.Argument(
            metavar="URL",
            show_default=False,
            help="A running server, as http://127.0.0.1:8000: memory, prefixes, waits and use, again every second.",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            show_default=False,
            help="Of that server; better in QUIRE_API_KEY, where no list of processes shows it.",
        ),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", metavar=" ", help="Show the server once, and end.")
    ] = False,
    attention: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPT",
            show_default=False,
            help="Text whose attention is looked at; @FILE reads it from a file.",
        ),
    ] = None,
    token: Annotated[
        int,
        typer.Option(
            metavar="N", help="Position of the token whose reading is shown; -1: the last."
        ),
    ] = -1,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|HUB_ID",
            show_default=False,
            help="Default: the packaged model; of a server with several, its name there.",
        ),
    ] = None,
    kv: Annotated[
        str, typer.Option(metavar="RECIPE", help="The codec that it is read through.")
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", show_default=False, help="Default: the file's.")
    ] = None,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory for the cache.")] = "0.5",
    html: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.html", show_default=False, help="Also write a page with every head."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """See where attention goes: mass by position, sinks, the heaviest fifth, and what one token reads.

    With the URL of a server, see what goes on there: blocks, the prefixes that are used most, tokens and waits.

    [dim]quire inspect --attention "The cat sat on the mat, and the cat" --token -1 --html look.html[/dim]

    [dim]quire inspect http://127.0.0.1:8000[/dim]
    """

    def work() -> int:
        if url is not None:
            of_a_prompt = (attention, dtype, html)
            if any(x is not None for x in of_a_prompt) or (token, kv, memory) != (
                -1,
                "auto",
                "0.5",
            ):
                raise ConfigError(
                    "inspect shows a server, or a prompt's attention; give a URL, or --attention and what goes with it"
                )
            from quire.cli.live import inspect_server

            return inspect_server(url, key, model, json=json, once=once)
        if attention is None:
            raise ConfigError("inspect needs --attention PROMPT, or the URL of a server")
        if key is not None or once:
            raise ConfigError("--key and --once are about a server; name it by its URL")
        return _run(attention, token, model, kv, dtype, memory, html, json=json)

    raise typer.Exit(interruptible(work))


def _run(
    prompt: str,
    token: int,
    model: str | None,
    kv: str,
    dtype: str | None,
    memory: str,
    html: str | None,
    *,
    json: bool,
) -> int:
    from quire.plan.layout import check_config
    from quire.spec import KVConfig

    text = _text(prompt)
    if html is not None and not Path(html).expanduser().parent.is_dir():
        raise ConfigError(f"--html {html}: its folder does not exist; make it first")
    check_config(KVConfig(kv))
    from quire.evaluate.attention import look
    from quire.models.load import check_source, load_model
    from quire.models.open import open_runner

    with spinner("loading the model …", shown=not json):
        source = check_source(model, dtype=dtype)
        quiet_transformers()
        loaded = load_model(source)
    if loaded.tokenizer is None:
        raise ConfigError("this model has no tokenizer, and a prompt is text")
    ids = [int(t) for t in loaded.tokenizer.encode(text)]
    runner = open_runner(loaded.model, kv=kv, memory=memory, weights="plain")
    try:
        with spinner("looking …", shown=not json):
            seen = look(runner, ids, token)
    finally:
        runner.close()
    words = [_shown(loaded.tokenizer.decode([t])) for t in ids]
    document = {"model": loaded.name, "kv": kv, **_document(seen, words)}
    if html is not None:
        try:
            Path(html).expanduser().write_text(_page(document), encoding="utf-8")
        except OSError as e:
            raise ConfigError(f"--html {html}: {e.strerror or e}; choose another place") from e
    if json:
        write(json_module.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        _show(document)
        if html is not None:
            say(f"every head: {html}")
    return 0


def _text(prompt: str) -> str:
    if not prompt.startswith("@"):
        return prompt
    try:
        return Path(prompt[1:]).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--attention {prompt}: {getattr(e, 'strerror', None) or e}") from e


def _shown(word: str) -> str:
    """One token's text in one line."""
    return word.replace("\n", "↵").replace("\t", "⇥") or "∅"


def _document(seen: Look, words: Sequence[str]) -> dict[str, Any]:
    mean = seen.mean_reads()
    best = sorted(range(len(mean)), key=lambda j: -mean[j])[:TOP]
    return {
        "tokens": [
            {"position": i, "id": t, "text": w}
            for i, (t, w) in enumerate(zip(seen.tokens, words, strict=True))
        ],
        "chosen": seen.chosen,
        "chosen_reads": [{"position": j, "text": words[j], "share": mean[j]} for j in best],
        "heads": [
            {
                "layer": h.layer,
                "head": h.head,
                "received": list(h.received),
                "heavy_share": h.heavy_share,
                "sinks": None if h.sinks is None else list(h.sinks),
                "reads": list(h.reads),
            }
            for h in seen.heads
        ],
    }


# -- the terminal ------------------------------------------------------------------------------------------------


def _show(document: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    n, heads = len(document["tokens"]), document["heads"]
    layers = sorted({h["layer"] for h in heads})
    console = out()
    wide = max(12, min(STRIP, n, console.width - 50))
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column(f"what positions 0 to {n - 1} receive")
    for name in ("first token", "heaviest fifth", "sinks"):
        table.add_column(name, justify="right")
    for layer in layers:
        mine = [h for h in heads if h["layer"] == layer]
        mean = [sum(x) / len(mine) for x in zip(*(h["received"] for h in mine), strict=True)]
        sinks = sum(bool(h["sinks"]) for h in mine)
        table.add_row(
            str(layer),
            Text(strip(mean, wide)),
            f"{100 * mean[0]:.1f} %",
            f"{100 * sum(h['heavy_share'] for h in mine) / len(mine):.0f} %",
            _of_heads(sinks, len(mine), short=mine[0]["sinks"] is None),
        )
    console.print(table)
    at = document["chosen"]
    word = document["tokens"][at]["text"]
    console.print(
        f"\nToken {at} ({word!r}) reads, on average over {len(heads)} heads:", highlight=False
    )
    for r in document["chosen_reads"]:
        bar = "█" * round(30 * r["share"])
        console.print(
            f"  {100 * r['share']:5.1f} %  {r['position']:5d}  {r['text']!r}  {bar}",
            highlight=False,
            markup=False,
        )


def _of_heads(sinks: int, heads: int, *, short: bool) -> str:
    if short:
        return "too short"
    return f"{sinks} of {heads} heads" if sinks else "none"


def strip(values: Sequence[float], wide: int) -> str:
    """Values in `wide` columns, the largest of each, as blocks whose height grows with the logarithm."""
    from math import log

    n = len(values)
    cells = [
        max(values[i * n // wide : max(i * n // wide + 1, (i + 1) * n // wide)])
        for i in range(wide)
    ]
    low, high = 1e-3, max(*cells, 1e-3)
    if high <= low:
        return SHADES[0] * wide
    scale = (len(SHADES) - 1) / log(high / low)
    return "".join(
        SHADES[max(0, min(len(SHADES) - 1, round(scale * log(max(c, low) / low))))] for c in cells
    )


# -- the page ----------------------------------------------------------------------------------------------------

_STYLE = """
:root {
  color-scheme: light dark; --ink: #1e2124; --soft: #5c6269; --paper: #fffefb; --line: #e2dfd7; --hot: 196, 98, 30;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e5e0; --soft: #a3a8ae; --paper: #15171a; --line: #2e3238; --hot: 226, 146, 74; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; padding: 20px;
  max-width: 60rem; font-variant-numeric: tabular-nums; }
h1 { font-size: 20px; margin: 0; } h2 { font-size: 16px; margin: 28px 0 4px; }
p { margin: 0 0 12px; max-width: 46rem; } .note { color: var(--soft); font-size: 14px; }
.words { line-height: 1.9; overflow-wrap: anywhere; max-width: none; }
.words span { border-radius: 3px; padding: 2px 0; white-space: pre-wrap; }
.words .chosen { outline: 2px solid rgb(var(--hot)); outline-offset: 1px; position: relative; }
.scroll { overflow-x: auto; } .scroll:focus-visible { outline: 2px solid rgb(var(--hot)); }
table { border-collapse: collapse; font-size: 13px; }
td, th { padding: 3px 18px 3px 0; text-align: right; white-space: nowrap; }
th { border-bottom: 1px solid var(--line); color: var(--soft); font-weight: 500; }
.map { text-align: left; padding-right: 24px; } svg { display: block; background: rgba(var(--hot), .06); }
"""


def _page(document: dict[str, Any]) -> str:
    from quire.evaluate.attention import SINK_SHARE, SINK_TOKENS

    tokens, at, heads = document["tokens"], document["chosen"], document["heads"]
    mean = [sum(x) / len(heads) for x in zip(*(h["reads"] for h in heads), strict=True)]
    top = max(mean)
    words = []
    for t in tokens:
        j = t["position"]
        share = mean[j] if j < len(mean) else 0.0
        mark = ' class="chosen"' if j == at else ""
        tip = f"{j}: {100 * share:.2f} %" if j <= at else f"{j}: after the chosen token"
        style = f"background: rgba(var(--hot), {DEEPEST * share / top:.3f})"
        text = escape(t["text"]).replace("↵", "↵<br>")
        words.append(f'<span{mark} style="{style}" title="{tip}">{text}</span>')
    short = ""
    if heads[0]["sinks"] is None:
        short = f"; {len(tokens)} tokens are too few to tell, {SINK_TOKENS} would do"
    rows = "\n".join(
        f"<tr><td>{h['layer']}</td><td>{h['head']}</td><td class=map>{_map(h['received'])}</td>"
        f"<td>{100 * h['received'][0]:.1f} %</td><td>{100 * h['heavy_share']:.0f} %</td>"
        f"<td>{_sinks(h['sinks'])}</td><td class=map>{_map(h['reads'])}</td></tr>"
        for h in heads
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Attention of {escape(document["model"])}</title><style>{_STYLE}</style></head><body>
<h1>Attention of {escape(document["model"])}, read through {escape(document["kv"])}</h1>
<h2>What token {at} reads</h2>
<p class="note">Shaded by what its query pays to each token before it, on average over {len(heads)} heads. Hold the
pointer over a token for its position and share.</p>
<p class="words">{"".join(words)}</p>
<h2>Every head</h2>
<p class="note">Received: what a position is paid by the average query that could read it, brighter for more
(logarithmic). Heaviest fifth: the share of all attention that the most attended 20 % of the tokens get. Sinks: early
positions that the average query far behind them pays more than {100 * SINK_SHARE:.0f} %{short}.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Every head"><table><thead><tr><th scope="col">layer</th>
<th scope="col">head</th><th scope="col" class="map">received, positions 0 to {len(tokens) - 1}</th>
<th scope="col">first token</th><th scope="col">heaviest fifth</th><th scope="col">sinks</th>
<th scope="col" class="map">token {at} reads</th></tr></thead><tbody>
{rows}
</tbody></table></div></body></html>
"""


def _sinks(positions: Sequence[int] | None) -> str:
    return "–" if not positions else ", ".join(map(str, positions))


def _map(values: Sequence[float], wide: int = 240) -> str:
    """A strip of cells; at most `wide` of them."""
    from math import log

    n = len(values)
    count = min(n, wide)
    cells = [max(values[i * n // count : (i + 1) * n // count]) for i in range(count)]
    high = max(*cells, 1e-3) if count > 1 else max(cells[0], 1e-3)
    step = wide / count
    boxes = []
    for i, c in enumerate(cells):
        shade = max(0.0, log(max(c, 1e-4) / 1e-4) / log(max(high, 2e-4) / 1e-4))
        if shade > 0.02:
            boxes.append(
                f'<rect x="{i * step:.2f}" width="{step + 0.1:.2f}" height="14" fill="rgba(var(--hot), {shade:.2f})"/>'
            )
    return f'<svg width="{wide}" height="14" role="img" aria-label="strip of {n} positions">{"".join(boxes)}</svg>'
