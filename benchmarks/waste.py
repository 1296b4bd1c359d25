"""How much of what is allocated holds nothing?

On the lengths of real conversations (prompt and answer tokens): internal waste by block size, the waste of contiguous
reservation, and an arena full of concurrent sequences at random stages, with slab remainders, partly filled slabs,
window blocks half behind the window and raw tails of a quantised body all counted. Without torch: the store counts.

    python benchmarks/waste.py --lengths ../shared/data/traces/sharegpt8k-lengths.csv

A byte is used when a later query may still read it (the span's `needs`), so a window's block is charged for what lies
behind the window. The bars: 1 % at the default block size, 4 % in every full arena.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import common
from common import Document, Table

from quire.codecs.coded import Coded
from quire.errors import CapacityError
from quire.plan import KVLayer, build_layout
from quire.spec import DEFAULT_BLOCK_TOKENS, CacheSpec, Field, Full, KVConfig, Site, Window
from quire.store import BlockStore, BlockTable

LENGTHS = common.ROOT.parent / "shared" / "data" / "traces" / "sharegpt8k-lengths.csv"
BLOCKS = (8, 16, 32, 64, 128, 256)
RESERVED = (2048, 4096, 8192)
CHUNK = 512

Lengths = list[tuple[int, int]]


@dataclass(frozen=True)
class OneByte(Coded):
    """Bytes of a typical 8-bit codec: a code per element, a 2-byte scale per token and head. Encodes nothing."""

    residual_tokens: int = 0
    group_tokens: int = 1
    name: ClassVar[str] = "one-byte"

    def stored(self, site: Site) -> tuple[Field, ...]:
        of = site.field
        return Field(f"{of.name}.codes", of.shape, "uint8"), Field(
            f"{of.name}.scale", (1,), "float16"
        )


def kv_layer(layer: int, heads: int, d: int, window: int | None = None) -> KVLayer:
    fields = (Field("k", (d,), "bfloat16"), Field("v", (d,), "bfloat16"))
    return KVLayer(layer, heads, fields, Full() if window is None else Window(window))


def llama(residual: int | None = None, block_tokens: int = DEFAULT_BLOCK_TOKENS) -> CacheSpec:
    """Llama-3-8B: 32 layers, 8 KV heads of 128; with a one-byte body where `residual` is given."""
    layers = [kv_layer(i, 8, 128) for i in range(32)]
    codecs: Any = None if residual is None else {"": OneByte(residual)}
    config = KVConfig(block_tokens=block_tokens)
    return build_layout(layers, config, dtype="bfloat16", codecs=codecs).spec


def gemma(block_tokens: int = DEFAULT_BLOCK_TOKENS) -> CacheSpec:
    """Gemma-3-4B: 34 layers, 4 KV heads of 256; every sixth layer is global, the others read 1,024 positions."""
    layers = [kv_layer(i, 4, 256, None if i % 6 == 5 else 1024) for i in range(34)]
    return build_layout(layers, KVConfig(block_tokens=block_tokens), dtype="bfloat16").spec


CASES: dict[str, Callable[[int], CacheSpec]] = {
    "uniform, Llama-3-8B": lambda b: llama(None, b),
    "windows and full, Gemma-3-4B": gemma,
    "one-byte body, no residual": lambda b: llama(0, b),
    "one-byte body, residual 128": lambda b: llama(128, b),
}


def read_lengths(path: Path) -> Lengths:
    """(prompt, answer) tokens of every request."""
    with path.open(newline="") as f:
        return [
            (int(r["num_prefill_tokens"]), int(r["num_decode_tokens"])) for r in csv.DictReader(f)
        ]


def made_up_lengths(n: int, seed: int) -> Lengths:
    """Where no trace is at hand: log-normal lengths, no claim attached."""
    draw = random.Random(seed)
    return [
        (1 + int(draw.lognormvariate(5, 1)), 1 + int(draw.lognormvariate(5, 1))) for _ in range(n)
    ]


def internal(lengths: Lengths, block: int) -> float:
    """Allocated minus used over allocated, whole sequences in blocks of so many tokens."""
    used = sum(p + a for p, a in lengths)
    held = sum(-(-(p + a) // block) * block for p, a in lengths)
    return 1 - used / held


def reserved(lengths: Lengths, room: int) -> dict[str, float]:
    """The same for one contiguous region of `room` tokens a request; longer requests are cut to it."""
    used = sum(min(room, p + a) for p, a in lengths)
    cut = sum(p + a > room for p, a in lengths)
    return {"waste": 1 - used / (room * len(lengths)), "cut_share": cut / len(lengths)}


def counted(lengths: Lengths, block: int) -> float:
    """`internal`, counted by the store's own tables instead of arithmetic."""
    layers = [kv_layer(0, 1, 64)]
    spec = build_layout(layers, KVConfig(block_tokens=block), dtype="bfloat16").spec
    store = BlockStore(spec, 64 << 20)
    held = used = 0
    for p, a in lengths:
        table = store.open()
        grow(table, p + a)
        held, used = held + table.held_bytes(), used + table.used_bytes()
        table.release()
    assert store.usage().held_bytes == 0
    return 1 - used / held


