"""What an evaluation found: rows for machines and people. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Cost", "Evaluation", "Layer", "Position", "Row"]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one configuration.

    Args:
        kv, keep: the configuration, as it was asked for.
        task: "ppl", a recall task's name, or "prompts".
        metric: nll, perplexity, dnll, kl, agreement (per token); recall, drecall (per answer); divergence, same (per
            prompt). A d is the difference from the full-precision cache on the same tokens; dnll above zero and drecall
            below it are losses. divergence: tokens of the exact greedy answer before this one goes another way, all of
            them where it never does, which is the share `same`.
        value, low, high: the figure and its interval; None where one unit gives none.
        bytes_per_token: measured: all live bytes of the tables at the texts' ends over their tokens.
        tokens: scored: predicted tokens, or tokens of answers.
        count: values that the figure is a mean of: predicted tokens, or answers.
        full_bytes_per_token: the exact cache's, on the same texts.
        length: tokens of each text.
        depth: of the asked fact; None over all depths.
        decoded: share of scored queries that read a decoded position; 0 under an exact cache.
    """

    kv: str
    keep: str
    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    bytes_per_token: float
    tokens: int
    length: int
    depth: float | None = None
    decoded: float = 0.0
    count: int = 0
    full_bytes_per_token: float = 0.0


@dataclass(frozen=True, slots=True)
class Position:
    """ΔNLL of the tokens that positions [start, stop) of every window predict."""

    kv: str
    keep: str
    length: int
    start: int
    stop: int
    dnll: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer's keys or values alone cost: KL and ΔNLL with that much coded and everything else exact.

    Args:
        low, high: of the KL divergence.
        head: of one KV head alone; None for all of the layer's.
    """

    kv: str
    layer: int
    field: str
    kl: float
    dnll: float
    low: float | None
    high: float | None
    head: int | None = None

    @property
    def place(self) -> str:
        """Layer, or layer and head."""
        return str(self.layer) if self.head is None else f"{self.layer}.{self.head}"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a configuration takes on this machine; the exact cache is one of them.

    Args:
        length: tokens of the sequence that was decoded.
        bytes_per_token: measured at its end, all live bytes.
        tokens_per_s: of one sequence that is being decoded, by the median step.
        capacity_tokens: that the memory holds in sequences of such length.
        memory_bytes: of which memory.
    """

    kv: str
    keep: str
    length: int
    bytes_per_token: float
    tokens_per_s: float
    capacity_tokens: int
    memory_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """All rows, and what they were measured on.

    Args:
        digest: of the weights as loaded, before any injection.
        full_bytes_per_token: the exact cache's, by task, measured on the same texts (of the last length).
        seed, injected: as asked.
        warnings: what a reader must know, one line each.
        positions: loss over position, where a text was scored.
        layers: what each layer alone costs, where that was asked for.
        costs: speed and capacity, where they were asked for; timed, so never twice the same.
    """

    rows: tuple[Row, ...]
    digest: str
    full_bytes_per_token: Mapping[str, float]
    seed: int = 0
    injected: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    positions: tuple[Position, ...] = ()
    layers: tuple[Layer, ...] = ()
    costs: tuple[Cost, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Configurations that are called lossy and save nothing, and figures that are no numbers."""
        found: dict[str, str] = {}
        for r in self.rows:
            full = r.full_bytes_per_token
            if not math.isfinite(r.value):
                found.setdefault(
                    f"{r.kv} {r.task} {r.metric}",
                    f"{r.metric} of {r.kv} on {r.task} is {r.value}: the document says null",
                )
            if r.decoded > 0 and r.bytes_per_token >= full:
                found.setdefault(
                    r.kv,
                    f"{r.kv} holds {r.bytes_per_token:,.0f} bytes per token on {r.task} and the exact cache "
                    f"{full:,.0f}: it saves nothing here",
                )
        return tuple(found.values())

    def document(self) -> dict[str, Any]:
        """The keys of `quire eval --json`."""
        return {
            **self.about,
            "digest": self.digest,
            "seed": self.seed,
            "injected": self.injected,
            "full_bytes_per_token": dict(self.full_bytes_per_token),
            "warnings": list(self.warnings),
            "rows": [_finite(asdict(r)) for r in self.rows],
            "positions": [_finite(asdict(p)) for p in self.positions],
            "layers": [_finite(asdict(x)) for x in self.layers],
            "costs": [asdict(c) for c in self.costs],
        }

    def table(self) -> Sequence[tuple[str, ...]]:
        """Rows as text, heading first.

        `n` is how many tokens or answers a figure is the mean of; `tokens/s` and `holds` are of `Cost`.
        """
        heads = (
            "kv",
            "task",
            "metric",
            "length",
            "depth",
            "value",
            "low",
            "high",
            "bytes/token",
            "n",
        )
        costs = {(c.kv, c.keep): c for c in self.costs}
        lines: list[tuple[str, ...]] = [heads + ("tokens/s", "holds") * bool(costs)]
        for r in self.rows:
            kv = r.kv if r.keep == "full" else f"{r.kv} {r.keep}"
            where = (f"{r.length:,}", "all" if r.depth is None else f"{r.depth:.2f}")
            figures = (_text(x) for x in (r.value, r.low, r.high))
            size, count = f"{r.bytes_per_token:,.1f}", f"{r.count:,}"
            line = (kv, r.task, r.metric, *where, *figures, size, count)
            if costs:
                cost = costs[r.kv, r.keep]
                line += (f"{cost.tokens_per_s:,.1f}", f"{cost.capacity_tokens:,}")
            lines.append(line)
        return lines

    def cost_table(self) -> Sequence[tuple[str, ...]]:
        """Bytes, speed and capacity as text, heading first; nothing where nothing was timed."""
        if not self.costs:
            return []
        lines: list[tuple[str, ...]] = [
            ("kv", "bytes/token", "of exact", "tokens/s", "tokens it holds")
        ]
        exact = self.costs[0].bytes_per_token
        for c in self.costs:
            kv = c.kv if c.keep == "full" else f"{c.kv} {c.keep}"
            share, size = f"{c.bytes_per_token / exact:.1%}", f"{c.bytes_per_token:,.1f}"
            lines.append((kv, size, share, f"{c.tokens_per_s:,.1f}", f"{c.capacity_tokens:,}"))
        return lines


def finite_row(row: Row) -> dict[str, Any]:
    """A row as JSON can say it."""
    return _finite(asdict(row))


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity and no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _text(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.6f}" if abs(value) >= 1e-4 or value == 0 else f"{value:.2e}"
