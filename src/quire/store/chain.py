"""One group's blocks of one sequence: an append-only list of ids in which places may become empty."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from quire.spec import CacheGroup, Interval, Residual, Span, Streaming
from quire.store.pool import BlockPool

GONE = -1
"""The place of a block that was given back because no span needs it any more."""


@dataclass(slots=True)
class Extent:
    """Blocks that a read covers, in order, and the logical position of each of their slots.

    `positions` is None when slot j of the extent holds position `first + j`. Positions outside [start, stop) are not
    the extent's: what lies there is empty, not needed, or another extent's (sinks and a window may share a block).
    """

    blocks: np.ndarray
    first: int
    start: int
    stop: int
    positions: np.ndarray | None = None
    sinks: bool = False
    """Of a streaming span: read with the query turned back."""
    own: np.ndarray | None = None
    """`[coordinates, n]`: the positions of the first n slots where each coordinate has its own, see `Chain`."""

    def slot_positions(self, block_tokens: int) -> np.ndarray:
        """Logical position of each slot, -1 for those that are not the extent's or whose block is gone."""
        at = self.positions
        if at is None:
            at = np.arange(self.first, self.first + len(self.blocks) * block_tokens)
        out = np.where((at >= self.start) & (at < self.stop), at, -1)
        gone = np.repeat(self.blocks == GONE, block_tokens)
        out[gone[: len(out)]] = -1
        return out


