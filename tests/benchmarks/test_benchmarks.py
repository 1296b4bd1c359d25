"""Every benchmark runs small: its own correctness checks hold and its document has its keys. Nothing is timed here."""

from __future__ import annotations

import argparse
import importlib
import json
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
KEYS = {
    "common": {"stream_gb_per_s"},
    "road": {"model", "by_context", "after_prompt"},
    "storage": {"cases"},
    "overhead": {"cases", "bar", "met"},
    "waste": {"by_block_tokens", "by_reservation_tokens", "full_arena", "bars"},
    "blocks": {"rows", "stream_gb_per_s"},
    "sampling": {"cases"},
    "linears": {"cases"},
    "rounding": {"cases", "perplexity"},
    "siblings": {"cases"},
    "prefill": {"cases"},
    "caches": {"cases", "peers", "verdicts"},
    "contexts": {"cases"},
    "peers": {"cases", "peers", "left_out", "verdicts"},
    "attention": {"cases", "torch", "attention", "verdicts"},
    "sealing": {"cases"},
    "peak": {"cases", "verdicts"},
    "latents": {"cases"},
    "sharing": {"index", "copies", "policies"},
    "dropping": {"cases"},
    "reading": {"cases"},
    "streaming": {"cases", "recomputed_ppl", "sink_share", "verdicts"},
    "serving": {"repeated", "beside", "verdicts"},
    "watching": {"looks", "misses"},
    "tiers": {"stores", "restart", "steps", "checksum"},
    "offload": {"cases", "copy_gb_per_s", "disk_get_gb_per_s"},
    "shortage": {"cases"},
}
ALWAYS = {"benchmark", "question", "command", "hardware", "commit", "settings", "checks", "smoke"}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark as `python benchmarks/NAME.py` would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_every_benchmark_is_here() -> None:
    assert {p.stem for p in FOLDER.glob("[a-z]*.py")} == set(KEYS)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=pytest.mark.slow) if x in ("peers", "serving") else x
        for x in sorted(KEYS)
    ],
)
def test_document(name: str, load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    load(name).main(["--smoke", "--json", "--repeats", "2", "--threads", "1"])
    doc = json.loads(capsys.readouterr().out)
    assert doc.keys() >= ALWAYS | KEYS[name]
    assert doc["benchmark"] == name
    assert doc["smoke"] is True
    assert all(c["ok"] in (True, None) for c in doc["checks"].values())
    assert doc["checks"] or name == "common"


def test_a_failed_check_ends_the_run(load: Any) -> None:
    common: ModuleType = load("common")
    doc = {"benchmark": "x", "checks": {}}
    with pytest.raises(SystemExit, match="nothing was timed"):
        common.check(doc, "two is three", False)
    assert doc["checks"] == {"two is three": {"ok": False}}


def test_figures_by_hand(load: Any) -> None:
    common, waste = load("common"), load("waste")
    turns = common.Turns({"a": [2.0, 4.0, 9.0], "b": [1.0, 4.0, 3.0]})
    assert turns.spread("a").json() == {"median": 4.0, "min": 2.0, "max": 9.0, "n": 3}
    assert turns.ratio("a", "b") == common.Spread(2.0, 1.0, 3.0, 3)
    fit = common.line_fit([0, 1, 2], [1.0, 3.0, 5.0])
    assert (fit["at_zero"], fit["slope"], fit["r2"]) == pytest.approx((1.0, 2.0, 1.0))
    lengths = [(3, 5), (10, 7)]  # 8 and 17 tokens
    assert waste.internal(lengths, 16) == pytest.approx(1 - 25 / 48)
    assert waste.counted(lengths, 16) == pytest.approx(1 - 25 / 48)
    assert waste.reserved(lengths, 16) == pytest.approx({"waste": 1 - 24 / 32, "cut_share": 0.5})


def test_needed_bytes_are_what_later_queries_read(load: Any) -> None:
    waste = load("waste")
    store_of = waste.BlockStore
    table = store_of(waste.llama(None), 64 << 20).open()
    waste.grow(table, 33)
    assert waste.needed_bytes(table) == 33 * 32 * 8 * 2 * 128 * 2
    body = store_of(waste.llama(0), 64 << 20).open()
    waste.grow(body, 33)  # one sealed block of codes and scales, one raw token
    assert waste.needed_bytes(body) == 32 * 8 * 2 * (32 * (128 + 2) + 128 * 2)


def test_shares_and_bars_are_taken_within_a_turn(load: Any) -> None:
    common, attention = load("common"), load("attention")
    cache = SimpleNamespace(kv="bf16", batch=1, ctx=8192, steps=[0, 0], n_bytes=lambda: 300)
    seconds = {
        "bf16": [2.0, 4.0, 8.0],  # of two calls: 300, 150, 75 bytes a second
        "bf16 resident": [1.0, 2.0, 2.0],  # 600, 300, 300
        "bf16 stream": [2.0, 2.0, 10.0],  # 500, 500, 100
    }
    row = attention.case_row(cache, common.Turns(seconds), 1000, "fused", [2.0, 8.0, 8.0])
    assert row["us"]["median"] == 2e6
    assert row["share_of_stream"] == {"median": 0.6, "min": 0.3, "max": 0.75, "n": 3}
    assert row["share_of_resident"] == {"median": 0.5, "min": 0.25, "max": 0.5, "n": 3}
    assert row["share_of_smaller"] == {"median": 0.6, "min": 0.5, "max": 0.75, "n": 3}
    assert row["torch_takes"] == {"median": 2.0, "min": 2.0, "max": 4.0, "n": 3}
    assert row["bars"] == {"share_of_smaller": 0.75, "torch_takes": 2.5, "met": False}
    cache.ctx = 1024
    row = attention.case_row(cache, common.Turns(seconds), 1000, "fused", [2.0, 8.0, 8.0])
    assert row["bars"] == {"share_of_smaller": None, "torch_takes": 1.5, "met": True}


def test_sets_hold_what_a_step_reads_in_random_order(load: Any) -> None:
    attention = load("attention")
    args = argparse.Namespace(
        head_dim=32, kv_heads=2, heads=4, block_tokens=32, cold_mib=1, patterns=8, seed=0
    )
    assert {"bf16", "fp8", "int8", "int4", "int4:group=32", "kivi:bits=2", "kivi:bits=4"} <= set(
        attention.recipes()
    )
    plain = attention.Cache(args, "bf16", 2, 224)
    assert plain.n_bytes() == 2 * 224 * 2 * 2 * 32 * 2  # batch, tokens, heads, fields, channels
    assert len(plain.steps) * plain.n_bytes() >= 1 << 20
    units = [u for s in plain.steps for r in s.reads for u in r.blocks.units.reshape(-1).tolist()]
    assert len(set(units)) == len(units) == len(plain.steps) * 2 * 7
    assert sum(abs(b - a) == 128 for a, b in pairwise(units)) < len(units) / 4  # 8 KiB a block
    resident = {u for r in plain.resident.reads for u in r.blocks.units.reshape(-1).tolist()}
    assert len(resident) == 7  # all of 256 KiB that there are
    kivi = attention.Cache(args, "kivi:bits=2", 1, 200)
    raw, coded = 200 - 64, 64  # whole blocks behind the window of 128
    field = coded * 2 * (32 // 4) + 2 * 2 * 2 * 2 * 32  # codes; scale and min per channel or token
    assert kivi.n_bytes() == raw * 2 * 2 * 32 * 2 + 2 * field
    held = len(kivi.tables) * kivi.layout.spec.bytes_for(200)
    assert kivi.store.usage().held_bytes <= held  # raw blocks behind the window were given back


def test_bytes_of_every_cache(load: Any) -> None:
    """A tiny Llama, two prompts of 40 tokens: 2 layers, one KV head of 64, float32."""
    caches = load("caches")
    args = argparse.Namespace(
        random="tiny", dtype="float32", seed=0, weights="plain", kv=["auto", "int8"], memory="16MiB"
    )
    sides = caches.Sides(args, 64)
    prompts = [[1] * 40, [2] * 40]
    held = {}
    for name in (*sides.own, "attach auto", "attach int8"):
        side = sides.forward(name, prompts)
        held[name] = side.kv_bytes()
        side.close()
    a_token = 2 * 2 * 64 * 4
    assert held["dynamic"] == 2 * 40 * a_token
    assert 0 <= held["static"] - 2 * 64 * a_token < 256  # and its counters
    assert 0 <= held["quantized fp8"] - 2 * 40 * a_token // 4 < 256
    assert held["attach auto"] == 2 * 64 * a_token  # two blocks of 32 each
    engine = caches.Engined(sides.runner("auto"), prompts)
    assert engine.kv_bytes() == held["attach auto"]
    engine.close()
    recipes = ("auto", "fp32", "fp16", "int8", "k=fp32,v=int8")
    exact = [caches.lossless(f"engine {kv}", "float32") for kv in recipes]
    assert exact == [True, True, False, False, False]


def test_rates_and_floors_are_taken_within_a_turn(load: Any) -> None:
    common, caches = load("common"), load("caches")
    seconds = {"dynamic": [2.0, 6.0], "static": [1.0, 2.0], "stream": [1.0, 2.0]}
    row = caches.row("static", 9, 3, 4, common.Turns(seconds), 50, 200, 2000)
    assert row["tokens_per_s"] == {"median": 9.0, "min": 6.0, "max": 12.0, "n": 2}
    assert row["to_dynamic"] == {"median": 2.5, "min": 2.0, "max": 3.0, "n": 2}
    assert row["share_of_floor"]["median"] == 0.5  # 4 steps of 250 bytes: half a second, and one


def test_a_prompt_s_figures_by_hand(load: Any) -> None:
    common, prefill = load("common"), load("prefill")
    seconds = {"transformers": [4.0, 4.0], "auto, 8": [2.0, 1.0], "product": [1.0, 2.0]}
    row = prefill.row("auto, 8", 10, common.Turns(seconds), 50, 100)
    assert row["tokens_per_s"]["median"] == 7.5
    assert row["to_transformers"] == {"median": 3.0, "min": 2.0, "max": 4.0, "n": 2}
    assert row["share_of_product"]["median"] == 0.625  # 25 and 50 a second, of 100 and 50
