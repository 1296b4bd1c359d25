"""Recall tasks by length and depth: seeded, of an exact length, for any tokenizer, with the answers marked.

    <s> filler FACT filler FACT filler ... QUESTION answer QUESTION answer
    [0, length_tokens)                     [answer.start, answer.stop)      depth = where its fact begins, 0 to 1

An answer counts when every token of it is the most likely one after the text before it. That is exact match of greedy
decoding: a wrong token ends the count, and before it the forced text is the one that the model would have written.
What may be answered in any order (`quire.evaluate.ruler`) is written by the model, and the words in it count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.errors import ConfigError, RequestError

Ids = npt.NDArray[np.int64]
Piece = list[int]
Rng = np.random.Generator

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PEOPLE = (
    *("Anna", "Boston", "Clara", "Dublin", "Edward", "Florence", "George", "Hannah", "Jane"),
    *("London", "Maria", "Martin", "Oslo", "Paris", "Peter", "Rome", "Simon", "Vienna", "William"),
)
PLAIN_TEXT = (
    "The road goes along the river and over a bridge of stone. In the morning there is mist on the water. "
    "A cart stands before the mill, and the miller counts his sacks. Nobody is in a hurry. By noon the sun is high, "
    "the dogs lie in the shade, and the bells of the church ring twice. "
)
"""Filler where no text is given."""


@dataclass(frozen=True)
class Answer:
    """Tokens [start, stop) answer; `depth` is where the fact that they repeat begins, as a share of the length."""

    start: int
    stop: int
    depth: float


@dataclass(frozen=True)
class Wanted:
    """A word that an answer must hold, anywhere; `depth` is where the text says it, None where that is everywhere."""

    text: str
    depth: float | None = None


@dataclass(frozen=True)
class Example:
    """`tokens: [T]` int64 and its answers, ascending; the first question begins at `asked`, 0 where none is asked.

    Of what may be answered in any order the tokens end with the question; the model writes at most `reply_tokens`, in
    which each of `wanted` counts by itself.
    """

    tokens: Ids
    answers: tuple[Answer, ...]
    asked: int = 0
    wanted: tuple[Wanted, ...] = ()
    reply_tokens: int = 0


@dataclass(frozen=True)
class Task:
    """What is asked: a kind and its numbers. `count` facts, `asked` of them."""

    kind: str
    count: int = 1
    asked: int = 1
    hops: int = 2

    @property
    def name(self) -> str:
        """The kind with the numbers that are not its default: `kv:count=16`."""
        usual = _TASKS[self.kind]
        said = [
            f"{n}={getattr(self, n)}" for n in _NUMBERS if getattr(self, n) != getattr(usual, n)
        ]
        return f"{self.kind}:{','.join(said)}" if said else self.kind

    def check(self) -> None:
        """Raises ConfigError for numbers that cannot be."""
        if self.count < 1 or self.hops < 1 or self.asked < 1:
            raise ConfigError(f"task {self.name}: numbers are at least 1")
        most = {
            "passkey": 1,
            "copy": 1,
            "needle": len(PEOPLE),
            "tracking": 90 // (self.hops + 1),
            "variables": 90 // (self.hops + 1),
        }
        if self.count > most.get(self.kind, 1 << 16):
            raise ConfigError(f"task {self.name}: count is at most {most[self.kind]}")
        if self.kind in ("kv", "token-kv", "needle") and self.asked > self.count:
            raise ConfigError(f"task {self.name}: asked is at most count, which is {self.count}")


_NUMBERS = ("count", "asked", "hops")
_TASKS = {
    "passkey": Task("passkey"),
    "kv": Task("kv", 32, 8),
    "token-kv": Task("token-kv", 32, 8),
    "needle": Task("needle", 4, 4),
    "tracking": Task("tracking", 4, 4, 2),
    "copy": Task("copy", 1, 8),
    "values": Task("values", 4),
    "variables": Task("variables", 1, 1, 4),
    "common": Task("common", 10),
    "frequent": Task("frequent", 3),
}
_OPEN = ("values", "variables", "common", "frequent")
"""Kinds of `quire.evaluate.ruler`."""
KINDS = tuple(_TASKS)


def parse_task(text: str) -> Task:
    """The task for `"kv"` or `"kv:count=16,asked=4"`.

    Raises:
        ConfigError: unknown, or numbers that cannot be.
    """
    kind, _, rest = text.strip().partition(":")
    if kind not in _TASKS:
        raise ConfigError(f"unknown task {kind!r}; known: ppl, {', '.join(KINDS)}")
    numbers: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        name, _, value = (x.strip() for x in item.partition("="))
        if name not in _NUMBERS or not value.isdecimal():
            raise ConfigError(
                f"task {kind}: {item.strip()!r} is not one of {', '.join(_NUMBERS)} with a number"
            )
        numbers[name] = int(value)
    task = replace(_TASKS[kind], **numbers)
    task.check()
    return task


# -- words and filler --------------------------------------------------------------------------------------------


@dataclass
class Words:
    """A tokenizer's pieces, each as it stands in the middle of a text.

    Args:
        tokenizer: a transformers tokenizer, with or without a token that begins a text.
    """

    tokenizer: Any
    _known: dict[str, Piece] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bos = getattr(self.tokenizer, "bos_token_id", None)
        self.begin: Piece = [] if bos is None else [int(bos)]
        self._anchor = self._encode(";")

    def __call__(self, text: str) -> Piece:
        """The tokens of a text that begins with a space, without the mark that some tokenizers begin a text with."""
        if text not in self._known:
            joined, n = self._encode(";" + text), len(self._anchor)
            fits = joined[:n] == self._anchor
            self._known[text] = joined[n:] if fits else self._encode(text)
        return self._known[text]

    def _encode(self, text: str) -> Piece:
        return [int(t) for t in self.tokenizer.encode(text, add_special_tokens=False)]

    def singles(self) -> Ids:
        """What token-level tasks draw from: ordinary tokens, those longer than a byte where there are enough."""
        special = set(getattr(self.tokenizer, "all_special_ids", ()))
        ids = [i for i in range(len(self.tokenizer)) if i not in special]
        texts = self.tokenizer.convert_ids_to_tokens(ids)
        long = [
            i
            for i, t in zip(ids, texts, strict=True)
            if t and len(t) > 1 and not t.startswith("<0x")
        ]
        return np.array(long if len(long) >= 256 else ids)


class Filler:
    """Runs of a text's tokens, from anywhere in it."""

    def __init__(self, tokens: Sequence[int]) -> None:
        if not len(tokens):
            raise RequestError("the text for filler holds no token")
        self.tokens = np.asarray(tokens, np.int64)

    def __call__(self, rng: Rng, n_tokens: int) -> Piece:
        """`n_tokens` in a row, around the end where the text is short."""
        at = int(rng.integers(0, len(self.tokens)))
        found: Piece = np.take(self.tokens, range(at, at + n_tokens), mode="wrap").tolist()
        return found


