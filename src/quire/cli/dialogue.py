"""A conversation as tokens: by the tokenizer's chat template, or in plain words where it has none.

Tokens that the model wrote itself stay as they are: encoding their text again could cut it differently, and the cache
would no longer fit. Only what is new in a turn is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from quire.engine.intake import check_text
from quire.errors import RequestError

__all__ = ["Dialogue"]

USER, ASSISTANT = "\nUser:", "\nAssistant:"


class Dialogue:
    """What was said, and the tokens of it.

    Args:
        tokenizer: with or without a chat template.
        system: said first, where given.
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self.reset()

    def reset(self) -> None:
        """Back to the beginning."""
        self.messages: list[dict[str, str]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self._text = ""
        self._tokens: list[int] = []

    @property
    def turns(self) -> int:
        """Answers so far."""
        return sum(m["role"] == "assistant" for m in self.messages)

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends a reply besides the model's own end: in plain words, the user's next line."""
        return () if self.templated else (USER,)

    def ask(self, text: str) -> list[int]:
        """The prompt of a new turn, all of it.

        Raises:
            RequestError: it is no text, or the template refuses it.
        """
        whole = self._render([*self.messages, {"role": "user", "content": text}])
        check_text(whole)
        if self._tokens and whole.startswith(self._text):
            rest = whole[len(self._text) :]
            tokens = self._tokens + list(self.tokenizer.encode(rest, add_special_tokens=False))
        else:
            tokens = list(self.tokenizer.encode(whole, add_special_tokens=not self.templated))
        self.messages.append({"role": "user", "content": text})
        self._asked = (whole, tokens)
        return list(tokens)

    def withdraw(self) -> None:
        """The last question came to nothing, if it was taken at all."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def answered(self, text: str, token_ids: Sequence[int], ends: Sequence[int]) -> None:
        """The reply to the last question.

        Args:
            text: as shown, cut before a stop string.
            token_ids: as written, what was cut off included.
            ends: ids that end a text; the template writes its own end.
        """
        whole, tokens = self._asked
        ids = list(token_ids)
        while ids and ids[-1] in ends:
            ids.pop()
        goes_on = text if self.templated else text + USER  # how the next prompt will read
        said = self._decode(ids)
        while ids and not goes_on.startswith(said):
            ids.pop()
            said = self._decode(ids)
        self.messages.append({"role": "assistant", "content": text})
        self._text, self._tokens = whole + said, tokens + ids

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _render(self, messages: Sequence[dict[str, str]]) -> str:
        if self.templated:
            try:
                return str(
                    self.tokenizer.apply_chat_template(
                        list(messages), add_generation_prompt=True, tokenize=False
                    )
                )
            except Exception as e:  # a template is a program; its errors are of any kind
                raise RequestError(f"the model's chat template refuses this: {e}") from e
        parts = []
        for m in messages:
            if m["role"] == "system":
                parts.append(f"{m['content']}\n")
            elif m["role"] == "user":
                parts.append(f"{USER} {m['content']}{ASSISTANT}")
            else:
                parts.append(m["content"])
        return "".join(parts).removeprefix("\n")

    # -- files ---------------------------------------------------------------------------------------------------

    def dump(self) -> str:
        """All of it as JSON."""
        return json.dumps(
            {"messages": self.messages, "text": self._text, "tokens": self._tokens},
            ensure_ascii=False,
        )

    def load(self, document: str) -> None:
        """What `dump` wrote. Raises KeyError, ValueError or TypeError when it is something else."""
        found = json.loads(document)
        self._text, self._tokens = str(found["text"]), [int(t) for t in found["tokens"]]
        self.messages = [
            {"role": str(m["role"]), "content": str(m["content"])} for m in found["messages"]
        ]
        first = self.messages[:1]
        self.system = first[0]["content"] if first and first[0]["role"] == "system" else None
