"""How many prompt tokens a second does a model take, by size of chunk and recipe, beside transformers' own forward?

One random Llama (`--random`, as `quire bench` makes it), one prompt of `--ctx` tokens:

    transformers    one forward over the whole prompt with a DynamicCache, logits of the last position
    KV, N           Quire's runner, as an engine runs it, in chunks of N tokens: later chunks read earlier ones back

Logits are compared before anything is timed: what stores the model's own dtype with transformers', what rounds with the
reference backend's. All sides take turns, with a product of two large matrices in the model's dtype, in the fastest
form at hand, among them: a prompt computes, so its measure is the share of that speed. Work counted: linear layers, the
causal half of attention.

    python benchmarks/prefill.py --random 55m --ctx 1024 4096 --chunk 512 2048
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import common
import torch
from caches import TOLERANCE, Forward, Sides, lossless
from common import Document, Spread, Stream, Table, Turns
from transformers import DynamicCache

from quire.bench.models import SIZES
from quire.bench.product import Product, prompt_work
from quire.engine.runner import Item
from quire.errors import QuireError


def theirs(model: Any, prompt: list[int]) -> torch.Tensor:
    return Forward(model, DynamicCache(config=model.config), [prompt]).logits[0].float()


def ours(runner: Any, prompt: list[int], chunk: int) -> torch.Tensor:
    """Logits of the last position."""
    table, n = runner.open(), len(prompt)
    try:
        for start in range(0, n, chunk):
            stop = min(n, start + chunk)
            table.append(stop - start)
            logits = runner.forward([Item(table, prompt, start, stop, int(stop == n))])
            table.commit()
        out: torch.Tensor = logits[0].float()
        return out
    finally:
        table.release()


def verify(
    doc: Document, args: argparse.Namespace, sides: Sides, runners: dict[str, Any], ctx: int
) -> None:
    """Every chunk size and recipe; a changed first token must show."""
    prompt = common.random_tokens(ctx, sides.vocab, args.seed)
    want = theirs(sides.plain, prompt)
    sigma, bound = float(want.std()), TOLERANCE[args.dtype]
    for kv, runner in runners.items():
        exact = lossless(f"engine {kv}", args.dtype)
        reference = None if exact else sides.runner(kv, "reference")
        try:
            for chunk in args.chunk:
                beside = want if reference is None else ours(reference, prompt, chunk)
                gap = float((ours(runner, prompt, chunk) - beside).abs().max()) / sigma
                what = "transformers'" if exact else "the reference backend's"
                name = f"{kv}, chunks of {chunk}, {ctx} tokens: {what} logits"
                common.check(doc, name, gap <= bound, gap)
        finally:
            if reference is not None:
                reference.close()
    other = theirs(sides.plain, [(prompt[0] + 1) % sides.vocab, *prompt[1:]])
    gap = float((other - want).abs().max()) / sigma
    common.check(doc, f"another first token is noticed, {ctx} tokens", gap > 0, gap)


def measure(
    doc: Document,
    args: argparse.Namespace,
    sides: Sides,
    runners: dict[str, Any],
    ctx: int,
    stream: Stream,
) -> None:
    """One prompt length, all sides in turns."""
    prompt = common.random_tokens(ctx, sides.vocab, args.seed)
    product = Product(getattr(torch, args.dtype))
    called: dict[str, Callable[[], object]] = {"transformers": partial(theirs, sides.plain, prompt)}
    for kv, runner in runners.items():
        for chunk in args.chunk:
            called[f"{kv}, {chunk}"] = partial(ours, runner, prompt, chunk)
    turns = common.take_turns(
        called | {"product": product.run}, args.repeats, clock=args.clock, stream=stream
    )
    needed = prompt_work(next(iter(runners.values())), ctx)
    assert needed is not None  # of a Llama
    for name in called:
        doc["cases"].append(row(name, ctx, turns, needed, product.work))


def row(name: str, ctx: int, turns: Turns, needed: int, flops: int) -> dict[str, Any]:
    peak = [flops / s for s in turns.seconds["product"]]
    seconds = turns.seconds[name]
    return {
        "side": name,
        "ctx": ctx,
        "tokens_per_s": Spread.of(ctx / s for s in seconds).json(digits=1),
        "to_transformers": turns.ratio("transformers", name).json(digits=3),
        "share_of_product": Spread.of(
            needed / s / p for s, p in zip(seconds, peak, strict=True)
        ).json(digits=3),
        "product_gflop_per_s": Spread.of(peak).json(1e-9, 1),
        "stream_gb_per_s": [round(x, 1) for x in turns.stream_gb_per_s or ()],
    }


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--random", default="55m", help=f"the model's size: {', '.join(SIZES)}")
    p.add_argument("--dtype", default="bfloat16", choices=sorted(TOLERANCE))
    p.add_argument("--kv", nargs="+", default=["auto", "int8", "int4"], help="Quire's recipes")
    p.add_argument("--ctx", type=int, nargs="+", default=[1024, 4096], help="tokens of the prompt")
    p.add_argument("--chunk", type=int, nargs="+", default=[512, 2048])
    p.add_argument("--weights", default="auto", help="of Quire's sides: auto, plain, prepacked")
    p.add_argument("--memory", default="1GiB", help="of each of Quire's arenas")
    p.set_defaults(repeats=3)
    args = p.parse_args(argv)
    if args.smoke:
        args.random, args.ctx, args.chunk, args.kv = "tiny", [100], [40, 128], ["auto", "int8"]
        args.repeats, args.memory, args.dtype = 2, "16MiB", "float32"
    if args.random not in SIZES or min(*args.ctx, *args.chunk) < 1:
        raise SystemExit(f"--random is one of {', '.join(SIZES)}; --ctx and --chunk are at least 1")
    common.prepare(args)
    question = "How many prompt tokens a second does a model take?"
    doc = common.document("prefill", question, args)
    doc["cases"] = []
    stream = Stream(8 << 20 if args.smoke else common.STREAM_BYTES)
    runners: dict[str, Any] = {}
    try:
        sides = Sides(args, max(args.ctx) + 1)
        for kv in sides.kv:
            runners[kv] = sides.runner(kv)
        common.say("verifying")
        verify(doc, args, sides, runners, min(args.ctx))
        for ctx in args.ctx:
            common.say(f"{ctx} tokens: timing")
            measure(doc, args, sides, runners, ctx, stream)
    except QuireError as e:
        raise SystemExit(f"prefill: {e}") from None
    finally:
        for runner in runners.values():
            runner.close()
    return common.report(doc, args, [table(doc)])


def table(doc: Document) -> Table:
    out = Table(
        ["ctx, kv, chunk", "tokens/s", "min", "max", "x transformers", "min", "max", "of product %"]
    )
    for r in doc["cases"]:
        out.add(
            f"{r['ctx']}, {r['side']}",
            *(f"{r['tokens_per_s'][k]:.0f}" for k in ("median", "min", "max")),
            *(f"{r['to_transformers'][k]:.2f}" for k in ("median", "min", "max")),
            f"{100 * r['share_of_product']['median']:.0f}",
        )
    return out


if __name__ == "__main__":
    main()