class Chain:
    """Block ids in order. Slots are physical; they equal logical positions until tokens are dropped.

    slots    |kept[0] kept[1] ... |cut cut+1 cut+2 ...         after `keep` or `compact` with tokens from `cut` on whole

    Where coordinates keep different tokens, equally many each, `own: [coordinates, n]` holds their positions and `kept`
    counts slots: all that a reader must know of them is that they lie before `cut`.
    """

    __slots__ = (
        "cold",
        "count",
        "cursor",
        "cut",
        "encoded",
        "group",
        "held",
        "ids",
        "kept",
        "own",
        "pool",
        "sealed",
    )

    def __init__(self, group: CacheGroup, pool: BlockPool) -> None:
        self.group = group
        self.pool = pool
        self.ids = np.full(8, GONE, np.int32)
        self.count = 0  # entries of ids in use
        self.held = 0  # of them not GONE
        self.cursor = 0  # entries before this one are settled: GONE, or needed for good
        self.sealed = 0  # entries before this one are sealed
        self.cold = 0  # entries before this one are away, see `store.cold`
        self.encoded = 0  # of a lossy body: entries before this one have their bytes in every layer
        self.kept: np.ndarray | None = None
        self.own: np.ndarray | None = None
        self.cut = 0

    def slot(self, position: int) -> int:
        """Slot of a logical position at or after `cut`; so also tokens to slots for a length."""
        return position if self.kept is None else position - self.cut + len(self.kept)

    def position(self, slot: int) -> int:
        """Logical position of a slot."""
        if self.kept is None:
            return slot
        return int(self.kept[slot]) if slot < len(self.kept) else slot - len(self.kept) + self.cut

    def entries_for(self, length: int, accepted: int) -> int:
        """Entries that `length` tokens take of which `accepted` will not be rolled back."""
        if self.group.recurrent:
            return 1
        if self.group.raw is not None:
            return self.slot(accepted) // self.group.block_tokens
        return -(-self.slot(length) // self.group.block_tokens)

    def partial(self, length: int) -> bool:
        """Whether the last entry is written in place by what follows `length` tokens."""
        if self.group.recurrent:
            return True
        return self.group.raw is None and self.slot(length) % self.group.block_tokens > 0

    def push(self, block: int) -> None:
        """Appends an entry that holds a block, reference included."""
        if self.count == len(self.ids):
            self.ids = np.concatenate([self.ids, np.full(len(self.ids), GONE, np.int32)])
        self.ids[self.count] = block
        self.count += 1
        self.held += 1

    def pop(self) -> None:
        """Gives the last entry back."""
        self.count -= 1
        block = int(self.ids[self.count])
        if block != GONE:
            self.held -= 1
            self.pool.release(block)
        self.cursor = min(self.cursor, self.count)
        self.sealed = min(self.sealed, self.count)
        self.encoded = min(self.encoded, self.count)

    def live(self) -> np.ndarray:
        """Ids of all blocks that are held, in order."""
        ids = self.ids[: self.count]
        there: np.ndarray = ids[ids != GONE]
        return there

    def drop_behind(self, n: int, unsealed: int | None = None) -> None:
        """Gives back whole entries that hold nothing a query at `n` or later may read. O(1) amortised.

        Args:
            n: the committed boundary.
            unsealed: positions from here on stay too: they are still to be encoded.
        """
        needs = self.group.span.needs(n)
        if needs == ((0, n),):
            return
        last = needs[-1][0] if needs and needs[-1][1] == n else n
        if unsealed is not None:
            last = min(last, unsealed)
        size = self.group.block_tokens
        end = min(self.count, self.slot(n) // size)
        self._drop_raw_sinks(needs, min(end, self.cursor, last // size))
        while self.cursor < end:
            low, high = (
                self.position(self.cursor * size),
                self.position(self.cursor * size + size - 1) + 1,
            )
            if high > last:
                return
            if not any(low < hi and lo < high for lo, hi in needs):
                self.held -= 1
                self.pool.release(int(self.ids[self.cursor]))
                self.ids[self.cursor] = GONE
            self.cursor += 1

    def _drop_raw_sinks(self, needs: tuple[Interval, ...], settled: int) -> None:
        """Raw sinks of a window's body stay until the window has passed them, unlike all else that is settled."""
        span, size = self.group.span, self.group.block_tokens
        if not isinstance(span, Residual) or not span.sinks:
            return
        for entry in range(min(settled, -(-span.sinks // size))):
            low, high = entry * size, entry * size + size
            there = self.ids[entry] != GONE
            if there and not any(low < hi and lo < high for lo, hi in needs):
                self.held -= 1
                self.pool.release(int(self.ids[entry]))
                self.ids[entry] = GONE

    def all_positions(self, length: int) -> np.ndarray:
        """Logical position of every slot in use, those of freed blocks included."""
        if self.group.recurrent:
            return np.arange(0)
        if self.group.raw is not None:
            length = self.logical(self.count)
        if self.kept is None:
            return np.arange(length)
        return np.concatenate([self.kept, np.arange(self.cut, length)])

    def logical(self, entry: int) -> int:
        """Where an entry's tokens begin, of one that holds tokens from `cut` on; so also where those before it end."""
        return self.position(entry * self.group.block_tokens)

    def true_positions(self, length: int) -> np.ndarray:
        """`[coordinates, slots]`: logical position of every slot in use, of each coordinate its own."""
        line = self.all_positions(length)
        every = np.broadcast_to(line, (len(self.group.coords), len(line)))
        if self.own is None:
            return every
        return np.concatenate([self.own, every[:, self.own.shape[1] :]], 1)

    def positions(self, length: int) -> np.ndarray:
        """Logical positions that are there to be read, ascending."""
        everything = self.all_positions(length)
        blocks = self.ids[np.arange(len(everything)) // self.group.block_tokens]
        there: np.ndarray = everything[blocks != GONE]
        return there

    def extents(self, start: int, stop: int) -> list[Extent]:
        """What queries [start, stop) may read: an extent per interval of `needs(start)`, the last up to `stop`.

        A lossy body ends with its last whole block.
        """
        size = self.group.block_tokens
        if self.kept is not None:
            everything = self.all_positions(stop)
            ids = self.ids[: -(-len(everything) // size)]
            return [Extent(ids, 0, 0, stop, everything, own=self.own)]
        if self.group.raw is not None:
            stop = min(stop, self.logical(self.count))
        out = []
        sinks = sinks_of(self.group.span)
        away = self.cold * size
        for low, hi in joined(self.group.span.needs(start), start, stop):
            lo = max(low, away)
            cuts = (lo, sinks, min(hi, stop)) if lo < sinks < min(hi, stop) else (lo, min(hi, stop))
            for a, b in pairwise(cuts):
                if a < b:
                    blocks = self.ids[a // size : -(-b // size)]
                    out.append(Extent(blocks, a // size * size, a, b, sinks=b <= sinks))
        return out

    def places(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(block id, row within it) of each logical position in [start, stop), which must lie at or after `cut`."""
        at = np.arange(self.slot(start), self.slot(stop))
        return self.ids[at // self.group.block_tokens], at % self.group.block_tokens

    def copy(self) -> Chain:
        """The same entries, no references taken."""
        twin = Chain(self.group, self.pool)
        twin.ids, twin.count, twin.held = self.ids.copy(), self.count, self.held
        twin.cursor, twin.sealed, twin.encoded = self.cursor, self.sealed, self.encoded
        twin.cold = self.cold
        twin.kept, twin.own, twin.cut = self.kept, self.own, self.cut
        return twin


def sinks_of(span: Span) -> int:
    """Positions below this are read with the query turned back; 0 for all spans but `Streaming`."""
    inner = span.inner if isinstance(span, Residual) else span
    return inner.sinks if isinstance(inner, Streaming) else 0


def joined(needs: tuple[Interval, ...], start: int, stop: int) -> list[Interval]:
    """`needs(start)` followed by the chunk's own [start, stop), merged where they touch."""
    if start >= stop:
        return list(needs)
    if needs and needs[-1][1] == start:
        return [*needs[:-1], (needs[-1][0], stop)]
    return [*needs, (start, stop)]
