"""What do three ways to store keys and values cost in a decode: concatenated, preallocated, paged?

One attention layer's cache, the same tokens in all three, without a model: N steps that append one token to each of B
sequences, each followed by attention over what is cached (torch's fused attention, grouped heads side by side).

    concatenated   torch.cat every step, as transformers' DynamicCache does: a new tensor, everything copied
    preallocated   one tensor of `--room` tokens a sequence, rows written in place, a slice read
    paged          this store: blocks taken as they are needed, gathered for each step

Time per step (storing, and attention, apart), allocations, bytes copied, and waste when the decode ends. Attention's
results are compared before anything is timed. A paged kernel would read blocks in place; the gather here is what plain
torch has to pay, and is counted as a copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import common
import torch
import torch.nn.functional as F
from common import Document, Spread, Stream, Table

from quire.attention import Row, Step
from quire.plan import KVLayer, build_layout
from quire.spec import Field, KVConfig
from quire.store import BlockStore

KV = tuple[torch.Tensor, torch.Tensor]


class Storage(Protocol):
    """B sequences of equal length; `[B, H_kv, T, D]` in, everything cached out."""

    allocations: int
    copied_bytes: int

    def append(self, k: torch.Tensor, v: torch.Tensor) -> KV: ...

    def waste(self) -> float: ...


def n_bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Concatenated:
    """A new tensor every step."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.kv: KV | None = None
        self.allocations = self.copied_bytes = 0

    def append(self, k: torch.Tensor, v: torch.Tensor) -> KV:
        if self.kv is None:
            self.kv = (k.clone(), v.clone())
        else:
            self.kv = (torch.cat([self.kv[0], k], 2), torch.cat([self.kv[1], v], 2))
        self.allocations += 2
        self.copied_bytes += n_bytes(*self.kv)
        return self.kv

    def waste(self) -> float:
        """Nothing is kept in reserve; while a step copies, the old and the new tensor exist together."""
        return 0.0


class Preallocated:
    """Room for the longest sequence from the start."""

    def __init__(self, args: argparse.Namespace) -> None:
        shape = (args.batch, args.kv_heads, args.room, args.head_dim)
        self.k, self.v = (torch.empty(shape, dtype=getattr(torch, args.dtype)) for _ in "kv")
        self.n = 0
        self.allocations, self.copied_bytes = 2, 0

    def append(self, k: torch.Tensor, v: torch.Tensor) -> KV:
        stop = self.n + k.shape[2]
        self.k[:, :, self.n : stop] = k
        self.v[:, :, self.n : stop] = v
        self.n = stop
        self.copied_bytes += n_bytes(k, v)
        return self.k[:, :, :stop], self.v[:, :, :stop]

    def waste(self) -> float:
        return 1 - self.n / self.k.shape[2]


class Paged:
    """Blocks of this store; the step is planned, written and gathered as the bridge does it."""

    def __init__(self, args: argparse.Namespace) -> None:
        fields = tuple(Field(n, (args.head_dim,), args.dtype) for n in "kv")
        layer = KVLayer(0, args.kv_heads, fields)
        config = KVConfig(block_tokens=args.block_tokens)
        self.layout = build_layout([layer], config, dtype=args.dtype)
        total = 2 * args.batch * self.layout.spec.bytes_for(args.ctx + total_steps(args) + 64)
        self.store = BlockStore(self.layout.spec, max(total, 8 << 20), device="cpu")
        _ = self.store.arena.buffer
        self.tables = [self.store.open() for _ in range(args.batch)]
        self.allocations, self.copied_bytes = 1, 0  # the arena

    def append(self, k: torch.Tensor, v: torch.Tensor) -> KV:
        t = k.shape[2]
        for table in self.tables:
            table.append(t)
        step = Step(self.store, self.layout, [Row(x, x.length - t, x.length) for x in self.tables])
        flat = {"k": k, "v": v}
        step.write(
            0, {n: x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for n, x in flat.items()}
        )
        self.copied_bytes += n_bytes(k, v)
        reads = step.of_layer(0)[2]
        if len(reads) == 1:  # a decode step: rows of equal length are read together
            kv = step.gather_both(0, reads[0], ("k", "v"), k.dtype)
        else:
            one, two = (torch.cat([step.gather(0, r, n, k.dtype) for r in reads]) for n in "kv")
            kv = one, two
        for table in self.tables:
            table.commit()
        self.copied_bytes += n_bytes(*kv)
        return kv

    def waste(self) -> float:
        held = sum(t.held_bytes() for t in self.tables)
        return 1 - sum(t.used_bytes() for t in self.tables) / held


KINDS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "concatenated": Concatenated,
    "preallocated": Preallocated,
    "paged": Paged,
}


def total_steps(args: argparse.Namespace) -> int:
    return int(args.steps * (args.repeats + 2))


def attend(q: torch.Tensor, kv: KV) -> torch.Tensor:
    """`q: [B, H_kv, G, D]`, one query per sequence."""
    return F.scaled_dot_product_attention(q, *kv)


