"""POST /v1/messages: Anthropic's form, where breakpoints of the prompt cache belong.

Every prefix is cached anyway. A breakpoint says how long: blocks of the request go only when no others are idle, for
five minutes or an hour, at most as long as the operator allows. What was found is told as `cache_read_input_tokens`;
what was computed up to the last breakpoint, in whole blocks, as `cache_creation_input_tokens`.
"""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from quire.engine import Completion, Delta
from quire.serve.answer import EventStream, new_id, sampling
from quire.serve.errors import ApiError, JSONReply, event
from quire.serve.forms import CacheOptions, Form, SamplingForm
from quire.serve.house import House
from quire.serve.service import Run, Service, Usage, unless_gone
from quire.serve.tools import Call, Reader, ToolUse, plan_tools

__all__ = ["MessagesForm", "message_routes"]

MOST_BREAKPOINTS = 4
LIFE_S = {"5m": 300.0, "1h": 3600.0}


class CacheControl(Form):
    """A breakpoint: keep what comes before it, and it."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Form):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: None = None


class ToolUseBlock(Form):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: Annotated[str, Field(min_length=1)]
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResultBlock(Form):
    """What came of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = TextBlock | ToolUseBlock | ToolResultBlock


class Turn(Form):
    """One turn."""

    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Field(min_length=1)]


class AnthropicTool(Form):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None


class AnthropicChoice(Form):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(Form):
    """A label."""

    user_id: str | None = None


class Disabled(Form):
    """The one kind of thinking that a model without it has."""

    type: Literal["disabled"]


class CountForm(Form):
    """POST /v1/messages/count_tokens."""

    model: str
    messages: Annotated[list[Turn], Field(min_length=1, max_length=4096)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=128)] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Disabled | None = None


class MessagesForm(CountForm, SamplingForm):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    cache: CacheOptions | None = None


@dataclass(frozen=True)
class Conversation:
    """A request's turns as templates expect them, and where its breakpoints are.

    Args:
        marks: of each breakpoint: turns before it, and the text of the turn that it stands in up to it.
        life_s: how long the longest-lived wants its blocks kept; 0: there are none.
    """

    turns: list[dict[str, Any]]
    marks: tuple[tuple[int, str], ...]
    life_s: float


def message_routes(house: House) -> APIRouter:
    """The endpoints."""
    router = APIRouter()

    @router.post("/v1/messages", summary="Continue a conversation", tags=["Anthropic"])
    async def messages(form: MessagesForm, request: Request) -> Response:
        service, adapter = house.find(form.model)
        talk = _conversation(form)
        use = _tools(service, form)
        turns = use.turns(talk.turns)
        prompt = await service.prompts.chat(turns, use.tools)
        params = sampling(
            form,
            max_tokens=form.max_tokens,
            stop=form.stop_sequences or (),
            constraint=await service.grammar(use.grammar),
            skip_special_tokens=not use.plain_specials,
        )
        cache = _kept(service, form.cache, talk.life_s)
        marked = await _marked_tokens(service, talk, use, prompt)
        caller = request.state.caller
        run = service.open_run(caller, [prompt], params, adapter=adapter, cache=cache)
        answer = _Answer(form.model, run, Reader(use), marked)
        if form.stream:
            return EventStream(answer.events(), run, request.url.path)
        (output,) = await unless_gone(request, run, run.finish())
        return JSONReply(answer.whole(output.outputs[0]))

    @router.post("/v1/messages/count_tokens", summary="How long a prompt is", tags=["Anthropic"])
    async def count_tokens(form: CountForm) -> Response:
        service, _ = house.find(form.model)
        use = _tools(service, form)
        turns = use.turns(_conversation(form).turns)
        return JSONReply({"input_tokens": len(await service.prompts.chat(turns, use.tools))})

    return router


def _conversation(form: CountForm) -> Conversation:
    """Raises ApiError: a block where it does not belong, or too many breakpoints."""
    turns: list[dict[str, Any]] = []
    controls = [tool.cache_control for tool in form.tools or () if tool.cache_control]
    marks: list[tuple[int, str]] = [(0, "") for _ in controls]
    if isinstance(form.system, str):
        turns.append({"role": "system", "content": form.system})
    elif form.system is not None:
        text = ""
        for part in form.system:
            text += part.text
            if part.cache_control is not None:
                controls.append(part.cache_control)
                marks.append((0, text))
        turns.append({"role": "system", "content": text})
    for at, turn in enumerate(form.messages):
        if isinstance(turn.content, str):
            turns.append({"role": turn.role, "content": turn.content})
            continue
        text = ""
        calls: list[dict[str, Any]] = []
        for block in turn.content:
            if isinstance(block, TextBlock):
                text += block.text
            elif isinstance(block, ToolUseBlock) and turn.role == "assistant":
                function = {"name": block.name, "arguments": block.input}
                calls.append({"id": block.id, "type": "function", "function": function})
            elif isinstance(block, ToolResultBlock) and turn.role == "user":
                turns.append(_result(block))
            else:
                wrong = f"a {block.type} block does not belong to the {turn.role}"
                raise ApiError(400, wrong, param=f"messages.{at}")
            if block.cache_control is not None:
                controls.append(block.cache_control)
                marks.append((len(turns), text))
        if text or calls or turn.role == "assistant":
            more = {"tool_calls": calls} if calls else {}
            turns.append({"role": turn.role, "content": text, **more})
    if len(controls) > MOST_BREAKPOINTS:
        raise ApiError(
            400, f"a request has at most {MOST_BREAKPOINTS} breakpoints, not {len(controls)}"
        )
    life_s = max((LIFE_S[control.ttl or "5m"] for control in controls), default=0.0)
    return Conversation(turns, tuple(marks), life_s)


