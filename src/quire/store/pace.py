"""How much of a step copies may take, those of the prefix cache's tiers and of swapped sequences together.

Calls into the store take at most 2 ms or a tenth of any step. Of that the tables' own books have a part, so all that a
step does before its forward counts, and copies end well below it; whoever copies asks `left_s` between blocks and says
what it spent. What a step has no time for waits for the next one, or is dropped, where it can be computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

__all__ = ["Pace"]

STEP_S, STEP_SHARE = 0.001, 0.05
"""Copies end when a step has taken so long: the larger of a time and a share of the shorter of the two steps before."""
ALONE_S = 0.05
"""Of a step in which nobody runs."""


class Pace:
    """The time that is left for copies in this step.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.clock = clock
        self.spent_s = self.worst_s = 0.0
        """In this step, and most of one step."""
        self._share = self._usual = STEP_S
        self._before_s = 0.0
        self._began = clock()
        self._scheduled_s: float | None = 0.0

    def begin_step(self, *, alone: bool = False) -> None:
        """Copies may take their share of this step. `alone`: nobody runs who would wait for them."""
        now = self.clock()
        self.worst_s = max(self.worst_s, self.spent_s)
        self.spent_s = 0.0
        before, self._before_s = self._before_s, now - self._began
        self._share = max(STEP_S, STEP_SHARE * min(before, self._before_s, 1.0))
        self._usual = self._share
        if alone:
            self._share = max(self._share, ALONE_S)
        self._began = now
        self._scheduled_s = None

    def joined(self) -> None:
        """Somebody was let in, and computes in this step."""
        self._share = self._usual

    def end_schedule(self) -> None:
        """What comes from here on is the forward."""
        self._scheduled_s = self.clock() - self._began

    @property
    def left_s(self) -> float:
        """For copies."""
        return self._share - max(self.spent_s, self._gone_s())

    def spent(self, seconds: float) -> None:
        """So much of it is gone."""
        self.spent_s += seconds

    def _gone_s(self) -> float:
        """Of this step, without its forward."""
        return self.clock() - self._began if self._scheduled_s is None else self._scheduled_s
