"""Demand of a mix of requests instead of one length: expected, and what is exceeded one time in a hundred.

Each user holds a request drawn from the file, at its full length: the figure to plan for, since any moment holds less.
"""

from __future__ import annotations

import csv
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from quire.errors import ConfigError
from quire.plan.demand import Demand

_PROMPT = ("prompt", "prefill", "context", "input")
_OUTPUT = ("decode", "generat", "output", "answer")
_WHOLE = ("length", "tokens", "total")
_DRAWS = 2000
_SAMPLED = 64
"""Up to so many users the hundredth is drawn; beyond, their sum is near enough to a normal distribution."""
Z99 = 2.3263478740408408
"""The standard normal's 99th percentile."""


@dataclass(frozen=True)
class Mix:
    """What a file of lengths asks for.

    Args:
        lengths: tokens per request, prompt and output together, ascending.
        each_bytes: what each of them holds on one rank, in the same order.
    """

    lengths: tuple[int, ...]
    each_bytes: tuple[int, ...]

    @property
    def mean_tokens(self) -> float:
        """Of a request."""
        return sum(self.lengths) / len(self.lengths)

    @cached_property
    def mean_bytes(self) -> float:
        """Of a request."""
        return sum(self.each_bytes) / len(self.each_bytes)

    def tokens_at(self, share: float) -> int:
        """The length that this share of requests does not exceed."""
        return self.lengths[min(len(self.lengths) - 1, math.ceil(share * len(self.lengths)) - 1)]

    def p99_bytes(self, users: int) -> float:
        """What so many users together exceed one time in a hundred.

        The larger of what drawn samples and the normal distribution say, so that it grows with every user.
        """
        formula = users * self.mean_bytes + Z99 * self._spread * math.sqrt(users)
        return max(formula, self._drawn[min(users, _SAMPLED) - 1])

    @cached_property
    def _spread(self) -> float:
        mean = self.mean_bytes
        return math.sqrt(sum((b - mean) ** 2 for b in self.each_bytes) / len(self.each_bytes))

    @cached_property
    def _drawn(self) -> Sequence[float]:
        draw = random.Random(0)  # the same users at every call
        sums = [0] * _DRAWS
        out: list[float] = []
        for _ in range(_SAMPLED):
            picked = draw.choices(self.each_bytes, k=_DRAWS)
            sums = [a + b for a, b in zip(sums, picked, strict=True)]
            out.append(float(sorted(sums)[math.ceil(0.99 * _DRAWS) - 1]))
        return out

    def max_users(self, room_bytes: int) -> int:
        """Most users whose 99th percentile still fits."""
        if room_bytes <= 0 or self.p99_bytes(1) > room_bytes:
            return 0
        low, high = 1, max(2, int(room_bytes // self.mean_bytes) + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.p99_bytes(middle) <= room_bytes else (low, middle)
        return low


def read_lengths(path: Path) -> list[int]:
    """Tokens per request from a CSV file: one column, or a prompt's and an output's which are added.

    Raises:
        ConfigError: no such file, no such columns, or something that is no count.
    """
    return [sum(parts) for parts in read_requests(path)]


def read_requests(path: Path) -> list[tuple[int, ...]]:
    """The same with its parts: (prompt, output) where the file tells them apart, else (tokens,).

    Raises:
        ConfigError: as `read_lengths`.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            rows = [row for row in csv.reader(f) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--lengths {path}: {getattr(e, 'strerror', None) or e}") from e
    if not rows:
        raise ConfigError(f"--lengths {path}: the file is empty")
    headless = all(_number(cell) is not None for cell in rows[0])
    columns = list(range(len(rows[0]))) if headless else _columns(rows[0])
    if not columns or len(columns) > 2:
        names = [f"column {i}" for i in range(1, len(rows[0]) + 1)] if headless else rows[0]
        raise ConfigError(
            f"--lengths {path}: columns of token counts are not clear from {', '.join(names)}; name them "
            "prompt_tokens and output_tokens, or have one called tokens"
        )
    out = []
    for at, row in enumerate(rows[0 if headless else 1 :], 1 if headless else 2):
        found = [_number(row[i]) if i < len(row) else None for i in columns]
        if any(x is None or not 0 <= x < math.inf for x in found):
            raise ConfigError(f"--lengths {path}: line {at} holds no counts of tokens")
        out.append(tuple(int(x) for x in found if x is not None))
    out = [parts for parts in out if sum(parts)]
    if not out:
        raise ConfigError(f"--lengths {path}: no request in it has any tokens")
    return out


def _columns(head: Sequence[str]) -> list[int]:
    """Where the counts are: prompts before outputs."""
    prompts = [i for i, name in enumerate(head) if _any(name, _PROMPT)]
    outputs = [i for i, name in enumerate(head) if _any(name, _OUTPUT) and i not in prompts]
    return prompts + outputs or [i for i, name in enumerate(head) if _any(name, _WHOLE)][:1]


def mix(demand: Demand, lengths: Sequence[int]) -> Mix:
    """What these requests hold, by the same arithmetic as one of them."""
    counts = Counter(lengths)
    each = {n: demand.sequence_bytes(n) for n in counts}
    ordered = sorted(lengths)
    return Mix(tuple(ordered), tuple(each[n] for n in ordered))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _any(name: str, parts: Sequence[str]) -> bool:
    low = name.lower()
    return "time" not in low and any(p in low for p in parts)
