"""What does a decode step gain where layers that share an input are multiplied in one call?

One random Llama with packed weights. Its layers take turns: joined (queries, keys and values one call, gate and up one)
and apart (each its own). A step is the whole `Engine.step()`; linears are the same calls of the same layers, in the
order and with the shapes of a step, and nothing else; the rest is what a step takes beside them.

    python benchmarks/siblings.py --size 55m --batch 1 8 --weights prepacked int8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
from common import Document, Spread, Stream, Table

from quire.bench.models import SIZES, random_llama
from quire.engine import Engine, SamplingParams
from quire.engine.schedule import SchedulerConfig
from quire.models.open import open_runner
from quire.models.siblings import watched


class Decoding:
    """An engine in the middle of decoding."""

    def __init__(self, args: argparse.Namespace, model: Any, weights: str, batch: int) -> None:
        self.model = model
        self.runner = open_runner(model, memory=args.memory, weights=weights)
        assert self.runner.weights is not None
        self.packed = self.runner.weights
        self.engine = Engine(self.runner, config=SchedulerConfig(step_tokens=4096))
        self.texts: dict[str, list[int]] = {}
        params = SamplingParams(max_tokens=None, ignore_eos=True)
        for i in range(batch):
            prompt = common.random_tokens(args.ctx, SIZES[args.size]["vocab"], args.seed + i)
            self.engine.add_request(prompt, params, on_delta=self._note)
        while len(self.texts) < batch:
            self.engine.step()

    def _note(self, delta: Any) -> None:
        self.texts.setdefault(delta.request_id, []).extend(delta.token_ids)

    def steps(self, n: int) -> None:
        for _ in range(n):
            self.engine.step()

    def choose(self, *, joined: bool) -> None:
        self.packed.part()
        if joined:
            self.packed.join()

    def linear_calls(self) -> Callable[[int], None]:
        """A function that makes n steps' calls of linear layers, as a step makes them."""
        with watched(self.packed.layers()) as calls:
            self.engine.step()
        made = [(c.layer, c.x) for c in calls]

        @torch.inference_mode()
        def run(n: int) -> None:
            for _ in range(n):
                for layer, x in made:
                    layer(x)

        return run

    def close(self) -> None:
        self.engine.close()
        self.runner.close()


def check(doc: Document, side: Decoding, where: str) -> None:
    """Joined layers give the bits of the layers apart."""
    with torch.inference_mode():
        ids = torch.tensor([common.random_tokens(24, 500, 5)])
        logits = []
        for joined in (False, True):
            side.choose(joined=joined)
            logits.append(side.model(input_ids=ids, use_cache=False).logits)
    common.check(doc, f"bit for bit, {where}", torch.equal(*logits), where)


def measure(
    doc: Document, args: argparse.Namespace, model: Any, weights: str, batch: int, stream: Stream
) -> Document:
    side = Decoding(args, model, weights, batch)
    where = f"{args.size}, {weights}, batch {batch}"
    check(doc, side, where)
    linears = side.linear_calls()

    def turn(work: Callable[[int], None], *, joined: bool) -> Callable[[], None]:
        def run() -> None:
            side.choose(joined=joined)
            work(args.steps)

        return run

    ways = {"apart": False, "joined": True}
    sides = {f"step, {k}": turn(side.steps, joined=v) for k, v in ways.items()}
    sides |= {f"linears, {k}": turn(linears, joined=v) for k, v in ways.items()}
    turns = common.take_turns(sides, args.repeats, clock=args.clock, stream=stream)
    n = args.steps
    found: Document = {"size": args.size, "weights": weights, "batch": batch, "ctx": args.ctx}
    for k in ways:
        step, linear = turns.seconds[f"step, {k}"], turns.seconds[f"linears, {k}"]
        rest = Spread.of((a - b) / n for a, b in zip(step, linear, strict=True))
        found[k] = {
            "step_ms": turns.spread(f"step, {k}", n).json(1e3, 3),
            "linears_ms": turns.spread(f"linears, {k}", n).json(1e3, 3),
            "rest_ms": rest.json(1e3, 3),
        }
    for what in ("step", "linears"):
        found[f"{what}_ratio"] = turns.ratio(f"{what}, apart", f"{what}, joined").json(digits=3)
    found["stream_gb_per_s"] = [round(s, 1) for s in turns.stream_gb_per_s or ()]
    found["floor_ms"] = round(side.packed.n_bytes / max(found["stream_gb_per_s"]) / 1e6, 2)
    side.close()
    return found


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--size", default="55m", choices=sorted(SIZES))
    p.add_argument("--weights", nargs="+", default=["prepacked", "int8"])
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    p.add_argument("--ctx", type=int, default=256, help="tokens of each prompt")
    p.add_argument("--steps", type=int, default=16, help="steps of a turn")
    p.add_argument("--memory", default="1GiB", help="of the arena")
    args = p.parse_args(argv)
    if args.smoke:
        args.size, args.batch, args.weights, args.memory = "tiny", [1, 3], ["prepacked"], "16MiB"
        args.ctx, args.steps, args.repeats = 20, 2, 2
    common.prepare(args)
    question = "What does a decode step gain where layers that share an input are one call?"
    doc = common.document("siblings", question, args)
    stream = Stream(8 << 20 if args.smoke else common.STREAM_BYTES)
    model = random_llama(args.size, context=args.ctx + 4096, seed=args.seed).model
    doc["cases"] = [
        measure(doc, args, model, w, b, stream)
        for w in sorted(args.weights, reverse=True)  # int8 last: what it rounds stays rounded
        for b in args.batch
    ]
    head = ["model, weights, batch", "layers", "step ms", "least", "linears ms", "least", "rest ms"]
    table = Table([*head, "apart / joined", "linears", "stream"])
    for c in doc["cases"]:
        for k in ("apart", "joined"):
            step, linear, rest = (c[k][f"{x}_ms"] for x in ("step", "linears", "rest"))
            table.add(
                f"{c['size']}, {c['weights']}, {c['batch']}",
                k,
                *(f"{x[y]:.2f}" for x in (step, linear) for y in ("median", "min")),
                f"{rest['median']:.2f}",
                f"{c['step_ratio']['median']:.3f}" if k == "joined" else "",
                f"{c['linears_ratio']['median']:.3f}" if k == "joined" else "",
                f"{min(c['stream_gb_per_s']):.1f}" if k == "joined" else "",
            )
    return common.report(doc, args, [table])


if __name__ == "__main__":
    main()