class Decode:
    """One storage in the middle of a decode."""

    def __init__(
        self, make: Callable[[argparse.Namespace], Storage], args: argparse.Namespace
    ) -> None:
        dtype = getattr(torch, args.dtype)
        draw = torch.Generator().manual_seed(args.seed)
        shape = (args.batch, args.kv_heads, args.ctx, args.head_dim)
        self.storage = make(args)
        self.now = common.CLOCKS[args.clock]
        self.prompt = [torch.randn(shape, generator=draw).to(dtype) for _ in "kv"]
        with torch.inference_mode():
            self.storage.append(*self.prompt)
        self.new = [
            [torch.randn(*shape[:2], 1, shape[3], generator=draw).to(dtype) for _ in "kv"]
            for _ in range(8)
        ]
        self.q = torch.randn(*shape[:2], args.share, shape[3], generator=draw).to(dtype)
        self.store_s: list[float] = []
        self.done = 0
        self.out = self.q

    @torch.inference_mode()
    def steps(self, n: int) -> None:
        spent = 0.0
        for _ in range(n):
            begin = self.now()
            kv = self.storage.append(*self.new[self.done % len(self.new)])
            spent += self.now() - begin
            self.out = attend(self.q, kv)
            self.done += 1
        self.store_s.append(spent)


def verify(doc: Document, args: argparse.Namespace) -> None:
    """Every way holds the same keys and values in the same order, after a prompt and a few steps."""
    outs = {}
    for name, make in KINDS.items():
        decode = Decode(make, args)
        decode.steps(min(5, args.steps))
        outs[name] = decode.out
    want = outs["concatenated"].float()
    for name, out in outs.items():
        gap = float((out.float() - want).abs().max())
        common.check(
            doc,
            f"{name} attends to the same",
            gap < 1e-2 if args.dtype != "float32" else gap < 1e-5,
            gap,
        )
    control = float(
        (attend(torch.flip(Decode(Concatenated, args).q, [3]), (want, want)) - want).abs().max()
    )
    common.check(doc, "another query is noticed", control > 1e-2, control)


def measure(args: argparse.Namespace, stream: Stream) -> dict[str, Any]:
    decodes = {name: Decode(make, args) for name, make in KINDS.items()}
    n = args.steps
    sides = {name: partial(d.steps, n) for name, d in decodes.items()}
    counted = {name: (d.storage.allocations, d.storage.copied_bytes) for name, d in decodes.items()}
    turns = common.take_turns(sides, args.repeats, warm_up=1, clock=args.clock, stream=stream)
    out: dict[str, Any] = {}
    for name, d in decodes.items():
        allocations, copied = counted[name]
        store = d.store_s[1:]
        attention = [t - s for t, s in zip(turns.seconds[name], store, strict=True)]
        out[name] = {
            "step_us": turns.spread(name, n).json(1e6, 2),
            "storing_us": Spread.of(s / n for s in store).json(1e6, 2),
            "attention_us": Spread.of(s / n for s in attention).json(1e6, 2),
            "to_concatenated": turns.ratio(name, "concatenated").json(digits=3),
            "allocations_per_step": (d.storage.allocations - allocations) / d.done,
            "copied_bytes_per_step": (d.storage.copied_bytes - copied) / d.done,
            "waste": d.storage.waste(),
        }
    return {"sides": out, "stream_gb_per_s": [round(x, 1) for x in turns.stream_gb_per_s or ()]}


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--ctx", type=int, nargs="+", default=[256, 2048])
    p.add_argument("--steps", type=int, default=32, help="steps of a turn")
    p.add_argument(
        "--room", type=int, default=4096, help="tokens reserved by the preallocated form"
    )
    p.add_argument("--kv-heads", type=int, default=2)
    p.add_argument("--share", type=int, default=4, help="query heads per KV head")
    p.add_argument("--head-dim", type=int, default=64)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--block-tokens", type=int, default=32)
    args = p.parse_args(argv)
    if args.smoke:
        args.batch, args.ctx, args.steps, args.room, args.repeats = 2, [9, 40], 3, 128, 2
    common.prepare(args)
    question = "What do concatenated, preallocated and paged storage cost in a decode?"
    doc = common.document("storage", question, args)
    every = list(args.ctx)
    if args.room < max(every) + total_steps(args):
        raise SystemExit(
            f"--room {args.room} is too small for {max(every)} + {total_steps(args)} tokens"
        )
    stream = Stream(8 << 20 if args.smoke else common.STREAM_BYTES)
    doc["cases"] = []
    for ctx in every:
        args.ctx = ctx
        verify(doc, args)
        doc["cases"].append({"ctx": ctx, "batch": args.batch, **measure(args, stream)})
    table = Table(
        [
            "ctx",
            "storage",
            "step us",
            "min",
            "max",
            "storing us",
            "to cat",
            "allocations",
            "copied KB",
            "waste %",
        ]
    )
    for case in doc["cases"]:
        for name, s in case["sides"].items():
            table.add(
                case["ctx"],
                name,
                *(f"{s['step_us'][k]:.0f}" for k in ("median", "min", "max")),
                f"{s['storing_us']['median']:.0f}",
                f"{s['to_concatenated']['median']:.2f}",
                f"{s['allocations_per_step']:.0f}",
                f"{s['copied_bytes_per_step'] / 1e3:.0f}",
                f"{100 * s['waste']:.1f}",
            )
    return common.report(doc, args, [table])


if __name__ == "__main__":
    main()
