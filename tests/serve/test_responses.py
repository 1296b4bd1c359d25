"""OpenAI's responses, by OpenAI's client: text, streams, tools, schemas, and what is not stored."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

MODEL = "packaged"
TOOL = {
    "type": "function",
    "name": "set_lamp",
    "parameters": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
}


def ask(served: Any, **more: Any) -> Any:
    wanted = {"model": MODEL, "input": "Alice was", "max_output_tokens": 8, "temperature": 0}
    return served.client().responses.create(**(wanted | more))


def test_a_response_is_what_chat_says(packaged: Any) -> None:
    done = ask(packaged, instructions="A story.")
    chat = packaged.client().chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "A story."},
            {"role": "user", "content": "Alice was"},
        ],
        max_tokens=8,
        temperature=0,
    )
    assert done.output_text == chat.choices[0].message.content
    assert done.status == "incomplete"
    assert done.incomplete_details.reason == "max_output_tokens"
    assert done.usage.input_tokens == chat.usage.prompt_tokens
    assert done.usage.output_tokens == 8


def test_a_conversation_comes_whole(packaged: Any) -> None:
    first = ask(packaged, input="In a hole in the ground there lived a reader of books. " * 3)
    items = [
        {"role": "user", "content": "In a hole in the ground there lived a reader of books. " * 3},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"role": "user", "content": [{"type": "input_text", "text": "And then?"}]},
    ]
    second = ask(packaged, input=items)
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens - 16


def test_a_stream_says_the_same_in_order(packaged: Any) -> None:
    whole = ask(packaged)
    events = list(ask(packaged, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type.removeprefix("response.") for e in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens == 8
    names = {e.item_id for e in events if hasattr(e, "item_id")}
    assert names == {events[-1].response.output[0].id}


def test_a_schema_is_followed(packaged: Any) -> None:
    form = {"type": "json_schema", "name": "n", "schema": {"enum": ["a", "b"]}, "strict": True}
    done = ask(packaged, text={"format": form}, temperature=1.5)
    assert json.loads(done.output_text) in ("a", "b")
    assert done.status == "completed"


def test_a_tool_is_called_and_answered(packaged: Any) -> None:
    named = {"type": "function", "name": "set_lamp"}
    wanted = {"tools": [TOOL], "max_output_tokens": 40}
    done = ask(packaged, tool_choice=named, **wanted)
    (call,) = done.output
    assert call.type == "function_call"
    assert json.loads(call.arguments) in ({"on": True}, {"on": False})
    events = list(ask(packaged, tool_choice="required", stream=True, **wanted))
    (finished,) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert json.loads(finished.arguments) in ({"on": True}, {"on": False})
    assert events[-1].response.output[0].arguments == finished.arguments
    items = [
        {"role": "user", "content": "Switch it."},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"},
    ]
    assert ask(packaged, input=items).output_text


@pytest.mark.parametrize(
    "more",
    [
        {"store": True},
        {"previous_response_id": "resp_1"},
        {"background": True},
        {"input": []},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"tools": [{"type": "web_search"}]},
        {"reasoning": {"effort": "high"}},
        {"max_output_tokens": 0},
        {"truncation": "auto"},
    ],
)
def test_what_cannot_be_honoured_is_refused(packaged: Any, more: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(packaged, **more)
    assert next(iter(more)) in str(caught.value.param)
