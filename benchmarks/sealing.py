"""What does it cost to encode the blocks that become whole, in a prompt's chunks and in decode steps?

One random model (`--random`, as `quire bench` makes it), the runner that an engine drives, every recipe with the blocks
encoded by the compiled kernel and by the codecs in torch:

    prompt    `--ctx` tokens in chunks of `--chunk`
    decode    `--batch` sequences, as many steps as a block has tokens, so that each of them seals one block

Both sides' arenas must hold the same bytes after the prompt. Both take turns; a share is the time between entering and
leaving the encoder over that of the whole work, within a turn.

    python benchmarks/sealing.py --random 55m --kv int8 int4 kivi:bits=2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import common
import torch
from common import Document, Spread, Table

from quire.attention import Step
from quire.attention.cpu import CpuBackend
from quire.attention.read import Seal
from quire.bench.models import SIZES, random_llama
from quire.engine.runner import Item
from quire.errors import QuireError
from quire.models.open import open_runner

SIDES = ("kernel", "torch")


class Sealing(CpuBackend):
    """Encodes by the kernel or by the codecs, and keeps the time that it takes."""

    def __init__(self, side: str) -> None:
        super().__init__()
        self.side, self.seconds, self.blocks = side, 0.0, 0

    def encode(self, step: Step, layer: int, s: Seal) -> bool:
        began = perf_counter()
        if self.side == "torch":
            step.encode(layer, s)
            done = True
        else:
            done = super().encode(step, layer, s)
        self.seconds += perf_counter() - began
        self.blocks += len(s.source.units) if done else 0
        return done


class Side:
    """A runner with one of the two encoders."""

    def __init__(self, args: argparse.Namespace, kv: str, side: str) -> None:
        context = max(args.ctx, args.decode_ctx) + 256
        made = random_llama(args.random, context=context, dtype=args.dtype, seed=args.seed)
        self.args, self.vocab = args, int(made.model.config.vocab_size)
        self.runner: Any = open_runner(
            made.model, kv=kv, memory=args.memory, attention="cpu", weights=args.weights
        )
        self.backend = self.runner.bridge.backend = Sealing(side)
        self.tables: list[Any] = []

    def prompt(self, keep: bool = False) -> None:  # noqa: FBT001, FBT002 - the caller names it
        self._feed([self.runner.open()], self.args.ctx, self.args.chunk)
        if not keep:
            self.tables.pop().release()

    def _feed(self, tables: list[Any], ctx: int, chunk: int) -> None:
        for i, table in enumerate(tables):
            tokens = common.random_tokens(ctx, self.vocab, self.args.seed + i)
            for at in range(0, ctx, chunk):
                stop = min(ctx, at + chunk)
                table.append(stop - at)
                self.runner.forward([Item(table, tokens, at, stop, 0)])
                table.commit()
        self.tables += tables

    def begin(self) -> None:
        """A batch in the middle of decoding, at lengths of all remainders within a block."""
        for i in range(self.args.batch):
            self._feed([self.runner.open()], self.args.decode_ctx + i, self.args.chunk)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            items = []
            for t in self.tables:
                at = t.length
                t.append(1)
                items.append(Item(t, [7] * (at + 1), at, at + 1, 1))
            self.runner.forward(items)
            for t in self.tables:
                t.commit()

    def release(self) -> None:
        while self.tables:
            self.tables.pop().release()


def verify(doc: Document, kv: str, sides: dict[str, Side]) -> None:
    """The same bytes in both arenas, and some of them; the kernel was not passed over."""
    stored = []
    for side in sides.values():
        side.runner.bridge.store.arena.buffer.zero_()
        side.backend.blocks = 0
        side.prompt(keep=True)
        stored.append(side.runner.bridge.store.arena.buffer)
    one = sides["kernel"]
    seen = [g for g in one.runner.bridge.layout.spec if g.raw is not None]
    common.check(doc, f"the kernel serves {kv}", bool(seen) and one.backend.blocks > 0)
    common.check(doc, f"equal bytes, {kv}", torch.equal(*stored) and bool(stored[0].any()))
    for side in sides.values():
        side.release()


def timed(side: Side, work: Callable[[], None], shares: list[float], spent: list[float]) -> None:
    side.backend.seconds, began = 0.0, perf_counter()
    work()
    shares.append(side.backend.seconds / (perf_counter() - began))
    spent.append(side.backend.seconds)


def measure(
    doc: Document, args: argparse.Namespace, kv: str, sides: dict[str, Side], kind: str
) -> None:
    shares: dict[str, list[float]] = {s: [] for s in SIDES}
    spent: dict[str, list[float]] = {s: [] for s in SIDES}
    size = sides["kernel"].runner.bridge.layout.spec.groups[0].block_tokens
    works: dict[str, Callable[[], object]] = {}
    for name, side in sides.items():
        work = side.prompt if kind == "prompt" else partial(side.decode, size)
        if kind == "decode":
            side.begin()
        works[name] = partial(timed, side, work, shares[name], spent[name])
    turns = common.take_turns(works, args.repeats)
    units = -(-args.ctx // args.chunk) if kind == "prompt" else size
    for name in SIDES:
        doc["cases"].append(
            {
                "kv": kv,
                "work": kind,
                "encoder": name,
                "ms": turns.spread(name, units).json(1e3, 3),
                "encoding_ms": Spread.of(s / units for s in spent[name][1:]).json(1e3, 3),
                "share": Spread.of(shares[name][1:]).json(digits=4),
                "to_torch": turns.ratio("torch", name).json(digits=3),
            }
        )
    for side in sides.values():
        side.release()


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--random", default="55m", help=f"the model's size: {', '.join(SIZES)}")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    p.add_argument("--kv", nargs="+", default=["int8", "int4", "kivi:bits=2"])
    p.add_argument("--ctx", type=int, default=2048, help="tokens of the prompt")
    p.add_argument("--chunk", type=int, default=512)
    p.add_argument("--batch", type=int, default=32, help="sequences that decode")
    p.add_argument("--decode-ctx", type=int, default=256, help="their tokens when they begin")
    p.add_argument("--weights", default="auto", help="auto, plain, prepacked")
    p.add_argument("--memory", default="512MiB", help="of each side's arena")
    p.set_defaults(repeats=5)
    args = p.parse_args(argv)
    if args.smoke:
        args.random, args.ctx, args.chunk, args.kv = "tiny", 200, 96, ["int8", "int4"]
        args.batch, args.decode_ctx, args.repeats, args.memory = 2, 40, 2, "16MiB"
    if args.clock == "cpu":
        raise SystemExit("sealing: shares are taken by the wall clock")
    if args.random not in SIZES or min(args.ctx, args.chunk, args.batch, args.decode_ctx) < 1:
        raise SystemExit(
            f"--random is one of {', '.join(SIZES)}; sizes of prompts, chunks and batches are at least 1"
        )
    common.prepare(args)
    doc = common.document("sealing", "What does it cost to encode blocks?", args)
    doc["cases"] = []
    try:
        for kv in args.kv:
            sides = {name: Side(args, kv, name) for name in SIDES}
            try:
                verify(doc, kv, sides)
                for kind in ("prompt", "decode"):
                    common.say(f"{kv}, {kind}: timing")
                    measure(doc, args, kv, sides, kind)
            finally:
                for side in sides.values():
                    side.runner.close()
    except QuireError as e:
        raise SystemExit(f"sealing: {e}") from None
    return common.report(doc, args, [table(doc)])


def table(doc: Document) -> Table:
    out = Table(
        ["kv, work, encoder", "ms a chunk/step", "encoding ms", "share %", "max %", "x faster"]
    )
    for r in doc["cases"]:
        out.add(
            f"{r['kv']}, {r['work']}, {r['encoder']}",
            f"{r['ms']['median']:.2f}",
            f"{r['encoding_ms']['median']:.3f}",
            f"{100 * r['share']['median']:.2f}",
            f"{100 * r['share']['max']:.2f}",
            f"{r['to_torch']['median']:.2f}",
        )
    return out


if __name__ == "__main__":
    main()
