"""What a client is told when something is wrong, in each dialect; and how JSON travels, whole or as events."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from quire.errors import CapacityError, QuireError, RequestError

__all__ = ["ApiError", "JSONReply", "as_api_error", "document", "event", "reply"]

logger = logging.getLogger(__name__)

_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES = _OPENAI_TYPES | {413: "request_too_large", 503: "overloaded_error"}

ANTHROPIC_PATH = "/v1/messages"
"""Requests to it are answered in Anthropic's form."""


class ApiError(Exception):
    """A refusal or a failure.

    Args:
        status: of HTTP.
        message: one line that says what would work.
        code: a word for programs.
        param: the field that is to blame.
        retry_after_s: when it may work; sent as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


class JSONReply(Response):
    """JSON in ASCII, so that half a character in a message cannot break the answer that complains about it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


def as_api_error(error: Exception) -> ApiError:
    """Any error as one for the client; what is no refusal is logged and said without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error))
    if isinstance(error, CapacityError):
        return ApiError(
            503, f"the cache has no room: {error}", code="cache_full", retry_after_s=1.0
        )
    if isinstance(error, QuireError):
        return ApiError(500, str(error), code="internal_error")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def document(error: ApiError, path: str) -> dict[str, Any]:
    """The error's body in the dialect of `path`."""
    if path.startswith(ANTHROPIC_PATH):
        kind = _ANTHROPIC_TYPES.get(
            error.status, "api_error" if error.status >= 500 else "invalid_request_error"
        )
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    kind = _OPENAI_TYPES.get(
        error.status, "server_error" if error.status >= 500 else "invalid_request_error"
    )
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }


def event(content: Mapping[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(content, separators=(',', ':'))}\n\n".encode("ascii")


def reply(error: ApiError, path: str) -> JSONReply:
    """The error as a response."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONReply(document(error, path), error.status, headers)
