"""Tool calls: into the prompt through the model's chat template, and out of the text that the model writes.

Two ways. With `tool_choice="required"`, or a function's name, the output follows a grammar: one JSON object with a
name and arguments of the function's schema; that works with every model, though a small one fills it with noise. With
`"auto"` the model decides, so its template must show it the tools and its form of a call must be known:

    <tool_call>{"name": …, "arguments": {…}}</tool_call>     Hermes, Qwen
    [TOOL_CALLS][{"name": …, "arguments": {…}}, …]            Mistral
    {"name": …, "parameters": {…}}                            Llama 3
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.serve.errors import ApiError
from quire.serve.grammar import GrammarSource, json_source

__all__ = ["Call", "Reader", "ToolUse", "plan_tools"]

_FORMS = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "mistral": ("[TOOL_CALLS]", None),
    "llama": ("{", None),
}
"""What begins a call in the text, and what ends it; None: the end of the text."""

PREFACE = (
    "You may call functions. To call one, answer with one JSON object that has its name and its arguments, and with "
    "nothing else. The functions:\n"
)


@dataclass(frozen=True)
class Call:
    """One call that the model made.

    Args:
        arguments: JSON text.
    """

    name: str
    arguments: str
    id: str = field(default_factory=lambda: "call_" + secrets.token_hex(12))


@dataclass(frozen=True)
class ToolUse:
    """How one request uses tools.

    Args:
        way: "none", "forced" (by grammar), or the family's form.
        tools: for the template, in OpenAI's form; empty when it gets none.
        preface: told first, where the template has no place for tools.
        grammar: what a forced call must follow.
        several: whether more than one call is wanted.
    """

    way: str = "none"
    tools: tuple[Mapping[str, Any], ...] = ()
    preface: str | None = None
    grammar: GrammarSource | None = None
    several: bool = True

    @property
    def plain_specials(self) -> bool:
        """Whether special tokens must stay in the text: a call's marks may be some."""
        return self.way in _FORMS

    def turns(self, turns: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The conversation, with the preface where one is needed."""
        if self.preface is None:
            return list(turns)
        first = dict(turns[0])
        if first["role"] == "system":
            first["content"] = f"{first['content']}\n\n{self.preface}"
            return [first, *turns[1:]]
        return [{"role": "system", "content": self.preface}, *turns]


def plan_tools(
    template: str, tools: Sequence[Mapping[str, Any]], choice: str, *, several: bool = True
) -> ToolUse:
    """How a request's tools reach this model.

    Args:
        template: the model's chat template.
        tools: in OpenAI's form.
        choice: "none", "auto", "required", or a function's name.

    Raises:
        ApiError: an unknown function, or a model that has not learned to choose.
    """
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) != len(names):
        raise ApiError(400, "two tools have the same name", param="tools")
    if not tools:
        if choice not in ("none", "auto"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        return ToolUse()
    if choice == "none":
        return ToolUse()
    shown = "tools" in template
    if choice == "auto":
        way = _family(template) if shown else None
        if way is None:
            raise ApiError(
                400,
                "this model's chat template has no known form of tool calls, so it cannot choose; "
                "tool_choice='required', or a function, works by grammar",
                param="tool_choice",
            )
        return ToolUse(way, tuple(tools), several=several)
    if choice != "required" and choice not in names:
        raise ApiError(400, f"no tool is called {choice!r}", param="tool_choice")
    callable_now = [t for t in tools if choice in ("required", t["function"]["name"])]
    schema = {"anyOf": [_call_schema(tool["function"]) for tool in callable_now]}
    preface = None if shown else PREFACE + "\n".join(json.dumps(t["function"]) for t in tools)
    return ToolUse("forced", tuple(tools) if shown else (), preface, json_source(schema))


def _family(template: str) -> str | None:
    if "<tool_call>" in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "parameters" in template and "<|python_tag|>" in template:
        return "llama"
    return None


def _call_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": function.get("parameters") or {"type": "object"},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


class Reader:
    """Splits one sample's text into what is said and what is called, as it comes.

    Args:
        use: how the request uses tools.
    """

    def __init__(self, use: ToolUse) -> None:
        self.use = use
        self.n_calls = 0
        self._held = ""
        self._said = False
        self._inside = use.way == "forced"

    def push(self, text: str) -> list[str | Call]:
        """New text; what is certain of it."""
        if self.use.way == "none":
            return [text] if text else []
        self._held += text
        out: list[str | Call] = []
        if self.use.way == "forced":
            return out
        begin, end = _FORMS[self.use.way]
        while self._held:
            if self._inside:
                at = -1 if end is None else self._held.find(end)
                if at < 0:
                    break
                assert end is not None
                out += self._calls(begin, self._held[:at], end)
                self._held = (
                    self._held[at + len(end) :].lstrip()
                    if self.n_calls
                    else self._held[at + len(end) :]
                )
                self._inside = False
                continue
            at = self._begins(begin)
            if at < 0:
                sure = len(self._held) - _overlap(self._held, begin)
                if self.use.way == "llama" and not self._said and not self._held.strip():
                    break
                out += self._say(self._held[:sure])
                self._held = self._held[sure:]
                break
            if self.use.way != "llama":
                out += self._say(self._held[:at])
            self._held = self._held[at if self.use.way == "llama" else at + len(begin) :]
            self._inside = True
        return out

    def finish(self) -> list[str | Call]:
        """No more text."""
        held, self._held = self._held, ""
        if not held:
            return []
        if not self._inside:
            return self._say(held)
        begin = "" if self.use.way in ("forced", "llama") else _FORMS[self.use.way][0]
        return self._calls(begin, held, "")

    def _begins(self, begin: str) -> int:
        """Where a call begins. Llama's is the whole answer, so it begins at once or not at all."""
        if self.use.way != "llama":
            return self._held.find(begin)
        stripped = self._held.lstrip()
        return (
            len(self._held) - len(stripped) if not self._said and stripped.startswith("{") else -1
        )

    def _say(self, text: str) -> list[str | Call]:
        if not text or (self.n_calls and not text.strip()):
            return []
        self._said = True
        return [text]

    def _calls(self, begin: str, text: str, end: str) -> list[str | Call]:
        """The calls in a piece of text; the piece itself where it holds none."""
        try:
            found = json.loads(text)
            calls = [_call(c) for c in (found if isinstance(found, list) else [found])]
        except (ValueError, KeyError, TypeError, RecursionError):
            return self._say(begin + text + end)
        if not self.use.several:
            calls = calls[: 1 - self.n_calls] if self.n_calls < 1 else []
        self.n_calls += len(calls)
        return list(calls)


def _call(found: Any) -> Call:
    name = found["name"]
    arguments = found["arguments"] if "arguments" in found else found["parameters"]
    if not isinstance(name, str):
        raise TypeError
    if isinstance(arguments, str):
        json.loads(arguments)
        return Call(name, arguments)
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, mark: str) -> int:
    """How much of the end of `text` may be the beginning of `mark`."""
    for n in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:n]):
            return n
    return 0
