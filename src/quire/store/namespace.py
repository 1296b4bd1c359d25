"""Who may find what: namespaces, the tenants that they are made for, and wishes about how long blocks stay.

Everything is private to its namespace, except whole chunks of a prefix that the namespace has declared to be shared
within a group:

    root(shared, group) ── chunk ── chunk ─┬─ salt of A ── chunk ── …
                                           └─ salt of B ── chunk ── …
    root(salt of C) ── chunk ── …

A tenant's salt follows from who was authenticated and from a secret of the server. Nothing that a request says can make
it another tenant's; a salt in a request can only divide a tenant's own namespace further.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from quire.errors import ConfigError, RequestError
from quire.store.evict import MAX_PRIORITY

__all__ = ["Hints", "Namespace", "Tenants"]


@dataclass(frozen=True)
class Namespace:
    """Who may find a prefix.

    Args:
        salt: secret bytes; two namespaces of different salts never find each other's blocks.
        shared: token sequences of which whole chunks may be found by all of the group that declare the same sequence.
        group: of those who share them.
    """

    salt: bytes = b""
    shared: tuple[tuple[int, ...], ...] = ()
    group: str = ""

    def public_tokens(self, tokens: Sequence[int]) -> int:
        """How many of these tokens lie within a declared prefix."""
        longest = 0
        for declared in self.shared:
            n = len(declared)
            if n > longest and len(tokens) >= n and tuple(tokens[:n]) == declared:
                longest = n
        return longest

    def root(self, base: bytes, *, public: bool) -> bytes:
        """The name of the empty prefix."""
        own = b"shared" + self.group.encode() if public else b"private" + self.salt
        return sha256(base + own).digest()


class Tenants:
    """Namespaces from principals.

    Args:
        secret: of the server, at least 16 bytes; a new one when None, so that names do not outlive the process.

    Raises:
        ConfigError: a secret that is too short.
    """

    def __init__(self, secret: bytes | None = None) -> None:
        if secret is not None and len(secret) < 16:
            raise ConfigError(f"a secret of {len(secret)} bytes can be guessed; give at least 16")
        self._secret = secret or secrets.token_bytes(32)
        self._shared: dict[str, list[tuple[int, ...]]] = {}

    def declare(self, group: str, tokens: Sequence[int]) -> None:
        """From now on whole chunks of this prefix may be found by all members of the group: a common system prompt."""
        prefix = tuple(tokens)
        known = self._shared.setdefault(group, [])
        if prefix and prefix not in known:
            known.append(prefix)

    def of(self, principal: str, *, group: str | None = None, narrow: str = "") -> Namespace:
        """The namespace of whoever was authenticated.

        Args:
            principal: a user, a key, an organisation: never taken from what a request says about itself.
            group: whose declared prefixes it shares; None: nobody's.
            narrow: divides the tenant's own namespace further; this one may come from the request.

        Raises:
            RequestError: an empty principal.
        """
        if not principal:
            raise RequestError("a tenant needs a name: who was authenticated?")
        salt = hmac.digest(self._secret, principal.encode(), "sha256")
        if narrow:
            salt = hmac.digest(salt, narrow.encode(), "sha256")
        shared: Iterable[tuple[int, ...]] = () if group is None else self._shared.get(group, ())
        return Namespace(salt, tuple(shared), group or "")


@dataclass(frozen=True)
class Hints:
    """Wishes about how long a request's blocks stay; never more than wishes.

    Args:
        priority: -3 to 3: each step is worth a doubling of the uses.
        keep_for_s: seconds in which the blocks go only when no other block is idle.

    Raises:
        RequestError: out of range.
    """

    priority: int = 0
    keep_for_s: float = 0.0

    def __post_init__(self) -> None:
        if self.priority not in range(-MAX_PRIORITY, MAX_PRIORITY + 1):
            raise RequestError(
                f"a cache priority lies within -{MAX_PRIORITY}..{MAX_PRIORITY}, not {self.priority!r}"
            )
        if not 0 <= self.keep_for_s < float("inf"):
            raise RequestError(f"keep_for_s is 0 or more seconds, not {self.keep_for_s!r}")
