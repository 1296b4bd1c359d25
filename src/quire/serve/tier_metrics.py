"""What Prometheus is told about tiers, and about what was done when memory ran short."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from quire.engine.core import EngineStats

__all__ = ["ladder_metrics", "tier_metrics"]

LADDER = {
    "drop": "dropped_blocks",
    "demote": "demoted_blocks",
    "recode": "recoded",
    "evict": "yielded",
    "swap": "swapped",
    "recompute": "recomputed",
    "queue": "queued",
}
"""Step to its counter: of blocks the first two, of samples the others."""

LOADS = ("hit", "miss", "corrupt", "timeout", "error")
STORES = {
    "stored": "stored",
    "rejected": "rejected",
    "dropped": "dropped",
    "store_timeout": "timeout",
    "store_error": "error",
}
TOTALS = (
    ("quire_tier_loaded_bytes", "Bytes that came up, verified.", "loaded_bytes"),
    ("quire_tier_stored_bytes", "Bytes that went down.", "stored_bytes"),
    ("quire_tier_failures", "Calls that failed or were late.", "failures"),
)
NOW = (
    ("quire_tier_up", "1: it answers; 0: it is left alone for now, or unwell.", "ok"),
    ("quire_tier_blocks", "Blocks that it holds.", "blocks"),
    ("quire_tier_used_bytes", "Bytes that they take.", "used_bytes"),
    ("quire_tier_capacity_bytes", "Bytes that it may take.", "capacity_bytes"),
    ("quire_tier_queued_bytes", "Bytes on their way down.", "queued_bytes"),
)
WHOLE = (
    ("quire_tier_loaded_tokens", "Prompt tokens that came from tiers.", "loaded_tokens"),
    ("quire_tier_demoted_blocks", "Evicted blocks that were sent down.", "demoted_blocks"),
    (
        "quire_tier_lost_blocks",
        "Evicted blocks for which there was no time or room.",
        "dropped_blocks",
    ),
    (
        "quire_tier_written_back_blocks",
        "Blocks written because they were found again.",
        "written_back",
    ),
)


def tier_metrics(report: dict[str, Any], model: str) -> Iterator[Metric]:
    """Everything of `Tiering.report`."""
    levels = report["levels"]
    for kinds, name, what in (
        ({k: k for k in LOADS}, "quire_tier_loads", "Blocks asked for."),
        (STORES, "quire_tier_stores", "Blocks sent down."),
    ):
        family = CounterMetricFamily(name, what, labels=["model_name", "tier", "outcome"])
        for level in levels:
            for key, outcome in kinds.items():
                family.add_metric([model, level["tier"], outcome], level[key])
        yield family
    for kind, rows in ((CounterMetricFamily, TOTALS), (GaugeMetricFamily, NOW)):
        for name, what, key in rows:
            each = kind(name, what, labels=["model_name", "tier"])
            for level in levels:
                each.add_metric([model, level["tier"]], float(level[key]))
            yield each
    for name, what, key in WHOLE:
        total = CounterMetricFamily(name, what, labels=["model_name"])
        total.add_metric([model], report[key])
        yield total
    owed = GaugeMetricFamily(
        "quire_tier_owed_blocks",
        "Blocks that were found again and are still to be written.",
        labels=["model_name"],
    )
    owed.add_metric([model], report["owed_blocks"])
    yield owed
    cut = CounterMetricFamily(
        "quire_tier_truncated", "Prefixes cut short and computed.", labels=["model_name", "reason"]
    )
    for reason, count in report["truncated"].items():
        cut.add_metric([model, reason], count)
    yield cut


def ladder_metrics(stats: EngineStats, model: str) -> Iterator[Metric]:
    """The steps of `engine.ladder`, and the invariants that were looked at."""
    ladder, checks = stats.ladder, stats.checks
    steps = CounterMetricFamily(
        "quire_shortage_steps",
        "For want of memory: blocks dropped, demoted; samples recoded, evicted from, swapped, recomputed, queued.",
        labels=["model_name", "step"],
    )
    for step, name in LADDER.items():
        steps.add_metric([model, step], getattr(ladder, name))
    yield steps
    for kind, name, what, value in (
        (
            CounterMetricFamily,
            "quire_offloaded_bytes",
            "Bytes of cold blocks that went away.",
            "offloaded_bytes",
        ),
        (
            CounterMetricFamily,
            "quire_offload_lost",
            "Samples computed anew for want of such a block.",
            "lost",
        ),
        (CounterMetricFamily, "quire_swapped_bytes", "Bytes of swapped samples.", "swapped_bytes"),
        (
            CounterMetricFamily,
            "quire_swaps_returned",
            "Swapped samples that came back.",
            "returned",
        ),
        (
            GaugeMetricFamily,
            "quire_parked_bytes",
            "Of swapped samples, in host memory.",
            "parked_bytes",
        ),
        (
            GaugeMetricFamily,
            "quire_copy_bytes_per_second",
            "Of swaps, as measured; 0: not yet.",
            "copy_bytes_per_s",
        ),
        (
            GaugeMetricFamily,
            "quire_prefill_tokens_per_second",
            "As measured; 0: not yet.",
            "prefill_tokens_per_s",
        ),
    ):
        family = kind(name, what, labels=["model_name"])
        family.add_metric([model], getattr(ladder, value))
        yield family
    looks = CounterMetricFamily(
        "quire_invariant_looks", "How often invariants were looked at.", labels=["model_name"]
    )
    looks.add_metric([model], checks.get("looks", 0))
    yield looks
    found = CounterMetricFamily(
        "quire_invariant_violations",
        "Invariants that did not hold, by name. Not zero: a bug of ours.",
        labels=["model_name", "invariant"],
    )
    for name, count in checks.get("violations", {}).items():
        found.add_metric([model, name], count)
    yield found
