"""RULER's families without order: what the prompts hold, and that words count wherever the answer has them."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from quire.errors import RequestError
from quire.evaluate.rows import written
from quire.evaluate.ruler import OFTEN, REPLY_TOKENS, SELDOM
from quire.evaluate.tasks import Example, Filler, Wanted, Words, generate, parse_task

FILLER = list(range(1, 90))


def make(tokenizer: Any, task: str, length: int, seed: int = 0) -> tuple[Example, str]:
    example = generate(parse_task(task), Words(tokenizer), Filler(FILLER), length, seed=seed)
    return example, tokenizer.decode(example.tokens)


@pytest.mark.parametrize("task", ["values", "variables:count=3", "common:count=3", "frequent"])
def test_prompt_and_answer_together_are_as_long_as_asked(tokenizer: Any, task: str) -> None:
    kind = task.partition(":")[0]
    example, text = make(tokenizer, task, 3000)
    assert len(example.tokens) + REPLY_TOKENS[kind] == 3000
    assert example.answers == ()
    assert example.reply_tokens == REPLY_TOKENS[kind]
    question = tokenizer.decode(example.tokens[example.asked :])
    assert question.count("?") == 1
    assert question.startswith(" Wh")
    body = text[: -len(question)]
    assert all(w.text in body and w.text not in question for w in example.wanted)
    again, _ = make(tokenizer, task, 3000)
    other, _ = make(tokenizer, task, 3000, seed=1)
    assert again.tokens.tolist() == example.tokens.tolist()
    assert other.wanted != example.wanted


def test_common_words_stand_thirty_times_and_all_others_three(tokenizer: Any) -> None:
    example, text = make(tokenizer, "common:count=4", 4000)
    items = re.findall(r" (\d+)\. (\w+)", text)
    assert [int(n) for n, _ in items] == list(range(1, len(items) + 1))
    counts = Counter(w for _, w in items)
    common = {w.text for w in example.wanted}
    assert len(common) == 4
    assert {counts.pop(w) for w in common} == {OFTEN}
    assert set(counts.values()) == {SELDOM}
    assert len(counts) > 20, "the list is as long as it fits"


def test_frequent_words_fall_as_their_rank_squared(tokenizer: Any) -> None:
    example, text = make(tokenizer, "frequent", 4000)
    counts = Counter(re.findall(r"\w+", text[: text.index(" What")]))
    times = [counts[w.text] for w in example.wanted]
    assert times == sorted(times, reverse=True)
    assert max(n for w, n in counts.items() if w not in {x.text for x in example.wanted}) < times[2]
    assert times[0] / times[1] == pytest.approx(4, rel=0.05)
    assert times[0] / times[2] == pytest.approx(9, rel=0.1)


def test_a_chain_of_variables_has_one_value_and_order(tokenizer: Any) -> None:
    example, text = make(tokenizer, "variables:count=2,hops=3", 2000)
    said = dict(re.findall(r" (X\d+) = (\w+) ;", text))
    value = re.search(r"have the value (\d+)\?", text)
    assert value is not None

    def resolved(name: str) -> str:
        return resolved(said[name]) if said[name].startswith("X") else said[name]

    having = {name for name in said if resolved(name) == value.group(1)}
    assert having == {w.text for w in example.wanted}
    assert len(having) == 4
    assert len(said) == 8
    depths = [w.depth for w in example.wanted]
    assert depths == sorted(depths)  # type: ignore[type-var]


def test_depths_are_where_values_stand(tokenizer: Any) -> None:
    example, text = make(tokenizer, "values:count=3", 1500)
    for w in example.wanted:
        assert w.depth is not None
        at = round(w.depth * 1500)
        assert w.text in text[at - 1 : at + 80]  # a byte is a token here, and bos none


def test_words_count_in_any_order_and_case() -> None:
    class Says:
        def answer(self, tokens: Any, n_tokens: int, **_: Any) -> list[int]:
            assert (list(tokens), n_tokens) == ([1, 2], 5)
            return [7, 0]

    class Spells:
        eos_token_id = 0

        def decode(self, ids: list[int]) -> str:
            assert ids == [7], "what ended the answer is no part of it"
            return "Third, then FIRST."

    wanted = (Wanted("first"), Wanted("second"), Wanted("third"))
    example = Example(np.array([1, 2]), (), wanted=wanted, reply_tokens=5)
    assert written(Says(), example, Spells()) == [True, False, True]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "length"),
    [("values", 200), ("variables", 120), ("common", 700), ("frequent:count=40", 900)],
)
def test_too_short_is_one_clear_line(tokenizer: Any, task: str, length: int) -> None:
    with pytest.raises(RequestError, match=f"task {task} needs .* tokens .* greater length"):
        make(tokenizer, task, length)
