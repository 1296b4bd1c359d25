"""`quire eval`: fidelity, recall and bytes of configurations, read through the cache. --help needs no torch."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.cli import declared
from quire.cli.console import err, say, spinner, write
from quire.cli.declared import BlockTokens, Device, Dtype, Json, Model
from quire.cli.eval_input import (
    PPL,
    check,
    check_ask,
    numbers,
    read_file,
    read_prompt_ids,
    split_policies,
    split_recipes,
    split_tasks,
)
from quire.cli.eval_work import (
    check_weights,
    check_writable,
    journal_asks,
    load,
    look,
    show_columns,
    write_file,
)
from quire.cli.progress import bar
from quire.codecs.recipe import available
from quire.errors import ConfigError, RequestError
from quire.spec import DEFAULT_BLOCK_TOKENS, KVConfig

if TYPE_CHECKING:
    from quire.evaluate.report import Evaluation
    from quire.models.load import Source

__all__ = ["command"]


def command(
    model: Model = None,
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
            help="ppl (needs --text), passkey, kv, token-kv, needle, tracking, copy, values, variables, common, "
            "frequent; with numbers as kv:count=32,asked=8; may be repeated. Default: ppl with --text, none with "
            "--prompts alone, else passkey, kv and (asked after) token-kv.",
        ),
    ] = None,
    text: Annotated[
        str | None,
        declared.text("UTF-8 text: what ppl scores, and what recall hides its facts in."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Your own prompts, one per line as text or as JSON: where greedy answers part from the exact ones, "
            "and KL along them.",
        ),
    ] = None,
    answer_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most tokens of an answer to --prompts.")
    ] = 64,
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
    seed: Annotated[int, declared.seed("Of examples and intervals.")] = 0,
    inject: Annotated[
        bool,
        declared.inject(
            "Put outliers into the model first: a harder judge with the same function."
        ),
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for all caches together.")
    ] = "0.5",
    block_tokens: BlockTokens = DEFAULT_BLOCK_TOKENS,
    ask: Annotated[
        str,
        typer.Option(
            metavar="WHEN",
            help="Where --keep drops tokens by score: questions come after that, or before (the first one counts).",
        ),
    ] = "after",
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            metavar=" ",
            help="Also what each layer's keys and values alone cost (needs --text).",
        ),
    ] = False,
    speed_tokens: Annotated[
        int,
        typer.Option(metavar="N", help="Decoding steps timed per configuration; 0 for none."),
    ] = 32,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.jsonl",
            show_default=False,
            help="Write the rows there, one JSON object per line. A run that is killed goes on from FILE.jsonl.part.",
        ),
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.html",
            show_default=False,
            help="Write a page with plots and all figures; it needs nothing else.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Measure what a configuration costs: every query reads the cache back, as in decoding.

    Differences are from the full-precision cache on the same tokens; bytes are all that the cache really holds.

    [dim]quire eval --kv bf16 --task ppl,passkey,kv --text book.txt --length 1024[/dim]
    """
    recall = [
        "passkey",
        "kv",
        *(["token-kv"] if ask == "after" else []),
    ]  # see `evaluate`: known before tokens go
    usual = [PPL] if text is not None else [] if prompts else recall
    recipes, tasks, lengths = (
        split_recipes(kv or ["auto"]),
        split_tasks(task) if task else usual,
        numbers(length),
    )
    configs = [(k, p) for p in split_policies(keep) for k in recipes]
    check(configs, tasks, examples, max_tokens, block_tokens, seed)
    check_ask(ask, configs)
    for flag, n, least in (("answer-tokens", answer_tokens, 1), ("speed-tokens", speed_tokens, 0)):
        if n < least:
            raise ConfigError(f"--{flag} must be at least {least}, not {n}")
    words = read_file("--text", text)
    if layers and words is None:
        raise ConfigError("--layers scores a text; give --text FILE")
    for flag, name in (("--out", out), ("--report", report)):
        check_writable(flag, name)
    with spinner("looking at the model …"):
        source = look(model, dtype, device, memory)
        _check_shape(source, configs, block_tokens)
        asks = [] if prompts is None else read_prompt_ids(prompts, source, answer_tokens)
    for n in lengths if tasks or words is not None else ():
        _check_source(source, tasks, words, n, max_tokens, examples, seed)
    options: dict[str, Any] = {
        "configs": configs,
        "tasks": tasks,
        "text": words,
        "length_tokens": lengths,
        "max_tokens": max_tokens,
        "examples": examples,
        "seed": seed,
        "block_tokens": block_tokens,
        "ask": ask,
        "prompts": asks,
        "answer_tokens": answer_tokens,
    }
    found = _run(
        source,
        inject,
        json=json,
        out=out,
        layers=layers,
        memory=memory,
        speed_tokens=speed_tokens,
        **options,
    )
    if report is not None:
        from quire.evaluate.page import page

        write_file("--report", report, page(found))
    if json:
        write(json_module.dumps(found.document(), ensure_ascii=False, allow_nan=False) + "\n")
        return
    _show(found)


