"""How one side of `peers.py` is driven: a process of its own, a line of JSON for each request and for each answer.

    open KEY KV PROMPTS ROOM     prefill; the texts of KEY are then in the middle of decoding, with room for ROOM tokens
    steps KEY N                  N greedy tokens more of every text of KEY       -> seconds
    texts KEY                    the tokens that KEY has given so far            -> one list a text
    close KEY
    judge PROMPTS TEXTS          transformers alone: how far each token lies below the best one there
    prefill KV PROMPTS           the same from nothing, up to the first tokens   -> seconds

It needs nothing but Python, so that it runs wherever a peer is installed. What a library prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


class Side:
    """What a side implements. `open` returns an object with `steps(n)`, `texts()`, `kv_bytes()` and `close()`."""

    name = ""
    version = ""

    def open(self, kv: str, prompts: list[list[int]], room: int) -> Any:
        raise NotImplementedError

    def judge(self, prompts: list[list[int]], texts: list[list[int]]) -> list[list[float]]:
        raise NotImplementedError


def serve(make: Any) -> None:
    """Answers requests until stdin ends. `make()` builds the side; whatever it raises ends it with one line."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(document: dict[str, Any]) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    try:
        side = make()
    except Exception as e:  # noqa: BLE001 - whatever a peer's installation does: it is not there
        answer({"error": " ".join(f"{type(e).__name__}: {e}".split())[:300]})
        return
    answer({"name": side.name, "version": side.version})
    opened: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            answer(_do(side, opened, json.loads(line)))
        except Exception as e:  # noqa: BLE001 - the driver says it and goes on without this side
            answer({"error": " ".join(f"{type(e).__name__}: {e}".split())[:300]})


def _do(side: Side, opened: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    op, key = asked["op"], asked.get("key", "")
    if op == "open":
        opened[key] = side.open(asked["kv"], asked["prompts"], asked["room"])
        return {"kv_bytes": int(opened[key].kv_bytes())}
    if op == "steps":
        began = time.perf_counter()
        opened[key].steps(asked["n"])
        return {"seconds": time.perf_counter() - began}
    if op == "texts":
        return {"texts": [[int(t) for t in text] for text in opened[key].texts()]}
    if op == "prefill":
        began = time.perf_counter()
        made = side.open(asked["kv"], asked["prompts"], asked["room"])
        seconds = time.perf_counter() - began
        made.close()
        return {"seconds": seconds}
    if op == "judge":
        return {"gaps": side.judge(asked["prompts"], asked["texts"])}
    if op == "close":
        opened.pop(key).close()
        return {}
    raise ValueError(f"unknown request {op!r}")
