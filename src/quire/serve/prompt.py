"""Between what clients write and what the engine reads: chat templates, tokens, and tokens back as text and bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from quire.engine.intake import check_text
from quire.serve.errors import ApiError
from quire.serve.forms import Message, TextPart

__all__ = ["Prompts", "as_turns", "plain_text"]

AT_ONCE = 1 << 15
"""Characters that are tokenized within the event loop; longer texts go to a thread."""


class Prompts:
    """A model's tokenizer as the endpoints use it.

    Args:
        tokenizer: of transformers.
        context_tokens: of the model.
    """

    def __init__(self, tokenizer: Any, context_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self.template = str(getattr(tokenizer, "chat_template", None) or "")
        self._bytes = _byte_alphabet(tokenizer)

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text. Raises ApiError: it is no Unicode."""
        check_text(text)
        if len(text) <= AT_ONCE:
            return self._encode(text, special=special)
        return await asyncio.to_thread(self._encode, text, special=special)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    def render(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        answer: bool = True,
    ) -> str:
        """Turns as the model's own chat template writes them.

        Args:
            turns: role, content and tool calls, see `as_turns`.
            tools: for a template that has a place for them.
            answer: end where the model is to answer. When the last turn is the assistant's, it is to be continued.

        Raises:
            ApiError: there is no template, or it refuses the turns.
        """
        if not self.template:
            raise ApiError(
                400, "this model has no chat template; use /v1/completions", code="no_chat_template"
            )
        if not turns:
            raise ApiError(400, "the messages hold no text; give some", param="messages")
        goes_on = answer and turns[-1]["role"] == "assistant"
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(turns),
                    tools=list(tools) if tools else None,
                    tokenize=False,
                    add_generation_prompt=answer and not goes_on,
                    continue_final_message=goes_on,
                )
            )
        except Exception as e:  # a template is a program; its errors are of any kind
            why = " ".join(str(e).split())[:300]
            raise ApiError(
                400, f"the model's chat template refuses this: {why}", param="messages"
            ) from e

    async def chat(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        answer: bool = True,
    ) -> list[int]:
        """The tokens of `render`."""
        return await self.encode(self.render(turns, tools, answer=answer), special=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    def token_text(self, token: int) -> tuple[str, list[int]]:
        """One token's text and its bytes; the text of part of a character is the replacement character."""
        text = self.decode([token])
        if "�" not in text:
            return text, list(text.encode())
        word = str(self.tokenizer.convert_ids_to_tokens(token))
        if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            return text, [int(word[3:5], 16)]
        raw = [self._bytes.get(c, -1) for c in word]
        return text, raw if min(raw, default=-1) >= 0 else list(text.encode())


def _byte_alphabet(tokenizer: Any) -> dict[str, int]:
    """The characters by which a byte-level tokenizer writes bytes; empty for another one."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or "ByteLevel" not in repr(core.decoder):
        return {}
    # GPT-2's rule: printable bytes stand for themselves, the others for characters from 256 on, in order
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def plain_text(content: str | Sequence[TextPart] | None) -> str:
    """A message's content as one text."""
    if content is None:
        return ""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def as_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: arguments of calls as objects, `developer` as `system`.

    Raises:
        ApiError: a message lacks what its role needs.
    """
    turns: list[dict[str, Any]] = []
    for at, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        turn: dict[str, Any] = {"role": role, "content": plain_text(message.content)}
        if message.content is None and not (role == "assistant" and message.tool_calls):
            raise ApiError(400, f"a {role} message needs content", param=f"messages.{at}.content")
        if message.name is not None:
            turn["name"] = message.name
        if message.tool_calls is not None and role != "assistant":
            raise ApiError(
                400, f"a {role} message makes no tool calls", param=f"messages.{at}.tool_calls"
            )
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(call.function.arguments, at),
                    },
                }
                for call in message.tool_calls
            ]
        if (role == "tool") != (message.tool_call_id is not None):
            raise ApiError(
                400,
                "a tool message, and no other, names the call that it answers",
                param=f"messages.{at}.tool_call_id",
            )
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        turns.append(turn)
    return turns


def _arguments(text: str, at: int) -> Any:
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError) as e:
        raise ApiError(
            400, "a tool call's arguments must be JSON", param=f"messages.{at}.tool_calls"
        ) from e
