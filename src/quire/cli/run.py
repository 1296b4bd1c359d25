"""`quire run`: prompts in, text out, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, cast

from quire.cli.console import err, say, write
from quire.cli.meter import Books, Meter
from quire.cli.options import RunOptions
from quire.cli.prepare import load, look, open_cache, vocabulary
from quire.cli.prompts import Ask, encode, read_prompts
from quire.engine.request import RequestOutput
from quire.errors import ConfigError
from quire.models.load import Loaded

if TYPE_CHECKING:
    from quire.engine.core import EngineStats

__all__ = ["Outcome", "generate", "main"]

FAILED = 1
"""Some of several requests ended with an error."""


@dataclass
class Outcome:
    """A finished batch.

    Args:
        outputs: one per prompt, in order.
        errors: of those that failed, by place.
        seconds: from submission to the last token.
        step_s: of each step, the forward and the draw.
        sharing: what the prefix cache did, where there is one.
        stats: the engine's counters at the end.
    """

    outputs: list[RequestOutput]
    books: Books
    seconds: float
    errors: dict[int, Exception] = field(default_factory=dict)
    step_s: list[float] = field(default_factory=list)
    sharing: dict[str, Any] | None = None
    stats: EngineStats | None = None

    @property
    def output_tokens(self) -> int:
        """Of all requests together."""
        return sum(o.figures.output_tokens for o in self.outputs)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the whole time, prefill included."""
        return self.output_tokens / self.seconds if self.seconds else 0.0


def main(arguments: Sequence[str], options: RunOptions) -> int:
    """Runs the command.

    Returns:
        The exit code.
    """
    asks = read_prompts(arguments, options)
    if options.compare is not None and len(asks) > 1:
        raise ConfigError(f"--compare takes one prompt, not {len(asks)}")
    source = look(options)
    context = source.max_context_tokens
    asks = encode(asks, source.tokenizer, context=context, vocab=vocabulary(source))
    loaded = load(source, options, [(a.where, cached_tokens(a, context)) for a in asks])
    if options.compare is not None:
        from quire.cli.compare import compare

        return compare(loaded, asks[0], options)
    runner = open_cache(loaded, options)
    try:
        return _run(loaded, runner, asks, options)
    finally:
        if options.tiers:
            runner.close()  # which writes what is cached to tiers that last


def _run(loaded: Loaded, runner: Any, asks: Sequence[Ask], options: RunOptions) -> int:
    """The batch, and what is shown of it."""
    trace = None
    if options.trace:
        from quire.cli.trace import Trace

        lengths = [len(a.token_ids) for a in asks]
        trace = Trace(runner, loaded.tokenizer, lengths, None if options.json else err())
    meter = Meter(runner, trace.add if trace else None)
    streams = len(asks) == 1 and not options.json and trace is None
    outcome = generate(loaded, meter, asks, stream=streams, bar=len(asks) > 1 and not options.quiet)
    if options.json:
        from quire.cli.report import document

        write(document(loaded, runner, options, outcome, trace.rows if trace else None))
        return FAILED if outcome.errors else 0
    if len(asks) > 1 or not streams:
        write_texts(asks, outcome.outputs)
    for at, error in outcome.errors.items():
        say(f"{asks[at].where or 'request: '}{error}", "red")
    if not options.quiet:
        from quire.cli.report import show_figures

        show_figures(err(), loaded, runner, options, outcome)
    return FAILED if outcome.errors else 0


def cached_tokens(ask: Ask, context: int | None) -> int:
    """Tokens that a request puts into the cache at most: all but the last one sampled."""
    wanted = ask.params.max_tokens or 1
    n_prompt = len(ask.token_ids)
    return n_prompt + (wanted if context is None else min(wanted, context - n_prompt)) - 1


def generate(
    loaded: Loaded, runner: Any, asks: Sequence[Ask], *, stream: bool = False, bar: bool = False
) -> Outcome:
    """Runs prompts as one continuous batch.

    Args:
        runner: usually a `Meter`.
        stream: write the text of the first to stdout as it comes, with a line's end after it.
        bar: show progress on stderr.

    Raises:
        QuireError: the only prompt was refused, or failed.
        KeyboardInterrupt: what was written stays; its argument says how much that was.
    """
    from quire.engine import Engine
    from quire.engine.sharing import sharing_report

    engine = Engine(cast("Any", runner), loaded.tokenizer, eos_token_ids=loaded.eos_token_ids)
    began = time.monotonic()
    places = {
        engine.add_request(list(a.token_ids), a.params, share=a.share, context=a.context): at
        for at, a in enumerate(asks)
    }
    done: dict[int, RequestOutput] = {}
    outcome = Outcome([], getattr(runner, "books", Books()), 0.0)
    last = "\n"
    try:
        with _progress(len(asks), shown=bar) as progress:
            while engine.has_work:
                step_began = time.monotonic()
                deltas = engine.step()
                outcome.step_s.append(time.monotonic() - step_began)
                for delta in deltas:
                    at = places[delta.request_id]
                    if stream and delta.text:
                        last = delta.text[-1]
                        write(delta.text)
                    if delta.output is not None:
                        done[at] = delta.output
                    if delta.error is not None:
                        outcome.errors[at] = delta.error
                progress.update(len(done), engine.core.output_tokens)
    except KeyboardInterrupt:
        if stream:
            write("" if last == "\n" else "\n")
        raise KeyboardInterrupt(f"after {engine.core.output_tokens} tokens") from None
    outcome.seconds = time.monotonic() - began
    outcome.sharing, outcome.stats = sharing_report(engine), engine.stats()
    if stream:
        write("" if last == "\n" and engine.core.output_tokens else "\n")
    if len(asks) == 1 and outcome.errors:
        raise outcome.errors[0]
    outcome.outputs = [done[at] for at in range(len(asks))]
    return outcome


def write_texts(asks: Sequence[Ask], outputs: Sequence[RequestOutput]) -> None:
    """All texts to stdout, each under its prompt when there are several."""
    for at, (ask, output) in enumerate(zip(asks, outputs, strict=True)):
        if len(asks) > 1:
            write(f"{'' if at == 0 else chr(10)}[{at + 1}] {_shortened(ask)}\n")
        write(output.text if output.text.endswith("\n") else output.text + "\n")


def _shortened(ask: Ask, width: int = 60) -> str:
    text = ask.prompt if isinstance(ask.prompt, str) else f"{len(ask.prompt)} token ids"
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"


class _Hidden:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing was shown."""

    def update(self, finished: int, tokens: int) -> None:
        """Show nothing."""


class _Bar:
    """Requests finished and tokens written so far, on stderr while it is a terminal."""

    def __init__(self, total: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self._progress = Progress(
            TextColumn("requests"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[tokens]:,} tokens"),
            TextColumn("{task.fields[rate]:,.0f}/s"),
            TimeElapsedColumn(),
            console=err(),
            transient=True,
        )
        self._task = self._progress.add_task("", total=total, tokens=0, rate=0.0)
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def update(self, finished: int, tokens: int) -> None:
        """After a step."""
        rate = tokens / max(time.monotonic() - self._began, 1e-9)
        self._progress.update(self._task, completed=finished, tokens=tokens, rate=rate)


def _progress(total: int, *, shown: bool) -> _Bar | _Hidden:
    return _Bar(total) if shown and err().is_terminal else _Hidden()
