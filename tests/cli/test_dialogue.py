"""Tokens of a conversation: what the model wrote stays as it wrote it, and the rest is encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from quire.cli.dialogue import Dialogue
from quire.errors import RequestError

END = 1


class Characters:
    """Every character a token, but `ab` and `\\nU` one each when encoded: a model may still write `a`, `b`."""

    chat_template: str | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        out, i = [0] if add_special_tokens else [], 0
        while i < len(text):
            if text.startswith("<end>", i):
                out, i = [*out, END], i + 5
            elif text.startswith("\nU", i):
                out, i = [*out, 3], i + 2
            elif text.startswith("ab", i):
                out, i = [*out, 2], i + 2
            else:
                out, i = [*out, ord(text[i])], i + 1
        return out

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        names = {0: "", END: "" if skip_special_tokens else "<end>", 2: "ab", 3: "\nU"}
        return "".join(names[i] if i in names else chr(i) for i in ids)


class Templated(Characters):
    chat_template = "yes"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        if messages[-1]["content"] == "forbidden":
            raise ValueError("roles must alternate")
        said = [f"{m['role'][0]}({m['content']}<end>" for m in messages]
        return "".join(said) + "a("


def ids(text: str) -> list[int]:
    """One token per character, as a model that writes `a` and `b` one by one."""
    return [ord(c) for c in text]


def test_a_template_and_the_model_s_own_tokens() -> None:
    talk = Dialogue(Templated())
    first = talk.ask("hi")
    assert first == Templated().encode("u(hi<end>a(", add_special_tokens=False)
    talk.answered("cab", [*ids("cab"), END], [END])
    second = talk.ask("ab?")
    # `c`, `a`, `b` as written, and the one end that the template writes
    assert second == first + ids("cab") + [END, *ids("u("), 2, ord("?"), END, *ids("a(")]


def test_plain_words_go_on_through_the_user_s_next_line() -> None:
    talk = Dialogue(Characters())
    assert talk.stops == ("\nUser:",)
    first = talk.ask("hi")
    assert Characters().decode(first) == "User: hi\nAssistant:"
    assert first[0] == 0, "a beginning of text, once"
    # the model wrote the next line itself, and too much of it; the text was cut before the line
    talk.answered(" cab", ids(" cab\nUser: x"), [END])
    second = talk.ask("yes")
    assert second == first + ids(" cab\nUser: yes\nAssistant:")
    assert talk.messages[1] == {"role": "assistant", "content": " cab"}


def test_a_reply_cut_inside_a_token_keeps_the_tokens_before_it() -> None:
    talk = Dialogue(Characters())
    first = talk.ask("hi")
    talk.answered(" ca", [*ids(" c"), 2], [END])  # the stop string began with b
    assert talk.ask("y") == first + ids(" c") + [ord("a"), 3, *ids("ser: y\nAssistant:")]


def test_a_rewritten_past_is_encoded_anew() -> None:
    talk = Dialogue(Templated())
    talk.ask("hi")
    talk.answered("cab", ids("cab"), [END])
    talk.messages[0]["content"] = "HI"
    want = "u(HI<end>a(cab<end>u(y<end>a("
    assert talk.ask("y") == Templated().encode(want, add_special_tokens=False)


def test_a_question_withdrawn_leaves_no_trace() -> None:
    talk = Dialogue(Templated(), system="be brief")
    talk.ask("one")
    talk.withdraw()
    assert talk.messages == [{"role": "system", "content": "be brief"}]
    talk.withdraw()
    assert len(talk.messages) == 1
    with pytest.raises(RequestError, match="template refuses this: roles must alternate"):
        talk.ask("forbidden")
    assert len(talk.messages) == 1


@pytest.mark.parametrize("kind", [Characters, Templated])
def test_a_dialogue_comes_back(kind: type[Characters]) -> None:
    talk = Dialogue(kind(), system="be brief")
    talk.ask("hi")
    talk.answered("cab", ids("cab"), [END])
    again = Dialogue(kind())
    again.load(talk.dump())
    assert again.turns == 1
    assert again.system == "be brief"
    assert again.ask("more") == talk.ask("more")
    again.reset()
    assert again.messages == [{"role": "system", "content": "be brief"}]