def grow(table: BlockTable, n_tokens: int) -> None:
    """Brings a table to `n_tokens` as an engine would: in chunks, each committed."""
    while table.length < n_tokens:
        table.append(min(CHUNK, n_tokens - table.length))
        table.commit()


def needed_bytes(table: BlockTable) -> float:
    """Bytes that a later query may still read."""
    total = 0.0
    for chain in table.chains:
        group, n = chain.group, table.committed
        whole = n if group.raw is None else n // group.block_tokens * group.block_tokens
        tokens = sum(max(0, min(hi, whole) - lo) for lo, hi in group.span.needs(n))
        total += tokens * sum(f.item_bytes for f in group.fields) * len(group.coords)
    return total


class Crowd:
    """An arena and the sequences in it."""

    def __init__(self, spec: CacheSpec, arena_bytes: int, lengths: Lengths, seed: int) -> None:
        self.store = BlockStore(spec, arena_bytes)
        self.lengths = lengths
        self.draw = random.Random(seed)
        self.tables: list[BlockTable] = []

    def fill(self) -> None:
        """Sequences at random stages of their answers, until one no longer fits."""
        while True:
            prompt, answer = self.draw.choice(self.lengths)
            table = self.store.open()
            try:
                grow(table, prompt + self.draw.randint(0, answer))
            except CapacityError:
                table.release()
                return
            self.tables.append(table)

    def churn(self, n: int) -> None:
        """`n` times: a random sequence ends, others take its place."""
        for _ in range(n):
            self.tables.pop(self.draw.randrange(len(self.tables))).release()
            self.fill()

    def figures(self) -> dict[str, float]:
        """Where the bytes of the taken slabs are."""
        arena = self.store.arena
        allocated = (arena.slabs - arena.free_slabs) * arena.slab_bytes
        used = sum(needed_bytes(t) for t in self.tables)
        held = sum(t.held_bytes() for t in self.tables)
        remainder = sum(
            p.slabs * (arena.slab_bytes - p.per_slab * p.block_bytes)
            for p in self.store.pools.values()
        )
        return {
            "sequences": len(self.tables),
            "tokens": sum(t.length for t in self.tables),
            "slab_bytes": arena.slab_bytes,
            "allocated_bytes": allocated,
            "waste": 1 - used / allocated,
            "in_blocks": (held - used) / allocated,
            "slab_remainder": remainder / allocated,
            "free_places_in_slabs": (allocated - held - remainder) / allocated,
            "never_taken": 1 - allocated / arena.total_bytes,
        }


