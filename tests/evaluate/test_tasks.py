"""Recall tasks: exact lengths, answers where they are said to be, the packaged model's own formats."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.errors import ConfigError, RequestError
from quire.evaluate.tasks import KINDS, Filler, Task, Words, generate, parse_task

DOTS = Filler([1 + ord(".") % 198])
SMALL = (
    *("passkey", "kv:count=4,asked=3", "token-kv:count=4,asked=3", "needle:count=2,asked=2"),
    *("tracking:count=2,asked=2", "copy:asked=3"),
)


def made(tokenizer: Any, text: str, length: int = 400, **options: Any) -> Any:
    return generate(parse_task(text), Words(tokenizer), DOTS, length, **options)


@pytest.mark.parametrize("text", SMALL)
def test_exact_length_seeded_and_answers_within(tokenizer: Any, text: str) -> None:
    first, again, other = (made(tokenizer, text, seed=s) for s in (3, 3, 4))
    assert first.tokens.shape == (400,)
    assert first.tokens.dtype == np.int64
    assert np.array_equal(first.tokens, again.tokens)
    assert first.answers == again.answers
    assert not np.array_equal(first.tokens, other.tokens)
    assert first.tokens[0] == tokenizer.bos_token_id
    assert len(first.answers) == parse_task(text).asked
    ends = [x for a in first.answers for x in (a.start, a.stop)]
    assert ends == sorted(ends)
    assert 1 < ends[0] < ends[-1] <= 400
    assert all(0 <= a.depth < 1 for a in first.answers)


@pytest.mark.parametrize("text", SMALL)
def test_an_answer_repeats_what_stands_at_its_depth(tokenizer: Any, text: str) -> None:
    for depth in (0.0, 0.5, 1.0):
        example = made(tokenizer, text, depth=depth)
        for a in example.answers:
            at = round(a.depth * 400)
            answer = example.tokens[a.start : a.stop].tolist()
            fact = example.tokens[at : at + 45].tolist()
            if not text.startswith("tracking"):  # there the fact names a variable, not the value
                assert any(
                    fact[i : i + len(answer)] == answer for i in range(len(fact) - len(answer) + 1)
                )
            assert a.start > at + len(answer)


def said(tokenizer: Any, example: Any) -> str:
    return re.sub(r"\.+", "_", tokenizer.decode(example.tokens))


def test_the_formats(tokenizer: Any) -> None:
    key = r"(\d{5})"
    text = said(tokenizer, made(tokenizer, "passkey"))
    found = re.fullmatch(
        rf"_ The pass key is {key}_ What is the pass key\? The pass key is {key}_", text
    )
    assert found
    assert found[1] == found[2]
    text = said(tokenizer, made(tokenizer, "kv:count=3,asked=2"))
    pairs = dict(re.findall(r" ([a-z]{3}) = (\d{3}) ;", text))
    asked = re.findall(r" ([a-z]{3}) \? (\d{3}) ;", text)
    assert len(pairs) == 3
    assert len({k for k, _ in asked}) == 2
    assert all(pairs[k] == v for k, v in asked)
    text = said(tokenizer, made(tokenizer, "needle:count=3,asked=3"))
    keys = dict(re.findall(rf" The pass key of (\w+) is {key}", text))
    asked = re.findall(rf" What is the pass key of (\w+)\? The pass key of (\w+) is {key}", text)
    assert len(asked) == 3
    assert all(a == b and keys[a] == v for a, b, v in asked)


def test_tracking_asks_for_the_value_at_the_head_of_the_chain(tokenizer: Any) -> None:
    text = said(tokenizer, made(tokenizer, "tracking:count=2,asked=2,hops=3"))
    values: dict[str, str] = {}
    for name, right in re.findall(r" (X\d\d) = (X\d\d|\d{5}) ;", text):
        values[name] = values.get(right, right)
    assert len(values) == 8
    asked = re.findall(r" (X\d\d) \? (\d{5}) ;", text)
    assert len(asked) == 2
    assert all(values[name] == value for name, value in asked)


def test_copy_repeats(tokenizer: Any) -> None:
    example = made(tokenizer, "copy", 200)
    body = example.tokens[1:]
    assert np.array_equal(body[:99], body[99:198])
    assert all(a.start >= 1 + 99 + 8 for a in example.answers), "the first piece cannot be known"


def test_depth_places_a_single_fact_exactly(tokenizer: Any) -> None:
    depths = [made(tokenizer, "passkey", 1000, depth=d).answers[0].depth for d in (0, 0.5, 1)]
    assert depths[0] == 1 / 1000, "right after what begins the text"
    assert depths[1] == pytest.approx(0.47, abs=0.02)
    assert depths[2] > 0.85
    many = [made(tokenizer, "kv", 2000, depth=d, seed=1).answers[0].depth for d in (0, 0.5, 1)]
    assert many[0] < many[1] < many[2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("niah", "unknown task 'niah'; known: ppl, passkey, kv"),
        ("kv:pairs=3", "'pairs=3' is not one of count, asked, hops"),
        ("kv:count=x", "with a number"),
        ("kv:count=4,asked=5", "asked is at most count, which is 4"),
        ("kv:count=0", "at least 1"),
        ("needle:count=99", "count is at most"),
        ("passkey:count=2", "count is at most 1"),
    ],
)
def test_tasks_that_cannot_be(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_task(text)


def test_names_say_what_differs() -> None:
    assert [parse_task(k).name for k in KINDS] == list(KINDS)
    assert parse_task("kv:count=16, asked=8").name == "kv:count=16"
    assert parse_task(Task("tracking", 3, 2, 1).name) == Task("tracking", 3, 2, 1)


def test_what_does_not_fit_is_refused(tokenizer: Any) -> None:
    for text in ("kv", "passkey"):
        with pytest.raises(RequestError, match=r"needs \d+ tokens and the length is 60"):
            made(tokenizer, text, 60)
    with pytest.raises(RequestError, match="task copy needs"):
        made(tokenizer, "copy", 20)
    with pytest.raises(RequestError, match="needs 400 tokens of the vocabulary"):
        made(tokenizer, "token-kv:count=200", 5000)
    with pytest.raises(RequestError, match="no token"):
        Filler([])


def test_pieces_are_those_of_the_text_in_one(shared: Path) -> None:
    """Byte-level and sentencepiece tokenizers: facts read as they would in a text, and marks of a beginning do not."""
    from transformers import AutoTokenizer

    for name in ("recall-5m", "stories260K"):
        tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
        example = generate(Task("kv", 4, 2), Words(tokenizer), Filler(Words(tokenizer)(" x")), 200)
        assert example.tokens[0] == tokenizer.bos_token_id
        text = tokenizer.decode(example.tokens[1:].tolist())
        pairs = dict(re.findall(r" ([a-z]{3}) = (\d{3}) ;", text))
        asked = re.findall(r" ([a-z]{3}) \? (\d{3}) ;", text)
        assert len(pairs) == 4
        assert len(asked) == 2
        assert all(pairs[k] == v for k, v in asked)
        whole = tokenizer.encode(text, add_special_tokens=False)
        assert len(whole) == pytest.approx(199, abs=1)
