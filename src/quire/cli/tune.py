"""`quire tune`: the best configuration for a model, a text, a budget of bytes and a floor of quality."""

from __future__ import annotations

import json as json_module
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.cli import declared
from quire.cli.console import say, spinner, write
from quire.cli.declared import BlockTokens, Device, Dtype, Json, Model
from quire.cli.eval_input import read_file, read_prompt_ids, split_policies, split_recipes
from quire.cli.eval_work import (
    check_weights,
    check_writable,
    journal_asks,
    load,
    look,
    write_file,
)
from quire.cli.progress import bar
from quire.errors import ConfigError, RequestError
from quire.spec import DEFAULT_BLOCK_TOKENS

if TYPE_CHECKING:
    from quire.evaluate.choice import Goal, Tuned
    from quire.models.load import Source

__all__ = ["command"]

BELOW_FLOOR = 1
"""Exit code where nothing that was measured has the quality that was asked for."""


def command(
    model: Model = None,
    memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="For the caches of all users: 4GiB, or as 0.5 or 50% a share of what the exact cache takes.",
        ),
    ] = "0.5",
    quality: Annotated[
        float, typer.Option(metavar="Q", help="Least top-1 agreement with the exact cache.")
    ] = 0.99,
    text: Annotated[
        str | None,
        declared.text("UTF-8 text like what will be served."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Prompts, one per line as text or as JSON; they and the model's own answers are the text.",
        ),
    ] = None,
    context: Annotated[
        int, typer.Option(metavar="N", help="Tokens of one sequence that the memory is to hold.")
    ] = 1024,
    users: Annotated[int, typer.Option(metavar="N", help="Sequences at a time.")] = 1,
    length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default=False,
            help="Tokens of a scored window. Default: 1024, or the context.",
        ),
    ] = None,
    kv: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B,…",
            show_default=False,
            help="Recipes to mix. Default: all that serve the model.",
        ),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            metavar="X,Y,…", help="Policies to try with the budget's share of tokens, or none."
        ),
    ] = "keydiff,kvzip",
    out: Annotated[
        str,
        typer.Option(
            metavar="FILE.toml",
            help="The configuration, with the evidence. A run that is killed goes on from FILE.toml.part.",
        ),
    ] = "tuned.toml",
    report: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.html", show_default=False, help="The evidence as a page with plots."
        ),
    ] = None,
    budget_minutes: Annotated[
        float, typer.Option(metavar="M", help="After which nothing further is taken up.")
    ] = 30.0,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most held-out tokens of the final comparison.")
    ] = 65_536,
    seed: Annotated[int, declared.seed("Of intervals.")] = 0,
    inject: Annotated[
        bool,
        declared.inject("Put outliers into the model first, as in eval."),
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    block_tokens: BlockTokens = DEFAULT_BLOCK_TOKENS,
    json: Json = False,
) -> None:
    """Find the best cache within a budget: codecs, bit maps, raw windows and policies, measured on your text.

    Exit code 1: nothing that was measured has the quality asked for; the best is written all the same.

    [dim]quire tune --memory 0.5 --quality 0.99 --text book.txt[/dim]
    """
    goal = _goal(memory, quality, context, users, length, max_tokens, budget_minutes)
    recipes = split_recipes(kv) if kv else []
    policies = [] if keep == "none" else split_policies(keep)
    _check(policies, text, prompts, seed)
    words = read_file("--text", text)
    for flag, name in (("--out", out), ("--report", report)):
        check_writable(flag, name)
    with spinner("looking at the model …"):
        source = look(model, dtype, device, "0.5")
        _check_context(source, goal)
        asks = [] if prompts is None else read_prompt_ids(prompts, source, ANSWER_TOKENS)
    options: dict[str, Any] = {
        "goal": [str(goal)],
        "codecs": recipes,
        "policies": policies,
        "injected": inject,
        "block_tokens": block_tokens,
        "seed": seed,
    }
    found = _run(source, goal, words, asks, out, options, json=json)
    from quire.evaluate.tuned import summary, tuned_page, tuned_toml

    choices: dict[str, Any] = {} if model is None else {"model": model}
    choices |= {} if dtype is None else {"dtype": dtype}
    choices |= {} if block_tokens == DEFAULT_BLOCK_TOKENS else {"block_tokens": block_tokens}
    written = tuned_toml(found, Path(out).name, choices)
    write_file("--out", out, written)
    Path(f"{out}.part").unlink(missing_ok=True)
    shutil.rmtree(f"{out}.maps", ignore_errors=True)
    if report is not None:
        write_file("--report", report, tuned_page(found, source.name))
    if json:
        import tomllib

        document = tomllib.loads(written)
        write(json_module.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        for line in summary(found):
            write(line + "\n")
        say(f"wrote {out}: quire run --config {out}", "dim")
    if not found.meets:
        raise typer.Exit(BELOW_FLOOR)


ANSWER_TOKENS = 128
"""Of an answer to a prompt, which is part of the text then."""


def _goal(
    memory: str,
    quality: float,
    context: int,
    users: int,
    length: int | None,
    max_tokens: int,
    minutes: float,
) -> Goal:
    from quire.evaluate.choice import Goal
    from quire.models.memory import parse_memory

    for flag, n in (("context", context), ("users", users), ("max-tokens", max_tokens)):
        if n < 1:
            raise ConfigError(f"--{flag} must be at least 1, not {n}")
    if not 0 < quality <= 1:
        raise ConfigError(f"--quality is an agreement above 0 and at most 1, not {quality:g}")
    if minutes <= 0:
        raise ConfigError(f"--budget-minutes must be above 0, not {minutes:g}")
    wanted = parse_memory(memory)
    if isinstance(wanted, float) and not 0 < wanted <= 1:
        raise ConfigError(
            f"--memory {memory}: a share of the exact cache lies in (0, 1]; for bytes give a unit, as in 4GiB"
        )
    if wanted <= 0:
        raise ConfigError(f"--memory {memory} must be above zero; for example 4GiB, 0.5 or 50%")
    window = min(1024, context) if length is None else length
    if window < 2:
        raise ConfigError(f"--length must be at least 2, not {window}")
    return Goal(wanted, quality, context, users, window, held_tokens=max_tokens, minutes=minutes)


def _check(policies: list[str], text: str | None, prompts: str | None, seed: int) -> None:
    from quire.retention import parse_keep

    if (text is None) == (prompts is None):
        raise RequestError("tune measures on text like yours; give --text FILE, or --prompts FILE")
    if seed < 0:
        raise ConfigError(f"--seed must be at least 0, not {seed}")
    for name in policies:
        if ":" in name or "(" in name:
            raise ConfigError(
                f"--keep {name}: the budget follows from --memory; give the name alone"
            )
        parse_keep(f"{name}:budget=0.5")


def _check_context(source: Source, goal: Goal) -> None:
    most = source.max_context_tokens
    if most is not None and max(goal.context, goal.length) > most:
        raise RequestError(
            f"--context {max(goal.context, goal.length)} is beyond the model's context of {most} tokens"
        )


def _run(
    source: Source,
    goal: Goal,
    words: str | None,
    asks: list[list[int]],
    out: str,
    options: dict[str, Any],
    *,
    json: bool,
) -> Tuned:
    from quire.evaluate.journal import Journal
    from quire.evaluate.tune import answered, tune

    with ExitStack() as stack:
        asked = journal_asks(source, text=words, prompts=asks, **options)
        journal = stack.enter_context(Journal(Path(f"{out}.part"), asked))
        if journal.resumed:
            say(f"going on with {out}.part, which has {journal.resumed} entries", "dim")
        loaded = load(source, shown=not json)
        check_weights(journal, loaded.digest)
        tell = stack.enter_context(bar(shown=not json))
        text: Any = words
        if words is None:
            text = answered(loaded.model, asks, ANSWER_TOKENS, loaded.eos_token_ids, journal)
        return tune(
            loaded.model,
            loaded.tokenizer,
            text,
            goal,
            folder=Path(f"{out}.maps"),
            journal=journal,
            progress=tell,
            **{k: v for k, v in options.items() if k != "goal"},
        )
