"""Replaying a trace of prefixes through the real index, without a model and without memory behind it.

    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2, …]}     one request a line

The format is Mooncake's (FAST '25): an id names 512 tokens together with all before them, the last one a part of that.
Requests follow one another as the file has them, without timing; nothing of one is held while another runs, and outputs
are not cached. Every id becomes a block of one token, so that look-up, insertion and eviction are those of serving.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.errors import ConfigError
from quire.store.insight import counting_store
from quire.store.sharing import Sharing

__all__ = ["BLOCK_TOKENS", "Ask", "Replay", "read_trace", "replay"]

BLOCK_TOKENS = 512
"""Tokens that an id of the trace stands for."""

UNLIMITED = "unlimited"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a trace: tokens of its prompt, and the ids of its blocks."""

    input_tokens: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay counted: integers, the same on every machine.

    Args:
        total_blocks: ids asked for.
        hit_blocks: the longest leading run of ids that was there, summed over requests.
        hit_tokens: 512 for each, at most the request's own.
        resident_blocks: cached at the end.
    """

    requests: int
    total_blocks: int
    hit_blocks: int
    hit_tokens: int
    total_tokens: int
    resident_blocks: int
    seconds: float


def read_trace(path: str) -> list[Ask]:
    """All requests of a file, in order.

    Raises:
        ConfigError: it cannot be read, or a line is not in the format.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: {getattr(e, 'strerror', None) or e}") from e
    asks = [
        _line(line, f"{path}, line {i}: ")
        for i, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]
    if not asks:
        raise ConfigError(f"{path} holds no request; one JSON object a line")
    return asks


def _line(line: str, where: str) -> Ask:
    try:
        found = json.loads(line)
        tokens, ids = found["input_length"], tuple(found["hash_ids"])
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(
            f'{where}must be an object with "input_length" and "hash_ids", as Mooncake\'s traces have them'
        ) from e
    if not all(type(i) is int and 0 <= i < 1 << 31 for i in (tokens, *ids)):
        raise ConfigError(f"{where}input_length and hash_ids are integers from 0 to 2^31 - 1")
    return Ask(tokens, ids)


def capacity_of(text: str, asks: Iterable[Ask]) -> int:
    """`--capacity-blocks`: a number, or room for every id of the trace. Raises ConfigError."""
    if text == UNLIMITED:
        return len({i for a in asks for i in a.ids}) or 1
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"--capacity-blocks must be a number of at least 1, or {UNLIMITED}, not {text!r}"
        )
    return int(text)


def replay(asks: Sequence[Ask], capacity_blocks: int, evict: str) -> Replay:
    """Runs the requests one after the other over an empty cache.

    Args:
        capacity_blocks: blocks that stay at most; of a longer request the first ones.
        evict: "lru" or "cost".
    """
    store = counting_store(capacity_blocks)
    sharing = Sharing(store, evict=evict)
    hit_blocks = hit_tokens = 0
    began = time.perf_counter()
    for ask in asks:
        ids = ask.ids[:capacity_blocks]
        table = sharing.open(ids, limit=len(ids))
        hit_blocks += table.length
        hit_tokens += min(BLOCK_TOKENS * table.length, ask.input_tokens)
        table.append(len(ids) - table.length)
        table.commit()
        table.release()
    pool = store.pool_for(store.spec.groups[0])
    return Replay(
        requests=len(asks),
        total_blocks=sum(len(a.ids) for a in asks),
        hit_blocks=hit_blocks,
        hit_tokens=hit_tokens,
        total_tokens=sum(a.input_tokens for a in asks),
        resident_blocks=pool.cached,
        seconds=time.perf_counter() - began,
    )


def document(trace: str, capacity: str, evict: str, found: Replay) -> dict[str, Any]:
    """The keys of `quire bench prefix-trace --json`."""
    return {
        "case": "prefix-trace",
        "trace": Path(trace).name,
        "capacity_blocks": capacity if capacity == UNLIMITED else int(capacity),
        "evict": evict,
        "requests": found.requests,
        "total_blocks": found.total_blocks,
        "hit_blocks": found.hit_blocks,
        "hit_tokens": found.hit_tokens,
        "total_tokens": found.total_tokens,
        "resident_blocks": found.resident_blocks,
        "hit_ratio": round(found.hit_tokens / max(1, found.total_tokens), 6),
        "seconds": round(found.seconds, 3),
    }
