"""What needs no model to think: models, tokens, health, metrics."""

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from quire import __version__
from quire.serve.errors import ApiError, JSONReply
from quire.serve.forms import DetokenizeForm, TokenizeForm
from quire.serve.house import House
from quire.serve.prompt import as_turns
from quire.serve.service import Service

__all__ = ["plain_routes"]


def plain_routes(house: House) -> APIRouter:
    """The endpoints."""
    router = APIRouter()

    @router.get("/v1/models", summary="What is served", tags=["OpenAI"])
    async def models() -> Response:
        return JSONReply({"object": "list", "data": [_model(house, n) for n in house.models]})

    @router.get("/v1/models/{name:path}", summary="One of them", tags=["OpenAI"])
    async def model(name: str) -> Response:
        return JSONReply(_model(house, name))

    @router.post("/tokenize", summary="A text, or messages, as tokens", tags=["Quire"])
    async def tokenize(form: TokenizeForm) -> Response:
        service, _ = house.find(form.model)
        tokens = await _tokens(service, form)
        found: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": service.prompts.context_tokens,
            "tokens": tokens,
        }
        if form.return_token_strs:
            found["token_strs"] = [service.prompts.token_text(t)[0] for t in tokens]
        return JSONReply(found)

    @router.post("/detokenize", summary="Tokens as text", tags=["Quire"])
    async def detokenize(form: DetokenizeForm) -> Response:
        service, _ = house.find(form.model)
        if max(form.tokens, default=0) >= service.engine.runner.vocab_size:
            raise ApiError(
                400,
                f"tokens holds an id outside the vocabulary of {service.engine.runner.vocab_size}",
                param="tokens",
            )
        return JSONReply({"prompt": service.prompts.decode(form.tokens)})

    @router.post("/v1/embeddings", include_in_schema=False)
    async def embeddings() -> Response:
        raise ApiError(
            404,
            "there are no embeddings here: models that continue texts were not trained to compare them; ask a server "
            "of an embedding model",
            code="not_offered",
        )

    @router.get("/health", summary="Whether tokens come", tags=["Quire"])
    async def health() -> Response:
        await house.health()
        return JSONReply({"status": "ok"})

    @router.get("/live", summary="Whether the process answers", tags=["Quire"])
    async def live() -> Response:
        return JSONReply({"status": "ok"})

    @router.get("/version", summary="Which Quire this is", tags=["Quire"])
    async def version() -> Response:
        return JSONReply({"version": __version__})

    @router.get("/metrics", summary="For Prometheus", tags=["Quire"])
    async def metrics(request: Request) -> Response:
        if not request.state.caller.operator:
            raise ApiError(403, "metrics are for an operator's key", code="operator_only")
        return Response(house.metrics(), media_type=CONTENT_TYPE_LATEST)

    return router


async def _tokens(service: Service, form: TokenizeForm) -> list[int]:
    if (form.prompt is None) == (form.messages is None):
        raise ApiError(400, "give a prompt, or messages", param="prompt")
    prompts = service.prompts
    if form.messages is not None:
        if form.add_special_tokens is not None:
            raise ApiError(
                400, "the chat template decides about special tokens", param="add_special_tokens"
            )
        answer = form.add_generation_prompt is not False
        return await prompts.chat(as_turns(form.messages), answer=answer)
    if form.add_generation_prompt is not None:
        raise ApiError(400, "add_generation_prompt is for messages", param="add_generation_prompt")
    assert form.prompt is not None
    return await prompts.encode(form.prompt, special=form.add_special_tokens is not False)


def _model(house: House, name: str) -> dict[str, Any]:
    service, adapter = house.find(name)
    return {
        "id": name,
        "object": "model",
        "created": service.created_s,
        "owned_by": "quire",
        "parent": None if adapter is None else service.name,
        "max_model_len": service.prompts.context_tokens,
    }
