"""Before anything is parsed: the size of a body, the name in Host, and the key. Pure ASGI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from quire.serve.config import ServeConfig
from quire.serve.errors import ApiError, reply
from quire.serve.keys import Caller
from quire.serve.tracing import ASKED, CARRIED

__all__ = ["ANYBODY", "Guard"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ANYBODY = Caller("anybody", operator=True)
"""Who calls a server without keys."""

OPEN_PATHS = frozenset({"/health", "/live", "/", "/dashboard.css", "/dashboard.js"})
"""Answered without a key: probes have none and learn nothing else, and the page's files hold nothing of anybody."""

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Guard:
    """Lets a request pass to the application, or answers it.

    Args:
        app: the application.
        config: keys and sizes.
    """

    def __init__(self, app: App, config: ServeConfig) -> None:
        self.app = app
        self.config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = {k.lower(): v for k, v in scope["headers"]}
            ASKED.set(
                (
                    scope["path"],
                    {k.decode(): headers[k].decode("latin-1") for k in CARRIED if k in headers},
                )
            )
            self._check_host(headers)
            scope.setdefault("state", {})["caller"] = self._caller(scope, headers)
            declared = headers.get(b"content-length", b"0")
            if declared.isdigit() and int(declared) > self.config.max_body_bytes:
                raise self._too_large()
        except ApiError as error:
            await reply(error, scope["path"])(scope, receive, send)
            return
        await self.app(scope, _Counted(receive, self.config.max_body_bytes, self._too_large), send)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        if not self.config.guards_host:
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in LOOPBACK_NAMES:
            raise ApiError(
                403,
                "a server without keys answers to localhost only; use that name, or give it keys",
                code="wrong_host",
            )

    def _caller(self, scope: Scope, headers: dict[bytes, bytes]) -> Caller:
        if not self.config.keys:
            return ANYBODY
        if scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return Caller("probe")
        kind, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if kind.lower() != "bearer":
            key = headers.get(b"x-api-key", b"").decode("latin-1")
        if not key:
            raise ApiError(
                401, "no API key; send Authorization: Bearer KEY, or x-api-key", code="no_api_key"
            )
        caller = self.config.keys.find(key.strip())
        if caller is None:
            raise ApiError(401, "this API key is not known here", code="invalid_api_key")
        return caller

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body may have {self.config.max_body_bytes:,} bytes; send a shorter prompt",
            code="body_too_large",
        )


class _Counted:
    """Receives a body and stops where it is too large, whatever its headers said."""

    def __init__(self, receive: Receive, most: int, error: Callable[[], ApiError]) -> None:
        self._receive = receive
        self._left = most
        self._error = error

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise self._error()
        return message
