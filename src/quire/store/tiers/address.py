"""Where a Redis or Valkey server is, as a user writes it behind the @ of `redis:SIZE@…`.

[USER[:PASSWORD]@]HOST[:PORT][/DB]
redis://[USER[:PASSWORD]@][USER[:PASSWORD]@]HOST[:PORT][/DB]
rediss://…[?ca=FILE][&cert=FILE&key=FILE]     TLS, verified by the system's authorities or by that file
unix:///PATH[?db=N]

What stands between , and ; of a recipe may not hold these two: in a password they are written %2C and %3B, and @ %40.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from quire.errors import ConfigError

__all__ = ["RedisAddress", "masked", "parse_address"]

EXAMPLE = "HOST:PORT, HOST:PORT/DB, redis://USER@HOST, rediss://HOST?ca=FILE or unix:///PATH"
_FILES = {"ca": "ssl_ca_certs", "cert": "ssl_certfile", "key": "ssl_keyfile"}


@dataclass(frozen=True)
class RedisAddress:
    """A server, and who we are there. Its text never holds the password.

    Args:
        host, port, db: of a server in the network; path: of its socket on this machine instead.
        tls: whether the connection is encrypted, and the server's certificate verified.
        files: (redis-py's option, path) of certificates.
    """

    host: str = "localhost"
    port: int = 6379
    db: int = 0
    path: str = ""
    tls: bool = False
    username: str = ""
    password: str = field(default="", repr=False)
    files: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """Without user and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.path or f"{host}:{self.port}" + (f"/{self.db}" if self.db else "")

    def options(self) -> dict[str, Any]:
        """For a connection of redis-py."""
        made: dict[str, Any] = {"db": self.db, **dict(self.files)}
        made |= {"path": self.path} if self.path else {"host": self.host, "port": self.port}
        if self.username:
            made["username"] = self.username
        if self.password:
            made["password"] = self.password
        return made


def masked(text: str) -> str:
    """A recipe or an address without the passwords of its URLs, even of one that was written with a comma in it."""
    return re.sub(
        r"((?:://|@(?!\w+://))[^/@:]*:)(?:(?!,\s*[A-Za-z_][\w-]*:\s*[0-9]).)*@", r"\1***@", text
    )


def parse_address(text: str, password: str | None = None) -> RedisAddress:
    """The text as a value.

    Args:
        text: see the module's.
        password: where the text names none.

    Raises:
        ConfigError: it is none; the message holds no password.
    """
    scheme, colon, _ = text.partition("://")
    first, more, _ = text.partition(":")  # behind it may be half a password, where a port should be
    shown = f"{scheme}://…" if colon else f"{first}:…" if more else text
    try:
        parts = _split(text if colon else f"redis://{text}")
        return _address(parts, password or "")
    except _WrongError as e:
        raise ConfigError(f"{shown!r} is no Redis address: {e}; write {EXAMPLE}") from None


class _WrongError(Exception):
    """Why it is no address, in words of ours."""


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # whose text holds parts of the URL
        raise _WrongError(
            "its port is no number up to 65535; , ; @ and / in a password are written %2C %3B %40 and %2F"
        ) from None
    return parts


def _address(parts: SplitResult, password: str) -> RedisAddress:
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise _WrongError(f"unknown scheme {parts.scheme}://")
    query = {k: v[-1] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
    unix = parts.scheme == "unix"
    db = query.pop("db", "") if unix else parts.path.strip("/")
    if db and not db.isdecimal():
        raise _WrongError(f"the database is a number, not {db!r}")
    files = tuple(
        (name, query.pop(short))
        for short, name in _FILES.items()
        if short in query and parts.scheme == "rediss"
    )
    if query:
        raise _WrongError(f"unknown option {next(iter(query))!r}")
    if unix and (parts.hostname or not parts.path):
        raise _WrongError("a socket has a path and no host: unix:///run/redis.sock")
    if not unix and not parts.hostname:
        raise _WrongError("it names no host")
    return RedisAddress(
        host=parts.hostname or "",
        port=parts.port or 6379,
        db=int(db or 0),
        path=parts.path if unix else "",
        tls=parts.scheme == "rediss",
        username=unquote(parts.username or ""),
        password=unquote(parts.password or "") or password,
        files=files,
    )
