"""`quire calibrate`: what a codec learns of a model from a text, written to a file. --help needs no torch."""

from __future__ import annotations

import json as json_module
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.cli import declared
from quire.cli.console import interruptible, quiet_transformers, say, spinner, write
from quire.cli.declared import Device, Dtype, Json, Model
from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.codecs.calibrated import Calibrated

__all__ = ["command"]


def command(
    model: Model = None,
    codec: Annotated[
        str,
        typer.Option(metavar="CODEC", help="What learns: cq:form=8c8b, kvquant:bits=3, …"),
    ] = "cq",
    text: Annotated[
        str | None,
        declared.text(
            "UTF-8 text like what the model will read, and none that it will be judged on."
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE.safetensors", show_default=False, help="Where it is written."),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of the text.")] = 32_768,
    length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default=False,
            help="Tokens of a window; default: 2048, or the model's context.",
        ),
    ] = None,
    seed: Annotated[int, declared.seed("The same seed, the same tables.")] = 0,
    inject: Annotated[
        bool,
        declared.inject("Of the model with outliers put in, as quire eval --inject judges it."),
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    memory: Annotated[
        str,
        typer.Option(metavar="SIZE", help="For what is captured; less of it means more passes."),
    ] = "1GiB",
    json: Json = False,
) -> None:
    """Let a codec learn from a text what it needs to know of a model.

    The file serves this model's weights alone, and the codec with these parameters.

    [dim]quire calibrate --codec cq:form=8c8b --text book.txt --out cq.safetensors[/dim]
    """
    from quire.codecs.recipe import load_codec

    chosen: Any = load_codec(codec)
    if not hasattr(chosen, "fit"):
        from quire.evaluate.calibration import check_codec

        check_codec(codec)
    words, target = _read(text), _target(out)
    for flag, value in (("--tokens", tokens), ("--length", 3 if length is None else length)):
        if value < 3:
            raise ConfigError(f"{flag} must be at least 3, not {value}")
    if seed < 0:
        raise ConfigError(f"--seed must be at least 0, not {seed}")
    options = {"tokens": tokens, "length_tokens": length, "seed": seed, "memory": memory}
    options["injected"] = inject
    raise typer.Exit(
        interruptible(
            lambda: _run(model, dtype, device, chosen, codec, words, target, options, json=json)
        )
    )


def _read(name: str | None) -> str:
    if name is None:
        raise ConfigError("a codec learns from a text; give --text FILE")
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--text {name}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"--text {name}: not UTF-8 text; convert it first") from e


def _target(name: str | None) -> Path:
    """Refused now rather than after minutes."""
    if name is None:
        raise ConfigError("give --out FILE.safetensors, which the result is written to")
    path = Path(name).expanduser()
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--out {name} cannot be written; name a file in a folder that can be")
    return path


def _run(
    model: str | None,
    dtype: str | None,
    device: str | None,
    chosen: Calibrated,
    codec: str,
    text: str,
    target: Path,
    options: dict[str, Any],
    *,
    json: bool,
) -> int:
    from quire.models.load import check_source, load_model

    with spinner("looking at the model …", shown=not json):
        named = model or os.environ.get("QUIRE_MODEL") or None
        source = check_source(named, dtype=dtype, device=device)
        quiet_transformers()
        from quire.models.memory import arena_bytes

        arena_bytes(options["memory"], source.chosen_device)
    with spinner("loading the model …", shown=not json):
        loaded = load_model(source)
    from quire.evaluate.calibration import calibrate

    with spinner("calibrating …", shown=not json) as status:

        def progress(what: str, done: int, total: int) -> None:
            if status is not None:
                status.update(f"{what}: {done} of {total}")

        found = calibrate(
            loaded.model,
            codec,
            text,
            tokenizer=loaded.tokenizer,
            progress=progress,
            **options,
        )
    found.save(target)
    use = chosen.with_file(str(target))
    if json:
        about = {"out": str(target), "kv": use, "table_bytes": found.table_bytes, **found.about}
        write(json_module.dumps(about, ensure_ascii=False) + "\n")
        return 0
    say(
        f"{target}: {found.table_bytes:,} bytes of tables from {int(found.about['tokens']):,} tokens, for the weights "
        f"{found.about['model'][:16]}"
    )
    write(f"--kv {use}\n")
    return 0
