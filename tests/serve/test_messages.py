"""Anthropic's own client against a real server: messages, streams, tools, breakpoints, and errors in its form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

MODEL = "packaged"
HELLO = [{"role": "user", "content": "Alice was beginning to get very tired of"}]
GREEDY = {"temperature": 0}
TOOL = {
    "name": "set_lamp",
    "description": "Switches a lamp.",
    "input_schema": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def client(packaged: Any) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=packaged.url, api_key="x", max_retries=0) as made:
        yield made


def ask(client: anthropic.Anthropic, **more: Any) -> Any:
    wanted = {"model": MODEL, "max_tokens": 8, "messages": HELLO, "extra_body": GREEDY} | more
    return client.messages.create(**wanted)


def test_a_message_is_what_chat_says(packaged: Any, client: anthropic.Anthropic) -> None:
    done = ask(client, system="A story.")
    assert done.stop_reason == "max_tokens"
    assert done.usage.output_tokens == 8
    turns = [{"role": "system", "content": "A story."}, *HELLO]
    chat = packaged.client().chat.completions.create(
        model=MODEL, messages=turns, max_tokens=8, temperature=0
    )
    assert done.content[0].text == chat.choices[0].message.content
    cut = done.content[0].text[3:6]
    stopped = ask(client, system="A story.", stop_sequences=[cut])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", cut)


def test_a_stream_says_the_same(client: anthropic.Anthropic) -> None:
    whole = ask(client)
    with client.messages.stream(
        model=MODEL, max_tokens=8, messages=HELLO, extra_body=GREEDY
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 8


def test_an_answer_can_be_begun_for_it(packaged: Any, client: anthropic.Anthropic) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "sitting by her"}]
    text = f"{HELLO[0]['content']}\nsitting by her"
    done = packaged.client().completions.create(
        model=MODEL, prompt=text, max_tokens=8, temperature=0
    )
    assert ask(client, messages=begun).content[0].text == done.choices[0].text


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "set_lamp"}])
def test_a_tool_is_used_and_answered(client: anthropic.Anthropic, choice: Any) -> None:
    with client.messages.stream(
        model=MODEL, max_tokens=40, messages=HELLO, tools=[TOOL], tool_choice=choice
    ) as stream:
        done = stream.get_final_message()
    assert done.stop_reason == "tool_use"
    (use,) = done.content
    assert use.name == "set_lamp"
    assert use.input in ({"on": True}, {"on": False})
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "done", "is_error": True}
    more = [
        *HELLO,
        {"role": "assistant", "content": [use.model_dump(include={"type", "id", "name", "input"})]},
        {"role": "user", "content": [result, {"type": "text", "text": "and now?"}]},
    ]
    assert ask(client, messages=more).content[0].text
    again = ask(client, max_tokens=40, tools=[TOOL], tool_choice=choice)
    assert again.content[0].type == "tool_use"


def test_breakpoints_are_reported(packaged: Any, client: anthropic.Anthropic) -> None:
    manual = "The manual of the machine says that it has seven wheels. " * 12
    system = [{"type": "text", "text": manual, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    grain = packaged.engine.runner.sharing.grain
    first = ask(client, system=system).usage
    again = ask(client, system=system).usage
    whole = client.messages.count_tokens(model=MODEL, system=system, messages=HELLO).input_tokens
    for usage in (first, again):
        parts = (usage.input_tokens, usage.cache_read_input_tokens)
        assert sum(parts) + usage.cache_creation_input_tokens == whole
    manual_tokens = len(packaged.engine.tokenizer.encode(manual))
    marked = first.cache_read_input_tokens + first.cache_creation_input_tokens
    assert manual_tokens - 2 * grain < marked <= manual_tokens + 1
    assert marked % grain == 0
    assert first.cache_creation_input_tokens > 100
    assert again.cache_creation_input_tokens == 0
    assert again.cache_read_input_tokens >= marked


def test_a_breakpoint_is_a_wish_of_the_cache(
    packaged: Any, client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    submit = packaged.engine.submit

    def watch(*args: Any, **wishes: Any) -> Any:
        seen.append(wishes["hints"])
        return submit(*args, **wishes)

    monkeypatch.setattr(packaged.engine, "submit", watch)
    block = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    ask(client, messages=[{"role": "user", "content": [block]}])
    ask(client)
    assert [hints and hints.keep_for_s for hints in seen] == [300.0, None]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no max_tokens": ({"max_tokens": None}, "max_tokens"),
    "negative": ({"max_tokens": -4}, "max_tokens"),
    "thinking": ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    "five breakpoints": (
        {
            "system": [
                {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
                for _ in range(5)
            ]
        },
        "at most 4",
    ),
    "a breakpoint without sharing": (
        {
            "cache": {"share": "off"},
            "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
        },
        "cache_control",
    ),
    "a result of the assistant": (
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": [{"type": "tool_result", "tool_use_id": "a", "content": "b"}],
                }
            ]
        },
        "tool_result",
    ),
    "a choice without a name": ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "name"),
    "a model that cannot choose": ({"tools": [TOOL]}, "required"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_have_its_form(packaged: Any, case: str) -> None:
    more, said = BAD[case]
    body = {"model": MODEL, "max_tokens": 8, "messages": HELLO} | more
    body = {key: value for key, value in body.items() if value is not None}
    with packaged.http() as http:
        answer = http.post("/v1/messages", json=body)
    assert answer.status_code == 400
    document = answer.json()
    assert document["type"] == "error"
    assert document["error"]["type"] == "invalid_request_error"
    assert said in document["error"]["message"]


def test_its_client_knows_the_errors(keyed: Any, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="there is no model"):
        ask(client, model="claude")
    with (
        anthropic.Anthropic(base_url=keyed.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError),
    ):
        ask(stranger)
    with anthropic.Anthropic(base_url=keyed.url, api_key=keyed.keys["bob"]) as bob:
        assert ask(bob, model="tiny").usage.output_tokens
