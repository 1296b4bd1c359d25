"""What Prometheus is told about tiers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

__all__ = ["tier_metrics"]

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
    cut = CounterMetricFamily(
        "quire_tier_truncated", "Prefixes cut short and computed.", labels=["model_name", "reason"]
    )
    for reason, count in report["truncated"].items():
        cut.add_metric([model, reason], count)
    yield cut
