"""The last minute of one tenant, or of all: tokens per second, and its clients' waits. Lives in the event loop."""

from __future__ import annotations

import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable

__all__ = ["SERIES", "Recent", "percentiles"]

SERIES = ("output", "computed", "found")
"""Tokens that were sampled; prompt tokens that were computed, and those that were found in the cache."""

SECONDS = 60
_SLOTS = SECONDS + 1  # and the second that is not over


class Recent:
    """What happened in the last minute.

    Args:
        most: waits of a kind that are remembered, the latest ones.
        clock: seconds.
    """

    __slots__ = ("_clock", "_counts", "_now", "between_s", "first_s")

    def __init__(self, most: int = 1024, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._now = int(clock())
        self._counts = {name: array("q", [0]) * _SLOTS for name in SERIES}
        self.first_s: deque[tuple[float, float]] = deque(maxlen=most)
        """(when, how long it was from admission to the first token)."""
        self.between_s: deque[tuple[float, float]] = deque(maxlen=most)
        """(when, how long after the token before)."""

    def count(self, series: str, n_tokens: int) -> None:
        """So many more, now."""
        self._turn()
        self._counts[series][self._now % _SLOTS] += n_tokens

    def series(self) -> dict[str, list[int]]:
        """Tokens in each of the last 60 whole seconds, the latest last."""
        self._turn()
        at = [(self._now - SECONDS + i) % _SLOTS for i in range(SECONDS)]
        return {name: [counts[i] for i in at] for name, counts in self._counts.items()}

    def waits(self) -> dict[str, list[float]]:
        """The waits of the last minute, in seconds: a copy for `percentiles`."""
        since = self._clock() - SECONDS
        return {
            name: [value for when, value in kept if when >= since]
            for name, kept in (
                ("first_token_s", self.first_s),
                ("between_tokens_s", self.between_s),
            )
        }

    def _turn(self) -> None:
        now = int(self._clock())
        for second in range(max(self._now, now - _SLOTS) + 1, now + 1):
            for counts in self._counts.values():
                counts[second % _SLOTS] = 0
        self._now = now


def percentiles(values: Iterable[float]) -> dict[str, float | None]:
    """How many, and the values below which 50, 90 and 99 % of them lie (nearest rank); None where there are none."""
    ordered = sorted(values)
    n = len(ordered)
    return {"n": n} | {
        f"p{p}": round(ordered[math.ceil(p * n / 100) - 1], 6) if n else None for p in (50, 90, 99)
    }