# -- before the weights are read ---------------------------------------------------------------------------------


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


def _run(
    source: Source,
    inject: bool,
    *,
    json: bool,
    out: str | None = None,
    layers: bool = False,
    memory: str = "0.5",
    speed_tokens: int = 0,
    **options: Any,
) -> Evaluation:
    from quire.evaluate.journal import Journal
    from quire.evaluate.report import finite_row
    from quire.evaluate.run import evaluate

    with ExitStack() as stack:
        journal = None
        if out is not None:
            asked = journal_asks(source, inject=inject, layers=layers, **options)
            journal = stack.enter_context(Journal(Path(f"{out}.part"), asked))
            if journal.resumed:
                say(f"going on with {out}.part, which has {journal.resumed} entries", "dim")
        loaded = load(source, shown=not json)
        check_weights(journal, loaded.digest)
        tell = stack.enter_context(bar(shown=not json))
        shared: dict[str, Any] = {
            "journal": journal,
            "progress": tell,
            "memory": memory,
            "injected": inject,
        }
        found = evaluate(
            loaded.model,
            loaded.tokenizer,
            speed_tokens=speed_tokens,
            end=loaded.eos_token_ids,
            **shared,
            **options,
        )
        if layers:
            found = replace(found, layers=tuple(_layers(loaded, shared, options)))
        if out is not None and journal is not None:
            lines = (json_module.dumps(finite_row(r), allow_nan=False) for r in found.rows)
            write_file("--out", out, "".join(line + "\n" for line in lines))
            journal.done()
    return replace(found, about=_about(source, loaded, options["length_tokens"]))


def _layers(loaded: Any, shared: dict[str, Any], options: dict[str, Any]) -> Any:
    """Of each recipe once, on a short part of the text in windows of the first length."""
    from quire.evaluate.sensitivity import LAYER_TOKENS, sensitivity

    return sensitivity(
        loaded.model,
        loaded.tokenizer,
        list(dict.fromkeys(kv for kv, _ in options["configs"])),
        options["text"],
        length_tokens=options["length_tokens"][0],
        max_tokens=min(options["max_tokens"], LAYER_TOKENS),
        block_tokens=options["block_tokens"],
        seed=options["seed"],
        **shared,
    )


def _about(source: Source, loaded: Any, lengths: Sequence[int]) -> dict[str, Any]:
    from quire.models.load import PACKAGED

    about: dict[str, Any] = {
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "lengths": lengths,
    }
    if source.name == PACKAGED:
        from quire import packaged

        about["packaged_sha256"] = packaged.digest()
    return about


# -- showing -----------------------------------------------------------------------------------------------------


def _show(found: Evaluation) -> None:
    """The tables to stdout, what they were measured on to stderr."""
    show_columns(found.table(), left=3)
    if found.layers:
        write("\n")
        each = (
            (x.kv, x.field, str(x.layer), f"{x.kl:.2e}", f"{x.dnll:+.2e}") for x in found.layers
        )
        show_columns([("kv", "field", "layer", "kl", "dnll"), *each], left=2)
    full = ", ".join(f"{task} {size:,.1f}" for task, size in found.full_bytes_per_token.items())
    err().print(f"exact cache, bytes per token: {full}", style="dim")
    injected = ", outliers injected" if found.injected else ""
    file = found.about.get("packaged_sha256")
    packaged = "" if file is None else f", packaged model {file[:16]}"
    err().print(f"weights {found.digest[:16]}{packaged}, seed {found.seed}{injected}", style="dim")
    for warning in found.warnings:
        say(f"warning: {warning}", "yellow")
