"""What some policies have learned of one model: files that name the model by the digest of its weights. Not a policy.

kvzap.safetensors    tensors L.weight [H_kv, width], L.bias [H_kv] of each layer L; the digest in the metadata
duo.json             {"digest": ..., "heads": [[layer, head], ...]}, those that need the whole context first; what
                     else is there says how they were found
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quire import packaged
from quire.errors import ConfigError

__all__ = ["Digest", "find", "read_heads"]

Digest = Callable[[], str]
"""Of the weights that a policy is to serve; asked for only by policies that need it."""


def find(
    policy: str, tool: str, file: str, name: str, digest: str, read: Callable[[Path], Any]
) -> Any:
    """A policy's map of a model: the file that was given, else the one beside the packaged model.

    Args:
        policy, tool: for messages: its name, and what makes such a file.
        file: as the user gave it, or empty.
        name: of the packaged file.
        digest: of the model.
        read: gives the file's digest first and then what it holds. May raise OSError, ValueError, KeyError.

    Raises:
        ConfigError: no file, no map of this kind, or another model's.
    """
    path = Path(file) if file else packaged.path() / name
    try:
        owner, found = read(path)
    except OSError as e:
        raise ConfigError(f"{policy}: {path} cannot be read ({e.strerror or e})") from e
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{policy}: {path} is no map that {tool} wrote") from e
    if owner == digest:
        return found
    if file:
        raise ConfigError(
            f"{policy}: {path} was made for another model ({str(owner)[:8]}, this one is {digest[:8]}); make one with "
            f"{tool}"
        )
    raise ConfigError(
        f"{policy}: no map is known of this model; make one with {tool} and give it as {policy}:map=FILE"
    )


def read_heads(path: Path) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A map of heads: the model's digest, and (layer, head), those that need the whole context first."""
    about = json.loads(path.read_text(encoding="utf-8"))
    return str(about["digest"]), tuple((int(layer), int(head)) for layer, head in about["heads"])
