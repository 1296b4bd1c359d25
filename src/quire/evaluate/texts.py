"""The token sequences of an evaluation, made without a model: windows of a text and examples of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from quire.errors import RequestError
from quire.evaluate.tasks import PLAIN_TEXT, Example, Filler, Task, Words, generate

__all__ = ["DEPTHS", "PPL", "PROMPTS", "encode", "prepare", "windows"]

PPL = "ppl"
PROMPTS = "prompts"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def prepare(
    tokenizer: Any,
    tasks: Sequence[Task | None],
    text: str | Sequence[int] | None,
    length_tokens: int,
    max_tokens: int = 65_536,
    examples: int = 25,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
) -> list[list[Example]]:
    """The token sequences of every task, without a model. None stands for ppl. Raises RequestError, see `evaluate`."""
    if seed < 0:
        raise RequestError(f"seed must be at least 0, not {seed}")
    if length_tokens < 2:
        raise RequestError(f"a length of {length_tokens} tokens has nothing to predict; 2 at least")
    if tokenizer is None and (isinstance(text, str) or any(tasks)):
        raise RequestError("this model has no tokenizer: recall tasks and a text as words need one")
    if text is None and None in tasks:
        raise RequestError("task ppl needs a text to score")
    ids = [] if text is None else encode(tokenizer, text)
    out: list[list[Example]] = []
    words = None if tokenizer is None else Words(tokenizer)
    for task in tasks:
        if task is None:
            out.append(windows(ids, words.begin if words else [], length_tokens, max_tokens))
            continue
        assert words is not None
        filler = Filler(ids or encode(tokenizer, PLAIN_TEXT))
        out.append(
            [
                generate(
                    task,
                    words,
                    filler,
                    length_tokens,
                    depth=depths[n % len(depths)],
                    seed=seed + n // len(depths),
                )
                for n in range(examples)
            ]
        )
    return out


def encode(tokenizer: Any, text: str | Sequence[int]) -> list[int]:
    """The tokens of a text without what begins one; token ids as they are."""
    if isinstance(text, str):
        return [int(t) for t in tokenizer.encode(text, add_special_tokens=False)]
    return [int(t) for t in text]


def windows(ids: list[int], begin: list[int], length: int, max_tokens: int) -> list[Example]:
    """Non-overlapping windows of exactly `length` tokens, what begins a text included; the rest is left out.

    Raises:
        RequestError: not one window.
    """
    inner = length - len(begin)
    count = min(len(ids) // inner, max(1, max_tokens // inner)) if inner > 0 else 0
    if not count:
        raise RequestError(
            f"the text has {len(ids)} tokens, fewer than one window of {length}; give a longer text or a smaller length"
        )
    return [Example(np.array(begin + ids[i * inner : (i + 1) * inner]), ()) for i in range(count)]
