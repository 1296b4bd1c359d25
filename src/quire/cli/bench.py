"""`quire bench`: how fast, beside what the memory gives. --help needs no torch."""

from __future__ import annotations

import json as json_module
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.cli.bench_serve import Load, measure_server
from quire.cli.console import INTERRUPTED, err, quiet_transformers, say, spinner, write
from quire.cli.declared import BlockTokens, Dtype, Json
from quire.codecs.recipe import available, parse_recipe
from quire.errors import ConfigError
from quire.spec import DEFAULT_BLOCK_TOKENS, KVConfig

if TYPE_CHECKING:
    from quire.models.load import Loaded

__all__ = ["command"]


def command(
    case: Annotated[
        str,
        typer.Argument(
            metavar="CASE",
            help="decode, prefill, concurrent, shared-prefix, prefix-trace TRACE.jsonl, or serve URL.",
        ),
    ],
    trace: Annotated[
        str | None,
        typer.Argument(
            metavar="TRACE|URL",
            show_default=False,
            help="Of prefix-trace: requests in Mooncake's format, replayed through the index without a model. "
            "Of serve: a running server.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|HUB_ID",
            show_default=False,
            help="A model folder, or a hub id. Without it the model that QUIRE_MODEL names, else the packaged one.",
        ),
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            show_default=False,
            help="Instead of a model, a Llama with random weights: tiny, 55m or 1.1b.",
        ),
    ] = None,
    ctx: Annotated[int, typer.Option(metavar="N", help="Tokens of each prompt.")] = 512,
    own: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default=False,
            help="Of shared-prefix: tokens of each prompt behind the prefix of --ctx tokens; default: 64.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Texts at a time.")] = 1,
    out: Annotated[int, typer.Option(metavar="N", help="Output tokens of each text.")] = 64,
    kv: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE",
            show_default=False,
            help=f"auto (default), {', '.join(available())}; may be repeated: they take turns in one run.",
        ),
    ] = None,
    keep: Annotated[str, typer.Option(metavar="POLICY", help="Which tokens are kept.")] = "full",
    repeats: Annotated[int, typer.Option(metavar="N", help="Turns of each recipe.")] = 5,
    seed: Annotated[int, typer.Option(metavar="S", help="Of prompts and weights.")] = 0,
    dtype: Dtype = None,
    weights: Annotated[
        str,
        typer.Option(metavar="FORM", help="auto, plain, prepacked, int8 or int4 linear layers."),
    ] = "auto",
    compile: Annotated[  # noqa: A002 - the option's name
        bool,
        typer.Option(
            "--compile",
            metavar=" ",
            help="Decode steps as code made by torch.compile: minutes before the first turn.",
        ),
    ] = False,
    attention: Annotated[
        str, typer.Option(metavar="NAME", help="auto, cpu, torch or reference.")
    ] = "auto",
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for all caches together.")
    ] = "0.5",
    block_tokens: BlockTokens = DEFAULT_BLOCK_TOKENS,
    capacity_blocks: Annotated[
        str | None,
        typer.Option(
            metavar="N|unlimited",
            show_default=False,
            help="Of prefix-trace: blocks of 512 tokens that stay; default: unlimited.",
        ),
    ] = None,
    evict: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY",
            show_default=False,
            help="Of prefix-trace: lru or cost (default).",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            show_default=False,
            help="Of serve: requests a second, at random times; default: 1.",
            rich_help_panel="Load on a server",
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default=False,
            help="Of serve: how many; default: 60, or all of a trace.",
            rich_help_panel="Load on a server",
        ),
    ] = None,
    shared: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default=False,
            help="Of serve: first tokens that all prompts have in common.",
            rich_help_panel="Load on a server",
        ),
    ] = None,
    trace_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Of serve: send the requests of this trace instead, at its times.",
            rich_help_panel="Load on a server",
        ),
    ] = None,
    shrink: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            show_default=False,
            help="Of serve: lengths of the trace are divided by it.",
            rich_help_panel="Load on a server",
        ),
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            show_default=False,
            help="Of serve: times of the trace are divided by it.",
            rich_help_panel="Load on a server",
        ),
    ] = None,
    good_first: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            show_default=False,
            help="Of serve: a good answer has its first token by then.",
            rich_help_panel="Load on a server",
        ),
    ] = None,
    good_between: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            show_default=False,
            help="Of serve: a good answer has its tokens so far apart, on average.",
            rich_help_panel="Load on a server",
        ),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Of serve: distributions of the waits, .png or .svg.",
            rich_help_panel="Load on a server",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Measure speed: verified against the reference first, then timed, with a streaming read beside it.

    The floor is what the memory allows: bytes of weights and cache that a step reads, over the streaming read.
    A prefill computes: it is measured by a product of two matrices in the model's dtype.

    [dim]quire bench decode --random 1.1b --ctx 512 --out 64[/dim]
    """
    load = Load(
        trace,
        model,
        rate,
        requests,
        ctx,
        out,
        shared,
        trace_file,
        shrink,
        speed,
        good_first,
        good_between,
        plot,
        seed,
    )
    _check_compile(case, attention, asked=compile)
    if case == "serve":
        measure_server(load, json=json)
        return
    load.refuse(case)
    if case == "prefix-trace":
        _replay(trace, capacity_blocks or "unlimited", evict or "cost", json=json)
        return
    for name, value in (
        ("TRACE", trace),
        ("--capacity-blocks", capacity_blocks),
        ("--evict", evict),
    ):
        if value is not None:
            raise ConfigError(f"{name} {value} is of prefix-trace, not of {case}; drop it")
    from quire.bench.cases import Case
    from quire.bench.models import check_size
    from quire.models.bridge import make_backend
    from quire.models.memory import arena_bytes
    from quire.models.prepack import check_weights
    from quire.plan.layout import check_config

    sharing = case == "shared-prefix"
    asked = Case(case, ctx, batch, out, seed, (64 if own is None else own) if sharing else own or 0)
    recipes = kv or ["auto"]
    for recipe in recipes:
        parse_recipe(recipe)
        check_config(KVConfig(recipe, keep, block_tokens))
    if repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, not {repeats}")
    make_backend(attention)
    check_weights(weights)
    share = arena_bytes(memory, "cpu") // (len(recipes) * (2 if sharing else 1))
    if random is not None:
        if model is not None:
            raise ConfigError("--random makes a model and --model names one; drop one of them")
        check_size(random)
    loaded = _load(model, random, asked.longest, dtype, seed)
    options = {
        "keep": keep,
        "memory": share,
        "block_tokens": block_tokens,
    }
    try:
        documents = _measure(
            loaded, asked, recipes, attention, weights, repeats, options, compiled=compile
        )
    except KeyboardInterrupt:
        say("interrupted; nothing is reported", "yellow")
        raise typer.Exit(INTERRUPTED) from None
    if json:
        whole = documents[0] if len(documents) == 1 else {"runs": documents}
        write(json_module.dumps(whole) + "\n")
    else:
        _show(documents)


def _replay(trace: str | None, capacity: str, evict: str, *, json: bool) -> None:
    from quire.bench.replay import capacity_of, document, read_trace, replay
    from quire.store.evict import make_eviction

    if trace is None:
        raise ConfigError("prefix-trace needs a file: quire bench prefix-trace TRACE.jsonl")
    make_eviction(evict)
    asks = read_trace(trace)
    blocks = capacity_of(capacity, asks)
    with spinner("replaying …"):
        found = document(trace, capacity, evict, replay(asks, blocks, evict))
    if json:
        write(json_module.dumps(found) + "\n")
        return
    write(
        f"{found['trace']}, {found['capacity_blocks']} blocks, {evict}: {found['hit_tokens']:,} of "
        f"{found['total_tokens']:,} tokens found ({found['hit_ratio']:.1%}), {found['hit_blocks']:,} of "
        f"{found['total_blocks']:,} blocks, {found['resident_blocks']:,} resident at the end\n"
    )


def _load(
    model: str | None, random: str | None, tokens: int, dtype: str | None, seed: int
) -> Loaded:
    """The model; refused before its weights are read where its context is too short."""
    from quire.models.load import check_source, load_model

    quiet_transformers()
    if random is not None:
        from quire.bench.models import random_llama

        with spinner("making the model …"):
            return random_llama(random, context=tokens, dtype=_dtype(dtype), seed=seed)
    source = check_source(model or os.environ.get("QUIRE_MODEL") or None, dtype=dtype)
    limit = source.max_context_tokens
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"--ctx and --out make {tokens} tokens and the context of {source.name} ends at {limit}; ask for fewer, "
            "or take --random"
        )
    with spinner("loading the model …"):
        return load_model(source)


def _check_compile(case: str, attention: str, *, asked: bool) -> None:
    """Refuses `--compile` where no step would run compiled, and where there is no compiler."""
    if not asked:
        return
    if case in ("prefill", "prefix-trace", "serve"):
        raise ConfigError(f"--compile is for decode steps, and {case} makes none here; drop it")
    if attention == "reference":
        raise ConfigError(
            "--compile is held to the eager steps of --attention reference; take another one, or drop it"
        )
    from quire.models.compiled import check_compile

    check_compile()


def _dtype(name: str | None) -> str:
    from quire.models.load import DTYPES

    if name is None or name == "auto":
        return "bfloat16"
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return name


def _measure(
    loaded: Loaded,
    case: Any,
    recipes: list[str],
    attention: str,
    weights: str,
    repeats: int,
    options: dict[str, Any],
    *,
    compiled: bool,
) -> list[dict[str, Any]]:
    from functools import partial

    from quire.bench.measure import REFERENCE, Side, measure
    from quire.evaluate.decode import twin
    from quire.models.open import open_runner
    from quire.models.prepack import prepack

    packed = prepack(loaded.model, weights)  # once: the twins below share them

    def opened(recipe: str, share: str, backend: str) -> Any:
        runner = open_runner(
            twin(loaded.model),
            kv=recipe,
            attention=backend,
            weights="plain",
            share=share,
            compile=compiled and backend != REFERENCE,
            **options,
        )
        runner.weights = packed
        return runner

    dtype = str(loaded.model.dtype).removeprefix("torch.")
    sides = [
        Side(
            recipe,
            partial(opened, recipe, "prefix" if case.shared else "off"),
            Side(recipe, partial(opened, recipe, "off")) if case.shared else None,
        )
        for recipe in recipes
    ]
    with spinner("measuring …") as status:
        tell = say if status is None else status.update
        return measure(
            case,
            sides,
            keep=options["keep"],
            attention=attention,
            dtype=dtype,
            repeats=repeats,
            say=tell,
            compiled=compiled,
        )


def _show(documents: list[dict[str, Any]]) -> None:
    """A line per recipe on stdout, the machine on stderr."""
    for d in documents:
        spread = d["tokens_per_s_spread"]
        floor = d["floor_tokens_per_s"]
        share = (
            f", {100 * d['tokens_per_s'] / floor:.0f} % of the floor {floor:,.1f}" if floor else ""
        )
        if d.get("share_of_product"):
            speed = d["product_gflop_per_s"]["median"]
            done = d["share_of_product"]["median"]
            share = (
                f", {done:.0%} of a product of matrices ({speed:,.0f} GFLOP/s, {d['product_form']})"
            )
        write(
            f"{d['case']} {d['batch']} x {d['ctx']} + {d['out']}, kv {d['kv']}: {d['tokens_per_s']:,.1f} tokens/s "
            f"({spread['min']:,.1f} to {spread['max']:,.1f}){share}; "
            f"{d['kv_bytes_per_token']:,.0f} B a token, {d['verified']:.0%} as the reference\n"
        )
        if "without_sharing" in d:
            beside = d["without_sharing"]
            write(
                f"  {d['computed_tokens']:,} tokens computed in {d['seconds']:,.2f} s, without sharing "
                f"{beside['computed_tokens']:,} in {beside['seconds']:,.2f} s: {d['times_faster']['median']:.2f} times "
                "as fast\n"
            )
    first = documents[0]
    err().print(
        f"memory reads {first['stream_gb_per_s']} GB/s; weights {first['weights']}"
        f"{', compiled' if first['compiled'] else ''}; {first['hardware']}; "
        f"commit {first['commit']}",
        style="dim",
    )
