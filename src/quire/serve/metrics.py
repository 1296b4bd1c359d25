"""What Prometheus is told: Quire's own names, and vLLM's for the dashboards that people have."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from quire.serve.recent import Recent

if TYPE_CHECKING:
    from quire.engine import EngineStats
    from quire.engine.request import RequestFigures
    from quire.serve.service import Usage

from quire.serve.tier_metrics import ladder_metrics, tier_metrics

__all__ = ["Histogram", "Meters"]

_STEPS = (1.0, 2.5, 5.0)
FIRST_S = tuple(m * 10.0**e for e in range(-3, 2) for m in _STEPS)
BETWEEN_S = tuple(m * 10.0**e for e in range(-4, 1) for m in _STEPS)
WHOLE_S = tuple(m * 10.0**e for e in range(-2, 3) for m in _STEPS)


@dataclass
class Histogram:
    """Counts of seconds in buckets; `bounds` are their upper ends."""

    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """One more."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper end, how many are at most that), the last one for all."""
        out, below = [], 0
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            out.append((bound, float(below)))
        return out


class Meters:
    """Counters of one server; lives in the event loop.

    Args:
        model: label of every metric.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.first = Histogram(FIRST_S)
        self.between = Histogram(BETWEEN_S)
        self.whole = Histogram(WHOLE_S)
        self.by_tenant: dict[str, Counter[str]] = {}
        self.refusals: Counter[tuple[str, str]] = Counter()
        self.misses: Counter[tuple[str, str]] = Counter()
        self.recent: dict[str | None, Recent] = {None: Recent(4096)}
        """By tenant, and of all under None."""
        self.stats: Callable[[], EngineStats] | None = None
        self.sharing: Callable[[], dict[str, Any] | None] = lambda: None

    def refused(self, tenant: str, reason: str) -> None:
        """A request was told to come back."""
        self.refusals[tenant, reason] += 1

    def first_token(self, tenant: str, seconds: float) -> None:
        """A request has its first token, so long after it was let in."""
        self.first.observe(seconds)
        now = time.monotonic()
        for recent in self._recent(tenant):
            recent.first_s.append((now, seconds))

    def next_token(self, tenant: str, seconds: float) -> None:
        """A sample has a token, so long after the one before."""
        self.between.observe(seconds)
        now = time.monotonic()
        for recent in self._recent(tenant):
            recent.between_s.append((now, seconds))

    def tokens(self, tenant: str, series: str, n_tokens: int) -> None:
        """Tokens of one of the `recent.SERIES`."""
        for recent in self._recent(tenant):
            recent.count(series, n_tokens)

    def looked(self, tenant: str, figures: RequestFigures, grain: int) -> None:
        """A prompt was looked up: how much of it was found, in chunks of `grain` tokens, and why no more."""
        if figures.admitted_s is None:
            return
        row = self.by_tenant.setdefault(tenant, Counter())
        if not figures.cached_tokens:
            row["missed"] += 1
        elif figures.miss is None and figures.prompt_tokens - figures.cached_tokens <= grain:
            row["found"] += 1
        else:
            row["partly"] += 1
        if figures.miss is not None:
            self.misses[tenant, figures.miss.reason] += 1

    def _recent(self, tenant: str) -> tuple[Recent, Recent]:
        mine = self.recent.get(tenant)
        if mine is None:
            mine = self.recent[tenant] = Recent()
        return mine, self.recent[None]

    def ended(self, tenant: str, usage: Usage, seconds: float, *, done: bool) -> None:
        """A request has left, done or not."""
        row = self.by_tenant.setdefault(tenant, Counter())
        row["done" if done else "broken"] += 1
        row["prompt"] += usage.prompt_tokens
        row["cached"] += usage.cached_tokens
        row["output"] += usage.output_tokens
        if done:
            self.whole.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Everything, now."""
        yield from self._latencies()
        yield from self._tenants()
        yield from self._engine()
        yield from self._sharing()

    def _latencies(self) -> Iterator[Metric]:
        for names, what, histogram in (
            (
                ("quire_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"),
                "From admission to the first token.",
                self.first,
            ),
            (
                ("quire_inter_token_seconds", "vllm:inter_token_latency_seconds"),
                "Between the tokens of a sample.",
                self.between,
            ),
            (
                ("quire_request_seconds", "vllm:e2e_request_latency_seconds"),
                "Of requests that were done.",
                self.whole,
            ),
        ):
            for name in names:
                family = HistogramMetricFamily(name, what, labels=["model_name"])
                family.add_metric([self.model], histogram.buckets(), histogram.total)
                yield family

    def _tenants(self) -> Iterator[Metric]:
        for key, name, what in (
            ("prompt", "quire_prompt_tokens", "Prompt tokens."),
            ("cached", "quire_cached_prompt_tokens", "Prompt tokens that were found in the cache."),
            ("output", "quire_output_tokens", "Output tokens."),
            ("found", "quire_prompts_found", "Prompts of which all was found that could be."),
            ("partly", "quire_prompts_partly_found", "Prompts whose beginning was found."),
            ("missed", "quire_prompts_missed", "Prompts of which nothing was found."),
            ("done", "quire_requests_done", "Requests answered to the end."),
            ("broken", "quire_requests_broken", "Requests that failed or whose client went away."),
        ):
            family = CounterMetricFamily(name, what, labels=["model_name", "tenant"])
            for tenant, row in list(self.by_tenant.items()):
                family.add_metric([self.model, tenant], row[key])
            yield family
        for name, what, counts in (
            ("quire_requests_refused", "Requests told to come back.", self.refusals),
            ("quire_prefix_misses", "Why no more of a prompt was found.", self.misses),
        ):
            labels = ["model_name", "tenant", "reason"]
            family = CounterMetricFamily(name, what, labels=labels)
            for (tenant, reason), count in list(counts.items()):
                family.add_metric([self.model, tenant, reason], count)
            yield family
        for key, name, what in (
            ("prompt", "vllm:prompt_tokens", "Prompt tokens."),
            ("output", "vllm:generation_tokens", "Output tokens."),
            ("done", "vllm:request_success", "Requests answered to the end."),
        ):
            total = sum(row[key] for row in list(self.by_tenant.values()))
            yield self._one(CounterMetricFamily, name, what, total)

    def _engine(self) -> Iterator[Metric]:
        if self.stats is None:
            return
        stats = self.stats()
        scheduler, usage = stats.scheduler, stats.usage
        total = 0 if usage is None else usage.total_bytes
        held = 0 if usage is None else usage.held_bytes
        for names, what, value in (
            (
                ("quire_requests_running", "vllm:num_requests_running"),
                "Samples running.",
                scheduler.running,
            ),
            (
                ("quire_requests_waiting", "vllm:num_requests_waiting"),
                "Samples waiting.",
                scheduler.waiting,
            ),
            (("quire_requests_loading",), "Samples that wait for a tier.", scheduler.loading),
            (
                ("quire_kv_held_ratio", "vllm:kv_cache_usage_perc"),
                "Share of the cache's memory that running requests hold, 0 to 1.",
                held / total if total else 0.0,
            ),
            (("quire_kv_total_bytes",), "Memory of the cache.", total),
            (("quire_kv_held_bytes",), "Held by running requests.", held),
            (
                ("quire_kv_cached_bytes",),
                "Idle, and found again when somebody asks for it.",
                0 if usage is None else usage.cached_bytes,
            ),
        ):
            for name in names:
                yield self._one(GaugeMetricFamily, name, what, value)
        for names, what, value in (
            (("quire_steps",), "Steps of the engine.", stats.steps),
            (
                ("quire_preemptions", "vllm:num_preemptions"),
                "Samples that lost their cache for a while.",
                scheduler.preemptions,
            ),
            (("quire_prefill_tokens",), "Computed in chunks of prompts.", scheduler.prefill_tokens),
            (
                ("quire_decode_tokens",),
                "Computed one per sample and step.",
                scheduler.decode_tokens,
            ),
            (
                ("quire_recomputed_tokens",),
                "Computed again after a preemption.",
                scheduler.recomputed_tokens,
            ),
        ):
            for name in names:
                yield self._one(CounterMetricFamily, name, what, value)
        yield from ladder_metrics(stats, self.model)

    def _sharing(self) -> Iterator[Metric]:
        report = self.sharing()
        if report is None:
            return
        for names, what, key in (
            (
                ("quire_prefix_asked_tokens", "vllm:prefix_cache_queries"),
                "Tokens that could have been found.",
                "asked_tokens",
            ),
            (
                ("quire_prefix_hit_tokens", "vllm:prefix_cache_hits"),
                "Tokens that were found.",
                "hit_tokens",
            ),
            (("quire_prefix_evicted_blocks",), "Blocks given up for others.", "evicted_blocks"),
            (("quire_prefix_stored_blocks",), "Blocks that can be found.", "stored_blocks"),
            (
                ("quire_prefix_stored_states",),
                "Checkpoints of recurrent state that were kept.",
                "stored_states",
            ),
        ):
            for name in names:
                yield self._one(CounterMetricFamily, name, what, report[key])
        if "tiers" in report:
            yield from tier_metrics(report["tiers"], self.model)

    def _one(self, family: Any, name: str, what: str, value: float) -> Metric:
        made: Metric = family(name, what, labels=["model_name"])
        made.add_metric([self.model], value)  # type: ignore[attr-defined]
        return made
