"""What an evaluation found: rows for machines and people. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Evaluation", "Row"]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one configuration.

    Args:
        kv, keep: the configuration, as it was asked for.
        task: "ppl", or a recall task's name.
        metric: nll, perplexity, dnll, kl, agreement (per token); recall, drecall (per answer). A d is the difference
            from the full-precision cache on the same tokens; dnll above zero and drecall below it are losses.
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


@dataclass(frozen=True)
class Evaluation:
    """All rows, and what they were measured on.

    Args:
        digest: of the weights as loaded, before any injection.
        full_bytes_per_token: the exact cache's, by task, measured on the same texts (of the last length).
        seed, injected: as asked.
        warnings: what a reader must know, one line each.
    """

    rows: tuple[Row, ...]
    digest: str
    full_bytes_per_token: Mapping[str, float]
    seed: int = 0
    injected: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

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
        }

    def table(self) -> Sequence[tuple[str, ...]]:
        """Rows as text, heading first. `n` is how many tokens or answers a figure is the mean of."""
        lines: list[tuple[str, ...]] = [
            ("kv", "task", "metric", "length", "depth", "value", "low", "high", "bytes/token", "n")
        ]
        for r in self.rows:
            kv = r.kv if r.keep == "full" else f"{r.kv} {r.keep}"
            where = (f"{r.length:,}", "all" if r.depth is None else f"{r.depth:.2f}")
            figures = (_text(x) for x in (r.value, r.low, r.high))
            size, count = f"{r.bytes_per_token:,.1f}", f"{r.count:,}"
            lines.append((kv, r.task, r.metric, *where, *figures, size, count))
        return lines


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity and no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _text(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.6f}" if abs(value) >= 1e-4 or value == 0 else f"{value:.2e}"
