"""Ten thousand small requests for a tenth of the memory that they want: who ends how, and what the store takes.

    python benchmarks/shortage.py

Random arrivals, lengths, priorities, forks and cancels; some ask for more than the arena could ever hold and are told
so. The bar: every request is accounted for, nothing is held at the end, and calls into the store take at most 2 ms or a
tenth of any step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import common
from common import Document, Table

from quire.bench.machine import Spread
from quire.bench.shortage import Load, drive
from quire.engine import Engine, SchedulerConfig
from quire.models.open import open_runner

CLOCK = {"wall": time.perf_counter, "cpu": time.thread_time}
"""cpu: of the engine's thread."""
SHOWN = (
    "dropped_blocks",
    "demoted_blocks",
    "swapped",
    "returned",
    "recomputed",
    "swap_dearer",
    "queued",
)


def side(model: Any, load: Load, args: argparse.Namespace, tiers: str) -> Document:
    """One run."""
    probe = open_runner(model, memory="64MiB", block_tokens=16)
    memory = load.bytes_wanted(probe.bytes_per_token) // 10
    probe.close()
    runner = open_runner(model, memory=memory, block_tokens=16, share="prefix", tiers=tiers)
    try:
        with Engine(runner, config=SchedulerConfig(step_tokens=256)) as engine:
            out = drive(
                engine,
                load,
                seed=args.seed,
                clock=CLOCK[args.clock],
                progress=lambda n: common.say(f"{n:,} have ended"),
            )
            stats = engine.stats()
        held = runner.usage().held_bytes + (runner.below.used_bytes if runner.below else 0)
    finally:
        runner.close()
    late = out.late_steps()
    return {
        "tiers": tiers or "none",
        "ends": dict(out.ends),
        "why": out.why,
        "accounted": out.accounted,
        "held_bytes": held,
        "arena_bytes": memory,
        "steps": len(out.step_s),
        "step_ms": Spread.of(1e3 * s for s in out.step_s).json(),
        "store_ms": Spread.of(1e3 * s for s in out.store_s).json(),
        "store_share": sum(out.store_s) / sum(out.step_s),
        "steps_over": len(late),
        "worst_over_ms": [[round(1e3 * a, 3), round(1e3 * b, 3)] for a, b in sorted(late)[-3:]],
        "preemptions": stats.scheduler.preemptions,
        "ladder": asdict(stats.ladder),
        "checks": stats.checks,
    }


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--requests", type=int, default=10_000)
    p.add_argument("--alive", type=int, default=60, help="most that are unfinished at a time")
    args = p.parse_args(argv)
    if args.smoke:
        args.requests, args.alive = 60, 30
    if min(args.requests, args.alive) < 1:
        raise SystemExit("--requests and --alive are at least 1")
    common.prepare(args)
    doc = common.document("shortage", "Do all end, and what does the store take?", args)
    model = common.random_llama(layers=2, hidden=128, heads=4, vocab=512, context=4096)
    load = Load(requests=args.requests, alive=args.alive)
    doc["cases"] = []
    for tiers in ("", "host:4MiB"):
        row = side(model, load, args, tiers)
        doc["cases"].append(row)
        what = f"tiers {row['tiers']}"
        common.check(doc, f"{what}: all are accounted for", row["accounted"] == args.requests)
        common.check(doc, f"{what}: none failed", not row["ends"].get("failed"))
        common.check(doc, f"{what}: nothing is held", row["held_bytes"] == 0)
        common.check(doc, f"{what}: no invariant broke", not row["checks"]["violations"])
    ends = Table(["tiers", "finished", "cancelled", "refused", "preempted", *SHOWN])
    steps = Table(
        ["tiers", "steps", "step ms", "store ms", "share", "over", "worst (store, step) ms"]
    )
    for r in doc["cases"]:
        ends.add(
            r["tiers"],
            *(r["ends"].get(k, 0) for k in ("finished", "cancelled", "refused")),
            r["preemptions"],
            *(r["ladder"][k] for k in SHOWN),
        )
        steps.add(
            r["tiers"],
            r["steps"],
            r["step_ms"]["median"],
            r["store_ms"]["median"],
            round(r["store_share"], 4),
            r["steps_over"],
            r["worst_over_ms"][-1:] or "",
        )
    return common.report(doc, args, [ends, steps])


if __name__ == "__main__":
    main()
