"""The shadow audit: a share of the hits is computed again without the cache, and what both would read is compared.

A hit must read what a miss would have read. The audit computes the found prefix cold into a private table, reads keys
and values of both as the next query would, decoded or raw, and compares them chunk by chunk: one block that belongs to
another prefix stands out however long the prefix is. Differences up to the model's own rounding pass.

What a policy left of a context (`store.whole`) is compressed again, too: what both kept must be the same, and nearly
all of it must have been kept by both, since scores that are nearly equal fall either way.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quire.engine.request import Sample
from quire.engine.runner import Item
from quire.errors import CapacityError

if TYPE_CHECKING:
    import torch

__all__ = ["AuditStats", "Auditor", "Divergence"]

TOLERANCE = {"float64": 1e-3, "float32": 1e-2}
"""Largest distance of a chunk, as a share of its norm; 0.15 in 16 bits. Another prefix is at about 1.4."""

CHUNK_TOKENS = 512
"""Computed at a time."""

SAME_TOKENS = 0.9
"""Of what the policy kept, at least so much must be the same tokens."""

KEPT = 64
"""Divergences that are remembered, the latest ones."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """One hit that read something else.

    Args:
        position: where the first chunk begins that differs; of a recurrent state the length that it was kept at.
        name: of the field; "kept": which tokens a policy kept, of which the distance is the share that differs.
        distance: |found - computed| / |computed| of the worst chunk.
    """

    request_id: str
    found_tokens: int
    position: int
    layer: int
    name: str
    distance: float


@dataclass(slots=True)
class AuditStats:
    """Counters since the start.

    Args:
        audited: hits that were compared; `tokens` of them were computed again.
        diverged: of them.
        skipped: chosen hits for which there was no room.
        worst: the largest distance seen.
    """

    audited: int = 0
    tokens: int = 0
    diverged: int = 0
    skipped: int = 0
    worst: float = 0.0
    divergences: list[Divergence] = field(default_factory=list)


class Auditor:
    """Audits a share of the hits of one runner.

    Args:
        runner: a `ModelRunner` that shares prefixes.
        rate: of hits, in (0, 1].
        seed: of the choice.
    """

    def __init__(self, runner: Any, rate: float, seed: int = 0) -> None:
        self.runner = runner
        self.rate = rate
        self.stats = AuditStats()
        self._draw = random.Random(seed)
        self._chosen: list[tuple[Sample, int, Any]] = []

    def found(self, sample: Sample, n_tokens: int, rules: Any = None) -> None:
        """A sample was let in over so many tokens, or over what `rules` left of them; nothing is computed yet."""
        if n_tokens and self._draw.random() < self.rate:
            self._chosen.append((sample, n_tokens, rules))

    def run(self) -> None:
        """Audits what was chosen since the last call. Cost: a prefill of each."""
        chosen, self._chosen = self._chosen, []
        for sample, n_tokens, rules in chosen:
            if sample.table is not None:
                self._audit(sample, n_tokens, rules)

    def _audit(self, sample: Sample, n_tokens: int, rules: Any) -> None:
        cold = self.runner.bridge.store.open()
        tokens = sample.tokens[:n_tokens]
        if rules is not None:
            rules.apply(cold, sample.prompt_tokens, sample.request.context)
        try:
            width = CHUNK_TOKENS if self.runner.chunked_prefill else n_tokens
            for start in range(0, n_tokens, width):
                stop = min(n_tokens, start + width)
                cold.append(stop - start)
                self.runner.forward([Item(cold, tokens, start, stop, 1)], sample.request.adapter)
                cold.commit()
            cold.append(1)  # what is compared is what the next query reads; tokens go before
            self.stats.audited += 1
            self.stats.tokens += n_tokens
            self._compare(sample, n_tokens, cold, dropped=rules is not None)
        except CapacityError:
            self.stats.skipped += 1
        finally:
            cold.release()

    def _compare(self, sample: Sample, n_tokens: int, cold: Any, *, dropped: bool) -> None:
        bridge, stats = self.runner.bridge, self.stats
        worst: Divergence | None = None
        for layer, names in bridge.layers():
            for name in names:
                mine = bridge.read_prefix(sample.table, n_tokens, layer, name)
                other = bridge.read_prefix(cold, n_tokens, layer, name)
                gone = _differently_kept(mine, other) if dropped else 0.0
                if gone > 1 - SAME_TOKENS:  # the rest of it says nothing
                    self._diverged(
                        Divergence(sample.request.request_id, n_tokens, 0, layer, "kept", gone)
                    )
                    return
                for at, distance in enumerate(_distances(mine, other, self.runner.sharing.grain)):
                    stats.worst = max(stats.worst, distance)
                    if worst is None or distance > worst.distance:
                        position = at * self.runner.sharing.grain
                        request = sample.request.request_id
                        worst = Divergence(request, n_tokens, position, layer, name, distance)
        for layer, name, mine, other in bridge.states_of(sample.table, cold):
            [distance] = _distances(mine, other, 1)
            stats.worst = max(stats.worst, distance)
            if worst is None or distance > worst.distance:
                request = sample.request.request_id
                worst = Divergence(request, n_tokens, n_tokens, layer, name, distance)
        limit = TOLERANCE.get(str(self.runner.model.dtype).removeprefix("torch."), 0.15)
        if worst is not None and not worst.distance <= limit:
            self._diverged(worst)

    def _diverged(self, found: Divergence) -> None:
        self.stats.diverged += 1
        self.stats.divergences = [*self.stats.divergences[-KEPT + 1 :], found]


def _differently_kept(mine: torch.Tensor, other: torch.Tensor) -> float:
    """`[heads, N, D]` twice, zeros where a token was dropped: the share kept by one alone, whose rows become zeros."""
    here, there = ((x != 0).any(-1) for x in (mine, other))
    alone = here ^ there
    mine[alone], other[alone] = 0, 0
    return float(alone.sum() / (here | there).sum().clamp_min(1))


def _distances(mine: torch.Tensor, other: torch.Tensor, size: int) -> Sequence[float]:
    """`[heads, N, D]` twice: the distance of each run of `size` tokens, as a share of its norm."""
    out = []
    for a, b in zip(mine.float().split(size, 1), other.float().split(size, 1), strict=True):
        gap = (a - b).norm() / b.norm().clamp_min(1e-9)
        out.append(float(gap) if bool(gap.isfinite()) else float("inf"))
    return out
