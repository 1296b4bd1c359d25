"""How many of a sample's tokens are computed next.

    0          computed          stop           len(tokens)
    |-- cached --|-- this chunk --|-- later ones --|

A chunk ends with the step's budget, with the logits that one forward may return, where the runner wants it to end (a
policy compacts there, or recurrent state is kept), or with the tokens. Where a prompt cannot be cut in chunks, what the
runner lets pass is one, and the only one of its step; what comes behind that, or was found, is computed token by token.

Some sequences turn into something else when they grow past a length (LongRoPE): what was computed up to there is
forgotten, and computed anew at once.
"""

from __future__ import annotations

from collections.abc import Callable

from quire.engine.request import Sample
from quire.engine.runner import Room, Table
from quire.engine.schedule import Plan

__all__ = ["Chunks"]


class Chunks:
    """The sizes of chunks.

    Args:
        room: says whether a prompt may be cut.
        logits_tokens: longest chunk of a prompt whose log-probabilities are wanted.
        cut: `cut(table, start, stop) -> stop'` with start < stop' ≤ stop: where a chunk must end; default: anywhere.
        restart_tokens: a sequence that grows past so many is computed anew; None: none is.
    """

    def __init__(
        self,
        room: Room,
        logits_tokens: int,
        cut: Callable[[Table, int, int], int] | None = None,
        restart_tokens: int | None = None,
    ) -> None:
        self.room = room
        self.logits_tokens = logits_tokens
        self.cut = cut
        self.restart_tokens = restart_tokens

    def next_tokens(self, sample: Sample, table: Table, plan: Plan) -> int:
        """Tokens of this sample to compute next; 0: not in this step."""
        start, end = sample.computed, len(sample.tokens)
        if not self.room.chunked_prefill:
            if start:
                return 1
            stop = end if self.cut is None else self.cut(table, 0, end)
            return 0 if plan.prefills else stop
        stop = min(end, start + plan.budget)
        if sample.unscored:
            stop = min(stop, start + self.logits_tokens)
        if self.cut is not None:
            stop = self.cut(table, start, stop)
        return max(stop - start, self._least(sample))

    def fewer_tokens(self, sample: Sample, n_tokens: int) -> int:
        """A smaller chunk, for one that is alone and finds no room for this one; 0: there is none that is of use."""
        least = self._least(sample)
        if not self.room.chunked_prefill or n_tokens <= least:
            return 0
        return max(least, n_tokens // 2)

    def changes(self, sample: Sample) -> bool:
        """Whether a sample's next token turns what it has computed into something else."""
        past = self.restart_tokens
        return past is not None and 0 < sample.computed <= past < len(sample.tokens)

    def restart(self, sample: Sample, table: Table | None = None) -> None:
        """Forget what a sample has computed (or found in `table`) if its next token turns it into something else."""
        table = table or sample.table
        if table is not None and self.changes(sample):
            table.truncate(0)
            sample.computed = 0

    def _least(self, sample: Sample) -> int:
        """The smallest chunk that is of use: of a sequence that must be computed anew, all up to where it changed."""
        past = self.restart_tokens
        return 1 if past is None or sample.computed or len(sample.tokens) <= past else past + 1
