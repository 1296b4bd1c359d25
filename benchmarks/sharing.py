"""What does sharing cost, and which policy finds more?

Operations on a prefix index with up to a million live blocks, and how a look-up grows; bytes that samples and beams of
one prompt hold at the pool; what both eviction policies find on a public trace of prefixes and on traces made from
public lengths (conversations whose turns begin with the turns before, alone and beside a scan of documents that come
once). Without torch: the store counts.

    python benchmarks/sharing.py --traces ../shared/data/traces
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import waste
from common import Document, Spread, Table

from quire.bench.replay import Ask, read_trace, replay
from quire.spec import CacheGroup, CacheSpec, Field
from quire.store import BlockStore, BlockTable
from quire.store.sharing import Sharing

TRACES = common.ROOT.parent / "shared" / "data" / "traces"
PROMPT_CHUNKS = (16, 64, 256)
TURN_TOKENS = 64
"""Tokens of a block in the traces that are made from lengths."""


def spec_of(block_tokens: int = 32) -> CacheSpec:
    field = Field("k", (16,), "float32")
    return CacheSpec((CacheGroup("g", ((0, 0),), (field,), block_tokens=block_tokens),))


# -- the index ---------------------------------------------------------------------------------------------------


class Filled:
    """A cache with `live` blocks, in prompts of 64 chunks of which pairs share the first half."""

    def __init__(self, live: int, seed: int) -> None:
        self.draw = random.Random(seed)
        spec = spec_of()
        bytes_ = live * spec.groups[0].block_bytes
        self.sharing = Sharing(BlockStore(spec, bytes_, slab_bytes=bytes_ // 8 // 64 * 64))
        self.pool = self.sharing.index.pools[0]
        half: list[int] = []
        self.prompts: list[list[int]] = []
        while self.pool.cached + 64 <= self.pool.capacity:
            half = half if len(self.prompts) % 2 else self.tokens(32)
            self.prompts.append([*half, *self.tokens(32)])
            self.leave(self.prompts[-1])

    def tokens(self, chunks: int) -> list[int]:
        return [self.draw.randrange(50_000) for _ in range(32 * chunks)]

    def leave(self, ids: list[int]) -> int:
        table = self.sharing.open(ids, limit=len(ids))
        found = table.length
        table.append(len(ids) - found)
        table.commit()
        table.release()
        return found

    def look_s(self, chunks: int, n: int) -> float:
        """CPU seconds of one look-up that finds `chunks` chunks, the median: only looking, nothing is taken."""
        some = [
            self.tokens(chunks) for _ in range(max(1, min(20, self.pool.capacity // (4 * chunks))))
        ]
        for ids in some:
            self.leave(ids)
        took_s = []
        for i in range(n):
            ids = some[i % len(some)]
            began = time.process_time()
            found = self.sharing.look(ids, limit=len(ids)).found
            took_s.append(time.process_time() - began)
            if found != chunks:
                raise SystemExit("a look-up did not find what is there")
        return statistics.median(took_s)

    def request_s(self, n: int) -> float:
        """CPU seconds per block of new prompts in a full cache: look-up, take, publish, release, evict."""
        some = [self.tokens(64) for _ in range(n)]
        began = time.process_time()
        for ids in some:
            self.leave(ids)
        return (time.process_time() - began) / (64 * n)


def index_rows(args: argparse.Namespace, doc: Document) -> list[dict[str, Any]]:
    rows = []
    for live in args.live:
        filled = Filled(live, args.seed)
        common.check(doc, f"{live:,} live blocks", filled.pool.cached > 0.9 * live)
        row: dict[str, Any] = {"live_blocks": filled.pool.cached}
        for chunks in PROMPT_CHUNKS:
            turns = [filled.look_s(chunks, args.lookups) for _ in range(args.repeats)]
            row[f"look_us_{chunks}"] = Spread.of(turns).json(1e6, 1)
        turns = [1 / filled.request_s(args.lookups) for _ in range(args.repeats)]
        row["blocks_per_s"] = Spread.of(turns).json(digits=0)
        rows.append(row)
    return rows


# -- copy on write -----------------------------------------------------------------------------------------------


def held_blocks(tables: Sequence[BlockTable]) -> int:
    group = tables[0].groups[0]
    return tables[0].store.usage().held_bytes // group.block_bytes


def samples(prompt: int, n: int, out: int) -> dict[str, int]:
    """n samples over one prompt, each `out` tokens further."""
    first = BlockStore(spec_of(), 64 << 20).open()
    waste.grow(first, prompt)
    tables = [first, *(first.fork() for _ in range(n - 1))]
    for _ in range(out):
        for t in tables:
            t.append(1)
            t.commit()
    own = -(-(prompt + out) // 32) - prompt // 32
    return {"held_blocks": held_blocks(tables), "least_blocks": prompt // 32 + n * own}


def beam(prompt: int, width: int, out: int, seed: int) -> dict[str, int]:
    """A beam in which every step some hypotheses are continued twice and others not at all."""
    draw = random.Random(seed)
    first = BlockStore(spec_of(), 64 << 20).open()
    waste.grow(first, prompt)
    tables = [first, *(first.fork() for _ in range(width - 1))]
    most = 0
    for _ in range(out):
        parents = [draw.randrange(width) for _ in range(width)]
        fresh = [tables[p].fork() for p in parents]
        for t in tables:
            t.release()
        tables = fresh
        for t in tables:
            t.append(1)
            t.commit()
        most = max(most, held_blocks(tables))
    own = -(-(prompt + out) // 32) - prompt // 32
    return {"held_blocks": most, "least_blocks": prompt // 32 + width * own}


# -- policies ----------------------------------------------------------------------------------------------------


def conversations(lengths: waste.Lengths) -> list[list[int]]:
    """Prompt tokens of each conversation's turns: a row that holds the row before and its answer goes on with it."""
    found: list[list[int]] = []
    before = None
    for prompt, answer in lengths:
        if before is None or prompt < before:
            found.append([])
        found[-1].append(prompt)
        before = prompt + answer
    return found


