"""OpenAI's own client against a real server: what people's programs do."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from quire.engine import SamplingParams

MODEL = "packaged"
QUESTION = [{"role": "user", "content": "Alice was beginning to get very tired of"}]


def ask(served: Any, messages: list[dict[str, Any]] = QUESTION, **more: Any) -> Any:
    wanted = {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0} | more
    return served.client().chat.completions.create(**wanted)


def test_a_conversation_finds_its_beginning_in_the_cache(packaged: Any) -> None:
    opening = "In a hole in the ground there lived a reader of manuals, who " * 3
    messages = [{"role": "user", "content": opening}]
    first = ask(packaged, messages, max_tokens=24)
    reply = first.choices[0].message
    assert reply.role == "assistant"
    assert first.choices[0].finish_reason == "length"
    assert first.usage.completion_tokens == 24
    assert first.usage.total_tokens == first.usage.prompt_tokens + 24
    messages += [
        {"role": "assistant", "content": reply.content},
        {"role": "user", "content": "And then?"},
    ]
    second = ask(packaged, messages)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 16 < cached < second.usage.prompt_tokens


def test_the_answer_is_what_the_engine_says(packaged: Any) -> None:
    prompt = packaged.engine.tokenizer.apply_chat_template(QUESTION, tokenize=False)
    prompt += "\n"
    tokens = packaged.engine.tokenizer.encode(prompt, add_special_tokens=False)
    (said,) = packaged.engine.generate([tokens], SamplingParams(max_tokens=8))
    assert ask(packaged).choices[0].message.content == said.text


def test_a_stream_says_what_the_whole_answer_says(packaged: Any) -> None:
    whole = ask(packaged, temperature=0.9, seed=7, n=2, logprobs=True, top_logprobs=2)
    texts, logprobs, reasons, usage = ["", ""], [[], []], [None, None], None
    stream = ask(
        packaged,
        temperature=0.9,
        seed=7,
        n=2,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.usage is not None:
            assert not chunk.choices
            usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            if choice.logprobs:
                logprobs[choice.index] += choice.logprobs.content
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert reasons == ["length", "length"]
    assert usage.completion_tokens == whole.usage.completion_tokens == 16
    for choice, found in zip(whole.choices, logprobs, strict=True):
        assert [row.token for row in found] == [row.token for row in choice.logprobs.content]
        for mine, theirs in zip(found, choice.logprobs.content, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
            assert len(mine.top_logprobs) == 2
            assert bytes(mine.bytes).decode() == mine.token


def test_seed_stop_and_bias_mean_what_they_say(packaged: Any) -> None:
    def text(**more: Any) -> str:
        return ask(packaged, max_tokens=16, **more).choices[0].message.content

    assert text(temperature=1.2, seed=1) == text(temperature=1.2, seed=1)
    assert text(temperature=1.2, seed=1) != text(temperature=1.2, seed=2)
    plain = text()
    middle = plain[5:8]
    stopped = ask(packaged, max_tokens=16, stop=[middle])
    assert stopped.choices[0].message.content == plain[: plain.index(middle)]
    assert stopped.choices[0].finish_reason == "stop"
    (token,) = packaged.engine.tokenizer.encode("Q", add_special_tokens=False)
    assert text(logit_bias={str(token): 100}) == "Q" * 16


def test_completions_score_what_they_echo(packaged: Any) -> None:
    client = packaged.client()
    prompt = "Alice was beginning to get very tired"
    done = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=4, temperature=0, logprobs=1, echo=True
    )
    choice = done.choices[0]
    assert choice.text.startswith(prompt)
    n = done.usage.prompt_tokens
    assert len(choice.logprobs.tokens) == n + 4
    assert choice.logprobs.token_logprobs[0] is None
    (scored,) = packaged.engine.generate(
        [prompt], SamplingParams(max_tokens=4, prompt_logprobs=1, logprobs=1)
    )
    mine = [one.logprob for one in scored.prompt_logprobs[1:]]
    assert choice.logprobs.token_logprobs[1:n] == pytest.approx(mine, abs=1e-3)
    only = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=0, logprobs=0, echo=True
    )
    assert only.choices[0].text == prompt
    assert only.choices[0].logprobs.token_logprobs[1:] == pytest.approx(mine, abs=1e-3)


def test_several_prompts_are_several_choices(packaged: Any) -> None:
    client = packaged.client()
    prompts = ["Alice was", "Emma Woodhouse, handsome,", "import os"]
    wanted = {"model": MODEL, "max_tokens": 6, "temperature": 0, "n": 2}
    together = client.completions.create(prompt=prompts, **wanted)
    assert [choice.index for choice in together.choices] == list(range(6))
    for at, prompt in enumerate(prompts):
        alone = client.completions.create(prompt=prompt, **(wanted | {"n": 1}))
        assert together.choices[2 * at].text == alone.choices[0].text
    texts = [""] * 6
    for chunk in client.completions.create(prompt=prompts, stream=True, **wanted):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in together.choices]
    tokens = packaged.engine.tokenizer.encode("Alice was")
    by_tokens = client.completions.create(prompt=[tokens], **wanted)
    assert by_tokens.choices[0].text == texts[0]


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_is_cancelled(packaged: Any, stream: bool) -> None:
    broken = packaged.engine.stats().finished.get("cancelled", 0)

    async def leave() -> None:
        client = openai.AsyncOpenAI(base_url=f"{packaged.url}/v1", api_key="x", max_retries=0)
        wanted: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 4000}
        wanted["extra_body"] = {"ignore_eos": True}
        if stream:
            answer = await client.chat.completions.create(stream=True, **wanted)
            async for chunk in answer:
                if chunk.choices and chunk.choices[0].delta.content:
                    break
            await answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                await client.with_options(timeout=0.5).chat.completions.create(**wanted)
        await client.close()

    asyncio.run(leave())
    packaged.wait_idle()
    assert packaged.engine.stats().finished.get("cancelled", 0) == broken + 1


def test_many_at_once_get_what_each_gets_alone(packaged: Any) -> None:
    prompts = [f"Chapter {i}. It was a" for i in range(12)]

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{packaged.url}/v1", api_key="x") as client:
            wanted = {"model": MODEL, "max_tokens": 12, "temperature": 0}
            asked = [client.completions.create(prompt=p, **wanted) for p in prompts]
            return [done.choices[0].text for done in await asyncio.gather(*asked)]

    together = asyncio.run(all_of_them())
    client = packaged.client()
    for prompt, text in list(zip(prompts, together, strict=True))[::4]:
        alone = client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0)
        assert alone.choices[0].text == text


SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["colour", "count", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(3))
def test_a_schema_is_followed(packaged: Any, seed: int) -> None:
    envelope = {"name": "thing", "schema": SCHEMA, "strict": True}
    form = {"type": "json_schema", "json_schema": envelope}
    done = ask(
        packaged, max_tokens=80, temperature=1.5, seed=seed, response_format=form, logprobs=True
    )
    assert done.choices[0].finish_reason == "stop"
    found = json.loads(done.choices[0].message.content)
    assert set(found) == set(SCHEMA["required"])
    assert found["colour"] in ("red", "green")
    assert found["count"] in range(100)
    assert 1 <= len(found["tags"]) <= 3
    assert set(found["tags"]) <= {"a", "b"}


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        ({"choice": ["yes", "no", "it depends"]}, {"yes", "no", "it depends"}),
        ({"regex": "[ab]{2}"}, {"aa", "ab", "ba", "bb"}),
        ({"grammar": 'start: "x" ("y" | "z")'}, {"xy", "xz"}),
        ({"json": {"const": 5}}, {"5"}),
    ],
)
def test_other_grammars_are_followed(packaged: Any, grammar: Any, texts: set[str]) -> None:
    body = {"structured_outputs": grammar}
    done = ask(packaged, temperature=1.5, n=4, extra_body=body)
    assert {choice.message.content for choice in done.choices} <= texts
    assert {choice.finish_reason for choice in done.choices} == {"stop"}


TOOL = {
    "type": "function",
    "function": {
        "name": "set_lamp",
        "description": "Switches a lamp.",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}


def test_a_tool_is_called_and_answered(packaged: Any) -> None:
    done = ask(packaged, max_tokens=40, tools=[TOOL], tool_choice="required")
    choice = done.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "set_lamp"
    assert json.loads(call.function.arguments) in ({"on": True}, {"on": False})
    messages = [
        *QUESTION,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    assert ask(packaged, messages).choices[0].message.content


def test_a_tool_call_is_streamed(packaged: Any) -> None:
    named = {"type": "function", "function": {"name": "set_lamp"}}
    calls, reasons = [], []
    for chunk in ask(packaged, max_tokens=40, tools=[TOOL], tool_choice=named, stream=True):
        calls += chunk.choices[0].delta.tool_calls or []
        reasons.append(chunk.choices[0].finish_reason)
        assert not chunk.choices[0].delta.content
    assert reasons[-1] == "tool_calls"
    (call,) = calls
    assert call.index == 0
    assert "on" in json.loads(call.function.arguments)


def test_models_are_listed(packaged: Any) -> None:
    client = packaged.client()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another/model")
