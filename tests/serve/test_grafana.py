"""deploy/grafana.json asks for what /metrics has, and for nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from quire.serve.config import ServeConfig
from served import serving

FILE = Path(__file__).parents[2] / "deploy" / "grafana.json"
NAME = re.compile(r"\b(?:quire|vllm)[_:][a-z_]+")
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}

VLLM = {
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *(
        "vllm:num_preemptions_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
    ),
    *("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total"),
    *("vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket"),
    "vllm:e2e_request_latency_seconds_bucket",
}
"""Names in vLLM's own documentation, as of its version 1 engine."""


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def tiered(tiny_folder: Path) -> Iterator[Any]:
    """A server with a tier, of which a prefix was cut short: a counter without a reason yet is not exported."""
    with serving(str(tiny_folder), ServeConfig(port=0), tiers="host:1MiB") as served:
        served.engine.runner.tiering.stats.truncated["timeout"] += 1
        yield served


def exported(served: Any) -> set[str]:
    with served.http() as client:
        text = client.get("/metrics").text
    kinds = re.findall(r"^# TYPE (\S+) (\S+)$", text, flags=re.MULTILINE)
    assert kinds
    return {
        name.removesuffix("_total") + suffix
        for name, kind in kinds
        for suffix in SUFFIXES.get(kind, ())
    }


def asked(dashboard: dict[str, Any]) -> list[str]:
    return [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]


def test_every_metric_is_exported(tiered: Any, dashboard: dict[str, Any]) -> None:
    there = exported(tiered)
    queries = [*asked(dashboard), *(v["query"] for v in dashboard["templating"]["list"])]
    wanted = {name for query in queries for name in NAME.findall(query)}
    assert len(wanted) > 15
    assert wanted <= there, f"asked for and not exported: {sorted(wanted - there)}"
    assert there >= VLLM


def test_the_dashboard_holds_together(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for query in asked(dashboard):
        assert query.count("(") == query.count(")")
        assert query.count("{") == query.count("}") > 0
        assert "$model" in query
    for a, b in combinations([panel["gridPos"] for panel in panels], 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert {t["datasource"]["uid"] for t in panel["targets"]} == {"${datasource}"}
        assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"])
