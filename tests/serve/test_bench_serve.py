"""`quire bench serve` against a real server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quire.cli.bench_serve import Load, measure_server
from quire.errors import ConfigError

NOTHING: dict[str, Any] = dict.fromkeys(Load.__dataclass_fields__) | {
    "ctx": 64,
    "out": 5,
    "seed": 0,
    "model": "packaged",
}


def load(**more: Any) -> Load:
    return Load(**(NOTHING | more))


def test_what_clients_saw_is_told(
    packaged: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plot = tmp_path / "waits.svg"
    asked = load(
        url=packaged.url, rate=50.0, requests=8, shared=48, first=60.0, between=60.0, plot=str(plot)
    )
    measure_server(asked, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["answered"] == found["requests"] == 8
    assert found["errors"] == {}
    assert found["prompt_tokens"] == 8 * 64
    assert 0.4 < found["cached_share"] < 0.8
    assert found["goodput"]["share"] == 1.0
    assert found["first_token_s"]["p50"] <= found["first_token_s"]["max"]
    assert "first token" in plot.read_text()
    measure_server(load(url=f"{packaged.url}/v1", rate=50.0, requests=2), json=False)
    text = capsys.readouterr().out
    assert text.startswith("2 of 2 requests answered")
    assert "between tokens, ms: p50" in text


def test_a_trace_is_sent(packaged: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = {"timestamp": 0, "input_length": 800, "output_length": 40, "hash_ids": [1, 2]}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(row | {'timestamp': 900})}\n")
    measure_server(load(url=packaged.url, trace=str(path), shrink=8.0, speed=3.0), json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["answered"] == 2
    assert found["prompt_tokens"] == 200
    assert found["cached_share"] > 0.4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "needs a server"),
        ({"url": "x", "shrink": 2.0}, "--shrink is about a trace"),
        ({"url": "x", "trace": "t", "rate": 2.0}, "--rate is about drawn"),
        ({"url": "x", "trace": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"url": "x", "plot": "a.pdf"}, ".png, .svg"),
        ({"url": "x", "rate": 0.0}, "above 0"),
        ({"url": "x", "shared": 100}, "does not fit"),
        ({"url": "http://127.0.0.1:9", "requests": 1, "rate": 99.0}, "answered none"),
    ],
)
def test_what_cannot_be_measured_is_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        measure_server(load(**more), json=True)


def test_a_wrong_model_is_told(packaged: Any) -> None:
    asked = load(url=packaged.url, model="other", requests=1, rate=99.0)
    with pytest.raises(ConfigError, match="HTTP 404"):
        measure_server(asked, json=True)


@pytest.mark.parametrize("name", ["rate", "trace", "first", "plot"])
def test_its_options_are_no_other_cases(name: str) -> None:
    with pytest.raises(ConfigError, match="is of bench serve, not of decode"):
        load(**{name: 1}).refuse("decode")
