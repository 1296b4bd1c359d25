"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from quire.engine import Delta, RequestOutput
from quire.serve.answer import EventStream, chat_logprobs, new_id, openai_sampling
from quire.serve.errors import ApiError, JSONReply, event
from quire.serve.forms import ChatForm, ToolChoice
from quire.serve.grammar import wanted_grammar
from quire.serve.house import House
from quire.serve.prompt import as_turns
from quire.serve.service import Run, Service, unless_gone
from quire.serve.tools import Call, Reader, ToolUse, plan_tools

__all__ = ["chat_routes"]


def chat_routes(house: House) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions", summary="Continue a conversation", tags=["OpenAI"])
    async def chat_completions(form: ChatForm, request: Request) -> Response:
        service, adapter = house.find(form.model)
        use = _tools(service, form)
        grammar = wanted_grammar(form.response_format, form.structured_outputs)
        if grammar is not None and use.way != "none":
            raise ApiError(400, "tools and a form of the output exclude each other", param="tools")
        turns = use.turns(as_turns(form.messages))
        prompt = await service.prompts.chat(turns, use.tools)
        more: dict[str, Any] = {}
        if form.logprobs or form.top_logprobs is not None:
            if not form.logprobs:
                raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
            more["logprobs"] = form.top_logprobs or 0
        if use.plain_specials:
            more["skip_special_tokens"] = False
        params = openai_sampling(
            form,
            await service.grammar(use.grammar or grammar),
            max_tokens=_max_tokens(form),
            **more,
        )
        options = form.stream_options
        if options is not None and not form.stream:
            raise ApiError(400, "stream_options needs stream=true", param="stream_options")
        caller = request.state.caller
        run = service.open_run(caller, [prompt], params, adapter=adapter, cache=form.cache)
        answer = _Answer(service, form.model, run, use, params.n)
        if form.stream:
            usage = options is not None and bool(options.include_usage)
            events = answer.events(usage=usage)
            return EventStream(events, run, request.url.path, end=b"data: [DONE]\n\n")
        (output,) = await unless_gone(request, run, run.finish())
        return JSONReply(answer.whole(output))

    return router


def _max_tokens(form: ChatForm) -> int | None:
    if form.max_completion_tokens is None:
        return form.max_tokens
    if form.max_tokens not in (None, form.max_completion_tokens):
        raise ApiError(
            400, "max_tokens and max_completion_tokens say the same; give one", param="max_tokens"
        )
    return form.max_completion_tokens


def _tools(service: Service, form: ChatForm) -> ToolUse:
    tools = [tool.model_dump(exclude_none=True) for tool in form.tools or ()]
    choice: str = "auto"
    if isinstance(form.tool_choice, ToolChoice):
        choice = form.tool_choice.function.name
        if choice in ("none", "auto", "required"):
            raise ApiError(400, f"a tool cannot be called {choice!r}", param="tool_choice")
    elif form.tool_choice is not None:
        choice = form.tool_choice
    several = form.parallel_tool_calls is not False
    return plan_tools(service.prompts.template, tools, choice, several=several)


class _Answer:
    """One chat completion, whole or in chunks."""

    def __init__(self, service: Service, model: str, run: Run, use: ToolUse, n: int) -> None:
        self.service = service
        self.run = run
        self.use = use
        self.readers = [Reader(use) for _ in range(n)]
        self.head = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": model}

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        """The answer at once."""
        choices = []
        for sample in output.outputs:
            reader = self.readers[sample.index]
            parts = [*reader.push(sample.text), *reader.finish()]
            text = "".join(p for p in parts if isinstance(p, str))
            calls = [p for p in parts if isinstance(p, Call)]
            message: dict[str, Any] = {
                "role": "assistant",
                "content": text if text or not calls else None,
                "refusal": None,
            }
            if calls:
                message["tool_calls"] = [_as_dict(call) for call in calls]
            choices.append(
                {
                    "index": sample.index,
                    "message": message,
                    "logprobs": chat_logprobs(self.service.prompts, sample.logprobs),
                    "finish_reason": "tool_calls" if calls else sample.finish_reason,
                }
            )
        return {
            **self.head,
            "object": "chat.completion",
            "choices": choices,
            "usage": self.run.usage().openai(),
        }

    async def events(self, *, usage: bool) -> AsyncIterator[bytes]:
        """The answer in chunks."""
        for index in range(len(self.readers)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for _, delta in self.run.deltas():
            for chunk in self._of(delta):
                yield chunk
        if usage:
            yield self._event([], self.run.usage().openai())

    def _of(self, delta: Delta) -> list[bytes]:
        reader = self.readers[delta.index]
        before = reader.n_calls
        parts = reader.push(delta.text)
        if delta.finish_reason is not None:
            parts += reader.finish()
        chunks = []
        logprobs = chat_logprobs(self.service.prompts, delta.logprobs)
        for part in parts:
            if isinstance(part, Call):
                content: dict[str, Any] = {"tool_calls": [{"index": before, **_as_dict(part)}]}
                before += 1
            else:
                content = {"content": part}
            chunks.append(self._chunk(delta.index, content, logprobs=logprobs))
            logprobs = None
        if logprobs is not None:
            chunks.append(self._chunk(delta.index, {"content": ""}, logprobs=logprobs))
        if delta.finish_reason is not None:
            reason = "tool_calls" if reader.n_calls else delta.finish_reason
            chunks.append(self._chunk(delta.index, {}, reason))
        return chunks

    def _chunk(
        self,
        index: int,
        content: dict[str, Any],
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": content, "logprobs": logprobs, "finish_reason": reason}
        return self._event([choice])

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": choices}
        return event(chunk if usage is None else {**chunk, "usage": usage})


def _as_dict(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
