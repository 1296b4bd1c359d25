"""API keys: made here, shown once, and kept as hashes.

A key is 32 random bytes, so one SHA-256 protects it: there is no word to guess. The file is JSON, for its owner only:

    {"keys": [{"name": "alice", "sha256": "…", "operator": false, "requests_per_minute": 60, …}]}

A key's name is the tenant: its limits are counted together, and its prefix cache is its own. Two keys may share a name.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from quire.errors import ConfigError

__all__ = ["Caller", "Keys", "Limits", "new_key"]

PREFIX = "quire-"
SHORTEST = 24
"""Characters of a key that somebody chose: fewer could be guessed from its hash."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Limits:
    """What one tenant may do; None: no limit of its own.

    Args:
        requests_per_minute: on average; as many at once.
        tokens_per_minute: prompt tokens that are not cached and output tokens.
        concurrent: requests at a time.

    Raises:
        ConfigError: a limit below 1.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}={value!r} must be an integer of at least 1, or absent")


@dataclass(frozen=True)
class Caller:
    """Who sent a request.

    Args:
        name: the tenant.
        operator: may read metrics and everybody's figures.
        limits: of its own; None: the server's.
    """

    name: str
    operator: bool = False
    limits: Limits | None = None


@dataclass
class Keys:
    """The callers by the hash of their key."""

    by_digest: dict[str, Caller] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.by_digest)

    def find(self, key: str) -> Caller | None:
        """Who has this key. The look-up is by hash, so its time tells nothing about the keys."""
        return self.by_digest.get(digest(key))

    @classmethod
    def of(cls, keys: Iterable[tuple[str, Caller]]) -> Keys:
        """Keys given in plain text, for instance by an environment variable.

        Raises:
            ConfigError: a key that could be guessed.
        """
        found = {}
        for key, caller in keys:
            if len(key) < SHORTEST:
                raise ConfigError(
                    f"an API key of {len(key)} characters can be guessed; use at least {SHORTEST}, "
                    "or let --new-key make one"
                )
            found[digest(key)] = caller
        return cls(found)

    @classmethod
    def read(cls, path: Path) -> Keys:
        """The keys of a file. Raises ConfigError: it is no such file, or others may read it."""
        try:
            if path.stat().st_mode & 0o077:
                raise ConfigError(f"{path} may be read by others; chmod 600 {path}")
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise ConfigError(f"--keys {path}: {e.strerror or e}") from e
        except ValueError as e:
            raise ConfigError(f"--keys {path}: not JSON ({e})") from e
        rows = document.get("keys") if isinstance(document, dict) else None
        if not isinstance(rows, list):
            raise ConfigError(f'--keys {path}: must be {{"keys": […]}}; --new-key writes it')
        return cls(dict(_row(path, at, row) for at, row in enumerate(rows)))


def digest(key: str) -> str:
    """SHA-256, in hexadecimal. Half characters are hashed too, so that any header can be asked about."""
    return sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def new_key(path: Path, name: str, *, operator: bool = False) -> str:
    """Makes a key, appends its hash to the file, and returns it: this is the only time that it can be seen.

    Raises:
        ConfigError: the name is none, or the file cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--new-key {name!r}: a name has up to 64 of A-Z a-z 0-9 . _ @ - and begins with a letter or digit"
        )
    rows: list[Any] = []
    if path.exists():
        Keys.read(path)
        rows = json.loads(path.read_text(encoding="utf-8"))["keys"]
    key = PREFIX + secrets.token_urlsafe(32)
    rows.append({"name": name, "sha256": digest(key), "operator": operator})
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mode 600
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"keys": rows}, file, indent=1)
        Path(temporary).replace(path)
    except OSError as e:
        raise ConfigError(f"--keys {path}: {e.strerror or e}") from e
    return key


def _row(path: Path, at: int, row: object) -> tuple[str, Caller]:
    where = f"--keys {path}: key {at}"
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} must be an object")
    limits = {n: row[n] for n in Limits.__dataclass_fields__ if n in row}
    unknown = set(row) - {"name", "sha256", "operator"} - set(limits)
    if unknown:
        raise ConfigError(f"{where}: unknown {min(unknown)!r}")
    name, hashed, operator = row.get("name"), row.get("sha256"), row.get("operator", False)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: {name!r} is no name")
    if not isinstance(hashed, str) or not _DIGEST.fullmatch(hashed):
        raise ConfigError(f"{where} ({name}): sha256 must be 64 hexadecimal digits")
    if not isinstance(operator, bool):
        raise ConfigError(f"{where} ({name}): operator must be true or false")
    return hashed, Caller(name, operator, Limits(**limits) if limits else None)
