"""Reading a sequence once more before some of its tokens go: drafts behind it, piece by piece, forgotten again.

    |0 ........ context ........ due|                         computed, not committed yet
                                    |piece 0|                 drafts: their queries are watched, then truncated
                                    |lead|piece 1|            the last tokens of piece 0 lead piece 1 in

Room for the longest piece is reserved with the tokens that end at `due` (`Keeper.spare`), so that nothing fails here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quire.retention.contract import LEAD_TOKENS

__all__ = ["Piece", "repeat"]


@dataclass
class Piece:
    """An item whose logits nobody wants."""

    table: Any
    tokens: Sequence[int]
    start: int
    stop: int
    logits: int = 0


def repeat(table: Any, tokens: Sequence[int], run: Callable[[Piece], object]) -> None:
    """Reads once more what a sequence has computed since the last time, where its policy asks for it at this length.

    Args:
        table: whose last tokens were computed and are not committed.
        tokens: of the whole sequence, or more.
        run: one forward.

    Cost: a prefill of those tokens over the whole cache.
    """
    keeper, length = table.keeper, table.length
    if keeper is None or not keeper.repeats_at(length):
        return
    keeper.repeating = True
    try:
        for piece in _pieces(tokens[:length], keeper.repeated, keeper.rules.policy.repeats):
            table.append(len(piece), drafts=len(piece))
            try:
                run(Piece(table, [*tokens[:length], *piece], length, table.length))
            finally:
                table.truncate(length)
        keeper.forget_behind(table, length)
        keeper.repeated = length
    finally:
        keeper.repeating = False


def _pieces(tokens: Sequence[int], start: int, most: int) -> Iterator[list[int]]:
    """Of `tokens[start:]`, at most so many each, and what leads them in."""
    for at in range(start, len(tokens), most):
        yield list(tokens[max(0, at - LEAD_TOKENS) : at + most])
