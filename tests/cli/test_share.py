"""`--share` and `quire bench prefix-trace`: what they print, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def prompts(path: Path, **last: object) -> Path:
    common = list(range(3, 83))
    lines = [{"prompt": [*common, i, i, i], "max_tokens": 2} for i in range(3)]
    lines[-1] |= last
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_prompts_that_begin_alike(quire: Callable[..., Any], tiny: Any, tmp_path: Path) -> None:
    file = prompts(tmp_path / "p.jsonl", share="off")
    words = ("run", "--model", tiny, "--prompts", file, "--memory", "8MiB", "--json")
    off, on = quire(*words), quire(*words, "--share", "prefix:explain=on,ghost=1,audit=1")
    assert on.code == 0, on.err
    assert [r["cached_tokens"] for r in off.json["requests"]] == [0, 0, 0]
    assert [r["cached_tokens"] for r in on.json["requests"]] == [0, 64, 0]
    assert [r["token_ids"] for r in on.json["requests"]] == [
        r["token_ids"] for r in off.json["requests"]
    ]
    assert "sharing" not in off.json
    assert on.json["sharing"]["hit_tokens"] == 64
    assert on.json["sharing"]["audit"]["diverged"] == 0
    assert [g["factor"] for g in on.json["sharing"]["ghost"]] == [0.5, 1.0, 2.0]
    assert on.json["requests"][0]["miss"]["reason"] == "never stored"


def test_a_trace_is_replayed(quire: Callable[..., Any], tmp_path: Path) -> None:
    """Four requests by hand: 2 + 3 leading blocks are there, the last one partial; then two blocks hold two."""
    file = tmp_path / "t.jsonl"
    asks = [(1000, [1, 2]), (1400, [1, 2, 3]), (1400, [1, 2, 3]), (400, [9])]
    file.write_text("\n".join(json.dumps({"input_length": n, "hash_ids": i}) for n, i in asks))
    done = quire("bench", "prefix-trace", file, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert (found["requests"], found["total_blocks"], found["total_tokens"]) == (4, 9, 4200)
    assert (found["hit_blocks"], found["hit_tokens"], found["resident_blocks"]) == (5, 2424, 4)
    small = quire("bench", "prefix-trace", file, "--capacity-blocks", 2, "--evict", "lru", "--json")
    assert (small.json["hit_blocks"], small.json["resident_blocks"]) == (4, 2)
    assert "5 of 9 blocks" in quire("bench", "prefix-trace", file).out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("run", "x", "--share", "all"), "known: off, prefix"),
        (("run", "x", "--share", "prefix:evict=x"), "known: cost, lru"),
        (("run", "x", "--share", "prefix", "--kv", "none"), "drop one of them"),
        (("run", "x", "--share", "prefix", "--compare", "none"), "drop --share"),
        (("bench", "prefix-trace"), "needs a file"),
        (("bench", "prefix-trace", "/nowhere"), "No such file"),
        (("bench", "prefix-trace", "/dev/null"), "holds no request"),
        (("bench", "prefix-trace", __file__), "line 1: must be an object"),
        (("bench", "prefix-trace", "/dev/null", "--evict", "fifo"), "known: cost, lru"),
        (("bench", "decode", "--evict", "lru"), "drop it"),
        (("bench", "decode", "--own", 3), "drop it"),
        (("bench", "shared-prefix", "--own", 0), "--own must be at least 1"),
    ],
)
def test_refusals(quire: Callable[..., Any], words: tuple[object, ...], part: str) -> None:
    done = quire(*words)
    assert done.code == 2, done.err
    assert done.out == ""
    assert done.err.count("\n") == 1, done.err
    assert part in done.err


def test_a_line_cannot_ask_for_what_is_off(
    quire: Callable[..., Any], tiny: Any, tmp_path: Path
) -> None:
    file = prompts(tmp_path / "p.jsonl", share="prefix")
    done = quire("run", "--model", tiny, "--prompts", file)
    assert done.code == 2
    assert "--share prefix" in done.err


KVZIP = ("--keep", "kvzip:budget=0.5,sinks=1,window=4,boundary=2")


def test_prompts_that_go_on_from_what_stayed_of_a_context(
    quire: Callable[..., Any], tiny: Any, tmp_path: Path
) -> None:
    """As text, in tokens, by line: the same context, the same tokens, found by all but the first."""
    context = "the log of a cache is a context, " * 3
    words = ("--model", tiny, "--memory", "8MiB", "--max-tokens", 3, "--json", *KVZIP)
    asks = [context + q for q in ("why?", "how?", "who?")]
    alone = quire("run", *asks, *words, "--context", context)
    assert alone.code == 0, alone.err
    found = quire("run", *asks, *words, "--context", context, "--share", "prefix")
    n = found.json["sharing"]["stored_wholes"], found.json["sharing"]["hit_wholes"]
    assert n == (1, 2)
    tokens = found.json["requests"][1]["cached_tokens"]
    assert tokens > 50
    file = tmp_path / "p.jsonl"
    lines = [
        {"prompt": a, "context": c} for a, c in zip(asks, (tokens, context, tokens), strict=True)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    lined = quire("run", "--prompts", file, *words, "--share", "prefix")
    config = tmp_path / "c.toml"
    config.write_text(f"[run]\ncontext = {tokens}\n")
    told = quire("run", *asks, *words, "--share", "prefix", "--config", config)
    texts = [[r["token_ids"] for r in out.json["requests"]] for out in (alone, found, lined, told)]
    assert all(t == texts[0] for t in texts)
    assert lined.json["sharing"]["hit_wholes"] == told.json["sharing"]["hit_wholes"] == 2
    plain = quire("run", *asks, *words)
    assert [r["token_ids"] for r in plain.json["requests"]] != texts[0], "tokens went elsewhere"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--context", 5), "keep by score, as --keep kvzip"),
        (("--context", 5, "--kv", "none"), "keep by score"),
        (("--context", 5, "--keep", "window:64"), "lets none go there"),
        (("--context", 0, *KVZIP), "from 1 on"),
        (("--context", -3, *KVZIP), "from 1 on"),
        (("--context", "", *KVZIP), "from 1 on"),
        (("--context", "y", *KVZIP), "the text that the prompt begins with"),
        (("--context", 1000, *KVZIP), "longer than the prompt"),
        (("--context", 1, *KVZIP, "--compare", "none"), "drop --context"),
    ],
)
def test_contexts_that_are_refused(
    quire: Callable[..., Any], tiny: Any, words: tuple[Any, ...], part: str
) -> None:
    done = quire("run", "xyz", "--model", tiny, *words)
    assert (done.code, done.out) == (2, "")
    assert part in done.err
    assert done.err.count("\n") == 1