def _result(block: ToolResultBlock) -> dict[str, Any]:
    content = block.content or ""
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    if block.is_error:
        text = f"error: {text}"
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}


def _tools(service: Service, form: CountForm) -> ToolUse:
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                **({} if tool.description is None else {"description": tool.description}),
                "parameters": tool.input_schema,
            },
        }
        for tool in form.tools or ()
    ]
    choice = form.tool_choice
    kind = "auto" if choice is None else choice.type
    if choice is not None and (kind == "tool") != (choice.name is not None):
        raise ApiError(
            400, "tool_choice of type tool, and no other, has a name", param="tool_choice"
        )
    wanted = {"any": "required", "tool": choice.name if choice else None}.get(kind) or kind
    several = choice is None or not choice.disable_parallel_tool_use
    return plan_tools(service.prompts.template, tools, wanted, several=several)


def _kept(service: Service, cache: CacheOptions | None, life_s: float) -> CacheOptions | None:
    """The cache's options with what the breakpoints wish."""
    if not life_s:
        return cache
    cache = cache or CacheOptions()
    if not service.shares or cache.share == "off":
        raise ApiError(
            400, "cache_control needs a cache of prefixes, and there is none for this request"
        )
    if cache.keep_for_s is not None:
        raise ApiError(400, "cache_control and cache.keep_for_s say the same; give one")
    return cache.model_copy(update={"keep_for_s": min(life_s, service.config.max_keep_s)})


async def _marked_tokens(
    service: Service, talk: Conversation, use: ToolUse, prompt: Sequence[int]
) -> int:
    """Tokens of the prompt up to the last breakpoint, in whole blocks; 0 where the template cannot say."""
    longest = 0
    for n, text in talk.marks:
        turns = talk.turns[:n]
        if text:
            turns = [*turns, {**talk.turns[n], "content": text}]
        if not turns:
            continue
        try:
            before = await service.prompts.chat(use.turns(turns), use.tools, answer=False)
        except ApiError:
            continue
        same = 0
        while same < min(len(before), len(prompt)) and before[same] == prompt[same]:
            same += 1
        longest = max(longest, same)
    sharing = getattr(service.engine.runner, "sharing", None)
    return longest // sharing.grain * sharing.grain if sharing is not None else 0


class _Answer:
    """One message, whole or in events."""

    def __init__(self, model: str, run: Run, reader: Reader, marked_tokens: int) -> None:
        self.run = run
        self.reader = reader
        self.marked_tokens = marked_tokens
        self.head = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model}
        self.open = False
        self.n_blocks = 0

    def whole(self, sample: Completion) -> dict[str, Any]:
        """The answer at once."""
        content: list[dict[str, Any]] = []
        for part in (*self.reader.push(sample.text), *self.reader.finish()):
            if isinstance(part, Call):
                content.append({**_call(part), "input": json.loads(part.arguments)})
            elif content and content[-1]["type"] == "text":
                content[-1]["text"] += part
            else:
                content.append({"type": "text", "text": part})
        return {
            **self.head,
            "content": content,
            **self._end(sample.finish_reason, sample.stop_reason),
            "usage": self._usage(),
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as it comes."""
        begun = False
        async for _, delta in self.run.deltas():
            if not begun:
                begun = True
                none: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
                start = {**self.head, **none, "usage": {**self._usage(), "output_tokens": 0}}
                yield _event("message_start", message=start)
            for each in self._of(delta):
                yield each
        yield _event("message_stop")

    def _of(self, delta: Delta) -> list[bytes]:
        parts = self.reader.push(delta.text)
        if delta.finish_reason is not None:
            parts += self.reader.finish()
        out: list[bytes] = []
        for part in parts:
            if isinstance(part, Call):
                out += [
                    *self._close(),
                    self._start({**_call(part), "input": {}}),
                    self._delta({"type": "input_json_delta", "partial_json": part.arguments}),
                    *self._close(),
                ]
            else:
                if not self.open:
                    out.append(self._start({"type": "text", "text": ""}))
                out.append(self._delta({"type": "text_delta", "text": part}))
        if delta.finish_reason is not None:
            end = self._end(delta.finish_reason, delta.stop_reason)
            out += [*self._close(), _event("message_delta", delta=end, usage=self._usage())]
        return out

    def _start(self, block: dict[str, Any]) -> bytes:
        self.open = True
        return _event("content_block_start", index=self.n_blocks, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self.n_blocks, delta=delta)

    def _close(self) -> list[bytes]:
        if not self.open:
            return []
        self.open = False
        self.n_blocks += 1
        return [_event("content_block_stop", index=self.n_blocks - 1)]

    def _end(self, reason: str | None, stop: str | int | None) -> dict[str, Any]:
        if self.reader.n_calls:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if isinstance(stop, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        named = "max_tokens" if reason == "length" else "end_turn"
        return {"stop_reason": named, "stop_sequence": None}

    def _usage(self) -> dict[str, int]:
        usage: Usage = self.run.usage()
        created = max(0, self.marked_tokens - usage.cached_tokens)
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens - created,
            "cache_read_input_tokens": usage.cached_tokens,
            "cache_creation_input_tokens": created,
            "output_tokens": usage.output_tokens,
        }


def _call(call: Call) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name}


def _event(kind: str, **content: Any) -> bytes:
    return event({"type": kind, **content}, kind)
