"""The command line's grammar. Nothing here imports torch: every --help is instant; the work is in the other files."""

# ruff: noqa: ARG001 - typer makes the flags from the signatures; their values travel in `context.params`

from __future__ import annotations

from typing import Annotated, Any

import typer

from quire import __version__
from quire.cli import (
    bench,
    calibrate,
    claims,
    doctor,
    evaluate,
    fsck,
    inspect,
    plan,
    serve,
    tune,
)
from quire.cli.console import interruptible
from quire.cli.flags import for_typer
from quire.codecs.recipe import available
from quire.spec import DEFAULT_BLOCK_TOKENS

__all__ = ["app"]

app = typer.Typer(
    name="quire",
    help="The KV cache for transformer inference as one system.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MODEL, _CACHE, _SAMPLING, _OUTPUT = "Model", "Cache", "Sampling", "Output"


def _option(panel: str, name: str, metavar: str, text: str, *short: str) -> Any:
    """An option whose default is told in its text: None means not given, so that a config file can speak."""
    return typer.Option(
        name, *short, metavar=metavar, help=text, rich_help_panel=panel, show_default=False
    )


Model = Annotated[
    str | None,
    _option(
        _MODEL,
        "--model",
        "PATH|HUB_ID",
        "A model folder, or a hub id. Without it the model that QUIRE_MODEL names, else the packaged one.",
    ),
]
Dtype = Annotated[
    str | None,
    _option(
        _MODEL, "--dtype", "NAME", "float32, bfloat16, float16 or float64; default: the file's."
    ),
]
Device = Annotated[
    str | None,
    _option(_MODEL, "--device", "cpu|cuda", "Where it runs; default: cuda where there is one."),
]
KV = Annotated[
    str | None,
    _option(
        _CACHE,
        "--kv",
        "RECIPE",
        f"How keys and values are stored: auto (default: the model's own dtype), {', '.join(available())}; "
        "or none: keep nothing and recompute everything at every step.",
    ),
]
Keep = Annotated[
    str | None, _option(_CACHE, "--keep", "POLICY", "Which tokens are kept; default: full.")
]
Memory = Annotated[
    str | None,
    _option(
        _CACHE,
        "--memory",
        "SIZE",
        "Memory for the cache: 8GiB, 500MB, or a share of what is free; default: 0.5.",
    ),
]
BlockTokens = Annotated[
    int | None,
    _option(_CACHE, "--block-tokens", "N", f"Tokens per block; default: {DEFAULT_BLOCK_TOKENS}."),
]
Share = Annotated[
    str | None,
    _option(
        _CACHE,
        "--share",
        "MODE",
        "off (default), or prefix: what prompts have in common is computed once; prefix:evict=lru|cost.",
    ),
]
Tiers = Annotated[
    str | None,
    _option(
        _CACHE,
        "--tiers",
        "TIERS",
        "Memory below the cache, as host:8GiB,disk:100GiB@DIR; a disk's blocks are found again next time. "
        "Shares prefixes.",
    ),
]
Attention = Annotated[
    str | None,
    _option(
        _CACHE,
        "--attention",
        "NAME",
        "auto (default): cpu where its kernels were built, else torch; or cpu, torch, reference.",
    ),
]
Weights = Annotated[
    str | None,
    _option(
        _MODEL,
        "--weights",
        "FORM",
        "auto (default), plain, prepacked, int8 or int4: how linear layers hold their weights on a CPU.",
    ),
]
Compile = Annotated[
    bool,
    _option(
        _MODEL,
        "--compile",
        " ",
        "Decode steps as code made by torch.compile: minutes at the first start, needs a C++ compiler.",
    ),
]
MaxTokens = Annotated[
    int | None, _option(_SAMPLING, "--max-tokens", "N", "Most output tokens; default: 128.")
]
Temperature = Annotated[
    float | None,
    _option(_SAMPLING, "--temperature", "T", "0 (default) always takes the best token."),
]
TopP = Annotated[
    float | None,
    _option(_SAMPLING, "--top-p", "P", "Keep the best tokens, up to this probability."),
]
TopK = Annotated[int | None, _option(_SAMPLING, "--top-k", "K", "Keep the K best tokens.")]
MinP = Annotated[
    float | None,
    _option(
        _SAMPLING, "--min-p", "P", "Keep tokens at least this fraction as probable as the best."
    ),
]
Seed = Annotated[int | None, _option(_SAMPLING, "--seed", "S", "The same seed, the same text.")]
Stop = Annotated[
    list[str] | None, _option(_SAMPLING, "--stop", "STR", "End before this text; may be repeated.")
]
Config = Annotated[
    str | None,
    _option(
        _OUTPUT,
        "--config",
        "FILE.toml",
        "The same options from a file, at its top or in a table named like the command; flags win.",
    ),
]
Quiet = Annotated[bool, _option(_OUTPUT, "--quiet", " ", "No figures on stderr.", "-q")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"quire {__version__}")
        raise typer.Exit


@app.callback()
def quire(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar=" ",
            callback=_show_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """The KV cache for transformer inference as one system."""


@app.command()
def run(
    context: typer.Context,
    prompt: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Texts to continue; - reads one from stdin."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help='A prompt per line: text, or JSON as {"prompt": "Once", "max_tokens": 5}.',
        ),
    ] = None,
    model: Model = None,
    dtype: Dtype = None,
    device: Device = None,
    kv: KV = None,
    keep: Keep = None,
    memory: Memory = None,
    block_tokens: BlockTokens = None,
    attention: Attention = None,
    weights: Weights = None,
    share: Share = None,
    tiers: Tiers = None,
    about: Annotated[
        str | None,
        _option(
            _CACHE,
            "--context",
            "N|TEXT",
            "What prompts begin with, in tokens or as text: --keep lets tokens go at its end, and with --share prefix "
            "the next prompt goes on from what stayed.",
        ),
    ] = None,
    compile: Compile = False,  # noqa: A002 - the option's name
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: Annotated[
        bool, _option(_SAMPLING, "--ignore-eos", " ", "Go on after the end-of-text token.")
    ] = False,
    json: Annotated[
        bool, _option(_OUTPUT, "--json", " ", "One JSON document on stdout and nothing else.")
    ] = False,
    compare: Annotated[
        str | None,
        _option(
            _OUTPUT,
            "--compare",
            "none",
            "Run again without a cache: tokens and time per step, side by side.",
        ),
    ] = None,
    trace: Annotated[
        bool,
        _option(
            _OUTPUT, "--trace", " ", "Every step: what was computed, read and cached, and where."
        ),
    ] = False,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Continue one or more prompts.

    The text goes to stdout as it comes, the figures to stderr. Several prompts run as one continuous batch.

    [dim]quire run "Once upon a time" --max-tokens 40[/dim]
    """
    from quire.cli.options import RunOptions
    from quire.cli.run import main

    asked = {**context.params, "context": context.params["about"]}
    if (asked["context"] or "").removeprefix("-").isdecimal():
        asked["context"] = int(asked["context"])
    options = RunOptions.resolve("run", asked)
    raise typer.Exit(interruptible(lambda: main(prompt or [], options)))


@app.command()
def chat(
    context: typer.Context,
    session: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Keep the conversation and its cache here; resume it when the file is there.",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", show_default=False, help="What the model is told first."),
    ] = None,
    model: Model = None,
    dtype: Dtype = None,
    device: Device = None,
    kv: KV = None,
    keep: Keep = None,
    memory: Memory = None,
    block_tokens: BlockTokens = None,
    tiers: Tiers = None,
    attention: Attention = None,
    weights: Weights = None,
    compile: Compile = False,  # noqa: A002 - the option's name
    max_tokens: Annotated[
        int | None, _option(_SAMPLING, "--max-tokens", "N", "Most tokens of a reply; default: 256.")
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Talk to a model that keeps its cache between turns.

    Each turn computes only what is new in it, and says how much that saved. Lines may also be piped in.
    Inside, /help lists the commands.
    """
    from quire.cli.chat import main
    from quire.cli.options import ChatOptions

    raise typer.Exit(main(ChatOptions.resolve("chat", context.params)))


@app.command()
def tour(
    context: typer.Context,
    panels: Annotated[
        list[int] | None,
        typer.Argument(
            metavar="PANEL",
            show_default=False,
            help="Only these: 1 steps, 2 with and without the cache, 3 formula and bytes, 4 rooms, blocks and sharing, "
            "5 techniques.",
        ),
    ] = None,
    model: Model = None,
    dtype: Annotated[
        str | None,
        _option(
            _MODEL,
            "--dtype",
            "NAME",
            "float32, bfloat16, float16 or float64; default: float32 for the packaged model, else the file's.",
        ),
    ] = None,
    device: Device = None,
    memory: Memory = None,
    block_tokens: BlockTokens = None,
    attention: Attention = None,
    json: Annotated[
        bool, _option(_OUTPUT, "--json", " ", "One JSON document on stdout and nothing else.")
    ] = False,
) -> None:
    """Show what a KV cache is and does, measured on the packaged model while you look.

    Five panels on stdout, each with the command for more. Needs no network and well under a minute.
    """
    from quire.cli.options import TourOptions
    from quire.cli.tour import main

    options = TourOptions.resolve("tour", context.params)
    raise typer.Exit(interruptible(lambda: main(options)))


app.command("eval")(evaluate.command)
app.command("tune")(tune.command)
app.command("calibrate")(calibrate.command)
app.command("bench")(bench.command)
app.command("plan")(for_typer(plan.command))
app.command("claims")(claims.command)
app.command("inspect")(inspect.command)
app.command("serve")(serve.command)
app.command("fsck")(fsck.command)
app.command("doctor")(doctor.command)
