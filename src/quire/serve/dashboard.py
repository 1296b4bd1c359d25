"""The page at `/`, and the figures that it shows: `/v1/kv/stats`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from quire.serve.errors import JSONReply
from quire.serve.house import House
from quire.serve.watch import Seat, Watch

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

__all__ = ["FILES", "dashboard_routes"]

FOLDER = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
}
"""Path -> file and type; what the guard lets pass without a key."""

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}

STREAM = "text/event-stream"


class Figures(StreamingResponse):
    """A document a second until the reader goes away."""

    def __init__(self, watch: Watch, seat: Seat) -> None:
        super().__init__(
            watch.events(seat),
            media_type=STREAM,
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        self._watch, self._seat = watch, seat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._watch.leave(self._seat)


def dashboard_routes(house: House) -> APIRouter:
    """The endpoints."""
    router = APIRouter()

    @router.get("/v1/kv/stats", summary="What goes on", tags=["Quire"])
    async def stats(request: Request, model: str | None = None) -> Response:
        """One document; with `Accept: text/event-stream` another every second.

        A tenant's key is told of the tenant, an operator's of everybody. Of several models, the one that is named, else
        the first.
        """
        caller = request.state.caller
        service, _ = house.find(model)
        if STREAM in request.headers.get("accept", ""):
            return Figures(service.watch, service.watch.sit(caller))
        return JSONReply(await service.watch.document(caller))

    if house.config.dashboard:
        for path, (name, kind) in FILES.items():
            _add_file(router, path, (FOLDER / name).read_bytes(), kind)
    return router


def _add_file(router: APIRouter, path: str, content: bytes, kind: str) -> None:
    async def file() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    router.add_api_route(path, file, methods=["GET"], include_in_schema=False)
