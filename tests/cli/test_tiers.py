"""`--tiers` and `quire fsck`: what they keep, what they print, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redis_server import needs_redis, redis_server


def test_a_second_run_finds_what_the_first_left(
    quire: Callable[..., Any], tiny: Any, tmp_path: Path
) -> None:
    file, folder = tmp_path / "p.jsonl", tmp_path / "cache"
    file.write_text(json.dumps({"prompt": list(range(3, 150)), "max_tokens": 2}))
    words = ("run", "--model", tiny, "--prompts", file, "--memory", "8MiB", "--json")
    config = tmp_path / "c.toml"
    config.write_text(f'[run]\ntiers = "host:1MiB,disk:8MiB@{folder}"\n')
    first, second = (quire(*words, "--config", config) for _ in range(2))
    assert first.code == second.code == 0, second.err
    (before,), (after,) = first.json["requests"], second.json["requests"]
    assert before["token_ids"] == after["token_ids"]
    assert (before["cached_tokens"], before["loaded_tokens"]) == (0, 0)
    assert (after["cached_tokens"], after["loaded_tokens"]) == (128, 128)
    assert second.json["share"] == "prefix"
    assert [t["tier"] for t in second.json["sharing"]["tiers"]["levels"]] == ["host", "disk"]

    found = quire("fsck", folder)
    assert found.code == 0, found.err
    assert "0 bad" in found.out
    for path in folder.glob("*.seg"):
        raw = bytearray(path.read_bytes())
        raw[4096 + 9] ^= 1
        path.write_bytes(raw)
    spoilt = quire("fsck", folder, "--json")
    assert spoilt.code == 1
    assert [b["why"] for b in spoilt.json["bad"]] == ["its data does not match its header"]
    third = quire(*words, "--config", config)
    (again,) = third.json["requests"]
    assert again["token_ids"] == before["token_ids"]
    assert quire("fsck", folder, "--drop").code == 0
    assert "0 bad" in quire("fsck", folder).out


@needs_redis
def test_a_redis_server_and_its_password_from_the_environment(
    quire: Callable[..., Any], tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": list(range(3, 150)), "max_tokens": 2}))
    words = ("run", "--model", tiny, "--prompts", file, "--memory", "8MiB", "--json", "--tiers")
    with redis_server(requirepass="hidden") as server:
        refused = quire(*words, f"redis:8MiB@{server.place}")
        assert refused.code == 2
        assert "refuses us" in refused.err
        assert refused.err.count("\n") == 1
        monkeypatch.setenv("QUIRE_REDIS_PASSWORD", "hidden")
        first, second = (quire(*words, f"redis:8MiB@{server.place}") for _ in range(2))
        assert first.code == second.code == 0, second.err
        server.kill()
        third = quire(*words, f"redis:8MiB@{server.place}")
    for done, loaded in ((first, 0), (second, 128), (third, 0)):
        assert done.json["requests"][0]["loaded_tokens"] == loaded
        assert done.json["requests"][0]["token_ids"] == first.json["requests"][0]["token_ids"]
        assert "hidden" not in done.out + done.err
    assert "going on without it" in third.err


def test_a_prompt_larger_than_the_cache_runs_with_its_cold_blocks_below(
    quire: Callable[..., Any], tiny: Any, tmp_path: Path
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": list(range(3, 220)), "max_tokens": 3}))
    words = ("run", "--model", tiny, "--prompts", file, "--block-tokens", "8", "--json")
    want = quire(*words, "--memory", "8MiB")
    small = (*words, "--memory", "32KiB")
    refused = quire(*small)
    assert refused.code != 0
    assert "32KiB" in refused.err
    got = quire(*small, "--tiers", "host:8MiB;offload=on")
    assert got.code == 0, got.err
    assert got.json["requests"][0]["token_ids"] == want.json["requests"][0]["token_ids"]
    assert got.json["shortage"]["offloaded_bytes"] > 0
    assert got.json["kv_bytes_peak"] <= 32 << 10
    assert got.json["checks"]["violations"] == {}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("run", "x", "--tiers", "host:1GiB;offload=maybe"), "offload is on or off"),
        (("run", "x", "--tiers", "host:1GiB;spill=on"), "known: deadline, sync, swap, offload"),
        (("run", "x", "--tiers", "host"), "is not KIND:SIZE"),
        (("run", "x", "--tiers", "redis:1GiB"), "needs a server"),
        (("run", "x", "--tiers", "tape:1GiB"), "known: host, disk"),
        (("run", "x", "--tiers", "host:1GiB", "--share", "off"), "drop one of them"),
        (("run", "x", "--tiers", "host:1GiB", "--kv", "none"), "drop one of them"),
        (("run", "x", "--tiers", "host:1GiB", "--compare", "none"), "drop --tiers"),
        (("serve", "--tiers", "disk:1GiB"), "needs a folder"),
        (("serve", "--tiers", "host:1GiB", "--share", "off"), "drop one of them"),
        (("fsck", "/nowhere"), "there is no folder /nowhere"),
        (("fsck", "/"), "is no disk tier"),
    ],
)
def test_what_is_refused(quire: Callable[..., Any], words: tuple[str, ...], part: str) -> None:
    done = quire(*words)
    assert done.code == 2
    assert part in done.err
    assert done.err.count("\n") == 1