# -- generating --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fact:
    """What is hidden, and the question, answer and close that ask it; no question for what is hidden only."""

    hidden: Piece
    ask: Piece = field(default_factory=list)
    answer: Piece = field(default_factory=list)
    close: Piece = field(default_factory=list)


def generate(
    task: Task,
    words: Words,
    filler: Filler,
    length_tokens: int,
    *,
    depth: float = 0.5,
    seed: int = 0,
) -> Example:
    """One example of exactly `length_tokens`.

    Args:
        depth: 0 to 1, where the fact lies that is asked: exactly for a single one, else as near as the shuffled
            others let it. Every answer records its own.

    Raises:
        RequestError: the facts and questions need more tokens.
    """
    rng = np.random.default_rng([seed, *task.name.encode(), length_tokens, round(depth * 1000)])
    if task.kind == "copy":
        return _copy(rng, words, length_tokens, task, depth)
    if task.kind in _OPEN:
        from quire.evaluate.ruler import generate_open

        return generate_open(rng, task, words, filler, length_tokens)
    facts, order = _MAKERS[task.kind](rng, words, task, depth)
    asked = [facts[i] for i in order]
    questions = [[*f.ask, *f.answer, *f.close] for f in asked]
    need = len(words.begin) + sum(len(f.hidden) for f in facts) + sum(map(len, questions))
    spare = length_tokens - need
    if spare < 0:
        raise RequestError(
            f"task {task.name} needs {need} tokens and the length is {length_tokens}; "
            "take a greater length or a smaller count"
        )
    if len(facts) == 1:
        gaps = [round(depth * spare), spare - round(depth * spare)]
    else:
        cuts = np.sort(rng.integers(0, spare + 1, len(facts)))
        gaps = np.diff(np.concatenate([[0], cuts, [spare]])).tolist()
    ids, places = list(words.begin), []
    for gap, fact in zip(gaps, facts, strict=False):
        ids += filler(rng, gap)
        places.append(len(ids) / length_tokens)
        ids += fact.hidden
    ids += filler(rng, gaps[-1])
    answers, first = [], len(ids)
    for i, fact in zip(order, asked, strict=True):
        ids += fact.ask
        answers.append(Answer(len(ids), len(ids) + len(fact.answer), places[i]))
        ids += [*fact.answer, *fact.close]
    return Example(np.array(ids), tuple(answers), first)


def _order(rng: Rng, count: int, asked: int, depth: float) -> list[int]:
    """Which facts are asked: the one at `depth` first, then others at random, none twice."""
    one = round(depth * (count - 1))
    others = [i for i in rng.permutation(count).tolist() if i != one]
    return [one, *others[: asked - 1]]


def _digits(rng: Rng, count: int) -> str:
    return "".join(map(str, rng.integers(0, 10, count)))


