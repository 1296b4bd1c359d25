"""A model folder's files, looked at before a weight is read: the config, the weights' shards, a tokenizer."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quire.errors import ConfigError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def read_config(folder: Path, name: str) -> Mapping[str, Any]:
    """A folder's config.json. Raises ConfigError."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"{name} holds an adapter, not a model; give the folder of its base model"
            )
        hint = "GGUF files are not read; " if any(folder.glob("*.gguf")) else ""
        raise ConfigError(
            f"{name} holds no config.json: {hint}a model folder has config.json, *.safetensors and a tokenizer"
        )
    return parse_config(path, name)


def parse_config(path: Path, name: str) -> Mapping[str, Any]:
    """A config.json that is a model's. Raises ConfigError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{name}: config.json cannot be read ({short_line(e)})") from e
    if not isinstance(config, dict) or not (
        config.get("model_type") or config.get("architectures")
    ):
        raise ConfigError(f"{name}: config.json names no model_type; it is not a model's config")
    return config


def check_weights(folder: Path, name: str) -> None:
    """Some form of weights, all of their shards, none of them cut off; or ConfigError."""
    for file in WEIGHTS:
        if (folder / file).is_file():
            _check_whole(folder / file, name)
            return
        index = folder / f"{file}.index.json"
        if index.is_file():
            shards = _shards(index, name)
            lost = [s for s in shards if not (folder / s).is_file()]
            if lost:
                raise ConfigError(
                    f"{name}: {len(lost)} of {len(shards)} weight files are missing ({lost[0]}, …); download them again"
                )
            for s in shards:
                _check_whole(folder / s, name)
            return
    raise ConfigError(
        f"{name} holds no weights: no model.safetensors, model.safetensors.index.json or pytorch_model.bin in it"
    )


def _shards(index: Path, name: str) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(f"{name}: {index.name} cannot be read ({short_line(e)})") from e


def _check_whole(path: Path, name: str) -> None:
    """A safetensors file is as long as its own header says."""
    if path.suffix != ".safetensors":
        return
    try:
        with path.open("rb") as f:
            (n,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(n)) if n <= path.stat().st_size else {}
        ends = [x["data_offsets"][1] for k, x in header.items() if k != "__metadata__"]
        whole = bool(header) and 8 + n + max(ends, default=0) == path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        whole = False
    if not whole:
        raise ConfigError(
            f"{name}: {path.name} is damaged or was cut off; copy or download it again"
        )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer in any of the usual forms."""
    names = (
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "tekken.json",
    )
    return any((folder / n).is_file() for n in names)


def short_line(error: BaseException) -> str:
    """An error of somebody else's in one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"
