"""A runner that notes what every step did, and passes everything on to the runner that does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quire.engine.runner import Item

if TYPE_CHECKING:
    import torch

__all__ = ["Books", "Meter", "StepItem", "used_bytes"]


@dataclass(frozen=True, slots=True)
class StepItem:
    """One sequence's share in a step.

    Args:
        sequence: which one, counted from 0 in order of first appearance.
        tokens: the ids that went in.
        start, stop: positions computed; a cache held [0, start) before and holds [0, stop) after.
        before, after: intervals of positions that lie in the cache, by group.
        read: intervals of positions that the step's queries read, by group.
        blocks: block ids by group, -1 where one was given back.
        held_bytes: of those blocks.
    """

    sequence: int
    tokens: tuple[int, ...]
    start: int
    stop: int
    before: dict[str, list[tuple[int, int]]]
    after: dict[str, list[tuple[int, int]]]
    read: dict[str, list[tuple[int, int]]]
    blocks: dict[str, list[int]]
    held_bytes: int


@dataclass(slots=True)
class Books:
    """What a run's sequences hold: now, at most, and each at its last step."""

    steps: int = 0
    peak_bytes: int = 0
    end_bytes: int = 0
    ends: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def waste(self) -> float:
        """Allocated minus used bytes over allocated, every sequence at its own last step."""
        held = sum(h for h, _ in self.ends.values())
        return 1 - sum(u for _, u in self.ends.values()) / held if held else 0.0


class Meter:
    """Stands in for a runner.

    Args:
        runner: does the work.
        on_step: called after each forward with its items; None: they are not made.
    """

    def __init__(
        self, runner: Any, on_step: Callable[[list[StepItem], float], None] | None = None
    ) -> None:
        self.runner = runner
        self.on_step = on_step
        self.books = Books()
        self._sequences: dict[
            int, tuple[int, Any]
        ] = {}  # the list is held, so its id stays its own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def forward(self, items: Sequence[Item], adapter: str | None = None) -> torch.Tensor:
        """The runner's, watched."""
        watching = self.on_step is not None
        before = [_cached(x.table, x.start) for x in items] if watching else []
        began = time.perf_counter()
        logits: torch.Tensor = self.runner.forward(items, adapter)
        took_s = time.perf_counter() - began
        books, held = self.books, 0
        books.steps += 1
        for x in items:
            number = self._number(x.tokens)
            held += x.table.held_bytes()
            books.ends[number] = (x.table.held_bytes(), used_bytes(x.table))
        total = self.runner.usage().held_bytes or held
        books.peak_bytes, books.end_bytes = max(books.peak_bytes, total), total
        if self.on_step is not None:
            shares = zip(items, before, strict=True)
            self.on_step([self._item(x, b) for x, b in shares], took_s)
        return logits

    def _number(self, tokens: Sequence[int]) -> int:
        return self._sequences.setdefault(id(tokens), (len(self._sequences), tokens))[0]

    def _item(self, x: Item, before: dict[str, list[tuple[int, int]]]) -> StepItem:
        chains = getattr(x.table, "chains", ())
        read = {
            c.group.name: [(e.first, e.stop) for e in _reads(c, x.start, x.stop)]
            for c in chains
            if not c.group.recurrent
        }
        return StepItem(
            sequence=self._number(x.tokens),
            tokens=tuple(x.tokens[x.start : x.stop]),
            start=x.start,
            stop=x.stop,
            before=before,
            after=_cached(x.table, x.stop),
            read=read,
            blocks={c.group.name: [int(b) for b in c.ids[: c.count]] for c in chains},
            held_bytes=x.table.held_bytes(),
        )


@dataclass(frozen=True, slots=True)
class _Span:
    first: int
    stop: int


def _reads(chain: Any, start: int, stop: int) -> list[_Span]:
    """What the queries [start, stop) read of one chain, as logical positions."""
    if chain.kept is not None:
        positions = chain.positions(stop)
        return [_Span(a, b) for a, b in _runs([int(p) for p in positions])]
    out = []
    for lo, hi in chain.group.span.needs(start):
        out.append(_Span(lo, min(hi, start)))
    top = stop if chain.group.raw is None else min(stop, chain.count * chain.group.block_tokens)
    out.append(_Span(start, top))
    joined: list[_Span] = []
    for s in (s for s in out if s.first < s.stop):
        if joined and joined[-1].stop == s.first:
            joined[-1] = _Span(joined[-1].first, s.stop)
        else:
            joined.append(s)
    return joined


def _cached(table: Any, length: int) -> dict[str, list[tuple[int, int]]]:
    """Intervals of logical positions below `length` that each group holds."""
    return {
        c.group.name: _runs([int(p) for p in c.positions(length) if p < length])
        for c in getattr(table, "chains", ())
        if not c.group.recurrent
    }


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending integers as half-open intervals."""
    out: list[tuple[int, int]] = []
    for p in positions:
        if out and out[-1][1] == p:
            out[-1] = (out[-1][0], p + 1)
        else:
            out.append((p, p + 1))
    return out


def used_bytes(table: Any) -> int:
    """`BlockTable.used_bytes` in O(groups): blocks that were given back are whole, so counting them suffices."""
    used = 0
    for c in getattr(table, "chains", ()):
        group = c.group
        rows = (
            group.block_tokens
            if group.recurrent
            else (c.count * group.block_tokens if group.raw is not None else c.slot(table.length))
            - (c.count - c.held) * group.block_tokens
        )
        used += rows * group.block_bytes // group.block_tokens
    return used
