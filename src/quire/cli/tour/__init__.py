"""`quire tour`: the cache shown on a real model, a panel at a time; every figure is measured while you look.

A panel is a file here with a `TITLE` and a `run(stage)` that measures, writes on the page where there is one, and
returns its part of the document, with the command that shows more under `"more"`.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from types import ModuleType
from typing import Any

from quire.cli.console import write
from quire.cli.options import TourOptions
from quire.cli.prepare import load, look, vocabulary
from quire.cli.tour import formula, growth, memory, steps, techniques
from quire.cli.tour.page import Page
from quire.cli.tour.stage import PROMPT, Pace, Stage, tour_text
from quire.errors import CapacityError, ConfigError, RequestError
from quire.models.load import Source

__all__ = ["PANELS", "main"]

PANELS: dict[str, ModuleType] = {
    "steps": steps,
    "growth": growth,
    "formula": formula,
    "memory": memory,
    "techniques": techniques,
}
"""In the order in which they are numbered, from 1."""

PACE = Pace()


def main(options: TourOptions, pace: Pace | None = None) -> int:
    """Runs the command. Returns the exit code.

    Raises:
        ConfigError: a panel that does not exist, a model without a tokenizer, or whatever `quire run` refuses.
        RequestError: a context too short for the first text.
    """
    wrong = [n for n in options.panels if not 1 <= n <= len(PANELS)]
    if wrong:
        known = ", ".join(f"{i} {name}" for i, name in enumerate(PANELS, 1))
        raise ConfigError(f"there is no panel {wrong[0]}; known: {known}")
    began = time.monotonic()
    pace = pace or PACE
    if options.model is None and options.dtype is None:
        # so that the two ways of panel 2 round alike: in bfloat16 a near tie may fall either way
        options = replace(options, dtype="float32")
    options = replace(options, quiet=options.json)
    source = look(options)
    longest = _check(source, pace)
    loaded = load(source, options, [("the tour's first text: ", longest)])
    page = None if options.json else Page()
    stage = Stage(loaded, options, pace, page, began)
    document: dict[str, Any] = stage.about()
    if page is not None:
        _title(page, document)
    document["panels"] = {}
    for number, (name, panel) in enumerate(PANELS.items(), 1):
        if number in options.panels or not options.panels:
            document["panels"][name] = _shown(stage, number, panel)
    document["seconds"] = time.monotonic() - began
    if page is None:
        write(json.dumps(document, ensure_ascii=False) + "\n")
    else:
        page.line()
        page.words(
            f"The tour took {document['seconds']:,.0f} s. Every figure above was measured in that time, on this "
            "machine; times move with its load. quire --help lists the commands.",
            "dim",
        )
    return 0


def _check(source: Source, pace: Pace) -> int:
    """Refuses what no panel could show, before the weights are read. Returns tokens that the first request caches."""
    tokenizer, context = source.tokenizer, source.max_context_tokens
    if tokenizer is None:
        raise ConfigError(
            f"{source.name} has no tokenizer and the tour reads texts; quire run --prompts FILE takes token ids"
        )
    known, highest = vocabulary(source), max(tokenizer.encode(tour_text()))
    if highest >= known:
        raise ConfigError(
            f"{source.name}: its tokenizer makes token {highest} and the model knows {known}; the tour needs a model "
            "and a tokenizer that belong together"
        )
    longest = len(tokenizer.encode(PROMPT)) + pace.same_tokens
    if context is not None and longest > context:
        raise RequestError(
            f"{source.name}: the tour writes {longest} tokens and the context is {context}; quire run takes less"
        )
    return longest - 1


def _title(page: Page, about: dict[str, Any]) -> None:
    page.line()
    page.words(
        f"Quire {about['version']}: the KV cache of a transformer, measured as you look", "bold"
    )
    page.words(
        f"model: {about['model']}, {about['architecture']}, {about['parameters'] / 1e6:,.2f} M parameters, "
        f"{about['dtype']}, {about['device']}, threads: {about['threads']}",
        "dim",
    )


def _shown(stage: Stage, number: int, panel: ModuleType) -> dict[str, Any]:
    """One panel; what this model cannot show is said in its place."""
    page = stage.page
    if page is not None:
        page.heading(f"{number}  {panel.TITLE}")
    found: dict[str, Any]
    try:
        found = panel.run(stage)
    except (ConfigError, CapacityError, RequestError) as e:
        found = {"refused": " ".join(str(e).split()), "more": stage.command("run", PROMPT)}
        if page is not None:
            page.words(f"not shown here: {found['refused']}", "yellow")
    if page is not None:
        page.more(found["more"])
    return found
