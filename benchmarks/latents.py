"""How fast is absorbed attention over latents (MLA), beside the best that torch does with them?

One layer, one query a sequence, `--heads` query heads over latents of 512 channels and a rotary part of 64, bfloat16:

    kernel      blocks read in place, arithmetic in float32
    gathered    the torch backend: blocks gathered, then two products in the model's dtype
    bf16, fp32  matmul - softmax - matmul over latents that lie side by side in that dtype already, for free

All sides are held to float64 first and take turns; ratios are taken within a turn. The bar is the best of the last two.

    python benchmarks/latents.py --batch 1 8 --ctx 1024 8192 --heads 16 128
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import common
import torch
from common import Document, Spread, Stream, Table, Turns

from quire.attention import ReferenceBackend, Row, Step
from quire.attention.reference import TorchBackend
from quire.errors import ConfigError
from quire.kernels.native import LatentArgs
from quire.models.bridge import make_backend
from quire.plan import KVLayer, build_layout
from quire.spec import Field, KVConfig
from quire.store import BlockStore

RANK, ROTARY = 512, 64
NAMES = ("latent", "k_rope")
BOUND = {"kernel": 3e-3, "gathered": 1e-2, "bf16": 1e-2, "fp32": 3e-3}
"""Largest error in the norm of a bfloat16 output; torch rounds weights to bfloat16 as well."""


class Case:
    """Sequences of latents in blocks and side by side, and every way to attend to them."""

    def __init__(self, args: argparse.Namespace, batch: int, ctx: int, heads: int) -> None:
        draw = torch.Generator().manual_seed(args.seed)
        fields = tuple(
            Field(n, (w,), "bfloat16") for n, w in zip(NAMES, (RANK, ROTARY), strict=True)
        )
        layout = build_layout(
            [KVLayer(0, 1, fields)],
            KVConfig(args.kv, block_tokens=args.block_tokens),
            dtype="bfloat16",
        )
        size = batch * layout.spec.bytes_for(ctx, chunk_tokens=ctx)
        self.store = BlockStore(layout.spec, 2 * size + (16 << 20), device="cpu")
        self.x = torch.randn(batch, ctx, RANK + ROTARY, generator=draw).to(torch.bfloat16)
        self.wide = self.x.float()
        self.backend: Any = make_backend(args.attention)
        tables = [self.store.open() for _ in range(batch)]
        for i, table in enumerate(tables):
            table.append(ctx - 1)
            self._write(Step(self.store, layout, [Row(table, 0, ctx - 1)]), self.x[i, :-1])
            table.commit()
            table.append(1)
        self.step = Step(self.store, layout, [Row(t, ctx - 1, ctx) for t in tables])
        self._write(self.step, self.x[:, -1])
        self.q = torch.randn(batch, heads, RANK + ROTARY, generator=draw).to(torch.bfloat16)
        self.scale = (RANK + ROTARY) ** -0.5
        self.flops = 2 * batch * heads * ctx * (2 * RANK + ROTARY)
        self.torch = TorchBackend()

    def _write(self, step: Step, x: torch.Tensor) -> None:
        parts = x.unsqueeze(1).split([RANK, ROTARY], -1)
        self.backend.write(step, 0, dict(zip(NAMES, parts, strict=True)))

    def blocks(self, backend: Any, q: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = backend.run(
            self.step, 0, self.q if q is None else q, scale=self.scale, keys=NAMES, value="latent"
        )
        return out

    def side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.q.to(x.dtype) @ x.transpose(1, 2)
        weights = torch.softmax(scores.float() * self.scale, -1).to(x.dtype)
        return (weights @ x[..., :RANK]).to(self.q.dtype)

    def sides(self) -> dict[str, Callable[[], torch.Tensor]]:
        return {
            "kernel": partial(self.blocks, self.backend),
            "gathered": partial(self.blocks, self.torch),
            "bf16": partial(self.side_by_side, self.x),
            "fp32": partial(self.side_by_side, self.wide),
        }


@torch.inference_mode()
def verify(doc: Document, args: argparse.Namespace, case: Case, where: str) -> None:
    """Against float64 over what is stored; the kernel itself was asked."""
    asked: list[LatentArgs] = []
    library = getattr(case.backend, "library", None)
    if library is not None:
        latent = library.latent
        library.latent = lambda a: (asked.append(a), latent(a))
    want = case.blocks(ReferenceBackend(), case.q.double())
    plain = args.kv == "auto"
    for name, call in case.sides().items():
        error = float((call().double() - want).norm() / want.norm())
        if plain or name in ("kernel", "gathered"):
            common.check(doc, f"{name}, {where}", error <= BOUND[name], error)
    if library is not None:
        library.latent = latent
        common.check(doc, f"the kernel serves {where}", len(asked) == 1)


def measure(
    doc: Document, args: argparse.Namespace, case: Case, key: dict[str, int], stream: Stream
) -> None:
    def inferring(call: Callable[[], torch.Tensor]) -> None:
        with torch.inference_mode():
            for _ in range(args.calls):
                call()

    sides = {name: partial(inferring, call) for name, call in case.sides().items()}
    turns = common.take_turns(sides, args.repeats, clock=args.clock, stream=stream)
    for name in sides:
        doc["cases"].append(key | row(name, turns, case.flops, args.calls))


def row(name: str, turns: Turns, flops: int, calls: int) -> dict[str, Any]:
    seconds = turns.seconds
    best = [min(a, b) for a, b in zip(seconds["bf16"], seconds["fp32"], strict=True)]
    return {
        "side": name,
        "ms": turns.spread(name, calls).json(1e3, 3),
        "gflop_per_s": Spread.of(calls * flops / s for s in seconds[name]).json(1e-9, 1),
        "to_best_torch": Spread.of(b / s for b, s in zip(best, seconds[name], strict=True)).json(
            digits=3
        ),
        "stream_gb_per_s": [round(x, 1) for x in turns.stream_gb_per_s or ()],
    }


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--heads", type=int, nargs="+", default=[16, 128])
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    p.add_argument("--ctx", type=int, nargs="+", default=[1024, 8192])
    p.add_argument("--kv", default="auto", help="recipe of the blocks; torch has bfloat16 always")
    p.add_argument("--block-tokens", type=int, default=32)
    p.add_argument("--calls", type=int, default=1, help="calls of a turn")
    p.add_argument("--attention", default="auto", help="backend of the first side")
    args = p.parse_args(argv)
    if args.smoke:
        args.heads, args.batch, args.ctx, args.repeats = [4, 16], [1, 2], [70], 2
    if min(*args.heads, *args.batch, args.calls) < 1 or min(args.ctx) < 2:
        raise SystemExit("latents: --heads, --batch and --calls are at least 1, --ctx at least 2")
    common.prepare(args)
    doc = common.document("latents", "How fast is absorbed attention over latents?", args)
    doc["cases"] = []
    stream = Stream(8 << 20 if args.smoke else common.STREAM_BYTES)
    try:
        for heads in args.heads:
            for batch in args.batch:
                for ctx in args.ctx:
                    case = Case(args, batch, ctx, heads)
                    where = f"{heads} heads, {batch} x {ctx}"
                    verify(doc, args, case, where)
                    common.say(f"{where}: timing")
                    measure(doc, args, case, {"heads": heads, "batch": batch, "ctx": ctx}, stream)
    except ConfigError as e:
        raise SystemExit(f"latents: {e}") from None
    return common.report(doc, args, [table(doc)])


def table(doc: Document) -> Table:
    out = Table(["heads, batch x ctx, side", "ms", "GFLOP/s", "x best torch", "min", "max"])
    for r in doc["cases"]:
        out.add(
            f"{r['heads']}, {r['batch']} x {r['ctx']}, {r['side']}",
            f"{r['ms']['median']:.2f}",
            f"{r['gflop_per_s']['median']:.0f}",
            *(f"{r['to_best_torch'][k]:.2f}" for k in ("median", "min", "max")),
        )
    return out


if __name__ == "__main__":
    main()
