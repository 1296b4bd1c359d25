"""What `quire eval` and `quire tune` do around their work: the model, files that are whole, journals, tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli.console import quiet_transformers, say, spinner, write
from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.evaluate.journal import Journal
    from quire.models.load import Source

__all__ = [
    "check_weights",
    "check_writable",
    "journal_asks",
    "load",
    "look",
    "show_columns",
    "write_file",
]


def look(model: str | None, dtype: str | None, device: str | None, memory: str) -> Source:
    """The model's files, checked. Raises ConfigError."""
    from quire.models.load import check_source

    source = check_source(
        model or os.environ.get("QUIRE_MODEL") or None, dtype=dtype, device=device
    )
    quiet_transformers()
    from quire.models.memory import arena_bytes

    arena_bytes(memory, source.chosen_device)
    return source


def load(source: Source, *, shown: bool) -> Any:
    """The model with its weights."""
    from quire.models.load import load_model

    with spinner("loading the model …", shown=shown):
        loaded = load_model(source)
    if loaded.missing:
        say(
            f"warning: the file lacks {len(loaded.missing)} of the model's weights; they are random",
            "yellow",
        )
    return loaded


def check_writable(flag: str, name: str | None) -> None:
    """Raises ConfigError, before hours are spent, where a file could not be written."""
    if name is None:
        return
    path = Path(name).expanduser()
    if path.is_dir():
        raise ConfigError(f"{flag} {name} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {name}: there is no folder {path.parent}; make it first")


def write_file(flag: str, name: str, text: str) -> None:
    """A file as a whole: it has the old content or the new one. Raises ConfigError."""
    path = Path(name).expanduser()
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as e:
        raise ConfigError(f"{flag} {name}: {e.strerror or e}") from e


def journal_asks(source: Source, **options: Any) -> dict[str, Any]:
    """What a journal must have been asked to be gone on with: all that figures depend on, long texts by digest."""
    from quire.evaluate.journal import digest_of

    long = ("text", "prompts")
    asked = {k: digest_of(v) if k in long else v for k, v in options.items()}
    return {
        "model": source.name,
        "dtype": str(source.dtype),
        "device": source.chosen_device,
        **asked,
    }


def check_weights(journal: Journal | None, digest: str) -> None:
    """Raises ConfigError where a journal is of other weights."""
    if journal is None:
        return
    if journal.get("weights") is None:
        journal.put("weights", digest)
    if journal.get("weights") != digest:
        raise ConfigError(
            f"{journal.path} is of a run with other weights; delete it, or write to another file"
        )


def show_columns(lines: Sequence[Sequence[str]], left: int) -> None:
    """A table on stdout, its first columns to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        write("  ".join(cells).rstrip() + "\n")
