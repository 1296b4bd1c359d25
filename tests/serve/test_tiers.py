"""Tiers under a server: what /metrics says of them, and a tenant that finds its own after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from quire.engine import Engine, SamplingParams
from quire.engine.core import EngineStats
from quire.engine.ladder import LadderStats
from quire.engine.sharing import sharing_report
from quire.models.load import load_model
from quire.models.open import open_runner
from quire.serve.config import ServeConfig
from quire.serve.house import House
from quire.serve.service import Service
from quire.serve.tier_metrics import ladder_metrics
from tiny_model import make_model


def test_metrics_tell_of_tiers_and_tenants_find_their_own_again(tmp_path: Path) -> None:
    loaded = load_model(make_model(tmp_path / "m"))
    tiers, prompt = f"host:1MiB,disk:8MiB@{tmp_path}/tier", list(range(3, 150))
    for tenant, expected in (("a", 0), ("b", 0), ("a", 128)):
        runner: Any = open_runner(loaded.model, memory="8MiB", share="prefix", tiers=tiers)
        with Engine(runner, loaded.tokenizer) as engine:
            service = Service(engine, ServeConfig(), "m", secret=runner.tiering.secret())
            (out,) = engine.generate(
                [prompt], SamplingParams(max_tokens=2), namespace=service.tenants.of(tenant)
            )
            assert out.figures.loaded_tokens == expected
            service.meters.stats = engine.stats
            service.meters.sharing = lambda engine=engine: sharing_report(engine)
            text = House([service]).metrics().decode()
        runner.close()
    samples = {
        (s.name, s.labels.get("tier"), s.labels.get("outcome")): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    assert samples["quire_tier_loads_total", "disk", "hit"] == 128 // 32
    assert samples["quire_tier_loads_total", "disk", "corrupt"] == 0
    assert samples["quire_tier_loaded_bytes_total", "disk", None] > 0
    assert samples["quire_tier_loaded_tokens_total", None, None] == 128
    assert samples["quire_tier_up", "host", None] == 1
    assert samples["quire_tier_blocks", "disk", None] > 4
    assert samples["quire_requests_loading", None, None] == 0


def test_metrics_tell_what_was_done_for_want_of_memory() -> None:
    ladder = LadderStats(
        dropped_blocks=1, demoted_blocks=2, recoded=3, yielded=4, offloaded_bytes=5, lost=6
    )
    ladder.swapped, ladder.recomputed, ladder.queued, ladder.parked_bytes = 7, 8, 9, 10
    stats = EngineStats(ladder=ladder, checks={"looks": 11, "violations": {"books": 12}})
    samples = {
        (s.name, s.labels.get("step") or s.labels.get("invariant")): s.value
        for family in ladder_metrics(stats, "m")
        for s in family.samples
    }
    steps = ("drop", "demote", "recode", "evict", "swap", "recompute", "queue")
    assert [samples["quire_shortage_steps_total", s] for s in steps] == [1, 2, 3, 4, 7, 8, 9]
    assert samples["quire_offloaded_bytes_total", None] == 5
    assert samples["quire_offload_lost_total", None] == 6
    assert samples["quire_parked_bytes", None] == 10
    assert samples["quire_invariant_looks_total", None] == 11
    assert samples["quire_invariant_violations_total", "books"] == 12
