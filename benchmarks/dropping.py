"""What does dropping tokens give: the time of a step, of its attention alone, and users on a fixed arena?

A random Llama (`--size`), a context of `--ctx` tokens of which keys and values are random too: time does not depend on
which tokens stay, only on how many. Every policy of `--keep` has a sequence of its own; steps are taken in turns.

    step        append, forward, commit: one token of one sequence
    attention   plan and backend alone, all layers, on the same step
    watched     the same attention while a policy is told what every query pays: what its statistics cost
    users       sequences of `--ctx` tokens, admitted one after another, that fit `--arena`, counted at the pool: each
                is whole when it comes, and dropped to its budget before the next
    freed       bytes that went at the pool, over what the budget says should go

    python benchmarks/dropping.py --ctx 16384 --keep full h2o:budget=0.2
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import common
from common import Document, Stream, Table


class Side(common.Kept):
    """One policy's sequence."""

    def plan(self) -> Any:
        step = super().plan()
        step.turn = self.runner.bridge.turner()
        return step

    def attend(self, q: Any, *, watched: bool = False) -> None:
        """The attention of a step, all layers."""
        from quire.attention.observe import Attended

        step, backend = self.plan(), self.runner.bridge.backend
        for layer in range(len(self.runner.bridge.layers())):
            attended = Attended("mean") if watched else None
            backend.run(step, layer, q, scale=0.125, attended=attended)


def users(runner: Any, keep: str, ctx: int) -> int:
    """How many sequences fit, one admitted after another."""
    from quire.errors import CapacityError
    from quire.retention import parse_keep

    tables: list[Any] = []
    try:
        while True:
            tables.append(runner.open(parse_keep(keep), prompt_tokens=ctx))
            common.fill(runner, tables[-1], ctx)
            tables[-1].append(1)  # what is to go goes now
            tables[-1].commit()
    except CapacityError:
        return len(tables) - 1
    finally:
        for t in tables:
            t.release()


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--size", default="55m")
    p.add_argument("--ctx", type=int, default=16384)
    p.add_argument("--keep", nargs="+", default=["full", "h2o:budget=0.2", "ada(h2o:budget=0.2)"])
    p.add_argument("--kv", default="auto")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--memory", default="1GiB")
    p.add_argument("--arena", default="1GiB", help="for counting users")
    args = p.parse_args(argv)
    if args.smoke:
        args.size, args.ctx, args.memory, args.arena = "tiny", 600, "16MiB", "4MiB"
    common.prepare(args)
    import torch

    from quire.bench.models import random_llama
    from quire.models.open import open_runner
    from quire.retention import parse_keep

    model = random_llama(args.size, context=args.ctx + 4096, dtype=args.dtype).model
    doc = common.document("dropping", "What does dropping tokens give?", args)
    runner: Any = open_runner(model, kv=args.kv, memory=args.memory)
    ids = common.random_tokens(args.ctx + 4096, 512, args.seed)
    sides = {k: Side(runner, k, ids, args.ctx) for k in args.keep}
    config = model.config
    q = torch.randn(
        1, config.num_attention_heads, config.hidden_size // config.num_attention_heads
    ).to(model.dtype)
    for k, s in sides.items():
        want = (
            runner.rules(s.table.keeper.rules.keep).kept_tokens(args.ctx)
            if s.table.keeper
            else args.ctx
        )
        want_bytes = s.full_bytes * want / args.ctx
        nominal = s.full_bytes - want_bytes
        freed = (s.full_bytes - s.bytes) / nominal if nominal else 1.0
        common.check(
            doc,
            f"{k}: at least 90 % of the nominal bytes went",
            freed >= 0.9 or args.smoke,
            round(freed, 3),
        )
        s.freed = freed
    work = {k: s.step for k, s in sides.items()}
    work |= {f"{k} attention": partial(s.attend, q) for k, s in sides.items()}
    spans = {k for k in sides if parse_keep(k).spans and k != "full"}  # nobody asks what those pay
    work |= {f"{k} watched": partial(s.attend, q, watched=k not in spans) for k, s in sides.items()}
    turns = common.take_turns(
        work, args.repeats, clock=args.clock, stream=None if args.smoke else Stream()
    )
    if turns.stream_gb_per_s:
        doc["stream_gb_per_s"] = turns.stream_gb_per_s
    runner.close()
    doc["cases"] = []
    first = args.keep[0]
    out = Table(
        [
            "policy",
            "step ms",
            "of full",
            "attention ms",
            "of full",
            "watched",
            "held MB",
            "freed",
            "users",
        ]
    )
    for k, s in sides.items():
        counter: Any = open_runner(model, kv=args.kv, memory=args.arena)
        n = users(counter, k, args.ctx)
        counter.close()
        row = {
            "keep": k,
            "step_s": turns.spread(k).json(),
            "step_to_full": turns.ratio(k, first).json(),
            "attention_s": turns.spread(f"{k} attention").json(),
            "attention_to_full": turns.ratio(f"{k} attention", f"{first} attention").json(),
            "watched_to_unwatched": turns.ratio(f"{k} watched", f"{k} attention").json(),
            "held_bytes": s.bytes,
            "freed_of_nominal": round(s.freed, 4),
            "users": n,
        }
        doc["cases"].append(row)
        out.add(
            k,
            f"{1e3 * row['step_s']['median']:.2f}",
            f"{row['step_to_full']['median']:.2f}",
            f"{1e3 * row['attention_s']['median']:.2f}",
            f"{row['attention_to_full']['median']:.2f}",
            f"{row['watched_to_unwatched']['median']:.2f}",
            f"{s.bytes / 1e6:.1f}",
            f"{100 * s.freed:.1f} %",
            n,
        )
    return common.report(doc, args, [out])


if __name__ == "__main__":
    main()
