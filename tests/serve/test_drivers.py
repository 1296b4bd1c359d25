"""Frameworks that drive OpenAI's interface, unchanged. They are heavy, and no part of `dev`: quire[drivers]."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

QUESTION = "Alice was beginning to get very tired of"


def expected(packaged: Any) -> str:
    done = packaged.client().chat.completions.create(
        model="packaged",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=8,
        temperature=0,
    )
    text: str = done.choices[0].message.content
    assert text
    return text


def test_langchain(packaged: Any) -> None:
    driver = pytest.importorskip("langchain_openai", reason="needs pip install 'quire[drivers]'")
    model = driver.ChatOpenAI(
        model="packaged",
        base_url=f"{packaged.url}/v1",
        api_key="none",
        temperature=0,
        max_tokens=8,
        max_retries=0,
    )
    said = expected(packaged)
    whole = model.invoke(QUESTION)
    assert whole.content == said
    assert whole.usage_metadata["output_tokens"] == 8
    assert whole.usage_metadata["input_token_details"]["cache_read"] > 0
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == said
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    tool = {"name": "set_lamp", "description": "A lamp.", "parameters": schema}
    forced = model.bind_tools([tool], tool_choice="set_lamp").bind(max_tokens=40)
    (call,) = forced.invoke(QUESTION).tool_calls
    assert call["name"] == "set_lamp"


def test_litellm(packaged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch a list of prices
    litellm = pytest.importorskip("litellm", reason="needs pip install 'quire[drivers]'")
    wanted = {
        "model": "openai/packaged",
        "api_base": f"{packaged.url}/v1",
        "api_key": "none",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 8,
        "temperature": 0,
        "num_retries": 0,
    }
    said = expected(packaged)
    whole = litellm.completion(**wanted)
    assert whole.choices[0].message.content == said
    assert whole.usage.completion_tokens == 8
    assert whole.usage.prompt_tokens_details.cached_tokens > 0
    streamed = litellm.completion(**wanted, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == said
    with pytest.raises(litellm.exceptions.NotFoundError):
        litellm.completion(**(wanted | {"model": "openai/another"}))