def full_arena(spec: CacheSpec, args: argparse.Namespace, lengths: Lengths) -> dict[str, Any]:
    """A full arena, at once and after many have come and gone."""
    crowd = Crowd(spec, args.arena_gib << 30, lengths, args.seed)
    crowd.fill()
    at_once = crowd.figures()
    crowd.churn(args.churn)
    later = crowd.figures()
    for t in crowd.tables:
        t.release()
    left = crowd.store.usage()
    assert left.held_bytes == 0
    assert left.free_bytes == left.total_bytes
    return {
        "block_bytes": {g.name: g.block_bytes for g in spec},
        "filled": at_once,
        "after_churn": later,
    }


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument(
        "--lengths", type=Path, help="CSV of token counts (default: the shared trace, else made up)"
    )
    p.add_argument("--arena-gib", type=int, default=40)
    p.add_argument("--churn", type=int, default=500, help="sequences that end and are replaced")
    args = p.parse_args(argv)
    if args.smoke:
        args.arena_gib, args.churn = 4, 3
    doc = common.document(
        "waste", "How much of what is allocated holds nothing?", args, with_torch=False
    )
    if args.lengths is None and not args.smoke and LENGTHS.is_file():
        args.lengths = LENGTHS
    if args.lengths is not None and not args.lengths.is_file():
        raise SystemExit(
            f"no file {args.lengths}: --lengths takes a CSV with num_prefill_tokens,num_decode_tokens"
        )
    lengths = read_lengths(args.lengths) if args.lengths else made_up_lengths(500, args.seed)
    doc["lengths"] = {
        "source": args.lengths.name if args.lengths else "made up: the bars do not apply",
        "requests": len(lengths),
        "mean_tokens": round(sum(map(sum, lengths)) / len(lengths), 1),
        "longest_tokens": max(map(sum, lengths)),
    }
    doc["settings"]["lengths"] = doc["lengths"]["source"]
    some = lengths[:: max(1, len(lengths) // 200)]
    for block in BLOCKS:
        same = abs(counted(some, block) - internal(some, block)) < 1e-12
        common.check(doc, f"the store counts as arithmetic does, {block}", same)
    doc["by_block_tokens"] = {str(b): internal(lengths, b) for b in BLOCKS}
    doc["by_reservation_tokens"] = {str(r): reserved(lengths, r) for r in RESERVED}
    doc["full_arena"] = {
        name: full_arena(make(DEFAULT_BLOCK_TOKENS), args, lengths) for name, make in CASES.items()
    }
    default = doc["by_block_tokens"][str(DEFAULT_BLOCK_TOKENS)]
    worst = max(
        c[k]["waste"] for c in doc["full_arena"].values() for k in ("filled", "after_churn")
    )
    doc["bars"] = {
        "default_block": {"bar": 0.01, "waste": default, "met": default <= 0.01},
        "full_arena": {"bar": 0.04, "waste": worst, "met": worst <= 0.04},
    }
    return common.report(doc, args, tables(doc))


def tables(doc: Document) -> list[Table]:
    def share(x: float) -> str:
        return f"{100 * x:.2f}"

    blocks = Table(["block tokens", *map(str, BLOCKS)])
    blocks.add("waste %", *(share(w) for w in doc["by_block_tokens"].values()))
    rooms = Table(["contiguous tokens", *map(str, RESERVED)])
    rooms.add("waste %", *(share(r["waste"]) for r in doc["by_reservation_tokens"].values()))
    rooms.add(
        "requests cut %", *(share(r["cut_share"]) for r in doc["by_reservation_tokens"].values())
    )
    full = Table(
        [
            "full arena",
            "when",
            "sequences",
            "slab KiB",
            "waste %",
            "in blocks",
            "slab rest",
            "free places",
        ]
    )
    for name, case in doc["full_arena"].items():
        for when in ("filled", "after_churn"):
            f = case[when]
            parts = (
                share(f[k])
                for k in ("waste", "in_blocks", "slab_remainder", "free_places_in_slabs")
            )
            full.add(name, when, f["sequences"], f["slab_bytes"] >> 10, *parts)
    return [blocks, rooms, full]


if __name__ == "__main__":
    main()
