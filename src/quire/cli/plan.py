"""`quire plan`: what will fit, before anything is bought or loaded. Needs no torch, no device and no weights."""

from __future__ import annotations

import json as json_module
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from quire.cli.flags import Flag, for_typer
from quire.errors import ConfigError
from quire.spec import DEFAULT_BLOCK_TOKENS, KVConfig

if TYPE_CHECKING:
    import typer

    from quire.plan.demand import Setup

__all__ = ["alone", "command"]

_WHAT, _CACHE, _WHERE, _OUTPUT = "What", "Cache", "Where", "Output"


def command(
    model: Annotated[
        str | None,
        Flag(
            "",
            "MODEL",
            "A config.json, a model folder, a name in the catalogue (--list) or a hub id. Without it the model "
            "that QUIRE_MODEL names, else the packaged one.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        Flag(
            "--context",
            "N",
            "Cached tokens per user; default: the trained context, 4096 if unknown.",
            _WHAT,
        ),
    ] = None,
    users: Annotated[int, Flag("--users", "N", "At the same time; default: 1.", _WHAT)] = 1,
    lengths: Annotated[
        str | None,
        Flag(
            "--lengths",
            "FILE.csv",
            "Tokens of real requests, one per line: expected demand and its 99th percentile.",
            _WHAT,
        ),
    ] = None,
    images: Annotated[
        int, Flag("--images", "N", "Per user, where the config says what one takes.", _WHAT)
    ] = 0,
    encoder_tokens: Annotated[
        int | None,
        Flag("--encoder-tokens", "N", "Input of an encoder-decoder, per user.", _WHAT),
    ] = None,
    kv: Annotated[
        list[str] | None,
        Flag(
            "--kv",
            "RECIPE",
            "How keys and values are stored: auto (default: the model's own dtype), int8, int4, kivi:bits=2, …; may be "
            "repeated.",
            _CACHE,
        ),
    ] = None,
    keep: Annotated[
        str, Flag("--keep", "POLICY", "Which tokens are kept; default: full.", _CACHE)
    ] = "full",
    block_tokens: Annotated[
        int,
        Flag("--block-tokens", "N", f"Per block; default: {DEFAULT_BLOCK_TOKENS}.", _CACHE),
    ] = DEFAULT_BLOCK_TOKENS,
    dtype: Annotated[
        str | None,
        Flag("--dtype", "NAME", "What the model computes in; default: the config's.", _CACHE),
    ] = None,
    device: Annotated[
        str | None,
        Flag("--device", "NAME|BYTES", "h100, a100-40, … (--list), or memory as 8GiB.", _WHERE),
    ] = None,
    tp: Annotated[
        int, Flag("--tp", "N", "Devices that share every layer; default: 1.", _WHERE)
    ] = 1,
    weights: Annotated[
        str | None,
        Flag(
            "--weights",
            "FORM|BYTES",
            "bfloat16, fp8, int8, int4, nf4, mxfp4 or a size as 40GiB; default: as the config or the files say.",
            _WHERE,
        ),
    ] = None,
    reserve: Annotated[
        float,
        Flag(
            "--reserve",
            "SHARE",
            "Of each device, left to the runtime and to fragmentation; default: 0.1.",
            _WHERE,
        ),
    ] = 0.1,
    price: Annotated[
        float | None,
        Flag("--price", "MONEY", "Of one device for an hour, in any currency.", _WHERE),
    ] = None,
    plot: Annotated[
        str | None,
        Flag(
            "--plot",
            "FILE",
            "Memory over context as .png, .svg or .html; needs matplotlib (the extra `plot`).",
            _OUTPUT,
        ),
    ] = None,
    json: Annotated[
        bool, Flag("--json", " ", "One JSON document on stdout and nothing else.", _OUTPUT)
    ] = False,
    list_: Annotated[
        bool, Flag("--list", " ", "Known models and devices, with their sources.", _OUTPUT)
    ] = False,
) -> None:
    """Say how much memory, how many users, which technique, on which device.

    Bytes are those that the engine's pools hand out; times are floors that the device's own peaks allow.

    [dim]quire plan llama-3.1-70b --device h100 --tp 4 --context 32768 --users 16[/dim]
    """
    from quire.plan.answer import answer

    if list_:
        _list(json=json)
        return
    given = model or os.environ.get("QUIRE_MODEL") or None
    first = _setup(given, KVConfig("auto", keep, block_tokens), device, weights, dtype)
    from dataclasses import replace

    from quire.plan.layout import check_config

    first = replace(first, ranks=tp, reserve=reserve, encoder_tokens=encoder_tokens)
    recipes = kv or ["auto"]
    for recipe in recipes:
        check_config(KVConfig(recipe, keep, block_tokens), runs=False)
    tokens = context if context is not None else first.shape.max_context or 4096
    mix = []
    if lengths is not None:
        from quire.plan.lengths import read_lengths

        mix = read_lengths(Path(lengths))
    setups = [replace(first, config=KVConfig(r, keep, block_tokens)) for r in recipes]
    documents = [
        answer(s, context=tokens, users=users, lengths=mix, price_per_hour=price, images=images)
        for s in setups
    ]
    if plot is not None:
        from quire.cli.plan_plot import draw

        draw(Path(plot), setups, documents[0])
    if json:
        from quire.cli.console import write

        whole = documents[0] if len(documents) == 1 else {"plans": documents}
        write(json_module.dumps(whole, ensure_ascii=False) + "\n")
        return
    from quire.cli.plan_page import show

    show(documents, setups[0])
    if plot is not None:
        from quire.cli.console import say

        say(f"wrote {plot}")


