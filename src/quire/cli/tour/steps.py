"""Panel 1: every step of a short request."""

from __future__ import annotations

from typing import Any

from quire.cli.meter import Meter
from quire.cli.report import bytes_text
from quire.cli.run import generate
from quire.cli.tour.stage import PROMPT, Stage
from quire.cli.trace import Trace

TITLE = "Prefill, then one token at a time"

WORDS = (
    "Each token attends to the keys and values of all tokens before it. The first step computes those of the whole "
    "prompt at once (prefill) and puts them into the cache; each later step computes one token (decode) and reads the "
    "others back. Intervals are half-open: 3:12 is positions 3 to 11."
)


def run(stage: Stage) -> dict[str, Any]:
    """The trace of one request."""
    page = stage.page
    if page is not None:
        page.words(WORDS)
        page.line()
    ask = stage.ask(PROMPT, stage.pace.steps)
    n_prompt = len(ask.token_ids)
    with stage.opened() as runner:
        console = None if page is None else page.console
        trace = Trace(runner, stage.loaded.tokenizer, [n_prompt], console)
        output = generate(stage.loaded, Meter(runner, trace.add), [ask]).outputs[0]
    computed = sum(b - a for a, b in (r["computed"] for r in trace.rows))
    again = sum(r["computed"][1] for r in trace.rows)
    held = trace.rows[-1]["kv_bytes"]
    found = {
        "prompt": PROMPT,
        "prompt_tokens": n_prompt,
        "token_ids": output.token_ids,
        "text": output.text,
        "rows": trace.rows,
        "computed": computed,
        "computed_without_cache": again,
        "kv_bytes": held,
        "more": stage.command("run", PROMPT, "--max-tokens", 40, "--trace"),
    }
    if page is not None:
        page.line()
        page.words(
            f"{len(trace.rows)} steps computed {computed} positions. Without a cache each step would have computed all "
            f"positions so far: {again}. The cache holds {bytes_text(held)} now."
        )
    return found
