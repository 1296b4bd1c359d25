"""`quire eval`: fidelity, recall and bytes of configurations, read through the cache. --help needs no torch."""

from __future__ import annotations

import json as json_module
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.cli.console import err, quiet_transformers, say, spinner, write
from quire.codecs.recipe import FIELDS, available, parse_recipe
from quire.errors import ConfigError, RequestError
from quire.retention import parse_keep
from quire.spec import DEFAULT_BLOCK_TOKENS, KVConfig

if TYPE_CHECKING:
    from quire.evaluate.report import Evaluation
    from quire.models.load import Source

__all__ = ["command", "split_recipes", "split_tasks"]

PPL = "ppl"


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="A model folder, or a hub id. Without it the model that QUIRE_MODEL names, else the packaged one.",
        ),
    ] = None,
    kv: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B,…",
            show_default=False,
            help=f"Recipes to compare with the exact cache: auto (default), {', '.join(available())}; may be repeated.",
        ),
    ] = None,
    keep: Annotated[
        str, typer.Option(metavar="X,Y,…", help="Retention policies, each with every recipe.")
    ] = "full",
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T,U,…",
            show_default=False,
            help="ppl (needs --text), passkey, kv, token-kv, needle, tracking, copy; with numbers as "
            "kv:count=32,asked=8; may be repeated. Default: ppl with --text, else passkey, kv and token-kv.",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="UTF-8 text: what ppl scores, and what recall hides its facts in.",
        ),
    ] = None,
    length: Annotated[
        str,
        typer.Option(metavar="N,M,…", help="Tokens of a window, and of a recall task."),
    ] = "1024",
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most tokens of the text that ppl scores.")
    ] = 65_536,
    examples: Annotated[
        int, typer.Option(metavar="N", help="Examples of every recall task, over five depths.")
    ] = 25,
    seed: Annotated[int, typer.Option(metavar="S", help="Of examples and intervals.")] = 0,
    inject: Annotated[
        bool,
        typer.Option(
            "--inject",
            metavar=" ",
            help="Put outliers into the model first: a harder judge with the same function.",
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", show_default=False, help="float32, bfloat16, …; default: the file's."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cpu|cuda", show_default=False, help="Default: cuda where there is one."
        ),
    ] = None,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for all caches together.")
    ] = "0.5",
    block_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens per block.")
    ] = DEFAULT_BLOCK_TOKENS,
    ask: Annotated[
        str,
        typer.Option(
            metavar="WHEN",
            help="Where --keep drops tokens by score: questions come after that, or before (the first one counts).",
        ),
    ] = "after",
    json: Annotated[
        bool,
        typer.Option("--json", metavar=" ", help="One JSON document on stdout and nothing else."),
    ] = False,
) -> None:
    """Measure what a configuration costs: every query reads the cache back, as in decoding.

    Differences are from the full-precision cache on the same tokens; bytes are all that the cache really holds.

    [dim]quire eval --kv bf16 --task ppl,passkey,kv --text book.txt --length 1024[/dim]
    """
    usual = [PPL] if text is not None else ["passkey", "kv", "token-kv"]
    recipes, tasks, lengths = (
        split_recipes(kv or ["auto"]),
        split_tasks(task or usual),
        _lengths(length),
    )
    configs = [(k, p) for p in split_policies(keep) for k in recipes]
    _check(configs, tasks, examples, max_tokens, block_tokens, seed)
    _check_ask(ask, configs)
    words = _read(text)
    with spinner("looking at the model …"):
        source = _look(model, dtype, device, memory)
        _check_shape(source, configs, block_tokens)
    for n in lengths:
        _check_source(source, tasks, words, n, max_tokens, examples, seed)
    found = _run(
        source,
        inject,
        json=json,
        configs=configs,
        tasks=tasks,
        text=words,
        length_tokens=lengths,
        max_tokens=max_tokens,
        examples=examples,
        seed=seed,
        block_tokens=block_tokens,
        memory=memory,
        ask=ask,
    )
    if json:
        write(json_module.dumps(found.document(), ensure_ascii=False, allow_nan=False) + "\n")
        return
    _show(found)


# -- lists of recipes --------------------------------------------------------------------------------------------


def split_recipes(texts: Sequence[str]) -> list[str]:
    """`"auto,kivi:bits=2,residual=128"` to two recipes: a name begins one, `k=` begins one or goes on with one.

    Raises:
        ConfigError: an unknown codec, or `none`, which keeps nothing to read.
    """
    names = {"auto", "none", *available()}
    found: list[str] = []
    for text in texts:
        current: list[str] = []
        for item in text.split(","):
            head = item.strip().partition(":")[0].partition(";")[0].strip()
            field = head.partition("=")[0].strip() if "=" in head else ""
            of_fields = bool(current) and current[0].partition("=")[0].strip() in FIELDS
            goes_on = field not in FIELDS if field else head.lstrip("-").isdecimal()
            if current and (goes_on or (field in FIELDS and of_fields)) and head not in names:
                current.append(item)
                continue
            if current:
                found.append(",".join(current).strip())
            current = [item]
        found.append(",".join(current).strip())
    for recipe in found:
        if recipe == "none":
            raise ConfigError(
                "--kv none keeps no cache, so there is nothing to evaluate; --kv auto is the exact one"
            )
        parse_recipe(recipe)
    return found


