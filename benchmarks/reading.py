"""What does reading fewer blocks give: the time of a step and of its attention alone, and the bytes that are read?

A random Llama (`--size`), a context of `--ctx` tokens of which keys and values are random too: time depends on how many
blocks are read, not on which. All sides hold the same cache, bounds included, and take their steps in turns.

    step        append, forward, commit: one token of one sequence
    attention   plan and backend alone, all layers, on the same step
    bytes       of keys and values that one step's attention reads, and of bounds beside them, by count

    python benchmarks/reading.py --ctx 16384 --keep full quest:budget=0.125,skip=0
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import common
from common import Document, Stream, Table


class Side(common.Kept):
    """One policy's sequence, whose prompt is over."""

    def attend(self, q: Any) -> Any:
        """The attention of a step, all layers; the last one's result."""
        step, out = self.plan(), None
        for layer in range(len(self.runner.bridge.layers())):
            out = self.runner.bridge.backend.run(step, layer, q, scale=0.125)
        return out

    def read_bytes(self) -> tuple[int, int]:
        """Of keys and values, and of bounds, in one step over all layers."""
        from quire.attention.sparse import choice_of
        from quire.spec import BOUNDS

        step, whole, bounds = self.plan(), 0, 0
        for layer in range(len(self.runner.bridge.layers())):
            for r in step.of_layer(layer)[2]:
                size, heads = r.source.block_tokens, len(r.source.heads(layer))
                beside = sum(f.item_bytes for f in r.source.fields if f.name == BOUNDS)
                per_token = (sum(f.bytes_in(size) for f in r.source.fields) - beside) / size
                choice, e = choice_of(step, r, layer), r.extents[0]
                tokens = e.stop - e.start
                if choice is not None:
                    tokens -= int(choice.whole[0] - choice.count[0]) * size
                    bounds += heads * int(choice.whole[0]) * beside
                whole += round(heads * tokens * per_token)
        return whole, bounds


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--size", default="55m")
    p.add_argument("--ctx", type=int, default=16384)
    p.add_argument(
        "--keep", nargs="+", default=["full", "quest:budget=0.125,skip=0", "quest:budget=0.125"]
    )
    p.add_argument("--kv", default="auto")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--memory", default="1GiB")
    args = p.parse_args(argv)
    if args.smoke:
        args.size, args.ctx, args.memory = "tiny", 600, "32MiB"
    common.prepare(args)
    import torch

    from quire.attention.reference import ReferenceBackend
    from quire.bench.models import random_llama
    from quire.models.open import open_runner
    from quire.retention import parse_keep

    model = random_llama(args.size, context=args.ctx + 4096, dtype=args.dtype).model
    doc = common.document("reading", "What does reading fewer blocks give?", args)
    store = next((k for k in args.keep if parse_keep(k).reads), "full")
    runner: Any = open_runner(model, kv=args.kv, keep=store, memory=args.memory)
    ids = common.random_tokens(args.ctx + 4096, 512, args.seed)
    sides = {k: Side(runner, k, ids, args.ctx) for k in args.keep}
    config = model.config
    d = config.hidden_size // config.num_attention_heads
    q = torch.randn(1, config.num_attention_heads, d).to(model.dtype)
    plain = runner.bridge.backend
    for k, s in sides.items():
        got = s.attend(q).float()
        runner.bridge.backend = ReferenceBackend()
        want = s.attend(q).float()
        runner.bridge.backend = plain
        error = float((got - want).norm() / want.norm())
        common.check(doc, f"{k}: the reference reads the same", error < 2e-2, round(error, 5))
    work = {k: s.step for k, s in sides.items()}
    work |= {f"{k} attention": partial(s.attend, q) for k, s in sides.items()}
    turns = common.take_turns(
        work, args.repeats, clock=args.clock, stream=None if args.smoke else Stream()
    )
    if turns.stream_gb_per_s:
        doc["stream_gb_per_s"] = turns.stream_gb_per_s
    doc["cases"], first = [], args.keep[0]
    out = Table(["policy", "step ms", "of first", "attention ms", "of first", "read MB", "bounds"])
    for k, s in sides.items():
        whole, bounds = s.read_bytes()
        row = {
            "keep": k,
            "step_s": turns.spread(k).json(),
            "step_to_first": turns.ratio(k, first).json(),
            "attention_s": turns.spread(f"{k} attention").json(),
            "attention_to_first": turns.ratio(f"{k} attention", f"{first} attention").json(),
            "read_bytes": whole,
            "bounds_bytes": bounds,
            "held_bytes": s.table.held_bytes(),
        }
        doc["cases"].append(row)
        out.add(
            k,
            f"{1e3 * row['step_s']['median']:.2f}",
            f"{row['step_to_first']['median']:.2f}",
            f"{1e3 * row['attention_s']['median']:.2f}",
            f"{row['attention_to_first']['median']:.2f}",
            f"{whole / 1e6:.2f}",
            f"{bounds / 1e6:.2f}",
        )
    runner.close()
    return common.report(doc, args, [out])


if __name__ == "__main__":
    main()
