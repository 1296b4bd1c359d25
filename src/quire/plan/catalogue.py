"""Known models and devices: `models.json` and `devices.json` beside this file, a row each, with its source.

A row holds facts that somebody published, in the words of Hugging Face configs and in bytes, bytes per second and
operations per second. Device rates are peaks of dense arithmetic; links count both directions together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quire.errors import ConfigError

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{p}b": 1000**n for n, p in enumerate("kmgt", 1)},
    **{f"{p}ib": 1024**n for n, p in enumerate("kmgt", 1)},
}


@dataclass(frozen=True)
class Device:
    """One accelerator, or so many bytes of anything.

    Args:
        name: in the catalogue, or the bytes as the user wrote them.
        memory_bytes: usable in all.
        bandwidth_bytes_s: of its memory; None where only bytes are known, as are the next ones.
        bf16_flops: dense multiply-adds count two.
        fp8_flops: None where it has no such units.
        link_bytes_s: to its neighbours, both directions together.
        link: what that link is.
        source: who says so.
    """

    name: str
    memory_bytes: int
    bandwidth_bytes_s: int | None = None
    bf16_flops: int | None = None
    fp8_flops: int | None = None
    link_bytes_s: int | None = None
    link: str = ""
    source: str = ""


@cache
def _rows(file: str) -> Mapping[str, Mapping[str, Any]]:
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    found: Mapping[str, Mapping[str, Any]] = json.loads(text)
    return found


def model_names() -> tuple[str, ...]:
    """Models of the catalogue, sorted."""
    return tuple(_rows("models.json"))


def device_names() -> tuple[str, ...]:
    """Devices of the catalogue, sorted."""
    return tuple(_rows("devices.json"))


def known_model(name: str) -> Mapping[str, Any] | None:
    """A row: `config`, `source`, and `parameters` (total, active) where those were published; None if unknown.

    Names are compared without case; an owner in front (`meta-llama/…`) and `-hf` behind do not matter.
    """
    rows = _rows("models.json")
    short = name.lower().rpartition("/")[2]
    for tried in (short, short.removesuffix("-hf"), short.removeprefix("meta-")):
        if tried in rows:
            return rows[tried]
    return None


def near(name: str, names: tuple[str, ...]) -> str:
    """The catalogue's nearest names, for a message."""
    import difflib

    short = name.lower().rpartition("/")[2]
    found = difflib.get_close_matches(short, names, 4, 0.5) or list(names[:4])
    return ", ".join(found)


def find_device(text: str) -> Device:
    """A device of the catalogue, or a number of bytes: `h100`, `A100-80`, `8GiB`.

    Raises:
        ConfigError: neither of them.
    """
    rows = _rows("devices.json")
    name = re.sub(r"[\s_]+", "-", text.strip().lower())
    for prefix in ("nvidia-", "amd-", "intel-", "google-"):
        name = name.removeprefix(prefix)
    name = re.sub(r"(\d)gi?b$", r"\1", name) if name not in rows else name
    if name in rows:
        return Device(name, **rows[name])
    try:
        return Device(text.strip(), parse_bytes(text))
    except ConfigError:
        raise ConfigError(
            f"unknown device {text!r}; known: {', '.join(rows)}; or memory, as in 8GiB"
        ) from None


def parse_bytes(text: str) -> int:
    """`8GiB`, `500MB`, `1024`. Raises ConfigError."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise ConfigError(f"{text!r} is not a size; for example 8GiB or 500MB")
    return int(float(found[1]) * unit)
