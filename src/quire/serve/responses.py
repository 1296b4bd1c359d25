"""POST /v1/responses: OpenAI's newer form. Nothing is stored, so a conversation comes whole with each request."""

import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from quire.engine import Completion, Delta
from quire.serve.answer import EventStream, new_id, sampling
from quire.serve.errors import ApiError, JSONReply, event
from quire.serve.forms import (
    CacheOptions,
    Form,
    FunctionTool,
    JSONSchema,
    Labels,
    Message,
    ResponseFormat,
    SamplingForm,
    TextPart,
    ToolCall,
)
from quire.serve.grammar import wanted_grammar
from quire.serve.house import House
from quire.serve.prompt import as_turns, plain_text
from quire.serve.service import Run, Service, unless_gone
from quire.serve.tools import Call, Reader, ToolUse, plan_tools

__all__ = ["ResponsesForm", "response_routes"]

Status = Literal["in_progress", "completed", "incomplete"]


class MessageItem(Form):
    """A turn."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    id: str | None = None
    status: Status | None = None
    phase: None = None


class CallItem(Form):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: Annotated[str, Field(min_length=1)]
    arguments: str
    id: str | None = None
    status: Status | None = None


class ResultItem(Form):
    """What came of it."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[TextPart]
    id: str | None = None
    status: Status | None = None


class FlatTool(FunctionTool):
    """A function that the model may call."""

    type: Literal["function"]


class FlatChoice(Form):
    """The one that must be called."""

    type: Literal["function"]
    name: str


class TextFormat(Form):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextOptions(Form):
    """What the text should be like."""

    format: TextFormat | None = None
    verbosity: None = None


