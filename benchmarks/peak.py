"""How much memory does a process hold at most while a model reads a long prompt, beside the cache itself?

A random Llama of `--layers` layers with `--kv-heads` KV heads of `--head-dim`, a prompt of `--ctx` tokens in chunks of
`--chunk`, a process of its own for every recipe. As attention takes time in the square of the context, only the last
`--computed` tokens go through the model (0: all of them); those before are written as random keys and values through
the backend, block by block.

    held      bytes of the blocks that the sequence holds
    extra     most resident memory while the last chunks are computed, less that before the prompt, less held
    bar       extra is less than held: at no time is there a second full copy of the cache

The floor of extra is what one layer's chunk needs: its keys and values decoded side by side, a mask, activations.
Linux only: the system's high-water mark is reset before the prompt.

    python benchmarks/peak.py --ctx 32768 --kv auto int8
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import common
from common import Document, Table

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(key: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at most."""
    line = next(x for x in STATUS.read_text(encoding="ascii").splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def run(args: argparse.Namespace, kv: str) -> dict[str, Any]:
    """One recipe, in this process."""
    import torch

    from quire.attention import Row, Step
    from quire.engine.runner import Item
    from quire.models.open import open_runner

    common.prepare(args)
    model = common.random_llama(
        layers=args.layers,
        hidden=args.kv_heads * args.head_dim,
        heads=args.kv_heads * args.share,
        kv_heads=args.kv_heads,
        vocab=1024,
        context=args.ctx,
        dtype=args.dtype,
        seed=args.seed,
    )
    runner: Any = open_runner(model, kv=kv, memory=args.memory, weights="plain")
    tokens = common.random_tokens(args.ctx, 1024, args.seed)
    bridge = runner.bridge

    def compute(table: Any, start: int, stop: int) -> torch.Tensor:
        table.append(stop - start)
        logits: torch.Tensor = runner.forward([Item(table, tokens, start, stop, 1)])
        table.commit()
        return logits

    def store(table: Any, start: int, stop: int) -> None:
        table.append(stop - start)
        step = Step(bridge.store, bridge.layout, [Row(table, start, stop)], bridge.device)
        for layer in range(args.layers):
            k, v = torch.randn(2, stop - start, args.kv_heads, args.head_dim, dtype=model.dtype)
            bridge.backend.write(step, layer, {"k": k, "v": v})
        table.commit()

    warm = runner.open()
    compute(warm, 0, min(args.chunk, args.ctx))
    warm.release()
    gc.collect()
    before = resident("VmRSS")
    RESET.write_text("5", encoding="ascii")
    table = runner.open()
    logits = None
    with torch.inference_mode():
        for start in range(0, args.ctx, args.chunk):
            stop = min(args.ctx, start + args.chunk)
            if args.computed and stop <= args.ctx - args.computed:
                store(table, start, stop)
            else:
                logits = compute(table, start, stop)
    peak, held = resident("VmHWM"), table.held_bytes()
    assert logits is not None
    one = 2 * args.ctx * args.kv_heads * args.head_dim * model.dtype.itemsize
    ok = bool(logits.isfinite().all()) and table.length == args.ctx
    runner.close()
    return {
        "kv": kv,
        "held_bytes": held,
        "extra_bytes": peak - before - held,
        "extra_to_held": round((peak - before - held) / held, 4),
        "layer_dense_bytes": one,
        "extra_to_layer": round((peak - before - held) / one, 3),
        "met": peak - before - held < held,
        "ok": ok,
    }


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--kv-heads", type=int, default=8)
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--share", type=int, default=1, help="query heads of a KV head")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    p.add_argument("--ctx", type=int, default=32768)
    p.add_argument("--chunk", type=int, default=512)
    p.add_argument("--computed", type=int, default=1024, help="last tokens that are; 0: all")
    p.add_argument("--kv", nargs="+", default=["auto", "int8", "int4", "kivi:bits=2"])
    p.add_argument("--memory", default="2GiB", help="of the arena; untouched pages are not held")
    args = p.parse_args(argv)
    if args.smoke:
        args.ctx, args.chunk, args.computed, args.layers = 600, 128, 256, 2
        args.kv_heads, args.head_dim, args.kv, args.memory = 2, 32, ["int8"], "16MiB"
    if min(args.ctx, args.chunk, args.layers) < 1 or args.computed < 0:
        raise SystemExit("peak: --ctx, --chunk and --layers are at least 1, --computed at least 0")
    if not RESET.exists():
        raise SystemExit("peak: needs Linux, whose high-water mark of memory can be reset")
    doc = common.document("peak", "How much memory does a long prompt take beside its cache?", args)
    doc["cases"] = []
    for kv in args.kv:
        common.say(f"{kv}: {args.ctx} tokens")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            case = pool.submit(run, args, kv).result()
        common.check(doc, f"{kv}: all tokens are cached, logits are numbers", case.pop("ok"))
        doc["cases"].append(case)
    met = sum(c["met"] for c in doc["cases"])
    doc["verdicts"] = [f"bar met by {met} of {len(doc['cases'])} recipes"]
    return common.report(doc, args, [table(doc)])


def table(doc: Document) -> Table:
    out = Table(["kv", "held MB", "extra MB", "extra / held", "extra / a layer's K and V"])
    for r in doc["cases"]:
        out.add(
            r["kv"],
            f"{r['held_bytes'] / 1e6:.1f}",
            f"{r['extra_bytes'] / 1e6:.1f}",
            f"{r['extra_to_held']:.2f}",
            f"{r['extra_to_layer']:.2f}",
        )
    return out


if __name__ == "__main__":
    main()
