"""POST /v1/completions."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from quire.engine import Completion, Delta, RequestOutput
from quire.serve.answer import EventStream, new_id, openai_sampling, text_logprobs
from quire.serve.errors import ApiError, JSONReply, event
from quire.serve.forms import CompletionForm
from quire.serve.grammar import wanted_grammar
from quire.serve.house import House
from quire.serve.service import Run, Service, unless_gone

__all__ = ["completion_routes"]


def completion_routes(house: House) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/completions", summary="Continue texts", tags=["OpenAI"])
    async def completions(form: CompletionForm, request: Request) -> Response:
        service, adapter = house.find(form.model)
        n = form.n or 1
        if form.best_of not in (None, n):
            raise ApiError(400, "best_of must equal n: all samples are returned", param="best_of")
        max_tokens = 16 if form.max_tokens is None else form.max_tokens
        more: dict[str, Any] = {}
        if form.logprobs is not None:
            more["logprobs"] = form.logprobs
        if form.echo:
            if form.stream:
                raise ApiError(400, "echo cannot be streamed", param="echo")
            if form.logprobs is not None:
                more["prompt_logprobs"] = form.logprobs
        if max_tokens == 0 and "prompt_logprobs" not in more:
            raise ApiError(
                400,
                "max_tokens=0 needs echo and logprobs: it scores the prompt",
                param="max_tokens",
            )
        grammar = wanted_grammar(form.response_format, form.structured_outputs)
        params = openai_sampling(
            form, await service.grammar(grammar), max_tokens=max_tokens, **more
        )
        options = form.stream_options
        if options is not None and not form.stream:
            raise ApiError(400, "stream_options needs stream=true", param="stream_options")
        prompts = await _prompts(service, form.prompt)
        caller = request.state.caller
        run = service.open_run(caller, prompts, params, adapter=adapter, cache=form.cache)
        answer = _Answer(service, form, run, n)
        if form.stream:
            usage = options is not None and bool(options.include_usage)
            events = answer.events(usage=usage)
            return EventStream(events, run, request.url.path, end=b"data: [DONE]\n\n")
        outputs = await unless_gone(request, run, run.finish())
        return JSONReply(answer.whole(outputs))

    return router


async def _prompts(service: Service, given: str | Sequence[Any]) -> list[list[int]]:
    """Texts or tokens, one or several, as tokens."""
    many = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if len(many) > service.config.max_samples:
        raise ApiError(
            400,
            f"{len(many)} prompts are more than the {service.config.max_samples} that one request may have here",
            param="prompt",
        )
    encode = service.prompts.encode
    texts = [encode(p) if isinstance(p, str) else asyncio.sleep(0, list(p)) for p in many]
    return [list(await text) for text in texts]


class _Answer:
    """One text completion, whole or in chunks. Choice: prompt × n + sample."""

    def __init__(self, service: Service, form: CompletionForm, run: Run, n: int) -> None:
        self.service = service
        self.form = form
        self.run = run
        self.n = n
        self.shown: dict[tuple[int, int], int] = {}
        self.head = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": form.model,
        }

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer at once."""
        choices = [
            self._choice(at, output, sample)
            for at, output in enumerate(outputs)
            for sample in output.outputs
        ]
        return {**self.head, "choices": choices, "usage": self.run.usage().openai()}

    def _choice(self, at: int, output: RequestOutput, sample: Completion) -> dict[str, Any]:
        prompts, text = self.service.prompts, sample.text
        tokens, found = list(sample.token_ids), list(sample.logprobs or ())
        if self.form.echo:
            text = self._given(at, output) + text
            tokens = [*output.prompt_token_ids, *tokens]
            found = [*(output.prompt_logprobs or ()), *found]
        logprobs = None
        if self.form.logprobs is not None:
            logprobs = text_logprobs(prompts, found, tokens, 0)
        return {
            "index": at * self.n + sample.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": sample.finish_reason,
        }

    def _given(self, at: int, output: RequestOutput) -> str:
        """The prompt as it was written; decoded, where it was given as tokens."""
        given = self.form.prompt if isinstance(self.form.prompt, str) else self.form.prompt[at]
        if isinstance(given, str):
            return given
        return self.service.prompts.decode(output.prompt_token_ids)

    async def events(self, *, usage: bool) -> AsyncIterator[bytes]:
        """The answer in chunks."""
        async for at, delta in self.run.deltas():
            yield event({**self.head, "choices": [self._part(at, delta)]})
        if usage:
            yield event({**self.head, "choices": [], "usage": self.run.usage().openai()})

    def _part(self, at: int, delta: Delta) -> dict[str, Any]:
        logprobs = None
        if delta.logprobs is not None:
            place = (at, delta.index)
            tokens = [one.token_id for one in delta.logprobs]
            offset = self.shown.get(place, 0)
            logprobs = text_logprobs(self.service.prompts, delta.logprobs, tokens, offset)
            self.shown[place] = offset + sum(len(text) for text in logprobs["tokens"])
        return {
            "index": at * self.n + delta.index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }
