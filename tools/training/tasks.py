"""Generated recall tasks: seeded, of an exact length, with the answers marked.

Every task has the same drawing. Facts are hidden in filler at random depths, questions follow:

    <s> filler FACT filler FACT filler ... QUESTION answer QUESTION answer
    [0, length_tokens)                     [answer.start, answer.stop)

A generator takes a numpy `Generator` and nothing else that is random, so a seed fixes the example
to the last token. `Example.weights[t]` is the weight of predicting `ids[t]` from `ids[:t]`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]
Filler = Callable[[np.random.Generator, int], Ids]
Piece = list[int]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# fmt: off
NAMES = [
    "Anna", "Berlin", "Boston", "Cairo", "Charles", "Clara", "Dublin", "Edward", "Emma", "Florence",
    "Frank", "George", "Hannah", "Harry", "Henry", "Jane", "John", "Julia", "Kate", "Lisbon",
    "London", "Lucy", "Madrid", "Maria", "Martin", "Mary", "Milan", "Moscow", "Nora", "Oliver",
    "Oslo", "Paris", "Peter", "Prague", "Robert", "Rome", "Rose", "Simon", "Sophie", "Susan",
    "Thomas", "Tokyo", "Vienna", "William",
]
# fmt: on


@dataclass(frozen=True)
class Example:
    """A sequence and what is asked of it.

    Args:
        ids: [T] int64
        weights: [T] float32, the weight of the loss at each predicted token
        answers: half-open spans of `ids`; an answer counts when all its tokens are predicted
    """

    ids: Ids
    weights: Weights
    answers: tuple[tuple[int, int], ...]


class Words:
    """The tokens of the fixed strings that tasks are written with, each encoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, Piece] = {}
        bos = tokenizer.token_to_id("<s>")
        if bos is None:
            raise ValueError("the tokenizer has no <s>, with which every example begins")
        self.bos: int = bos
        # Tokens beyond the 2 special ones and the 256 bytes: what token-level tasks draw from.
        self.plain = np.arange(258, tokenizer.get_vocab_size())

    def __call__(self, text: str) -> Piece:
        """The tokens of `text`. Pieces join as the whole does at spaces and around digits."""
        if text not in self._known:
            if len(self._known) > 100_000:
                self._known.clear()
            self._known[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._known[text]

    def number(self, digits: str) -> Piece:
        """The tokens of a space and digits."""
        return [*self(" "), *(self(d)[0] for d in digits)]


@dataclass(frozen=True)
class Question:
    """The tokens that ask, the answer, and what closes it."""

    ask: Piece
    answer: Piece
    close: Piece

    def __len__(self) -> int:
        return len(self.ask) + len(self.answer) + len(self.close)


def _digits(rng: np.random.Generator, count: int) -> str:
    return "".join(map(str, rng.integers(0, 10, count)))


def _fit(questions: Sequence[Question], room_tokens: int) -> list[Question]:
    """The first questions that fit, at least one."""
    taken: list[Question] = []
    for question in questions:
        if len(question) > room_tokens:
            break
        room_tokens -= len(question)
        taken.append(question)
    if not taken:
        raise ValueError("the facts and one question do not fit: ask for more tokens")
    return taken


def _gaps(rng: np.random.Generator, total_tokens: int, count: int) -> list[int]:
    """`count` gaps that sum to `total_tokens`, every division as likely as any other."""
    cuts = np.sort(rng.integers(0, total_tokens + 1, count - 1))
    edges = [0, *cuts.tolist(), total_tokens]
    return [after - before for before, after in pairwise(edges)]


def hide(
    rng: np.random.Generator,
    bos: int,
    length_tokens: int,
    facts: Sequence[Piece],
    questions: Sequence[Question],
    filler: Filler,
    *,
    gaps: Sequence[int] | None = None,
    filler_weight: float = 0.0,
    answer_weight: float = 1.0,
) -> Example:
    """Facts in their order within filler, then the questions that fit.

    Args:
        gaps: filler tokens before each fact and after the last (drawn at random where None)
        filler_weight: weight of the filler's own tokens in the loss
        answer_weight: weight of the answers' tokens and of what closes them
    Raises:
        ValueError: the facts and one question need more than `length_tokens`
    """
    room = length_tokens - 1 - sum(map(len, facts))
    taken = _fit(questions, room)
    spare = room - sum(map(len, taken))
    if gaps is None:
        gaps = _gaps(rng, spare, len(facts) + 1)
    ids: Piece = [bos]
    weights: list[float] = [0.0]
    answers: list[tuple[int, int]] = []

    def put(piece: Sequence[int], weight: float) -> None:
        ids.extend(piece)
        weights.extend([weight] * len(piece))

    for gap, fact in zip(gaps, [*facts, []], strict=True):
        put(filler(rng, gap).tolist() if gap else [], filler_weight)
        put(fact, 0.0)
    for question in taken:
        put(question.ask, 0.0)
        answers.append((len(ids), len(ids) + len(question.answer)))
        put(question.answer, answer_weight)
        put(question.close, answer_weight)
    return Example(np.array(ids), np.array(weights, dtype=np.float32), tuple(answers))


def token_pairs(
    rng: np.random.Generator,
    words: Words,
    length_tokens: int,
    filler: Filler,
    *,
    pairs: int,
    asked: int,
    filler_weight: float = 0.0,
    answer_weight: float = 1.0,
) -> Example:
    """`KEY = VALUE ;` with single random tokens, asked again in the same form."""
    drawn = rng.choice(words.plain, 2 * pairs, replace=False).tolist()
    keys, values = drawn[:pairs], drawn[pairs:]
    equals, close = words(" ="), words(" ;")
    facts = [[k, *equals, v, *close] for k, v in zip(keys, values, strict=True)]
    # What closes a token-level pair is always the same token: it is not asked.
    questions = [
        Question([*(close if n else []), keys[i], *equals], [values[i]], [])
        for n, i in enumerate(rng.integers(0, pairs, asked))
    ]
    return hide(
        rng,
        words.bos,
        length_tokens,
        facts,
        questions,
        filler,
        filler_weight=filler_weight,
        answer_weight=answer_weight,
    )


def text_pairs(
    rng: np.random.Generator,
    words: Words,
    length_tokens: int,
    filler: Filler,
    *,
    pairs: int,
    asked: int,
    filler_weight: float = 0.0,
    answer_weight: float = 1.0,
) -> Example:
    """` abc = 123 ;` with keys of three letters and values of three digits, asked ` abc ?`."""
    book: dict[str, str] = {}
    while len(book) < pairs:
        book["".join(LETTERS[i] for i in rng.integers(0, 26, 3))] = _digits(rng, 3)
    items = list(book.items())
    facts = [[*words(f" {k} ="), *words.number(v), *words(" ;")] for k, v in items]
    questions = [
        Question(words(f" {items[i][0]} ?"), words.number(items[i][1]), words(" ;"))
        for i in rng.integers(0, pairs, asked)
    ]
    return hide(
        rng,
        words.bos,
        length_tokens,
        facts,
        questions,
        filler,
        filler_weight=filler_weight,
        answer_weight=answer_weight,
    )


def passkey(
    rng: np.random.Generator,
    words: Words,
    length_tokens: int,
    filler: Filler,
    *,
    depth: float | None = None,
    filler_weight: float = 0.0,
    answer_weight: float = 1.0,
) -> Example:
    """` The pass key is 12345.` at one depth of the filler, asked at the end.

    Args:
        depth: 0.0 (directly after `<s>`) to 1.0 (directly before the question); None draws it
    """
    key = words.number(_digits(rng, 5))
    fact = [*words(" The pass key is"), *key, *words(".")]
    ask = [*words(" What is the pass key? The pass key is")]
    question = Question(ask, key, words("."))
    spare = length_tokens - 1 - len(fact) - len(question)
    if spare < 0:
        raise ValueError(f"a pass key needs {length_tokens - spare} tokens: ask for more")
    before = int(rng.integers(0, spare + 1)) if depth is None else round(depth * spare)
    return hide(
        rng,
        words.bos,
        length_tokens,
        [fact],
        [question],
        filler,
        gaps=[before, spare - before],
        filler_weight=filler_weight,
        answer_weight=answer_weight,
    )


def needles(
    rng: np.random.Generator,
    words: Words,
    length_tokens: int,
    filler: Filler,
    *,
    count: int,
    asked: int,
    filler_weight: float = 0.0,
    answer_weight: float = 1.0,
) -> Example:
    """Several named pass keys; each question names one."""
    names = [f" the pass key of {NAMES[i]}" for i in rng.permutation(len(NAMES))[:count]]
    keys = [words.number(_digits(rng, 5)) for _ in names]
    facts = [
        [*words(n.replace(" the", " The", 1) + " is"), *key, *words(".")]
        for n, key in zip(names, keys, strict=True)
    ]
    order = np.resize(rng.permutation(count), asked)
    questions = [
        Question(
            words(f" What is{names[i]}?{names[i].replace(' the', ' The', 1)} is"),
            keys[i],
            words("."),
        )
        for i in order
    ]
    return hide(
        rng,
        words.bos,
        length_tokens,
        facts,
        questions,
        filler,
        filler_weight=filler_weight,
        answer_weight=answer_weight,
    )


def tracking(
    rng: np.random.Generator,
    words: Words,
    length_tokens: int,
    filler: Filler,
    *,
    chains: int,
    hops: int,
    asked: int,
    filler_weight: float = 0.0,
    answer_weight: float = 1.0,
) -> Example:
    """Variables assigned from one another: ` X17 = 40512 ; X63 = X17 ;`, asked ` X63 ?`.

    A chain's statements keep their order; chains are shuffled into one another.
    """
    variables = [f" X{10 + i}" for i in rng.permutation(90)[: chains * (hops + 1)]]
    values = [words.number(_digits(rng, 5)) for _ in range(chains)]
    turns = rng.permutation(np.repeat(np.arange(chains), hops + 1))
    done = [0] * chains
    facts: list[Piece] = []
    for chain in turns.tolist():
        at = chain * (hops + 1) + done[chain]
        right = values[chain] if done[chain] == 0 else words(variables[at - 1])
        facts.append([*words(f"{variables[at]} ="), *right, *words(" ;")])
        done[chain] += 1
    questions = [
        Question(words(f"{variables[i]} ?"), values[i // (hops + 1)], words(" ;"))
        for i in rng.integers(0, len(variables), asked)
    ]
    return hide(
        rng,
        words.bos,
        length_tokens,
        facts,
        questions,
        filler,
        filler_weight=filler_weight,
        answer_weight=answer_weight,
    )


def copy(
    rng: np.random.Generator,
    words: Words,
    length_tokens: int,
    filler: Filler | None,
    *,
    span_tokens: int,
) -> Example:
    """A span of random tokens (of the filler's, where given) over and over; the first is free.

    The answers are the whole repetitions, one span each.
    """
    if span_tokens * 2 + 1 > length_tokens:
        raise ValueError(f"two spans of {span_tokens} do not fit in {length_tokens} tokens")
    span = filler(rng, span_tokens) if filler else rng.choice(words.plain, span_tokens)
    ids = np.concatenate([[words.bos], np.resize(span, length_tokens - 1)]).astype(np.int64)
    weights = np.ones(length_tokens, dtype=np.float32)
    weights[: 1 + span_tokens] = 0.0
    starts = range(1 + span_tokens, length_tokens - span_tokens + 1, span_tokens)
    return Example(ids, weights, tuple((s, s + span_tokens) for s in starts))


def text(rng: np.random.Generator, words: Words, length_tokens: int, filler: Filler) -> Example:
    """A window of real text after `<s>`; every token counts, nothing is asked."""
    ids = np.concatenate([[words.bos], filler(rng, length_tokens - 1)])
    weights = np.ones(length_tokens, dtype=np.float32)
    weights[0] = 0.0
    return Example(ids, weights, ())
