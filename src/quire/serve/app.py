"""The ASGI application: guard, routes, and every error in the form that its client expects."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.responses import Response

from quire import __version__
from quire.engine.sharing import sharing_report
from quire.errors import QuireError
from quire.serve.chat import chat_routes
from quire.serve.completions import completion_routes
from quire.serve.dashboard import dashboard_routes
from quire.serve.errors import ApiError, as_api_error, reply
from quire.serve.guard import Guard
from quire.serve.house import House
from quire.serve.messages import message_routes
from quire.serve.plain import plain_routes
from quire.serve.responses import response_routes
from quire.serve.service import ClientGoneError

__all__ = ["build_app"]

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": what}
    for status, what in {
        400: "The request is wrong, or asks for what this server does not do.",
        401: "No key, or an unknown one.",
        403: "Not with this key, or not by this host name.",
        404: "No such model or page.",
        413: "The body is too large.",
        429: "Later: Retry-After says when.",
        503: "Shutting down, or no token in time.",
    }.items()
}


def build_app(house: House) -> FastAPI:
    """The application over what is served, which it closes at its end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for service in house.services:
            service.meters.stats = service.engine.stats
            service.meters.sharing = partial(sharing_report, service.engine)
        try:
            yield
        finally:
            house.close()

    app = FastAPI(
        title="Quire",
        version=__version__,
        summary="The KV cache for transformer inference as one system.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
        separate_input_output_schemas=False,
    )
    for routes in (
        chat_routes,
        completion_routes,
        response_routes,
        message_routes,
        plain_routes,
        dashboard_routes,
    ):
        app.include_router(routes(house))
    _name_models(app, house)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientGoneError, _gone)
    for kind in (ApiError, QuireError, Exception):
        app.add_exception_handler(kind, _failed)
    app.add_middleware(Guard, config=house.config)
    if house.config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(house.config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key"],
            expose_headers=["retry-after"],
        )
    return app


def _name_models(app: FastAPI, house: House) -> None:
    """Lets the interface's document say which models there are."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        for form in document["components"]["schemas"].values():
            model = form.get("properties", {}).get("model")
            if model is not None:
                model["enum"] = [*house.models, *([None] if "anyOf" in model else [])]
        return document

    app.openapi = openapi  # type: ignore[method-assign]


async def _failed(request: Request, error: Exception) -> Response:
    return reply(as_api_error(error), request.url.path)


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # the guard's, while the body was read
        return reply(error.__cause__, request.url.path)
    message = {
        404: f"there is nothing at {request.url.path[:100]}",
        405: f"{request.method} is not for {request.url.path[:100]}",
        400: "the body is not JSON in UTF-8",
    }.get(error.status_code, str(error.detail))
    answer = reply(ApiError(error.status_code, message), request.url.path)
    answer.headers.update(error.headers or {})
    return answer


async def _invalid(request: Request, error: Exception) -> Response:
    """The first thing that is wrong, by name."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(place) or None
    if first["type"] == "json_invalid":
        message, param = f"the body is not JSON: {first['ctx']['error']}", None
    elif first["type"] == "extra_forbidden":
        message = f"{param}: this field is unknown here, or cannot be honoured; leave it out"
    elif first["type"] == "missing":
        where = "; GET /v1/models lists what is served" if param == "model" else ""
        message = f"{param or 'the body'} is missing{where}"
    elif not place:
        message = "the body must be a JSON object with content-type application/json"
    else:
        message = f"{param}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return reply(ApiError(400, message[:500], param=param), request.url.path)