def split_policies(text: str) -> list[str]:
    """`"full,h2o:budget=0.2,window=64,ada(snapkv:0.2)"` to three policies: what has a = and no name is a parameter."""
    items, depth = [""], 0
    for c in text:
        depth += (c == "(") - (c == ")")
        if c == "," and not depth:
            items.append("")
        else:
            items[-1] += c
    found: list[str] = []
    for item in items:
        head = item.partition("(")[0].partition(":")[0]
        if found and "=" in head:
            found[-1] += f",{item.strip()}"
        else:
            found.append(item.strip())
    return found


def _check_ask(ask: str, configs: Sequence[tuple[str, str]]) -> None:
    from quire.evaluate.run import ASK

    if ask not in ASK:
        raise ConfigError(f"--ask {ask!r} is not known; known: {', '.join(ASK)}")
    if ask == "before" and all(parse_keep(keep).spans for _, keep in configs):
        raise ConfigError(
            "--ask before is about policies that drop tokens by score, and no --keep here does; drop it"
        )


def split_tasks(texts: Sequence[str]) -> list[str]:
    """`"ppl,kv:count=16,asked=4"` to two tasks: what has a = and no name is a number of the task before it."""
    found: list[str] = []
    for item in ",".join(texts).split(","):
        if found and "=" in item and ":" not in item:
            found[-1] += f",{item.strip()}"
        else:
            found.append(item.strip())
    return found


def _lengths(text: str) -> list[int]:
    """`"512,1024"` to two numbers. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--length {text!r} must be a number of tokens, or several as 512,1024")
    return list(dict.fromkeys(map(int, parts)))


# -- before the weights are read ---------------------------------------------------------------------------------


def _check(
    configs: Sequence[tuple[str, str]],
    tasks: Sequence[str],
    examples: int,
    max_tokens: int,
    block_tokens: int,
    seed: int,
) -> None:
    from quire.evaluate.tasks import parse_task
    from quire.plan.layout import check_config

    for flag, value in (("--examples", examples), ("--max-tokens", max_tokens)):
        if value < 1:
            raise ConfigError(f"{flag} must be at least 1, not {value}")
    if seed < 0:
        raise ConfigError(f"--seed must be at least 0, not {seed}")
    for kv, keep in configs:
        check_config(KVConfig(kv, keep, block_tokens))
    for task in tasks:
        if task != PPL:
            parse_task(task)


def _read(name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--text {name}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"--text {name}: not UTF-8 text; convert it first") from e


def _look(model: str | None, dtype: str | None, device: str | None, memory: str) -> Source:
    from quire.models.load import check_source

    source = check_source(
        model or os.environ.get("QUIRE_MODEL") or None, dtype=dtype, device=device
    )
    quiet_transformers()
    from quire.models.memory import arena_bytes

    arena_bytes(memory, source.chosen_device)
    return source


def _check_shape(source: Source, configs: Sequence[tuple[str, str]], block_tokens: int) -> None:
    """What a configuration cannot serve in this model, found without its weights."""
    from quire.cli.prepare import check_shape, depends_on_shape

    for kv, keep in configs:
        if depends_on_shape(kv):
            check_shape(source, KVConfig(kv, keep, block_tokens))


def _check_source(
    source: Source,
    tasks: Sequence[str],
    text: str | None,
    length: int,
    max_tokens: int,
    examples: int,
    seed: int,
) -> None:
    """All of `evaluate`'s refusals that the config and the tokenizer suffice for."""
    from quire.evaluate.run import prepare
    from quire.evaluate.tasks import parse_task

    context = source.max_context_tokens
    if context is not None and length > context:
        raise RequestError(f"--length {length} is beyond the model's context of {context} tokens")
    if text is None and PPL in tasks:
        raise RequestError("task ppl needs a text to score; give --text FILE")
    asked = [None if t == PPL else parse_task(t) for t in tasks]
    prepare(source.tokenizer, asked, text, length, max_tokens, min(examples, 1), seed=seed)


# -- running and showing -----------------------------------------------------------------------------------------


def _run(source: Source, inject: bool, *, json: bool, **options: Any) -> Evaluation:
    from quire.evaluate.run import evaluate
    from quire.models.load import PACKAGED, load_model

    with spinner("loading the model …", shown=not json):
        loaded = load_model(source)
    if loaded.missing:
        say(
            f"warning: the file lacks {len(loaded.missing)} of the model's weights; they are random",
            "yellow",
        )
    about: dict[str, Any] = {
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "lengths": options["length_tokens"],
    }
    if source.name == PACKAGED:
        from quire import packaged

        about["packaged_sha256"] = packaged.digest()
    with spinner("evaluating …", shown=not json) as status:

        def progress(task: str, done: int, total: int) -> None:
            if status is not None:
                status.update(f"{task}: {done} of {total} texts")

        found = evaluate(
            loaded.model, loaded.tokenizer, injected=inject, progress=progress, **options
        )
    return replace(found, about=about)


def _show(found: Evaluation) -> None:
    """The table to stdout, what it was measured on to stderr."""
    lines = found.table()
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            c.ljust(w) if i < 3 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        write("  ".join(cells).rstrip() + "\n")
    full = ", ".join(f"{task} {size:,.1f}" for task, size in found.full_bytes_per_token.items())
    err().print(f"exact cache, bytes per token: {full}", style="dim")
    injected = ", outliers injected" if found.injected else ""
    file = found.about.get("packaged_sha256")
    packaged = "" if file is None else f", packaged model {file[:16]}"
    err().print(f"weights {found.digest[:16]}{packaged}, seed {found.seed}{injected}", style="dim")
    for warning in found.warnings:
        say(f"warning: {warning}", "yellow")