def turns(lengths: waste.Lengths, n: int, seed: int, documents: Sequence[int] = ()) -> list[Ask]:
    """n requests: turns of 200 conversations at a time in random order, with documents between them that come once."""
    draw, serial = random.Random(seed), 0
    waiting = iter(conversations(lengths))
    live: list[tuple[int, list[int], int]] = []
    asks: list[Ask] = []
    scan = iter(documents)
    while len(asks) < n:
        while len(live) < 200 and (turn := next(waiting, None)) is not None:
            live.append((serial, turn, 0))
            serial += 1 << 10
        if not live:
            break
        at = draw.randrange(len(live))
        base, sizes, i = live[at]
        blocks = sizes[i] // TURN_TOKENS
        asks.append(Ask(sizes[i], tuple(base + b for b in range(min(blocks, 1 << 10)))))
        live[at] = (base, sizes, i + 1)
        if i + 1 == len(sizes):
            del live[at]
        document = next(scan, None) if draw.random() < 0.3 else None
        if document is not None:
            asks.append(Ask(document, tuple(serial + b for b in range(document // TURN_TOKENS))))
            serial += 1 << 10
    return asks


def traces(args: argparse.Namespace) -> dict[str, tuple[list[Ask], list[int]]]:
    """Name to requests and capacities in blocks."""
    made = waste.made_up_lengths(200, args.seed)
    if args.smoke or not args.traces.is_dir():
        return {"made-up conversations": (turns(made, 300, args.seed), [50, 400])}
    share = waste.read_lengths(args.traces / "sharegpt8k-lengths.csv")
    papers = [p for p, _ in waste.read_lengths(args.traces / "arxiv-summarization-lengths.csv")]
    out: dict[str, tuple[list[Ask], list[int]]] = {
        "mooncake-conversation": (
            read_trace(str(args.traces / "mooncake-conversation.jsonl")),
            [5859, 19531],
        )
    }
    for name, documents in (("conversations", ()), ("conversations and a scan", papers)):
        asks = turns(share, args.requests, args.seed, documents)
        distinct = len({i for a in asks for i in a.ids})
        out[name] = asks, [distinct // 50, distinct // 10, distinct // 4]
    return out


def policy_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name, (asks, capacities) in traces(args).items():
        for capacity in [*capacities, len({i for a in asks for i in a.ids})]:
            found = {evict: replay(asks, capacity, evict) for evict in ("lru", "cost")}
            lru, cost = found["lru"].hit_blocks, found["cost"].hit_blocks
            rows.append(
                {
                    "trace": name,
                    "requests": len(asks),
                    "capacity_blocks": capacity,
                    "total_blocks": found["lru"].total_blocks,
                    "lru_hit_blocks": lru,
                    "cost_hit_blocks": cost,
                    "cost_to_lru": round(cost / max(1, lru), 4),
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--live", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    p.add_argument("--lookups", type=int, default=200, help="of a turn")
    p.add_argument("--requests", type=int, default=4000, help="of a trace made from lengths")
    p.add_argument("--traces", type=Path, default=TRACES, help="folder of traces and lengths")
    p.add_argument("--part", choices=["all", "index", "copies", "policies"], default="all")
    args = p.parse_args(argv)
    if args.smoke:
        args.live, args.lookups = [1000, 3000], 3
    common.prepare(args)
    doc = common.document("sharing", "What does sharing cost, and which policy finds more?", args)
    tables = []
    doc["index"] = index_rows(args, doc) if args.part in ("all", "index") else []
    table = Table(["live blocks", *(f"look-up of {c}, us" for c in PROMPT_CHUNKS), "blocks/s"])
    for r in doc["index"]:
        looks = (r[f"look_us_{c}"]["median"] for c in PROMPT_CHUNKS)
        table.add(f"{r['live_blocks']:,}", *looks, f"{r['blocks_per_s']['median']:,.0f}")
    tables.append(table)
    doc["copies"] = {"8 samples": samples(1000, 8, 32), "beam of 4": beam(1000, 4, 32, args.seed)}
    for name, c in doc["copies"].items():
        common.check(doc, f"{name} hold one prompt and their tails", _tight(c), c)
    table = Table(["over 1,000 tokens", "held blocks", "one prompt and tails"])
    for name, c in doc["copies"].items():
        table.add(name, c["held_blocks"], c["least_blocks"])
    tables.append(table)
    doc["policies"] = policy_rows(args) if args.part in ("all", "policies") else []
    table = Table(["trace", "capacity", "of blocks asked", "lru", "cost", "cost / lru"])
    for r in doc["policies"]:
        hits = (f"{r[k]:,}" for k in ("lru_hit_blocks", "cost_hit_blocks"))
        table.add(
            r["trace"],
            f"{r['capacity_blocks']:,}",
            f"{r['total_blocks']:,}",
            *hits,
            r["cost_to_lru"],
        )
    tables.append(table)
    return common.report(doc, args, tables)


def _tight(counted: dict[str, int]) -> bool:
    return counted["held_blocks"] <= counted["least_blocks"]


if __name__ == "__main__":
    main()
