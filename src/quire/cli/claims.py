"""`quire claims`: the field's headline statements, run here. --help needs no torch."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from quire.cli.console import INTERRUPTED, err, out, quiet_transformers, say, spinner, write
from quire.cli.declared import Json
from quire.errors import ConfigError

__all__ = ["command"]


def command(
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", show_default=False, help="Only this claim; may be repeated."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", metavar=" ", help="Shorter runs, within two minutes.")
    ] = False,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.csv",
            show_default=False,
            help="Tokens of recorded requests, for the claims about paging; best as prompt and output.",
        ),
    ] = None,
    page: Annotated[
        str | None,
        typer.Option(
            "--write", metavar="FILE.md", show_default=False, help="Write the results page."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Run the field's headline claims about KV caches: our figure and a verdict for each.

    Reproduced, contradicted (with the figure), arithmetic (nothing to run), or not here (why).

    [dim]quire claims --quick[/dim]
    """
    from quire.bench.machine import commit, hardware
    from quire.evaluate.claims import (
        arithmetic,
        dropped,
        later,
        measured,
        memory,
        rates,
        run_claims,
    )
    from quire.evaluate.claims.slips import slips

    claims = [
        c for part in (arithmetic, measured, memory, rates, dropped, later) for c in part.CLAIMS
    ]
    names = [c.name for c in claims]
    unknown = [n for n in only or () if n not in names]
    if unknown:
        raise ConfigError(f"unknown claim {unknown[0]!r}; known: {', '.join(names)}")
    recorded: list[tuple[int, ...]] = []
    if lengths is not None:
        from quire.plan.lengths import read_requests

        recorded = read_requests(Path(lengths))
    chosen = [c for c in claims if not only or c.name in only]
    quiet_transformers()
    bench = measured.Bench(quick=quick, requests=recorded)
    try:
        with spinner("running …") as status:
            tell = (lambda _: None) if status is None else status.update
            rows = run_claims(chosen, bench, tell=tell)
    except KeyboardInterrupt:
        say("interrupted; nothing is reported", "yellow")
        raise typer.Exit(INTERRUPTED) from None
    flags = " --quick" if quick else ""
    document = {
        "claims": rows,
        "slips": slips(),
        "quick": quick,
        "command": f"quire claims{flags}" + (" --lengths FILE" if recorded else ""),
        "hardware": hardware(),
        "commit": commit(),
    }
    if page is not None:
        _write(Path(page), document)
    if json:
        write(json_module.dumps(document, ensure_ascii=False) + "\n")
    else:
        _show(document)
    if page is not None:
        say(f"wrote {page}")


def _write(path: Path, document: dict[str, Any]) -> None:
    """The page, and beside it the drawing where there is something to draw."""
    from quire.evaluate.claims.drawing import drawing
    from quire.evaluate.claims.page import page

    svg = drawing(document["claims"])
    picture = path.with_suffix(".svg")
    try:
        if svg:
            picture.write_text(svg, encoding="utf-8")
        path.write_text(page(document, picture.name if svg else ""), encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--write {path}: {e.strerror or e}") from e


_STYLES = {"reproduced": "green", "contradicted": "bold red", "arithmetic": "cyan"}


def _show(document: dict[str, Any]) -> None:
    from rich.text import Text

    console = out()
    for r in document["claims"]:
        console.print(Text(f"{r['name']}: ", "bold") + Text(r["claim"]))
        verdict = Text(r["verdict"], _STYLES.get(r["verdict"], "yellow"))
        ours = f": {r['ours']}" if r["ours"] else ""
        why = f" ({r['why']})" if r["why"] else ""
        console.print(Text("  ") + verdict + Text(ours) + Text(why, "dim"))
    err().print(f"{document['hardware']}; commit {document['commit']}", style="dim")
