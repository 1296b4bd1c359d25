"""Every benchmark runs small: its own correctness checks hold and its document has its keys. Nothing is timed here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
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
@pytest.mark.parametrize("name", sorted(KEYS))
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
