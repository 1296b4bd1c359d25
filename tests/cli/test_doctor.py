"""`quire doctor`: its document, its page, what it refuses, and when it says that a tier pays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quire.bench.doctor import judge
from quire.store.tiers.segments import USED
from redis_server import needs_redis, redis_server


def test_what_it_measures(quire: Callable[..., Any], tiny: Any, tmp_path: Path) -> None:
    words = ("doctor", "--model", tiny, "--folder", tmp_path, "--tokens", 64, "--size", 1)
    done = quire(*words, "--repeats", 2, "--kv", "int8", "--json")
    assert done.code == 0, done.err
    doc = done.json
    assert doc["kv"] == "int8"
    assert doc["disk"]["get_gb_per_s"]["n"] == 2
    assert doc["memory"]["copy_gb_per_s"]["median"] > 0
    assert [v["tier"] for v in doc["verdicts"]] == ["host", "disk"]
    # 2 layers, 2 heads, k and v: 32 tokens of 8 codes and a float16 scale in the body, of 8 floats in the raw window
    assert doc["block_bytes"] > 2 * 2 * 2 * 32 * (8 + 32)
    assert doc["network"]["loopback_gb_per_s"]["n"] == 2
    assert doc["network"]["redis"] is None
    assert list(tmp_path.iterdir()) == []  # nothing of it stays
    page = quire(*words, "--repeats", 1).out
    assert "cold get" in page
    assert "pay" in page


@needs_redis
def test_a_server_is_measured_and_left_as_it_was(
    quire: Callable[..., Any], tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUIRE_REDIS_PASSWORD", "hidden")
    words = ("doctor", "--model", tiny, "--folder", tmp_path, "--tokens", 64, "--size", 1)
    with redis_server(requirepass="hidden") as server:
        words = (*words, "--repeats", 2, "--redis", server.place)
        found, page = quire(*words, "--json").json, quire(*words).out
        with server.client() as client:
            left = {k: v for k, v in client.hgetall(USED).items() if int(v)}
            assert not left
            assert not list(client.scan_iter(b"quire:1:*:*:*"))
            client.config_set("maxmemory", str(client.info()["used_memory"]))
        full = quire(*words)
    remote = found["network"]["redis"]
    assert remote["address"] == server.place
    assert remote["get_gb_per_s"]["n"] == remote["put_gb_per_s"]["n"] == 2
    assert remote["lookup_s"]["median"] > 0
    assert [v["tier"] for v in found["verdicts"]] == ["host", "disk", "redis"]
    assert f"at {server.place}" in page
    assert full.code == 2
    assert full.err.strip().count("\n") == 0
    gone = quire(*words)
    assert gone.code == 2
    assert "hidden" not in found["network"].__repr__() + page + full.err + gone.err


def test_the_question_has_its_share() -> None:
    near, far = (judge("redis", 1e9, 1_000_000, 0.010, wait_s) for wait_s in (0.0, 0.009))
    assert near.load_s == pytest.approx(0.001)
    assert far.load_s == pytest.approx(0.010)
    assert (near.pays, far.pays) == (True, False)


def test_a_tier_pays_where_loading_is_clearly_less() -> None:
    block, compute_s = 1_000_000, 0.010
    slow, even, fast = (judge("disk", rate, block, compute_s) for rate in (1e7, 1.1e8, 1e9))
    assert (slow.pays, even.pays, fast.pays) == (False, False, True)
    assert fast.load_s == pytest.approx(0.001)
    assert fast.times == pytest.approx(10)
    assert fast.text() == "disk pays: a block in 1 ms, computed in 10 ms, 10 times as fast"
    assert slow.text() == "disk does not pay: a block in 100 ms, computed in 10 ms"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--folder", "/nowhere"), "there is no such folder"),
        (("--tokens", "0"), "must be at least 1"),
        (("--tokens", "100000"), "give fewer"),
        (("--kv", "none", "--tokens", "8"), "caches nothing"),
        (("--kv", "int5", "--tokens", "8"), "unknown codec"),
        (("--redis", "here:port"), "is no Redis address"),
    ],
)
def test_what_it_refuses(
    quire: Callable[..., Any], tiny: Any, words: tuple[str, ...], part: str
) -> None:
    done = quire("doctor", "--model", tiny, *words)
    assert done.code == 2
    assert part in done.err
    assert done.err.strip().count("\n") == 0
