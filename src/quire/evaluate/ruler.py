"""RULER's families whose answers have no order: multi-value needles, variable tracking, common and frequent words.

    values      one name, `count` values in `count` places of a filler          all of them are asked for
    variables   `count` chains of `hops` assignments, one value at each head    all variables of the first chain
    common      a numbered list: `count` words 30 times, all others 3 times     the common ones
    frequent    words with frequencies of a zeta distribution, alpha 2          the `count` most frequent

The model writes its answer, as long as RULER lets it be, and the words that stand in it count, whatever their case.

Source: RULER (Hsieh et al., arXiv 2404.06654), section 3 and appendix B: the numbers of words, repetitions and chains,
    the zeta distribution, answers of 128, 30, 120 and 50 tokens, the share of the references that the output holds.
Differs: words are made of syllables, drawn by the seed, where the paper takes an English list (common) or letters
    (frequent); the filler is the user's text; the questions are in our words and there is no worked example before
    them. Single, multi-key and multi-query needles are `needle` of `quire.evaluate.tasks` (`count`, `asked`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quire.errors import RequestError
from quire.evaluate.tasks import PEOPLE, Example, Filler, Piece, Rng, Task, Wanted, Words

__all__ = ["generate_open"]

OFTEN, SELDOM = 30, 3
"""How many times a common word stands in the list, and how many times another."""
ALPHA = 2.0
REPLY_TOKENS = {"values": 128, "variables": 30, "common": 120, "frequent": 50}
_SYLLABLES = tuple(a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "or"))


def generate_open(
    rng: Rng, task: Task, words: Words, filler: Filler, length_tokens: int
) -> Example:
    """One example: a prompt that ends with its question, and with its answer is `length_tokens` long.

    Raises:
        RequestError: what must be said needs more tokens.
    """
    room = length_tokens - REPLY_TOKENS[task.kind] - len(words.begin)
    if task.kind in ("values", "variables"):
        make = _values if task.kind == "values" else _variables
        facts, ask, wanted = make(rng, task, words)
        body, places = _scattered(rng, task, filler, facts, room - len(ask), length_tokens)
        depths = [(len(words.begin) + p) / length_tokens for p in places]
        found = tuple(Wanted(text, depths[i]) for text, i in wanted)
    else:
        make_list = _common if task.kind == "common" else _frequent
        ask = words(_ASK[task.kind].format(count=task.count))
        body, said = make_list(rng, task, words, filler, room - len(ask))
        found = tuple(Wanted(text) for text in said)
    ids = [*words.begin, *body, *ask]
    asked = len(ids) - len(ask)
    return Example(np.array(ids), (), asked, found, REPLY_TOKENS[task.kind])


_ASK = {
    "common": " What are the {count} most common words in the list above? The most common words are:",
    "frequent": " What are the {count} most frequent words in the coded text above? The most frequent words are:",
}

_Said = list[tuple[str, int]]
"""Words that are wanted, each with the fact that says it."""


def _values(rng: Rng, task: Task, words: Words) -> tuple[list[Piece], Piece, _Said]:
    name = PEOPLE[int(rng.integers(len(PEOPLE)))]
    values: dict[str, None] = {}
    while len(values) < task.count:
        values["".join(map(str, rng.integers(0, 10, 5)))] = None
    facts = [
        [*words(f" One of the pass keys of {name} is"), *words(f" {v}"), *words(".")]
        for v in values
    ]
    ask = words(f" What are all the pass keys of {name}? The pass keys of {name} are")
    return facts, ask, [(v, i) for i, v in enumerate(values)]


def _variables(rng: Rng, task: Task, words: Words) -> tuple[list[Piece], Piece, _Said]:
    """Statements of a chain keep their order, chains are shuffled into one another."""
    long = task.hops + 1
    names = [f"X{10 + i}" for i in rng.permutation(90)[: task.count * long]]
    values = ["".join(map(str, rng.integers(0, 10, 5))) for _ in range(task.count)]
    done = [0] * task.count
    facts: list[Piece] = []
    wanted: _Said = []
    for chain in rng.permutation(np.repeat(np.arange(task.count), long)).tolist():
        at = chain * long + done[chain]
        right = values[chain] if done[chain] == 0 else names[at - 1]
        if chain == 0:
            wanted.append((names[at], len(facts)))
        facts.append([*words(f" {names[at]} ="), *words(f" {right}"), *words(" ;")])
        done[chain] += 1
    ask = words(f" Which variables have the value {values[0]}? They are")
    return facts, ask, wanted


def _scattered(
    rng: Rng, task: Task, filler: Filler, facts: Sequence[Piece], room: int, length_tokens: int
) -> tuple[Piece, list[int]]:
    """Facts in order within filler, `room` tokens in all, and where each begins."""
    spare = room - sum(map(len, facts))
    if spare < 0:
        raise _too_short(task, length_tokens, length_tokens - spare)
    cuts = np.sort(rng.integers(0, spare + 1, len(facts)))
    gaps = np.diff(np.concatenate([[0], cuts, [spare]])).tolist()
    body: Piece = []
    places = []
    for gap, fact in zip(gaps, facts, strict=False):
        body += filler(rng, gap)
        places.append(len(body))
        body += fact
    return [*body, *filler(rng, gaps[-1])], places


def _common(
    rng: Rng, task: Task, words: Words, filler: Filler, room: int
) -> tuple[Piece, list[str]]:
    """The longest list that fits, after as much filler as is left."""

    def listed(others: int) -> Piece:
        names = _names(np.random.default_rng(seed), task.count + others)
        times = [OFTEN] * task.count + [SELDOM] * others
        order = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(names)), times))
        body: Piece = []
        for i, at in enumerate(order.tolist(), 1):
            body += [*words(f" {i}."), *words(f" {names[at]}")]
        return body

    seed = int(rng.integers(1 << 31))
    low, high = 1, max(2, room // SELDOM)
    if len(listed(low)) > room:
        raise _too_short(task, room, len(listed(low)))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(listed(middle)) <= room else (low, middle)
    body = listed(low)
    names = _names(np.random.default_rng(seed), task.count)
    return [*filler(rng, room - len(body)), *body], names


def _frequent(
    rng: Rng, task: Task, words: Words, filler: Filler, room: int
) -> tuple[Piece, list[str]]:
    """Words by rank, the i-th as often as 1 / i^alpha says of the whole; the most frequent are told apart by one."""
    names = _names(rng, 64)
    share = 1.0 / np.arange(1, len(names) + 1) ** ALPHA
    widest = max(len(words(f" {n}")) for n in names)
    total = room // widest
    times = np.floor(share / share.sum() * total).astype(int)
    if task.count > len(names) - 1 or times[task.count - 1] <= times[task.count]:
        raise _too_short(task, room, room + widest * task.count)
    body: Piece = []
    for at in rng.permutation(np.repeat(np.arange(len(names)), times)).tolist():
        body += words(f" {names[at]}")
    return [*filler(rng, room - len(body)), *body], names[: task.count]


def _names(rng: Rng, count: int) -> list[str]:
    """Different words, none within another."""
    found: dict[str, None] = {}
    while len(found) < count:
        word = "".join(_SYLLABLES[i] for i in rng.integers(0, len(_SYLLABLES), 3))
        if not any(word in other or other in word for other in found):
            found[word] = None
    return list(found)


def _too_short(task: Task, length: int, need: int) -> RequestError:
    return RequestError(
        f"task {task.name} needs {need} tokens and there is room for {length}; "
        "take a greater length or a smaller count"
    )
