"""Seeing attention: what every token of a prompt is paid, and what one chosen token reads, per layer and head.

    received[j]   what position j is paid by a query that could read it, on average     the sink shows at j = 0
    share[j]      what it is paid by all queries together, as a share of everything      the heaviest fifth, summed
    reads[j]      what the chosen query pays to position j                              sums to 1

The figures come from the cache's own attention (`attention.observe`), through whatever codec holds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quire.attention.observe import Attended
from quire.attention.step import Step
from quire.engine.runner import Item
from quire.errors import ConfigError, RequestError

__all__ = ["FAR_TOKENS", "SINK_SHARE", "SINK_TOKENS", "HeadSeen", "Look", "look"]

SINK_SHARE = 0.3
"""A position that receives more than this from the average query far behind it is a sink."""

SINK_POSITIONS = 8
FAR_TOKENS = 16
"""Queries from this position on are far behind the first ones: evenly spread, each of these would get 6 % at most."""

SINK_TOKENS = 2 * FAR_TOKENS
"""Shorter prompts cannot tell a sink from a token that is read because there are few."""

HEAVY = 0.2


@dataclass(frozen=True)
class HeadSeen:
    """One query head.

    Args:
        received: `[n]`, see the module.
        heavy_share: of all that was paid, what the heaviest fifth of the tokens got.
        sinks: positions among the first eight that receive more than `SINK_SHARE` from the average query at
            `FAR_TOKENS` or later; None: the prompt has fewer than `SINK_TOKENS`.
        reads: `[chosen + 1]`, what the chosen token's query pays.
    """

    layer: int
    head: int
    received: tuple[float, ...]
    heavy_share: float
    sinks: tuple[int, ...] | None
    reads: tuple[float, ...]


@dataclass(frozen=True)
class Look:
    """All heads of all layers that attend, over `tokens`; `chosen` is the position whose query was looked at."""

    tokens: tuple[int, ...]
    chosen: int
    heads: tuple[HeadSeen, ...]

    def mean_reads(self) -> list[float]:
        """What the chosen query pays, on average over heads."""
        return [sum(x) / len(self.heads) for x in zip(*(h.reads for h in self.heads), strict=True)]


class _Observer:
    """Asks every layer of one step about the last `last` queries of its row."""

    def __init__(self, step: Step, last: int) -> None:
        self.row = step.rows[0]
        self.last = last
        self.paid: dict[int, torch.Tensor] = {}

    def ask(self, layer: int) -> list[Attended]:
        return [Attended("each", rows={self.row: self.last})]

    def take(self, layer: int, q: torch.Tensor, scale: float, answers: Sequence[Attended]) -> None:
        self.paid[layer] = answers[0].total(self.row).double().cpu()

    def note(self, layer: int, hidden: torch.Tensor, positions: Any) -> None:
        """Not asked for."""

    def finish(self) -> None:
        """Nothing to book."""


def look(runner: Any, tokens: Sequence[int], chosen: int = -1) -> Look:
    """Runs a prompt and looks at its attention.

    Args:
        runner: of `open_runner`, over a cache that keeps every token.
        tokens: at least two.
        chosen: position of the query that is looked at; negative ones count from the end.

    Raises:
        ConfigError: a runner without a cache, or a model whose attention cannot be watched.
        RequestError: too few or too many tokens, or no such position.
    """
    bridge = getattr(runner, "bridge", None)
    if bridge is None:
        raise ConfigError("kv='none' keeps no cache to look into; kv='auto' does")
    if bridge.way == "dense":
        raise ConfigError("this model's attention is its own (way 'dense') and cannot be watched")
    ids = [int(t) for t in tokens]
    n = len(ids)
    if not 2 <= n <= runner.max_context_tokens:
        raise RequestError(
            f"a prompt of {n} tokens; it takes from 2 to the context's {runner.max_context_tokens}"
        )
    at = chosen + n if chosen < 0 else chosen
    if not 0 <= at < n:
        raise RequestError(
            f"token {chosen} is not one of the prompt's {n}; 0 to {n - 1} are, or -1 for the last"
        )
    paid = _watched(runner, ids, 0, n, n)
    reads = _watched(runner, ids[: at + 1], at, at + 1, 1)
    far = _watched(runner, ids, 0, n, n - FAR_TOKENS) if n >= SINK_TOKENS else None
    if not paid:
        raise ConfigError("no layer of this model attends to cached tokens")
    heads = []
    for layer in sorted(paid):
        could = torch.arange(n, 0, -1, dtype=torch.float64)
        for head, row in enumerate(paid[layer]):
            received = row / could
            order = row.sort(descending=True).values
            heavy = float(order[: math.ceil(HEAVY * n)].sum() / order.sum())
            sinks = None if far is None else _sinks(far[layer][head], n - FAR_TOKENS)
            own = tuple(reads[layer][head].tolist())
            heads.append(HeadSeen(layer, head, tuple(received.tolist()), heavy, sinks, own))
    return Look(tuple(ids), at, tuple(heads))


def _sinks(paid: torch.Tensor, n_queries: int) -> tuple[int, ...]:
    """Of what the last queries paid together, `[n]`."""
    return tuple(int(j) for j in (paid[:SINK_POSITIONS] / n_queries > SINK_SHARE).nonzero())


def _watched(
    runner: Any, ids: list[int], start: int, stop: int, last: int
) -> dict[int, torch.Tensor]:
    """Layer to `[H_q, stop]`: what the last queries of [start, stop) paid; [0, start) is cached before."""
    bridge, table = runner.bridge, runner.open()
    seen: list[_Observer] = []

    def observer(step: Step) -> _Observer:
        seen.append(_Observer(step, last))
        return seen[-1]

    try:
        if start:
            table.append(start)
            runner.forward([Item(table, ids, 0, start, 0)])
            table.commit()
        table.append(stop - start)
        bridge.observer = observer
        runner.forward([Item(table, ids, start, stop, 1)])
        return seen[-1].paid
    finally:
        bridge.observer = None
        table.release()
