"""tools/policies_table.py: budgets as written, a run that goes on where it was stopped, and what is marked."""

from __future__ import annotations

import argparse
import json
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from quire.retention import parse_keep
from tool import load_tool

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool() -> ModuleType:
    return load_tool("policies_table")


def options(path: Path, **changes: Any) -> argparse.Namespace:
    usual = {
        "model": None,
        "text": None,
        "runs": path,
        "policy": ["random", "lru", "tova"],
        "share": [0.5, 0.1],
        "task": ["kv"],
        "ask": ["after"],
        "length": 200,
        "examples": 2,
        "at_once": 4,
    }
    return argparse.Namespace(**usual | changes)


def test_budgets_are_spelled_as_keep_takes_them(tool: ModuleType) -> None:
    assert tool.spelled("window", 0.25, 1000) == "window:250"
    assert tool.spelled("sinks", 0.25, 1000) == "sinks:4+window:246"
    assert tool.spelled("h2o:age=true", 0.1, 1000) == "h2o:budget=0.1,age=true"
    assert tool.spelled("ada(snapkv)", 0.1, 1000) == "ada(snapkv:budget=0.1)"
    assert tool.spelled("duo", 0.5, 1000) == "duo:retrieval=0.333,sinks=16,window=234"
    for policy in tool.POLICIES:
        parse_keep(tool.spelled(policy, 0.25, 1000))


def test_what_stands_there_is_not_measured_again(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def evaluate(_m: Any, _t: Any, configs: Any, tasks: Any, *_: Any, **how: Any) -> Any:
        keeps = [keep for _, keep in configs]
        asked.append(keeps)
        figures = {
            "metric": "recall",
            "value": 0.5,
            "low": 0.4,
            "high": 0.6,
            "depth": None,
            "count": 9,
        }
        rows = [
            SimpleNamespace(
                **figures | {"metric": m}, keep=k, bytes_per_token=1.0, full_bytes_per_token=4.0
            )
            for k in keeps
            for m in ("recall", "drecall")
        ]
        assert tasks == ["kv"]
        assert how["ask"] == "after"
        return SimpleNamespace(rows=rows, digest="d" * 64)

    monkeypatch.setattr(tool, "evaluate", evaluate)
    for loader in (tool.AutoTokenizer, tool.AutoModelForCausalLM):
        monkeypatch.setattr(
            loader, "from_pretrained", lambda *_a, **_k: SimpleNamespace(eval=lambda: None)
        )
    path = tmp_path / "runs.jsonl"
    tool.measure(options(path, policy=["random"]))
    assert asked == [["random:budget=0.5", "full", "random:budget=0.1"]]
    with path.open("a") as out:
        out.write('{"cut": ')
    asked.clear()
    tool.measure(options(path))
    assert sorted(chain(*asked)) == [
        "lru:budget=0.1",
        "lru:budget=0.5",
        "tova:budget=0.1",
        "tova:budget=0.5",
    ]
    asked.clear()
    tool.measure(options(path))
    assert not asked
    page = tool.page(tool.measured(path), "built-in filler")
    assert "| `tova` | 50.0% (0.25) | 50.0% (0.25) |" in page
    assert "9 answers; full cache 50.0%." in page


def test_bold_is_above_both_baselines_and_cursive_below_random(tool: ModuleType) -> None:
    def row(policy: str, low: float, high: float) -> dict[str, Any]:
        unit = {"task": "kv", "ask": "after", "length": 9, "examples": 1, "answers": 3}
        figures = {"recall": (low + high) / 2, "low": low, "high": high, "bytes": 0.5}
        return unit | figures | {"policy": policy, "share": 0.5, "digest": "d", "keep": policy}

    rows = [
        row("random", 0.3, 0.4),
        row("lru", 0.5, 0.6),
        row("best", 0.7, 0.8),
        row("middle", 0.45, 0.55),
        row("worst", 0.1, 0.2),
    ]
    rows = [json.loads(json.dumps(r)) for r in rows]
    page = tool.page(rows, "x")
    assert tool.page([], "x", page) == tool.page(rows, "x", page) == page
    other = [r | {"task": "needle"} for r in rows]
    both = tool.page(other, "x", page)
    assert both == tool.page([*rows, *other], "x")
    assert both.startswith(page)
    with pytest.raises(SystemExit, match="other texts or weights"):
        tool.page(other, "y", page)
    assert "| `best` | **75.0%** (0.50) |" in page
    assert "| `middle` | 50.0% (0.50) |" in page
    assert "| `worst` | *15.0%* (0.50) |" in page
    assert page.index("| `best`") < page.index("| `lru`") < page.index("| `worst`")