def _text_pairs(rng: Rng, words: Words, task: Task, depth: float) -> tuple[list[_Fact], list[int]]:
    """` abc = 123 ;`, asked ` abc ?`."""
    book: dict[str, str] = {}
    while len(book) < task.count:
        book["".join(LETTERS[i] for i in rng.integers(0, 26, 3))] = _digits(rng, 3)
    facts = [
        _Fact(
            [*words(f" {k} ="), *words(f" {v}"), *words(" ;")],
            words(f" {k} ?"),
            words(f" {v}"),
            words(" ;"),
        )
        for k, v in book.items()
    ]
    return facts, _order(rng, task.count, task.asked, depth)


def _token_pairs(rng: Rng, words: Words, task: Task, depth: float) -> tuple[list[_Fact], list[int]]:
    """`KEY = VALUE ;` with single random tokens, asked in the same form."""
    plain = words.singles()
    if len(plain) < 2 * task.count:
        raise RequestError(f"task {task.name} needs {2 * task.count} tokens of the vocabulary")
    drawn = rng.choice(plain, 2 * task.count, replace=False).tolist()
    equals, close = words(" ="), words(" ;")
    facts = [
        _Fact([k, *equals, v, *close], [k, *equals], [v], close)
        for k, v in zip(drawn[: task.count], drawn[task.count :], strict=True)
    ]
    return facts, _order(rng, task.count, task.asked, depth)


def _passkey(rng: Rng, words: Words, _task: Task, _depth: float) -> tuple[list[_Fact], list[int]]:
    """` The pass key is 12345.`, asked at the end."""
    key = words(" " + _digits(rng, 5))
    fact = _Fact(
        [*words(" The pass key is"), *key, *words(".")],
        words(" What is the pass key? The pass key is"),
        key,
        words("."),
    )
    return [fact], [0]


def _needles(rng: Rng, words: Words, task: Task, depth: float) -> tuple[list[_Fact], list[int]]:
    """Several named pass keys; each question names one."""
    facts = []
    for i in rng.permutation(len(PEOPLE))[: task.count]:
        key, name = words(" " + _digits(rng, 5)), PEOPLE[i]
        said = f" The pass key of {name} is"
        ask = f" What is the pass key of {name}?{said}"
        facts.append(_Fact([*words(said), *key, *words(".")], words(ask), key, words(".")))
    return facts, _order(rng, task.count, task.asked, depth)


def _tracking(rng: Rng, words: Words, task: Task, depth: float) -> tuple[list[_Fact], list[int]]:
    """Variables assigned from one another: ` X17 = 40512 ; X63 = X17 ;`, asked ` X63 ?` at the end of a chain.

    A chain's statements keep their order; chains are shuffled into one another.
    """
    long = task.hops + 1
    names = [f" X{10 + i}" for i in rng.permutation(90)[: task.count * long]]
    values = [words(" " + _digits(rng, 5)) for _ in range(task.count)]
    done = [0] * task.count
    facts, ends = [], []
    for chain in rng.permutation(np.repeat(np.arange(task.count), long)).tolist():
        at = chain * long + done[chain]
        right = values[chain] if done[chain] == 0 else words(names[at - 1])
        facts.append(
            _Fact(
                [*words(f"{names[at]} ="), *right, *words(" ;")],
                words(f"{names[at]} ?"),
                values[chain],
                words(" ;"),
            )
        )
        done[chain] += 1
        if done[chain] == long:
            ends.append(len(facts) - 1)
    order = _order(rng, len(ends), min(task.asked, len(ends)), depth)
    return facts, [ends[i] for i in order]


_MAKERS: dict[str, Callable[[Rng, Words, Task, float], tuple[list[_Fact], list[int]]]] = {
    "kv": _text_pairs,
    "token-kv": _token_pairs,
    "passkey": _passkey,
    "needle": _needles,
    "tracking": _tracking,
}

COPY_TOKENS = 8
"""Tokens of one answer of the copy task."""


def _copy(rng: Rng, words: Words, length_tokens: int, task: Task, depth: float) -> Example:
    """Random tokens twice; the answers are `asked` pieces of the repetition, whose first piece nobody can know."""
    lead = length_tokens - len(words.begin)
    span, rest = lead // 2, lead % 2
    pieces = span // COPY_TOKENS - 1
    if pieces < 1:
        raise RequestError(
            f"task copy needs {len(words.begin) + 4 * COPY_TOKENS} tokens and the length is {length_tokens}"
        )
    body = rng.choice(words.singles(), span).tolist()
    ids = [*words.begin, *body, *body, *body[:rest]]
    first = len(words.begin)
    answers = []
    for i in sorted(_order(rng, pieces, min(task.asked, pieces), depth)):
        at = first + (i + 1) * COPY_TOKENS
        answers.append(Answer(at + span, at + span + COPY_TOKENS, at / length_tokens))
    return Example(np.array(ids), tuple(answers), first + span)
