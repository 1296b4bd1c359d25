"""Tool calls in a text are found however it is cut, and what only looks like one is said."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.serve.errors import ApiError
from quire.serve.tools import Call, Reader, ToolUse, plan_tools

HERMES = "{% if tools %}<tool_call>{% endif %}"
MISTRAL = "{% if tools %}[TOOL_CALLS]{% endif %}"
LLAMA = "{% if tools %}parameters<|python_tag|>{% endif %}"
PLAIN = "{{ messages }}"


def tool(name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


TEXTS: dict[str, tuple[str, str, list[Any]]] = {
    "one": (
        "hermes",
        'So: <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
        ["So: ", ("f", {"a": 1})],
    ),
    "two": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        [("f", {}), ("g", {})],
    ),
    "none": ("hermes", "a < b <tool> </tool_call>", ["a < b <tool> </tool_call>"]),
    "broken": ("hermes", "<tool_call>{</tool_call>!", ["<tool_call>{</tool_call>!"]),
    "cut off": ("hermes", 'x<tool_call>{"name": "f"', ['x<tool_call>{"name": "f"']),
    "unclosed and whole": ("hermes", '<tool_call>{"name": "f", "arguments": {}}', [("f", {})]),
    "a beginning": ("hermes", "five <tool_c", ["five <tool_c"]),
    "a list": (
        "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": [1]}}, {"name": "g", "arguments": {}}]',
        [("f", {"a": [1]}), ("g", {})],
    ),
    "no list": ("mistral", "[TOOL] no", ["[TOOL] no"]),
    "parameters": ("llama", ' {"name": "f", "parameters": {"a": "b"}}', [("f", {"a": "b"})]),
    "said first": ("llama", 'It is {"name": "f"}', ['It is {"name": "f"}']),
    "other JSON": ("llama", '{"a": 1}', ['{"a": 1}']),
    "forced": ("forced", '{"name":"f","arguments":{"a":1}}', [("f", {"a": 1})]),
    "forced, cut": ("forced", '{"name":"f","argu', ['{"name":"f","argu']),
    "no tools": ("none", "<tool_call>", ["<tool_call>"]),
}


def read(way: str, pieces: list[str], **more: Any) -> list[Any]:
    reader = Reader(ToolUse(way, **more))
    parts: list[Any] = []
    for piece in pieces:
        parts += reader.push(piece)
    parts += reader.finish()
    said: list[Any] = []
    for part in parts:
        if isinstance(part, Call):
            said.append((part.name, json.loads(part.arguments)))
        elif said and isinstance(said[-1], str):
            said[-1] += part
        else:
            said.append(part)
    return said


@pytest.mark.parametrize("case", TEXTS)
@given(cuts=st.lists(st.integers(0, 120)))
def test_calls_are_found_however_the_text_is_cut(case: str, cuts: list[int]) -> None:
    way, text, expected = TEXTS[case]
    at = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(at)]
    assert read(way, pieces) == expected


def test_what_is_certain_is_said_at_once() -> None:
    reader = Reader(ToolUse("hermes"))
    assert reader.push("hello <") == ["hello "]
    assert reader.push("b") == ["<b"]
    assert Reader(ToolUse("llama")).push("hello") == ["hello"]


def test_one_call_is_one_call() -> None:
    _, text, _ = TEXTS["two"]
    assert read("hermes", [text], several=False) == [("f", {})]


@pytest.mark.parametrize(
    ("template", "way"), [(HERMES, "hermes"), (MISTRAL, "mistral"), (LLAMA, "llama")]
)
def test_the_template_tells_the_form(template: str, way: str) -> None:
    use = plan_tools(template, [tool()], "auto")
    assert use.way == way
    assert use.tools == (tool(),)
    assert use.plain_specials
    assert use.grammar is None
    assert plan_tools(template, [tool()], "none") == ToolUse()


def test_a_template_without_tools_is_told_of_them() -> None:
    use = plan_tools(PLAIN, [tool("f", description="does f"), tool("g")], "g")
    assert use.way == "forced"
    assert use.tools == ()
    assert use.grammar is not None
    assert '"const": "g"' in use.grammar[1]
    assert '"const": "f"' not in use.grammar[1]
    user = {"role": "user", "content": "x"}
    first, second = use.turns([user])
    assert first["role"] == "system"
    assert "does f" in first["content"]
    assert second == user
    (system, _) = use.turns([{"role": "system", "content": "Be good."}, user])
    assert system["content"].startswith("Be good.\n")
    assert plan_tools(HERMES, [tool()], "required").preface is None


@pytest.mark.parametrize(
    ("template", "tools", "choice", "said"),
    [
        (PLAIN, [tool()], "auto", "required"),
        ("tools but no form", [tool()], "auto", "required"),
        (HERMES, [tool()], "g", "'g'"),
        (HERMES, [tool(), tool()], "auto", "same name"),
        (HERMES, [], "required", "needs tools"),
    ],
)
def test_what_cannot_be_called_is_refused(
    template: str, tools: list[Any], choice: str, said: str
) -> None:
    with pytest.raises(ApiError, match=said):
        plan_tools(template, tools, choice)
