"""Speed and capacity beside quality: how fast one sequence is decoded under each configuration, and how many fit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from quire.engine.runner import Item
from quire.evaluate.cells import Cell
from quire.evaluate.report import Cost
from quire.models.memory import arena_bytes

__all__ = ["costs_of"]


def costs_of(
    cells: Sequence[Cell],
    tokens: Sequence[int],
    steps: int,
    memory: int | float | str,
    device: Any,
) -> list[Cost]:
    """Decodes the last tokens of a text one by one, under each configuration in turn.

    Args:
        cells: the exact one first.
        tokens: the text, of which at most half are timed.
        steps: to be timed.
        memory: that capacity is counted in, see `arena_bytes`.
    """
    room = arena_bytes(memory, device)
    return [_cost(cell, [int(t) for t in tokens], steps, room) for cell in cells]


def _cost(cell: Cell, tokens: list[int], steps: int, room: int) -> Cost:
    runner = cell.scorer.runner
    n = len(tokens)
    prompt = n - min(steps, n // 2)
    table = runner.open(prompt_tokens=prompt)
    size = cell.scorer.chunk_tokens
    seconds = []
    try:
        ends = sorted({*range(size, prompt, size), prompt, *range(prompt + 1, n + 1)})
        for start, stop in pairwise([0, *ends]):
            runner.cut(table, start, stop)
            table.append(stop - start)
            began = time.perf_counter()
            runner.forward([Item(table, tokens, start, stop, 1)]).argmax().item()
            took = time.perf_counter() - began
            table.commit()
            if stop > prompt:
                seconds.append(took)
        per_token = table.held_bytes() / n
    finally:
        table.release()
    return Cost(
        *cell.config,
        n,
        per_token,
        1 / statistics.median(seconds),
        int(room // per_token),
        room,
    )
