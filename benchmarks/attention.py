"""How near to the memory's speed does decode attention read its cache, and how far ahead of torch is it?

Attention alone, one layer, one query a sequence, for every recipe: `--batch` sequences of `--ctx` tokens in blocks in
random order, `--cold-mib` of them in rotation so that no call finds its cache in a processor's caches. Beside each:

    stream      a pass over 256 MiB, just before
    resident    the same calls over block tables that name the same few blocks again and again: no memory, all compute
    torch       contiguous bf16 keys and values, in rotation as well: fused attention with the queries of a KV head
                side by side, and matmul - softmax - matmul. The best of the two is the bar; enable_gqa is shown only

All sides take turns; shares and ratios are taken within a turn. GB/s counts what the store holds of the slots that are
read: codes, scales, and the raw tail. Before timing each recipe is held to float64 attention over its decoded cache.

    python benchmarks/attention.py --threads 1 --clock cpu
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from common import Document, Spread, Stream, Table, Turns

from quire.attention import ReferenceBackend, Row, Step
from quire.codecs import available
from quire.codecs.coded import Coded
from quire.errors import ConfigError
from quire.kernels.native import DecodeArgs, Library
from quire.models.bridge import make_backend
from quire.plan import KVLayer, build_layout
from quire.spec import Field, KVConfig
from quire.store import BlockStore

SHARE = 0.75
"""The bar of every codec from LONG tokens on: of the smaller of the stream and the resident speed."""

AHEAD = {"bf16": 2.5, "int8": 4.0, "int4": 5.0, "kivi:bits=2": 4.0}
"""The bars against the best torch form from LONG tokens on; below it is AHEAD_SHORT for all of them."""

AHEAD_SHORT, LONG = 1.5, 8192
EXACT, WHOLE = 2e-6, 3e-4
"""Largest error in the norm of the output, of float32 queries: where rows of floats are read, and where codes are
multiplied as integers."""

RESIDENT_BYTES = 256 << 10
CHUNK = 1024


def recipes() -> list[str]:
    """What kernels read in place: codecs' `shown` recipes or their names; of plain ones the model's dtype."""
    out = ["bf16"]
    for name in available():
        codec = getattr(importlib.import_module(f"quire.codecs.{name}"), "Codec", None)
        if codec is not None and not codec.plain and codec.packing is not Coded.packing:
            out += getattr(codec, "shown", (name,))
    more = {"int4": ["int4", "int4:group=32"], "kivi": ["kivi:bits=2", "kivi:bits=4"]}
    return [kv for name in out for kv in more.get(name, [name])]


class Counted:
    """The library, with the calls of its decode kernel counted."""

    def __init__(self, library: Library) -> None:
        self._library, self.calls = library, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def decode(self, args: DecodeArgs) -> None:
        self.calls += 1
        self._library.decode(args)


class Cache:
    """Sets of `batch` sequences of `ctx` tokens under one recipe, each set with its decode step planned.

    Blocks are copies of a few hundred that the codec made, and stand in random order across all sets.
    """

    def __init__(self, args: argparse.Namespace, kv: str, batch: int, ctx: int) -> None:
        self.kv, self.batch, self.ctx = kv, batch, ctx
        fields = tuple(Field(n, (args.head_dim,), "bfloat16") for n in "kv")
        config = KVConfig(kv, block_tokens=args.block_tokens)
        self.layout = build_layout([KVLayer(0, args.kv_heads, fields)], config, dtype="bfloat16")
        one = batch * self.layout.spec.bytes_for(ctx)
        n_sets = max(1, -(-(args.cold_mib << 20) // one))
        self.draw = np.random.default_rng(args.seed)
        self.store = BlockStore(self.layout.spec, n_sets * one * 9 // 8 + (64 << 20), device="cpu")
        self.tables = [self.table() for _ in range(n_sets * batch)]
        self.fill(args.patterns, args.seed)
        rows = [Row(t, ctx - 1, ctx) for t in self.tables]
        self.rows = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        self.steps = [Step(self.store, self.layout, r) for r in self.rows]
        self.resident = self.few(RESIDENT_BYTES)
        draw = torch.Generator().manual_seed(args.seed + 1)
        self.q = torch.randn(batch, args.heads, args.head_dim, generator=draw).to(torch.bfloat16)
        self.scale = args.head_dim**-0.5

    def table(self) -> Any:
        """A sequence that is about to answer its last token, as chunks of a prompt would leave it."""
        table = self.store.open()
        while table.length < self.ctx - 1:
            table.append(min(CHUNK, self.ctx - 1 - table.length))
            for chain in table.chains:
                chain.encoded = chain.count
            table.commit()
        table.append(1)
        return table

    def fill(self, n_blocks: int, seed: int) -> None:
        """Shuffles the blocks of all sequences and fills each with one of `n_blocks` that were written and sealed."""
        n = n_blocks * self.layout.spec.groups[0].block_tokens
        donor = BlockStore(
            self.layout.spec,
            2 * self.layout.spec.bytes_for(n, chunk_tokens=n) + (8 << 20),
            device="cpu",
        )
        donor.arena.buffer.zero_()
        table = donor.open()
        table.append(n)
        draw = torch.Generator().manual_seed(seed)
        heads, width = len(self.layout.spec.groups[0].coords), self.width
        values = {f: torch.randn(n, heads, width, generator=draw) for f in "kv"}
        values["k"][..., 3] *= 4  # a channel that stands out
        Step(donor, self.layout, [Row(table, 0, n)]).write(
            0, {f: x.to(torch.bfloat16) for f, x in values.items()}
        )
        for at, chain in enumerate(table.chains):
            patterns = blocks_of(donor, chain.group, chain.live())
            mine = [t.chains[at] for t in self.tables]
            ids = self.draw.permutation(np.concatenate([c.live() for c in mine]))
            first = 0
            for c in mine:
                there = np.flatnonzero(c.ids[: c.count] >= 0)
                c.ids[there] = ids[first : first + len(there)]
                first += len(there)
            for block, i in zip(
                blocks_of(self.store, chain.group, ids),
                self.draw.integers(len(patterns), size=len(ids)),
                strict=True,
            ):
                block.copy_(patterns[i])

    @property
    def width(self) -> int:
        return int(self.layout.fields_of(self.layout.spec.groups[0])[0].shape[0])

    def few(self, n_bytes: int) -> Step:
        """The first set's step over the same few blocks again and again, at least one."""
        step = Step(self.store, self.layout, self.rows[0])
        for read in step.reads:
            units = read.blocks.units
            n = max(1, min(units.shape[1], n_bytes // read.source.block_bytes))
            units[:] = units[:1, np.arange(units.shape[1]) % n]
        return step

    def n_bytes(self) -> int:
        """What one set's step reads."""
        return sum(
            (hi - lo) * r.source.block_bytes // r.source.block_tokens
            for r in self.steps[0].reads
            for i in range(len(r.rows))
            for lo, hi in r.runs(i)
        )

    def caller(self, backend: Any, steps: Iterable[Step]) -> Callable[[], object]:
        """One pass over all sets."""

        @torch.inference_mode()
        def call() -> None:
            for step in steps:
                backend.run(step, 0, self.q, scale=self.scale)

        return call

    @torch.inference_mode()
    def error(self, backend: Any, at: int) -> tuple[float, float]:
        """Of the last sequence of a set: float32 queries against float64 over what is decoded, and bfloat16 queries."""
        row = Step(self.store, self.layout, [self.rows[at][-1]])
        want = ReferenceBackend().run(row, 0, self.q[-1:].double(), scale=self.scale)
        got = backend.run(self.steps[at], 0, self.q.float(), scale=self.scale)[-1:]
        rounded = backend.run(self.steps[at], 0, self.q, scale=self.scale)[-1:]
        exact, near = (float((x - want).norm() / want.norm()) for x in (got, rounded))
        return exact, near


def blocks_of(store: BlockStore, group: Any, ids: np.ndarray) -> list[torch.Tensor]:
    """The bytes of these blocks."""
    buffer, n = store.arena.buffer, group.block_bytes
    return [buffer[u : u + n] for u in (store.units(group, ids) * 64).tolist()]


class Contiguous:
    """The same shapes for torch: bf16 keys and values side by side, sets in rotation."""

    def __init__(self, args: argparse.Namespace, batch: int, ctx: int) -> None:
        shape = (batch, args.kv_heads, ctx, args.head_dim)
        n = max(1, -(-(args.cold_mib << 20) // (4 * batch * args.kv_heads * ctx * args.head_dim)))
        draw = torch.Generator().manual_seed(args.seed)
        some = torch.randn(2, *shape[1:3], args.head_dim, generator=draw).to(torch.bfloat16)
        self.sets = [
            tuple(some[i].roll(s, 1).expand(shape).contiguous() for i in (0, 1)) for s in range(n)
        ]
        self.q = torch.randn(batch, args.heads, args.head_dim, generator=draw).to(torch.bfloat16)
        self.grouped = self.q.view(batch, args.kv_heads, -1, args.head_dim)
        self.scale = args.head_dim**-0.5

    def fused(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(self.grouped, k, v).view(self.q.shape)

    def products(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (self.grouped @ k.transpose(2, 3)).mul_(self.scale)
        return (torch.softmax(scores, -1) @ v).view(self.q.shape)

    def gqa(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = self.q.unsqueeze(2)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).view(self.q.shape)

    def caller(self, form: Callable[..., torch.Tensor], n: int | None = None) -> Callable[[], None]:
        @torch.inference_mode()
        def call() -> None:
            for k, v in self.sets[:n]:
                form(k, v)

        return call

    @torch.inference_mode()
    def error(self, form: Callable[..., torch.Tensor]) -> float:
        k, v = self.sets[-1]
        at = slice(-1, None)
        scores = self.grouped[at].double() @ k[at].double().transpose(2, 3) * self.scale
        want = (torch.softmax(scores, -1) @ v[at].double()).view(self.q[at].shape)
        return float((form(k, v)[at] - want).norm() / want.norm())


def verify(doc: Document, backend: Any, caches: Sequence[Cache], dense: Contiguous) -> None:
    """Float64 attention over the decoded cache; the kernel itself was asked; other blocks give another answer."""
    for cache in caches:
        where = f"{cache.kv}, batch {cache.batch}, {cache.ctx} tokens"
        counted = getattr(backend, "library", None)
        before = counted.calls if counted else 0
        exact, near = cache.error(backend, 0)
        if counted:
            common.check(doc, f"the kernel serves {where}", counted.calls == before + 2)
        # torch's own products round in the model's dtype; the kernel does not
        bound = 1e-2 if not counted else EXACT if cache.kv.startswith(("bf16", "fp8")) else WHOLE
        common.check(doc, f"float32 queries, {where}", exact <= bound, exact)
        common.check(doc, f"bfloat16 queries, {where}", near <= 1e-2, near)
        with torch.inference_mode():
            other = backend.run(cache.few(0), 0, cache.q, scale=cache.scale)
            mine = backend.run(cache.steps[0], 0, cache.q, scale=cache.scale)
        seen = float((other - mine).float().norm() / mine.float().norm())
        common.check(doc, f"other blocks are noticed, {where}", seen > 2e-2, seen)
    for form in (dense.fused, dense.products, dense.gqa):
        error = dense.error(form)
        where = f"torch {form.__name__}, batch {caches[0].batch}, {caches[0].ctx} tokens"
        common.check(doc, where, error <= 2e-2, error)


def measure(
    doc: Document, args: argparse.Namespace, backend: Any, batch: int, ctx: int, stream: Stream
) -> None:
    """All recipes and torch's forms of one shape, in turns."""
    common.say(f"batch {batch}, {ctx} tokens: filling and verifying")
    caches = [Cache(args, kv, batch, ctx) for kv in args.kv]
    dense = Contiguous(args, batch, ctx)
    verify(doc, backend, caches, dense)
    forms = {"fused": dense.fused, "products": dense.products}
    sides: dict[str, Callable[[], object]] = {}
    for cache in caches:
        sides[f"{cache.kv} stream"] = stream.read
        sides[cache.kv] = cache.caller(backend, cache.steps)
        sides[f"{cache.kv} resident"] = cache.caller(backend, [cache.resident] * len(cache.steps))
    sides["torch stream"] = stream.read
    sides |= {f"torch {name}": dense.caller(form) for name, form in forms.items()}
    common.say(f"batch {batch}, {ctx} tokens: timing")
    turns = common.take_turns(sides, args.repeats, clock=args.clock)
    dense_bytes = 4 * batch * args.kv_heads * ctx * args.head_dim
    for name in forms:
        seconds = [s / len(dense.sets) for s in turns.seconds[f"torch {name}"]]
        doc["torch"].append(form_row(name, batch, ctx, seconds, dense_bytes))
    seconds = [common.timed(dense.caller(dense.gqa, 1), args.clock) for _ in range(2)]
    doc["torch"].append(form_row("gqa", batch, ctx, seconds, dense_bytes))
    best = min(forms, key=lambda name: turns.spread(f"torch {name}").median)
    per_call = [s / len(dense.sets) for s in turns.seconds[f"torch {best}"]]
    for cache in caches:
        doc["cases"].append(case_row(cache, turns, stream.n_bytes, best, per_call))


def form_row(
    name: str, batch: int, ctx: int, seconds: Sequence[float], n_bytes: int
) -> dict[str, Any]:
    return {
        "form": name,
        "batch": batch,
        "ctx": ctx,
        "us": Spread.of(seconds).json(1e6, 1),
        "gb_per_s": Spread.of(n_bytes / s for s in seconds).json(1e-9, 2),
    }


def case_row(
    cache: Cache, turns: Turns, stream_bytes: int, best: str, torch_s: Sequence[float]
) -> dict[str, Any]:
    n, n_bytes = len(cache.steps), cache.n_bytes()
    cold, resident = ([s / n for s in turns.seconds[cache.kv + x]] for x in ("", " resident"))
    speed, inside = [n_bytes / s for s in cold], [n_bytes / s for s in resident]
    read = [stream_bytes / s for s in turns.seconds[f"{cache.kv} stream"]]

    def share(of: Iterable[float]) -> dict[str, float]:
        return Spread.of(a / b for a, b in zip(speed, of, strict=True)).json(digits=3)

    row: dict[str, Any] = {
        "kv": cache.kv,
        "batch": cache.batch,
        "ctx": cache.ctx,
        "sets": n,
        "read_bytes": n_bytes,
        "us": Spread.of(cold).json(1e6, 1),
        "gb_per_s": Spread.of(speed).json(1e-9, 2),
        "stream_gb_per_s": Spread.of(read).json(1e-9, 2),
        "resident_gb_per_s": Spread.of(inside).json(1e-9, 2),
        "share_of_stream": share(read),
        "share_of_resident": share(inside),
        "share_of_smaller": share(min(a, b) for a, b in zip(read, inside, strict=True)),
        "best_torch": best,
        "torch_takes": Spread.of(t / s for t, s in zip(torch_s, cold, strict=True)).json(digits=2),
    }
    long = cache.ctx >= LONG
    ahead = AHEAD.get(cache.kv) if long else AHEAD_SHORT
    row["bars"] = {
        "share_of_smaller": SHARE if long else None,
        "torch_takes": ahead,
        "met": (not long or row["share_of_smaller"]["median"] >= SHARE)
        and (ahead is None or row["torch_takes"]["median"] >= ahead),
    }
    return row


def tables(doc: Document) -> list[Table]:
    first = Table(
        [
            *("batch, ctx, kv", "us", "min", "max", "GB/s", "stream", "resident"),
            *("of stream %", "of the smaller %", "min", "max", "torch takes", "min", "max", "bars"),
        ]
    )
    for r in doc["cases"]:
        first.add(
            f"{r['batch']}, {r['ctx']}, {r['kv']}",
            *(f"{r['us'][k]:.0f}" for k in ("median", "min", "max")),
            *(f"{r[f'{x}gb_per_s']['median']:.1f}" for x in ("", "stream_", "resident_")),
            f"{100 * r['share_of_stream']['median']:.0f}",
            *(f"{100 * r['share_of_smaller'][k]:.0f}" for k in ("median", "min", "max")),
            *(f"{r['torch_takes'][k]:.1f}x" for k in ("median", "min", "max")),
            "met" if r["bars"]["met"] else "missed",
        )
    second = Table(["batch, ctx, torch form", "us", "min", "max", "GB/s"])
    for r in doc["torch"]:
        second.add(
            f"{r['batch']}, {r['ctx']}, {r['form']}",
            *(f"{r['us'][k]:.0f}" for k in ("median", "min", "max")),
            f"{r['gb_per_s']['median']:.1f}",
        )
    return [first, second]


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--kv", nargs="+", default=recipes(), help="recipes (default: all codecs)")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    p.add_argument("--ctx", type=int, nargs="+", default=[1024, 8192, 32768])
    p.add_argument("--heads", type=int, default=32, help="of queries")
    p.add_argument("--kv-heads", type=int, default=8)
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--block-tokens", type=int, default=32)
    p.add_argument("--cold-mib", type=int, default=256, help="of each recipe's cache, at least")
    p.add_argument("--patterns", type=int, default=128, help="distinct blocks")
    p.add_argument("--attention", default="auto", help="backend: cpu, torch, reference")
    p.set_defaults(repeats=5)
    args = p.parse_args(argv)
    if args.smoke:
        args.batch, args.ctx, args.repeats, args.cold_mib = [2], [70, 200], 2, 1
        args.heads, args.kv_heads, args.head_dim, args.patterns = 4, 2, 32, 8
    if args.heads % args.kv_heads or min(*args.ctx, *args.batch) < 1:
        raise SystemExit("--heads must be a multiple of --kv-heads, --ctx and --batch at least 1")
    common.prepare(args)
    question = "How near to the memory's speed does decode attention read its cache?"
    doc = common.document("attention", question, args)
    stream = Stream(8 << 20 if args.smoke else common.STREAM_BYTES)
    doc["cases"], doc["torch"] = [], []
    try:
        backend: Any = make_backend(args.attention)
        doc["attention"] = backend.name
        if backend.name == "cpu":
            backend.library = Counted(backend.library)
        for batch in args.batch:
            for ctx in args.ctx:
                measure(doc, args, backend, batch, ctx, stream)
    except ConfigError as e:
        raise SystemExit(f"attention: {e}") from None
    met = [r["bars"]["met"] for r in doc["cases"]]
    doc["verdicts"] = [f"bars met in {sum(met)} of {len(met)} cases ({doc['attention']} backend)"]
    return common.report(doc, args, tables(doc))


if __name__ == "__main__":
    main()
