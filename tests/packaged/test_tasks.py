"""The generated tasks, by cases worked out by hand on a tokenizer of single bytes."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from training import tasks
from training.batches import EARLY, LATE, Sampler
from training.corpus import Text
from training.tasks import Question, Words

DOT = 9_999


def byte_tokenizer() -> Tokenizer:
    """`<s>`, `</s>`, the 256 bytes, and 300 tokens for token-level tasks to draw from."""
    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    symbols += [f"<{n}>" for n in range(300)]
    tokenizer = Tokenizer(models.BPE({s: n for n, s in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def words(tokenizer: Tokenizer) -> Words:
    return Words(tokenizer)


def dots(rng: np.random.Generator, length_tokens: int) -> np.ndarray:
    return np.full(length_tokens, DOT)


def spoken(tokenizer: Tokenizer, example: tasks.Example) -> str:
    """The example with `_` for filler and the answers in brackets."""
    ids, said = example.ids.tolist(), []
    for at in range(1, len(ids)):
        said += ["["] * sum(at == a for a, _ in example.answers)
        said.append("_" if ids[at] == DOT else tokenizer.decode([ids[at]]))
        said += ["]"] * sum(at + 1 == b for _, b in example.answers)
    return "".join(said)


def generators() -> dict[str, object]:
    return {
        "token_pairs": lambda r, w, n: tasks.token_pairs(r, w, n, dots, pairs=3, asked=5),
        "text_pairs": lambda r, w, n: tasks.text_pairs(r, w, n, dots, pairs=3, asked=5),
        "passkey": lambda r, w, n: tasks.passkey(r, w, n, dots),
        "needles": lambda r, w, n: tasks.needles(r, w, n, dots, count=2, asked=2),
        "tracking": lambda r, w, n: tasks.tracking(r, w, n, dots, chains=2, hops=2, asked=3),
        "copy": lambda r, w, n: tasks.copy(r, w, n, None, span_tokens=40),
        "text": lambda r, w, n: tasks.text(r, w, n, dots),
    }


@pytest.mark.parametrize("name", generators())
def test_seed_fixes_every_token_and_length_is_exact(words: Words, name: str) -> None:
    make = generators()[name]
    first, again, other = (make(np.random.default_rng(s), words, 301) for s in (5, 5, 6))  # type: ignore[operator]
    assert len(first.ids) == len(first.weights) == 301
    assert first.ids[0] == words.bos
    assert first.weights[0] == 0.0
    assert np.array_equal(first.ids, again.ids)
    assert np.array_equal(first.weights, again.weights)
    assert first.answers == again.answers
    assert name == "text" or not np.array_equal(first.ids, other.ids)
    assert all(0 < a < b <= 301 for a, b in first.answers)


def test_hide_places_facts_questions_and_weights() -> None:
    # <s> . . [7 7] . [8] then two questions; the third does not fit.
    example = tasks.hide(
        np.random.default_rng(0),
        0,
        15,
        facts=[[7, 7], [8]],
        questions=[Question([1], [2, 2], [3]), Question([4], [5], []), Question([6] * 9, [6], [])],
        filler=dots,
        gaps=[2, 1, 2],
        filler_weight=0.5,
        answer_weight=4.0,
    )
    assert example.ids.tolist() == [0, DOT, DOT, 7, 7, DOT, 8, DOT, DOT, 1, 2, 2, 3, 4, 5]
    weights = [0, 0.5, 0.5, 0, 0, 0.5, 0, 0.5, 0.5, 0, 4, 4, 4, 0, 4]
    assert example.weights.tolist() == weights
    assert example.answers == ((10, 12), (14, 15))


def test_facts_without_room_for_a_question_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        tasks.hide(np.random.default_rng(0), 0, 5, [[7, 7, 7]], [Question([1], [2], [])], dots)


@pytest.mark.parametrize(("depth", "before", "after"), [(0.0, 0, 20), (0.25, 5, 15), (1.0, 20, 0)])
def test_passkey_stands_at_its_depth(
    tokenizer: Tokenizer, words: Words, depth: float, before: int, after: int
) -> None:
    # 1 for <s>, 23 for " The pass key is 12345.", 46 for the question with its answer, 20 spare.
    ask = " What is the pass key? The pass key is"
    length = 1 + 23 + len(ask) + 7 + 20
    example = tasks.passkey(np.random.default_rng(3), words, length, dots, depth=depth)
    ((start, stop),) = example.answers
    key = tokenizer.decode(example.ids[start:stop].tolist())
    assert len(key) == 6
    assert key.strip().isdigit()
    fact = f" The pass key is{key}."
    assert spoken(tokenizer, example) == "_" * before + fact + "_" * after + f"{ask}[{key}]."
    weighted = np.flatnonzero(example.weights).tolist()
    assert weighted == list(range(start, stop + 1))


def test_every_text_pair_is_answered_by_its_own_value(tokenizer: Tokenizer, words: Words) -> None:
    example = tasks.text_pairs(np.random.default_rng(1), words, 400, dots, pairs=9, asked=8)
    said = spoken(tokenizer, example).replace("_", "")
    stated, asked = said[: 9 * 12], said[9 * 12 :]
    book = dict(part.strip().split(" = ") for part in stated.split(" ;") if part.strip())
    assert len(book) == 9
    questions = [part.strip().split(" ?") for part in asked.split(" ;") if part.strip()]
    assert len(questions) == 8
    assert all(answer == f"[ {book[key]}]" for key, answer in questions)


def test_token_pairs_are_asked_in_the_form_they_are_stated(
    tokenizer: Tokenizer, words: Words
) -> None:
    example = tasks.token_pairs(np.random.default_rng(2), words, 90, dots, pairs=4, asked=3)
    ids = [i for i in example.ids.tolist() if i != DOT]
    equals, close = words(" ="), words(" ;")
    size = 2 + len(equals) + len(close)
    facts = [ids[1 + size * n :][:size] for n in range(4)]
    book = {f[0]: f[1 + len(equals)] for f in facts}
    assert len(book) == 4
    assert len(example.answers) == 3
    for start, stop in example.answers:
        assert stop == start + 1
        key = example.ids[start - 1 - len(equals)]
        assert example.ids[start - len(equals) : start].tolist() == equals
        assert book[key] == example.ids[start]


def test_a_needle_is_asked_by_its_name(tokenizer: Tokenizer, words: Words) -> None:
    example = tasks.needles(np.random.default_rng(4), words, 400, dots, count=3, asked=3)
    said = spoken(tokenizer, example).replace("_", "")
    assert len(example.answers) == 3
    for start, stop in example.answers:
        key = tokenizer.decode(example.ids[start:stop].tolist())
        name = said.split(f"[{key}]")[0].split(" of ")[-1].removesuffix(" is")
        assert f" The pass key of {name} is{key}." in said
        assert f" What is the pass key of {name}? The pass key of {name} is[{key}]." in said


def test_a_variable_has_the_value_its_chain_began_with(tokenizer: Tokenizer, words: Words) -> None:
    example = tasks.tracking(np.random.default_rng(7), words, 400, dots, chains=3, hops=2, asked=6)
    said = spoken(tokenizer, example).replace("_", "")
    values: dict[str, str] = {}
    asked = 0
    for part in (p.strip() for p in said.split(" ;") if p.strip()):
        if " = " in part:
            left, right = part.split(" = ")
            assert left not in values
            # A chain's order is kept: what is assigned from is known already.
            values[left] = right if right.isdigit() else values[right]
        else:
            name, answer = part.split(" ?")
            assert answer == f"[ {values[name]}]"
            asked += 1
    assert len(values) == 9
    assert asked == 6


def test_copy_repeats_its_span(words: Words) -> None:
    example = tasks.copy(np.random.default_rng(0), words, 12, None, span_tokens=4)
    ids = example.ids.tolist()
    assert ids == [0, *ids[1:5], *ids[1:5], *ids[1:4]]
    assert example.weights.tolist() == [0] * 5 + [1] * 7
    assert example.answers == ((5, 9),)


def test_the_mixes_are_distributions_over_the_same_tasks() -> None:
    assert EARLY.keys() == LATE.keys()
    assert sum(EARLY.values()) == pytest.approx(1.0)
    assert sum(LATE.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("length", [256, 512])
def test_a_batch_is_a_function_of_seed_and_step(words: Words, length: int) -> None:
    text = Text({"books": np.arange(2, 258).repeat(8)}, {"books": 1.0})
    batches = [Sampler(seed, words, text).batch(step, 8, length) for seed, step in [(1, 2)] * 2]
    (ids, weights), (again, again_weights) = batches
    assert ids.shape == weights.shape == (8, length)
    assert ids.equal(again)
    assert weights.equal(again_weights)
    assert (weights.sum(1) > 0).all()
    assert not ids.equal(Sampler(1, words, text).batch(3, 8, length)[0])
    assert not ids.equal(Sampler(2, words, text).batch(2, 8, length)[0])