class ResponsesForm(SamplingForm, Labels):
    """What this server can honour of it."""

    model: str
    input: (
        str
        | Annotated[list[MessageItem | CallItem | ResultItem], Field(min_length=1, max_length=4096)]
    )
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    tools: Annotated[list[FlatTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    include: Annotated[list[Any], Field(max_length=0)] | None = None
    cache: CacheOptions | None = None


def response_routes(house: House) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/responses", summary="Answer", tags=["OpenAI"])
    async def responses(form: ResponsesForm, request: Request) -> Response:
        service, adapter = house.find(form.model)
        use = _tools(service, form)
        grammar = wanted_grammar(_format(form), None)
        if grammar is not None and use.way != "none":
            raise ApiError(400, "tools and a form of the output exclude each other", param="tools")
        turns = use.turns(as_turns(_messages(form)))
        prompt = await service.prompts.chat(turns, use.tools)
        params = sampling(
            form,
            max_tokens=form.max_output_tokens,
            constraint=await service.grammar(use.grammar or grammar),
            skip_special_tokens=not use.plain_specials,
        )
        caller = request.state.caller
        run = service.open_run(caller, [prompt], params, adapter=adapter, cache=form.cache)
        answer = _Answer(form, run, Reader(use))
        if form.stream:
            return EventStream(answer.events(), run, request.url.path)
        (output,) = await unless_gone(request, run, run.finish())
        return JSONReply(answer.whole(output.outputs[0]))

    return router


def _messages(form: ResponsesForm) -> list[Message]:
    """The input as chat messages; calls that follow each other are one turn's."""
    made: list[Message] = []
    if form.instructions is not None:
        made.append(Message(role="system", content=form.instructions))
    if isinstance(form.input, str):
        return [*made, Message(role="user", content=form.input)]
    for item in form.input:
        if isinstance(item, MessageItem):
            made.append(Message(role=item.role, content=plain_text(item.content)))
        elif isinstance(item, ResultItem):
            text = plain_text(item.output)
            made.append(Message(role="tool", content=text, tool_call_id=item.call_id))
        else:
            function = {"name": item.name, "arguments": item.arguments}
            call = ToolCall.model_validate({"id": item.call_id, "function": function})
            if made and made[-1].role == "assistant":
                before = made[-1].tool_calls or []
                made[-1] = made[-1].model_copy(update={"tool_calls": [*before, call]})
            else:
                made.append(Message(role="assistant", tool_calls=[call]))
    return made


def _tools(service: Service, form: ResponsesForm) -> ToolUse:
    tools = []
    for tool in form.tools or ():
        function = tool.model_dump(exclude_none=True, exclude={"type"})
        tools.append({"type": "function", "function": function})
    choice: str = "auto"
    if isinstance(form.tool_choice, FlatChoice):
        choice = form.tool_choice.name
        if choice in ("none", "auto", "required"):
            raise ApiError(400, f"a tool cannot be called {choice!r}", param="tool_choice")
    elif form.tool_choice is not None:
        choice = form.tool_choice
    several = form.parallel_tool_calls is not False
    return plan_tools(service.prompts.template, tools, choice, several=several)


def _format(form: ResponsesForm) -> ResponseFormat | None:
    wanted = None if form.text is None else form.text.format
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        return ResponseFormat(type=wanted.type)
    envelope = {"name": wanted.name or "schema", "schema": wanted.schema_}
    return ResponseFormat(type="json_schema", json_schema=JSONSchema.model_validate(envelope))


class _Answer:
    """One response, whole or in events."""

    def __init__(self, form: ResponsesForm, run: Run, reader: Reader) -> None:
        self.form = form
        self.run = run
        self.reader = reader
        self.id = new_id("resp_")
        self.created_s = int(time.time())
        self.output: list[dict[str, Any]] = []
        self.text: str | None = None  # of the message that is open
        self.n_events = 0

    def whole(self, sample: Completion) -> dict[str, Any]:
        """The answer at once."""
        self._take([*self.reader.push(sample.text), *self.reader.finish()])
        self._close()
        return self._document(sample.finish_reason)

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as it comes."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._document(None))
        reason = None
        async for _, delta in self.run.deltas():
            for each in self._of(delta):
                yield each
            reason = delta.finish_reason
        kind = "response.incomplete" if reason == "length" else "response.completed"
        yield self._event(kind, response=self._document(reason))

    def _of(self, delta: Delta) -> list[bytes]:
        parts = self.reader.push(delta.text)
        if delta.finish_reason is None:
            return self._take(parts)
        return self._take([*parts, *self.reader.finish()]) + self._close()

    def _take(self, parts: list[str | Call]) -> list[bytes]:
        """Puts parts into the output; returns the events that say so."""
        out: list[bytes] = []
        for part in parts:
            if isinstance(part, Call):
                out += [*self._close(), *self._call(part)]
                continue
            if self.text is None:
                self.text = ""
                item = {**self._message(""), "status": "in_progress", "content": []}
                self.output.append(item)
                out.append(self._added(item))
                out.append(
                    self._event("response.content_part.added", **self._place(), part=_part(""))
                )
            self.text += part
            place = self._place()
            out.append(self._event("response.output_text.delta", **place, delta=part, logprobs=[]))
        return out

    def _close(self) -> list[bytes]:
        if self.text is None:
            return []
        text, self.text = self.text, None
        place = self._place()
        item = self.output[-1] = {**self.output[-1], **self._message(text), "id": place["item_id"]}
        return [
            self._event("response.output_text.done", **place, text=text, logprobs=[]),
            self._event("response.content_part.done", **place, part=_part(text)),
            self._event("response.output_item.done", output_index=place["output_index"], item=item),
        ]

    def _call(self, call: Call) -> list[bytes]:
        item = {
            "type": "function_call",
            "id": new_id("fc_"),
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }
        self.output.append(item)
        at = len(self.output) - 1
        place = {"item_id": item["id"], "output_index": at}
        kind = "response.function_call_arguments"
        return [
            self._added({**item, "arguments": "", "status": "in_progress"}),
            self._event(f"{kind}.delta", **place, delta=call.arguments),
            self._event(f"{kind}.done", **place, name=call.name, arguments=call.arguments),
            self._event("response.output_item.done", output_index=at, item=item),
        ]

    def _added(self, item: dict[str, Any]) -> bytes:
        at = len(self.output) - 1
        return self._event("response.output_item.added", output_index=at, item=item)

    def _message(self, text: str) -> dict[str, Any]:
        return {
            "type": "message",
            "id": new_id("msg_"),
            "status": "completed",
            "role": "assistant",
            "content": [_part(text)],
        }

    def _place(self) -> dict[str, Any]:
        at = len(self.output) - 1
        return {"item_id": self.output[at]["id"], "output_index": at, "content_index": 0}

    def _event(self, kind: str, **content: Any) -> bytes:
        number = self.n_events
        self.n_events += 1
        return event({"type": kind, "sequence_number": number, **content}, kind)

    def _document(self, reason: str | None) -> dict[str, Any]:
        form, usage = self.form, self.run.usage()
        status = "in_progress" if reason is None else "completed"
        if reason == "length":
            status = "incomplete"
        given = json.loads(form.model_dump_json(by_alias=True, exclude_none=True))
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_s,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "instructions": form.instructions,
            "max_output_tokens": form.max_output_tokens,
            "metadata": form.metadata or {},
            "model": form.model,
            "output": self.output,
            "parallel_tool_calls": form.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": 1.0 if form.temperature is None else form.temperature,
            "text": given.get("text", {"format": {"type": "text"}}),
            "tool_choice": given.get("tool_choice", "auto"),
            "tools": given.get("tools", []),
            "top_p": 1.0 if form.top_p is None else form.top_p,
            "truncation": "disabled",
            "usage": None
            if reason is None
            else {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.output_tokens,
            },
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
