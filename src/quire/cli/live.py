"""`quire inspect URL`: what goes on in a server, as its dashboard shows it, in a terminal."""

from __future__ import annotations

import json as json_module
import os
from collections.abc import Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from quire.cli.console import out, write
from quire.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

__all__ = ["inspect_server", "picture", "squeezed"]

PATH = "/v1/kv/stats"
PATIENCE_S = 30.0
MARKS = {
    "free": ("·", "bright_black"),
    "cached": ("░", "blue"),
    "held": ("▓", "cyan"),
    "shared": ("█", "magenta"),
    "private": ("▒", "yellow"),
}
"""State -> how a cell of the map looks, with colours and without."""

ROWS = 6
SPARKS = " ▁▂▃▄▅▆▇█"
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
WHY = {
    "differs": "another token comes next",
    "evicted": "it was evicted",
    "never stored": "nobody had sent it",
    "other namespace": "only another key has it",
    "no checkpoint": "its tokens are there, the state behind them is not",
}


class _NoRedirect(HTTPRedirectHandler):
    """A key goes to the server that was named, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        """Refuses."""


def inspect_server(
    url: str, key: str | None, model: str | None = None, *, json: bool, once: bool
) -> int:
    """Shows a server: again every second on a terminal until Ctrl-C, else once.

    Args:
        model: of several that are served, the one that is shown; None: the first.

    Raises:
        ConfigError: nobody answers there, or not with this key.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"{url!r} is no server's address; as http://127.0.0.1:8000")
    key = key or os.environ.get("QUIRE_API_KEY")
    console = out()
    if json or once or not console.is_terminal:
        with _open(url, key, model, "application/json") as answer:
            document = _read(url, answer.read())
        if json:
            write(json_module.dumps(document, ensure_ascii=False) + "\n")
        else:
            console.print(picture(document, console.width))
        return 0
    from rich.console import ConsoleDimensions
    from rich.live import Live

    try:
        with Live(  # stdout stays what it is: the console writes there itself
            console=console,
            auto_refresh=False,
            screen=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as live:
            for document in _stream(url, key, model):
                size = get_terminal_size()
                console.size = ConsoleDimensions(size.columns, size.lines)
                live.update(picture(document, size.columns), refresh=True)
    except KeyboardInterrupt:
        return 0
    raise ConfigError(f"{url} has ended; start it again, or look elsewhere")


# -- the server ----------------------------------------------------------------------------------------------------


def _open(url: str, key: str | None, model: str | None, kind: str) -> HTTPResponse:
    place = url.rstrip("/").removesuffix("/v1") + PATH
    place += "" if model is None else "?" + urlencode({"model": model})
    request = Request(place, headers={"accept": kind})  # noqa: S310 - http(s), checked
    if key:
        request.add_unredirected_header("authorization", f"Bearer {key}")
    try:
        answer: HTTPResponse = build_opener(_NoRedirect).open(request, timeout=PATIENCE_S)
    except HTTPError as e:
        with e:
            raise ConfigError(f"{url}: {_why(e)}") from e
    except (URLError, OSError, HTTPException, ValueError) as e:
        raise ConfigError(f"{url} cannot be reached: {getattr(e, 'reason', e)}") from e
    return answer


def _why(error: HTTPError) -> str:
    """What a refusal says; with what would work."""
    if error.code == 401:
        return "it asks for a key, or for another one: --key KEY, or QUIRE_API_KEY"
    try:
        return _plain(str(json_module.loads(error.read(1 << 16))["error"]["message"]))
    except (ValueError, KeyError, TypeError, OSError):
        return f"it answers {error.code}; is it a server of Quire's?"


def _read(url: str, raw: bytes) -> dict[str, Any]:
    try:
        document = json_module.loads(raw)
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("object") != "kv.stats":
        raise ConfigError(f"{url} is no server of Quire's: {PATH} holds something else")
    return document


def _stream(url: str, key: str | None, model: str | None) -> Iterator[dict[str, Any]]:
    with _open(url, key, model, "text/event-stream") as answer:
        try:
            for line in answer:
                if line.startswith(b"data:"):
                    yield _read(url, line[5:])
        except (OSError, HTTPException):
            return


# -- the picture ---------------------------------------------------------------------------------------------------


def picture(document: dict[str, Any], wide: int) -> RenderableType:
    """One document, `wide` columns of it."""
    from rich.console import Group
    from rich.text import Text

    d = document
    head = Text.assemble(
        (_plain(d["model"]), "bold"), f"  kv {d['kv']}, keep {d['keep']}, share {d['share']}"
    )
    if not d["you"]["operator"]:
        head.append(f"  key {d['you']['tenant']}")
    parts: list[RenderableType] = [head, Text(""), *_now(d)]
    if d.get("blocks"):
        parts += [Text(""), *_memory(d["blocks"], d["tiers"], wide)]
    parts += [Text(""), _prompts(d)]
    tree = _tree(d["tree"], wide)
    if tree:
        parts += [Text(""), Text("Prefixes that are used most", "bold"), *tree]
    parts += [Text(""), _tenants(d)]
    return Group(*parts)


def _now(d: dict[str, Any]) -> list[Text]:
    from rich.text import Text

    series = d["series"]
    found, computed = sum(series["found"]), sum(series["computed"])
    rate = sum(series["output"][-5:]) / 5
    requests = d["requests"]
    rows = [
        ("output", f"{rate:,.0f} tokens/s", spark(series["output"])),
        ("found", _share(found, found + computed), "of the last minute's prompt tokens"),
        (
            "queue",
            f"{requests['running']} running",
            f"{requests['waiting']} waiting, {_bytes(requests['held_bytes'])} held",
        ),
    ]
    for name, key in (("first token", "first_token_s"), ("between tokens", "between_tokens_s")):
        waits = d["waits"][key]
        more = f"p90 {_ms(waits['p90'])}, p99 {_ms(waits['p99'])}" if waits["n"] else ""
        rows.append((name, _ms(waits["p50"]), more))
    return [
        Text.assemble((f"{name:<15}", "dim"), (f"{value:>14}", "bold"), f"   {more}")
        for name, value, more in rows
    ]


def spark(values: Sequence[int]) -> str:
    """A line of bars, one per value."""
    top = max(*values, 1)
    return "".join(SPARKS[-(-v * (len(SPARKS) - 1) // top)] for v in values)


def _memory(
    blocks: dict[str, Any], tiers: Sequence[dict[str, Any]], wide: int
) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    states = blocks["states"]
    across = min(wide, 96)
    cells = squeezed(blocks["cells"], ROWS * across)
    lines = []
    for at in range(0, len(cells), across):
        line = Text()
        for state in cells[at : at + across]:
            mark, style = MARKS.get(states[state], ("?", ""))
            line.append(mark, style)
        lines.append(line)
    total = {s: sum(p["bytes"][s] for p in blocks["pools"]) for s in states}
    total["free"] = blocks["free_bytes"]
    legend = Text()
    for state in states:
        mark, style = MARKS.get(state, ("?", ""))
        legend.append(f"{mark} ", style)
        legend.append(f"{state} {_bytes(total[state])}   ")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("codec", "tier", "block"):
        table.add_column(name)
    for name in ("size", "held", "cached", "free"):
        table.add_column(name, justify="right")
    for p in blocks["pools"]:
        b = p["bytes"]
        table.add_row(
            ", ".join(p["codecs"]) or "–",
            p["tier"],
            f"{' or '.join(map(str, p['block_tokens'])) or '–'} tokens",
            *map(
                _bytes,
                (p["block_bytes"], b["held"] + b["shared"] + b["private"], b["cached"], b["free"]),
            ),
        )
    for t in tiers:
        free = max(0, t["capacity_bytes"] - t["used_bytes"])
        room = _bytes(free) if t["capacity_bytes"] else "–"
        name = t["tier"] if t["ok"] else f"{t['tier']}, {t['why'] or 'resting'}"
        table.add_row(
            "all", _plain(name), f"{t['blocks']:,} blocks", "–", "–", _bytes(t["used_bytes"]), room
        )
    return [Text(f"Memory, {_bytes(blocks['total_bytes'])}", "bold"), *lines, legend, table]


def squeezed(runs: Sequence[Sequence[Any]], most: int) -> list[int]:
    """Of runs of cells the state that fills most of each, in at most `most` cells."""
    every = [counts for n, counts in runs for _ in range(n)]
    width = max(1, -(-len(every) // most))
    out = []
    for at in range(0, len(every), width):
        sums = [sum(column) for column in zip(*every[at : at + width], strict=True)]
        busy = sums[1:]  # what is free shows only where nothing else is
        out.append(1 + busy.index(max(busy)) if any(busy) else 0)
    return out


def _prompts(d: dict[str, Any]) -> Text:
    from rich.text import Text

    p = d["prompts"]
    text = Text.assemble(
        ("Prompts  ", "bold"),
        f"{p['found']} found, {p['partly']} in part, {p['missed']} not; "
        f"{_share(p['found_tokens'], p['tokens'])} of {p['tokens']:,} tokens",
    )
    for reason, n in sorted(d["misses"].items(), key=lambda x: -x[1]):
        text.append(f"\n  {n:>7,}  {WHY.get(reason, reason)}")
    engine = d.get("engine")
    if engine:
        for name, n in engine["corrupt"].items():
            text.append(f"\n  {n:>7,}  corrupt: {name}", "bold red" if n else "")
        if "evicted_blocks" in engine:
            text.append(f"\n  {engine['evicted_blocks']:>7,}  blocks evicted")
    return text


def _tree(trees: Sequence[dict[str, Any]], wide: int) -> list[Text]:
    from rich.text import Text

    lines: list[Text] = []

    def tell(branches: Sequence[dict[str, Any]], more: int, depth: int) -> None:
        for b in branches:
            text = b.get("text")
            words = (
                f"tokens {b['at']}–{b['at'] + b['tokens'] - 1}" if text is None else _plain(text)
            )
            head = f"{b['uses']:>6}× {b['tokens']:>6}{'+' if b['cut'] else ' '} {'  ' * depth}"
            line = Text(f"{head}{words}", "cyan" if b["held_chunks"] else "")
            line.truncate(wide, overflow="ellipsis")
            lines.append(line)
            tell(b["children"], b["more"], depth + 1)
        if more:
            lines.append(Text(f"{'':15}{'  ' * depth}{more} more", "dim"))

    for tree in trees:
        if tree["branches"]:
            lines.append(Text(f"  uses  tokens  {tree['tenant']}", "dim"))
            tell(tree["branches"], tree["more"], 0)
    return lines


def _tenants(d: dict[str, Any]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("key")
    for name in (
        "running",
        "waiting",
        "done",
        "refused",
        "prompt tokens",
        "found",
        "output tokens",
        "holds",
    ):
        table.add_column(name, justify="right")
    for t in d["tenants"]:
        counts = [t[n] for n in ("running", "waiting", "done", "refused", "prompt_tokens")]
        table.add_row(
            t["tenant"],
            *(f"{n:,}" for n in counts),
            _share(t["found_tokens"], t["prompt_tokens"]),
            f"{t['output_tokens']:,}",
            _bytes(t["held_bytes"]),
        )
    if d["tenants_left_out"]:
        table.add_row(f"and {d['tenants_left_out']} more")
    return table


def _plain(text: str) -> str:
    """In one line, and without what a terminal would obey."""
    return "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split())
    )


def _bytes(n: float) -> str:
    unit = 0
    while n >= 1024 and unit < len(UNITS) - 1:
        n, unit = n / 1024, unit + 1
    return f"{n:.0f} {UNITS[unit]}" if not unit or n >= 100 else f"{n:.1f} {UNITS[unit]}"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"
