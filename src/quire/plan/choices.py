"""The choices in a configuration file, for those who have no command line: what `quire.attach(config=FILE)` reads."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from quire.codecs.maps import PREFIX
from quire.errors import ConfigError
from quire.spec import DEFAULT_BLOCK_TOKENS

__all__ = ["beside", "read_choices"]


def beside(kv: str, file: Path) -> str:
    """A recipe out of a file: a map that it names by a relative path lies beside that file."""
    name = kv.removeprefix(PREFIX)
    return kv if name == kv else f"{PREFIX}{file.parent / Path(name).expanduser()}"


def read_choices(file: Path) -> tuple[str, str, int]:
    """kv, keep and block_tokens of the file's top; what it does not say is the default.

    Raises:
        ConfigError: no such file, not TOML, or a value of another type.
    """
    try:
        document = tomllib.loads(file.expanduser().read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"config {file}: {e.strerror or e}") from e
    except ValueError as e:
        raise ConfigError(f"config {file}: not TOML ({e})") from e
    usual: dict[str, Any] = {"kv": "auto", "keep": "full", "block_tokens": DEFAULT_BLOCK_TOKENS}
    if not set(usual) & set(document):
        raise ConfigError(f"config {file} says none of {', '.join(usual)} at its top")
    found = {key: document.get(key, value) for key, value in usual.items()}
    for key, value in found.items():
        if type(value) is not type(usual[key]):
            raise ConfigError(f"config {file}: {key} = {value!r} must be {_SAID[type(usual[key])]}")
    return beside(found["kv"], file.expanduser()), found["keep"], found["block_tokens"]


_SAID = {str: "a string", int: "a number"}
