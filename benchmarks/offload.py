"""A context several times the arena: tokens per second against what moving its cold blocks takes at least.

    python benchmarks/offload.py                          a random Llama, 8,192 tokens, an arena of a quarter
    python benchmarks/offload.py --folder /mnt/nvme       where the disk tier lies

Sides: `here` has an arena that holds everything; `host` keeps the cold blocks in host memory; `disk` keeps them in
files (read past the page cache where the file system allows it). A decode step reads every cold block once, so its
floor is the time of a step with all blocks here, or of moving those bytes at the bandwidth measured beside, whichever
is more; their sum is what a mover gives that overlaps nothing. All sides must say the same tokens.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
from common import Document, Table

from quire.bench.doctor import disk_rates, memory_rates
from quire.bench.machine import Spread
from quire.engine import Engine, SamplingParams, SchedulerConfig
from quire.models.open import open_runner


def run(
    model: Any, args: argparse.Namespace, kv: str, memory: int, tiers: str
) -> tuple[list[int], dict[str, Any]]:
    """One request from its first chunk to its last token."""
    runner = open_runner(model, kv=kv, memory=memory, tiers=tiers, attention=args.attention)
    ids = common.random_tokens(args.ctx, model.config.vocab_size, args.seed)
    held = 0
    try:
        with Engine(runner, config=SchedulerConfig(step_tokens=args.chunk)) as engine:
            engine.add_request(ids, SamplingParams(max_tokens=args.out, ignore_eos=True))
            out: Any = None
            times: list[float] = []
            began = time.perf_counter()
            while engine.has_work:
                for delta in engine.step():
                    times += [time.perf_counter()] * len(delta.token_ids)
                    out = delta.output or out
                held = max(held, runner.usage().held_bytes)
            ladder = engine.stats().ladder
    finally:
        runner.close()
    steps = [b - a for a, b in pairwise(times)]
    return out.token_ids, {
        "prefill_s": times[0] - began,
        "step_s": Spread.of(steps).json(),
        "tokens_per_s": 1 / Spread.of(steps).median,
        "held_bytes": held,
        "arena_bytes": runner.usage().total_bytes,
        "away_bytes": ladder.offloaded_bytes,
    }


def case(model: Any, args: argparse.Namespace, doc: Document, kv: str, folder: Path) -> None:
    """All sides of one codec."""
    probe = open_runner(model, kv=kv, memory="64MiB")
    want = int(probe.bytes_per_token * (args.ctx + args.out))
    probe.close()
    room = want * 2
    sides = {
        "here": (want * 2, ""),
        "host": (want // args.times, f"host:{room}B;offload=on"),
        "disk": (want // args.times, f"disk:{room * 2}B@{folder}/{len(doc['cases'])};offload=on"),
    }
    texts, rows = {}, {}
    for name, (memory, tiers) in sides.items():
        common.say(f"{kv} {name}")
        texts[name], rows[name] = run(model, args, kv, memory, tiers)
    for name in ("host", "disk"):
        common.check(
            doc, f"{kv} {name}: the tokens of an unlimited arena", texts[name] == texts["here"]
        )
        row = rows[name]
        common.check(doc, f"{kv} {name}: within the arena", row["held_bytes"] <= row["arena_bytes"])
        rate = 1e9 * (doc["copy_gb_per_s"] if name == "host" else doc["disk_get_gb_per_s"])
        moving = row["away_bytes"] / rate
        here = rows["here"]["step_s"]["median"]
        row["floor_tokens_per_s"] = 1 / max(moving, here)
        row["serial_tokens_per_s"] = 1 / (moving + here)
        row["share_of_floor"] = row["tokens_per_s"] / row["floor_tokens_per_s"]
        row["share_of_serial"] = row["tokens_per_s"] / row["serial_tokens_per_s"]
    doc["cases"] += [{"kv": kv, "side": name, **row} for name, row in rows.items()]


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--ctx", type=int, default=8192)
    p.add_argument("--out", type=int, default=24)
    p.add_argument("--times", type=int, default=4, help="the context is so many times the arena")
    p.add_argument("--chunk", type=int, default=1024)
    p.add_argument("--kv", nargs="+", default=["auto", "int8"])
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--hidden", type=int, default=512)
    p.add_argument("--kv-heads", type=int, default=8)
    p.add_argument("--attention", default="auto")
    p.add_argument("--folder", type=Path, default=Path(), help="on the disk that is measured")
    args = p.parse_args(argv)
    if args.smoke:
        args.ctx, args.out, args.chunk, args.layers, args.hidden = 2048, 4, 512, 2, 128
        args.times = 2
    if min(args.ctx, args.out - 1, args.times) < 1:
        raise SystemExit("--ctx and --times are at least 1, --out at least 2")
    common.prepare(args)
    doc = common.document(
        "offload", "What does a context larger than the arena cost, against moving it?", args
    )
    doc["cases"] = []
    doc["copy_gb_per_s"] = memory_rates(32 << 20, 5)["copy_gb_per_s"]["median"]
    model = common.random_llama(
        layers=args.layers, hidden=args.hidden, kv_heads=args.kv_heads, context=2 * args.ctx
    )
    folder = Path(tempfile.mkdtemp(prefix="quire-offload-", dir=args.folder))
    try:
        doc["disk_get_gb_per_s"] = disk_rates(folder, 1 << 20, 32, 3)["get_gb_per_s"]["median"]
        for kv in args.kv:
            case(model, args, doc, kv, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    made = Table(
        [
            "kv",
            "side",
            "prefill s",
            "tokens/s",
            "floor",
            "share",
            "of serial",
            "away MiB",
            "arena MiB",
        ]
    )
    for r in doc["cases"]:
        made.add(
            r["kv"],
            r["side"],
            *(
                round(r[k], 2) if k in r else ""
                for k in ("prefill_s", "tokens_per_s", "floor_tokens_per_s")
            ),
            *(round(r[k], 2) if k in r else "" for k in ("share_of_floor", "share_of_serial")),
            r["away_bytes"] >> 20,
            r["arena_bytes"] >> 20,
        )
    return common.report(doc, args, [made])


if __name__ == "__main__":
    main()