# -- where the facts come from -----------------------------------------------------------------------------------


def _setup(
    model: str | None, config: KVConfig, device: str | None, weights: str | None, dtype: str | None
) -> Setup:
    from dataclasses import replace

    from quire.plan.catalogue import find_device, known_model
    from quire.plan.demand import Setup
    from quire.plan.shape import read_shape
    from quire.plan.weights import Parameters, count_parameters, embedding_of, file_bytes, form_of

    name, facts, folder, published = find_model(model)
    shape = read_shape(facts, name, dtype=_dtype(dtype))
    owned = model is not None and "/" in model and not Path(model).expanduser().exists()
    if owned and known_model(name) is not None:
        note = f"{name} is planned as the catalogue's row of that name, whoever owns it"
        shape = replace(shape, assumed=(*shape.assumed, note))
    try:
        counted: Parameters | None = count_parameters(shape)
    except ConfigError:
        counted = None
    if published is not None:
        counted = Parameters(*published, embedding_of(shape), "published")
    given: int | None = None
    form = ""
    if weights is not None:
        form, given = _weights(weights)
    elif folder is not None and dtype is None and (given := file_bytes(folder)) is not None:
        form = "its files"
    else:
        form = form_of(shape)
    return Setup(
        shape,
        config,
        counted,
        form,
        given,
        find_device(device) if device is not None else None,
    )


def _dtype(name: str | None) -> str | None:
    """The long form of `--dtype`. Raises ConfigError."""
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
    if name is None or name == "auto":
        return None
    found = short.get(name, name)
    if found not in short.values():
        raise ConfigError(f"unknown dtype {name!r}; known: auto, {', '.join(short.values())}")
    return found


def _weights(text: str) -> tuple[str, int | None]:
    """`--weights`: a form, or bytes. Raises ConfigError."""
    from quire.plan.catalogue import parse_bytes
    from quire.plan.weights import BITS

    name = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}.get(text, text)
    if name in BITS:
        return name, None
    try:
        return "given", parse_bytes(text)
    except ConfigError:
        raise ConfigError(
            f"unknown --weights {text!r}; known: {', '.join(BITS)}, or a size as 40GiB"
        ) from None


Found = tuple[str, dict[str, Any], Path | None, tuple[int, int] | None]


def find_model(model: str | None) -> Found:
    """A model's config, from wherever the name leads.

    Returns:
        Its name, its config, its folder where the weights lie here, and (total, active) parameters where published.

    Raises:
        ConfigError: it leads nowhere.
    """
    if model is None:
        from quire import packaged

        return "packaged", _read(packaged.path() / "config.json", "packaged"), packaged.path(), None
    path = Path(model).expanduser()
    if path.is_dir():
        return model, _read(path / "config.json", model), path, None
    if path.is_file():
        return model, _read(path, model), None, None
    from quire.plan.catalogue import known_model, model_names, near

    row = known_model(model)
    if row is not None:
        published = row.get("parameters")
        return model, dict(row["config"]), None, tuple(published) if published else None
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or model.endswith(".json"):
        raise ConfigError(
            f"{model}: no such file or folder, and no model of the catalogue; near it: {near(model, model_names())}; "
            "all: quire plan --list"
        )
    return model, _from_hub(model), None, None


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json_module.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or f"not JSON ({e})"
        raise ConfigError(f"{name}: {path.name} cannot be read: {why}") from e
    if not isinstance(found, dict):
        raise ConfigError(f"{name}: {path.name} holds no config: an object of fields is expected")
    return found


def _from_hub(name: str) -> dict[str, Any]:
    """A config.json from the local cache, else from the hub; nothing else of the model."""
    from quire.plan.catalogue import model_names, near

    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        path = cached if isinstance(cached, str) else hf_hub_download(name, "config.json")
    except Exception as e:  # the hub's client and its HTTP library raise a dozen unrelated kinds
        text = " ".join(str(e).split()) or type(e).__name__
        raise ConfigError(
            f"{name}: neither a folder nor in the catalogue, and the hub gives no config.json ({text[:120]}); near it "
            f"in the catalogue: {near(name, model_names())}"
        ) from e
    return _read(Path(path), name)


def _list(*, json: bool) -> None:
    from quire.cli.console import out, write
    from quire.plan.catalogue import device_names, find_device, known_model, model_names

    models = {n: (known_model(n) or {}).get("source", "") for n in model_names()}
    devices = {n: find_device(n) for n in device_names()}
    if json:
        plain = {n: vars(d) for n, d in devices.items()}
        write(json_module.dumps({"models": models, "devices": plain}) + "\n")
        return
    from quire.cli.plan_page import catalogue_tables

    for table in catalogue_tables(models, devices):
        out().print(table)


def alone() -> typer.Typer:
    """A grammar of `plan` without the other commands, whose imports take longer than a plan."""
    import typer

    grammar = typer.Typer(
        name="quire",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    grammar.command("plan")(for_typer(command))

    @grammar.callback()
    def _quire() -> None:
        """The KV cache for transformer inference as one system."""

    return grammar
