"""Does a quantised cache decode faster over a long context, in a whole model?

A random Llama (`--size`), one sequence a recipe, whose `--ctx` tokens of keys and values are random too: time does
not depend on what they are. All recipes take turns of `--steps` steps, with linear layers as `--weights` says. The
floor of a step is its bytes, weights once and the cache that this recipe holds, over the streaming read around it.

    step     append, forward, commit: one token of one sequence
    faster   turns in which the recipe took less time than the first one

Before timing, each recipe's logits are held to torch's attention over the same blocks.

    python benchmarks/contexts.py --size 1.1b --ctx 16384 --kv bf16 int8 int4 --repeats 10
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import common
from common import Document, Stream, Table

TOLERANCE = 0.2
"""Largest difference of logits, in their standard deviations: a model's own rounding in 16 bits."""


def logits(side: common.Kept) -> Any:
    """Of the last token, again: its row is written and read as before."""
    from quire.engine.runner import Item

    n = side.table.length
    side.table.truncate(n - 1)
    side.table.append(1)
    out = side.runner.forward([Item(side.table, side.ids, n - 1, n, 1)])
    side.table.commit()
    return out.float()


def difference(side: common.Kept) -> float:
    """Of the kernels' logits from torch's, over the same blocks."""
    from quire.models.bridge import make_backend

    bridge = side.runner.bridge
    mine, kept = logits(side), bridge.backend
    bridge.backend = make_backend("torch", "cpu")
    try:
        theirs = logits(side)
    finally:
        bridge.backend = kept
    return float((mine - theirs).abs().max() / theirs.std())


def steps(side: common.Kept, n: int) -> None:
    for _ in range(n):
        side.step()


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--size", default="1.1b")
    p.add_argument("--ctx", type=int, default=16384)
    p.add_argument(
        "--kv",
        nargs="+",
        default=["bf16", "int8", "int4"],
        help="the first one is what others are held to",
    )
    p.add_argument("--steps", type=int, default=4, help="of a turn")
    p.add_argument("--weights", default="auto")
    p.add_argument("--memory", default="1GiB", help="for each recipe")
    args = p.parse_args(argv)
    if args.smoke:
        args.size, args.ctx, args.memory = "tiny", 200, "16MiB"
    common.prepare(args)

    from quire.bench.models import random_llama
    from quire.evaluate.decode import twin
    from quire.models.open import open_runner

    doc = common.document("contexts", "Does a quantised cache decode faster?", args)
    room = 64 + args.steps * (args.repeats + 3)
    model = random_llama(args.size, context=args.ctx + room).model
    read = sum(x.numel() * x.element_size() for x in model.parameters())
    read -= model.get_input_embeddings().weight.numel() * 2  # looked up, not read
    ids = common.random_tokens(args.ctx + room, 512, args.seed)
    sides: dict[str, common.Kept] = {}
    for kv in args.kv:
        runner: Any = open_runner(twin(model), kv=kv, memory=args.memory, weights=args.weights)
        sides[kv] = common.Kept(runner, "full", ids, args.ctx)
        off = difference(sides[kv])
        common.check(
            doc, f"{kv}: logits as torch's attention gives them", off <= TOLERANCE, round(off, 4)
        )
    turns = common.take_turns(
        {kv: partial(steps, s, args.steps) for kv, s in sides.items()},
        args.repeats,
        warm_up=3,
        clock=args.clock,
        stream=None if args.smoke else Stream(),
    )
    if turns.stream_gb_per_s:
        doc["stream_gb_per_s"] = turns.stream_gb_per_s
    doc["cases"] = []
    first = args.kv[0]
    out = Table(
        [
            "kv",
            "step ms",
            "min",
            "max",
            "tokens/s",
            "of the floor",
            "to the first",
            "faster",
            "cache MB",
        ]
    )
    for kv, s in sides.items():
        spread = turns.spread(kv, args.steps)
        need = read + s.bytes
        floor = need / (1e9 * sum(turns.stream_gb_per_s) / 2) if turns.stream_gb_per_s else 0.0
        ratio = turns.ratio(kv, first)
        faster = sum(a < b for a, b in zip(turns.seconds[kv], turns.seconds[first], strict=True))
        doc["cases"].append(
            {
                "kv": kv,
                "step_s": spread.json(),
                "floor_s": floor,
                "of_floor": floor / spread.median,
                "to_first": ratio.json(),
                "faster": faster,
                "held_bytes": s.bytes,
                "read_bytes": need,
            }
        )
        out.add(
            kv,
            *(f"{1e3 * x:.1f}" for x in (spread.median, spread.least, spread.greatest)),
            f"{1 / spread.median:.2f}",
            f"{100 * floor / spread.median:.0f} %",
            f"{ratio.median:.2f}",
            f"{faster} of {args.repeats}",
            f"{s.bytes / 1e6:.0f}",
        )
        s.table.release()
        s.runner.close()
    return common.report(doc, args, [out])


if __name__ == "__main__":
    main()
