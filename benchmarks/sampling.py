"""What does drawing a step's tokens cost, by kind of sampling and by how sure the model is?

The engine's `draw` alone, on random logits: a standard deviation of 8 is a model that is sure of a few tokens, 2 one
with thousands of candidates, 0.3 none at all.

    python benchmarks/sampling.py --clock cpu --threads 1

To compare two commits, run it in a checkout of each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import common
import torch
from common import Document, Table

from quire.engine.params import SamplingParams
from quire.engine.request import Request, Sample
from quire.engine.sampler import draw

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "top_k": {"temperature": 1.0, "top_k": 50},
    "top_k, top_p": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "repetition": {"temperature": 1.0, "repetition_penalty": 1.1},
}


def make_samples(kind: str, batch: int) -> list[Sample]:
    params = [SamplingParams(seed=i, **KINDS[kind]) for i in range(batch)]
    requests = [Request(str(i), [1, 2, 3], p, 100, i) for i, p in enumerate(params)]
    return [r.samples[0] for r in requests]


def make_logits(batch: int, vocab: int, deviation: float, seed: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return deviation * torch.randn(batch, vocab, generator=made)


def verify(doc: Document, args: argparse.Namespace) -> None:
    """Rows alone draw what they draw together; other seeds draw otherwise."""
    for deviation in args.deviation:
        logits = make_logits(8, args.vocab, deviation, args.seed)
        for kind in KINDS:
            samples = make_samples(kind, 8)
            together = draw(logits, samples, None)[0]
            alone = [draw(logits[i : i + 1], [samples[i]], None)[0][0] for i in range(8)]
            common.check(doc, f"alone as together, {kind}, {deviation:g}", together == alone)
    samples = make_samples("temperature", 8)
    flat = torch.zeros(1, args.vocab).expand(8, -1)
    drawn = set(draw(flat, samples, None)[0])
    common.check(doc, "seeds draw differently", len(drawn) > 4, len(drawn))


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    p.add_argument("--vocab", type=int, default=32_000)
    p.add_argument("--deviation", type=float, nargs="+", default=[0.3, 2.0, 8.0])
    args = p.parse_args(argv)
    if args.smoke:
        args.batch, args.vocab, args.repeats = [1, 3], 2000, 2
    common.prepare(args)
    doc = common.document("sampling", "What does drawing a step's tokens cost?", args)
    verify(doc, args)
    doc["cases"] = []
    table = Table(["kind", "batch", "deviation", "ms", "min", "max"])
    for batch in args.batch:
        for deviation in args.deviation:
            logits = make_logits(batch, args.vocab, deviation, args.seed)
            sides = {k: partial(draw, logits, make_samples(k, batch), None) for k in KINDS}
            turns = common.take_turns(sides, args.repeats, clock=args.clock)
            for kind in KINDS:
                ms = turns.spread(kind).json(1e3, 4)
                doc["cases"].append(
                    {"kind": kind, "batch": batch, "deviation": deviation, "draw_ms": ms}
                )
                figures = (f"{ms[k]:.2f}" for k in ("median", "min", "max"))
                table.add(kind, batch, f"{deviation:g}", *figures)
    return common.report(doc, args, [table])


if __name__ == "__main__":
    main()
