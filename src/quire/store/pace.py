"""How much of a step copies may take, those of the prefix cache's tiers and of swapped sequences together.

Calls into the store take at most 2 ms or a tenth of any step. Of that the tables' own books have a part, so copies stay
below it; whoever copies asks `left_s` between blocks and says what it spent. What a step has no time for waits for the
next one, or is dropped, where it can be computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

__all__ = ["Pace"]

STEP_S, STEP_SHARE = 0.0012, 0.06
"""What copies may take of a step: the larger of a time and a share of the step before."""
ALONE_S = 0.05
"""Of a step in which nobody runs."""


class Pace:
    """The time that is left for copies in this step.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.clock = clock
        self.left_s = self._share = STEP_S
        self.spent_s = self.worst_s = 0.0
        """In this step, and most of one step."""
        self._began = clock()

    def begin_step(self, *, alone: bool = False) -> None:
        """Copies may take their share of this step. `alone`: nobody runs who would wait for them."""
        now = self.clock()
        self.worst_s = max(self.worst_s, self.spent_s)
        self.spent_s = 0.0
        share = max(STEP_S, STEP_SHARE * min(now - self._began, 1.0))
        self.left_s = self._share = max(share, ALONE_S) if alone else share
        self._began = now

    def spare_s(self) -> float:
        """What is left for what nobody waits for: everything since the step began counts, the tables' books as well."""
        return min(self.left_s, self._share - (self.clock() - self._began))

    def spent(self, seconds: float) -> None:
        """So much of it is gone."""
        self.left_s -= seconds
        self.spent_s += seconds
