"""Do a model's linear layers gain from prepacked weights, and from how many rows on do they lose?

One `nn.Linear` shape at a time, several layers of it so that weights are read cold; plain and packed take turns, and
where oneDNN packed them, so does oneDNN's own product for all rows: our kernel reads its blocks where it is faster.

    python benchmarks/linears.py --clock cpu --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
from common import Document, Stream, Table
from torch import nn

from quire.kernels import native
from quire.models.panels import PanelWeight
from quire.models.prepack import Prepacked
from quire.models.prepack import _forward as forward_of

ROUNDED = ("int8", "int4")


class Stack(nn.Module):
    """Layers side by side over one input."""

    def __init__(self, shape: tuple[int, int], n_bytes: int, dtype: torch.dtype) -> None:
        super().__init__()
        size = shape[0] * shape[1] * dtype.itemsize
        n = max(1, n_bytes // size)
        self.dtype, self.weight_bytes = dtype, n * size
        self.layers = nn.ModuleList(nn.Linear(*shape, bias=False).to(dtype) for _ in range(n))
        self.requires_grad_(requires_grad=False)

    def caller(self, x: torch.Tensor) -> Callable[[], object]:
        @torch.inference_mode()
        def call() -> None:
            for layer in self.layers:
                layer(x)

        return call


def rounded_stacks(
    args: argparse.Namespace, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Stack]:
    """The same layers rounded to 8 and to 4 bits; none where no kernel multiplies them."""
    if dtype != torch.bfloat16 or native.load() is None:
        return {}
    found = {}
    for form in ROUNDED:
        torch.manual_seed(args.seed)
        found[form] = Stack(shape, args.mib << 20, dtype)
        Prepacked(found[form]).pack_layers(form)
    return found


def onednn_stack(
    args: argparse.Namespace, shape: tuple[int, int], dtype: torch.dtype
) -> Stack | None:
    """The same layers packed and multiplied by oneDNN alone; None where it does not pack them."""
    torch.manual_seed(args.seed)
    stack = Stack(shape, args.mib << 20, dtype)
    Prepacked(stack).pack_layers()
    if dtype != torch.bfloat16 or isinstance(stack.layers[0].weight, PanelWeight):
        return None
    for layer in stack.layers:
        object.__setattr__(layer, "forward", forward_of(layer.weight, layer.bias))
    return stack


def measure(
    doc: Document, args: argparse.Namespace, dtype: str, shape: tuple[int, int], stream: Stream
) -> list[dict[str, Any]]:
    kind = getattr(torch, dtype)
    torch.manual_seed(args.seed)
    plain = Stack(shape, args.mib << 20, kind)
    torch.manual_seed(args.seed)
    packed = Stack(shape, args.mib << 20, kind)
    changed = Prepacked(packed)
    changed.pack_layers()
    rounded, alone = rounded_stacks(args, shape, kind), onednn_stack(args, shape, kind)
    out = []
    for rows in args.rows:
        x = torch.randn(rows, shape[0]).to(kind)
        with torch.inference_mode():
            want, got = plain.layers[0](x), packed.layers[0](x)
        error = float((want - got).abs().max() / want.std())
        where = f"{dtype} {shape[0]} x {shape[1]}, {rows} rows"
        # oneDNN gives the plain product's bits; our kernel adds in another order, and bfloat16 rounds the sums
        panels = isinstance(packed.layers[0].weight, PanelWeight)
        exact = kind == torch.float32 or not native.load()
        common.check(doc, where, error < (1e-5 if exact else 0.05), error)
        sides = {"plain": plain.caller(x), "packed": packed.caller(x)}
        sides |= {form: stack.caller(x) for form, stack in rounded.items()}
        if alone is not None:
            sides["oneDNN"] = alone.caller(x)
        turns = common.take_turns(sides, args.repeats, clock=args.clock, stream=stream)
        seconds = turns.spread("packed").median
        out.append(
            {
                "dtype": dtype,
                "shape": list(shape),
                "rows": rows,
                "plain_over_packed": turns.ratio("plain", "packed").json(digits=3),
                **{
                    f"packed_over_{form}": turns.ratio("packed", form).json(digits=3)
                    if form in rounded
                    else None
                    for form in ROUNDED
                },
                "onednn_over_packed": None
                if alone is None
                else turns.ratio("oneDNN", "packed").json(digits=3),
                "packed_gb_per_s": round(packed.weight_bytes / seconds / 1e9, 2),
                "form": "panels" if panels else "oneDNN",
                "stream_gb_per_s": [round(s, 1) for s in turns.stream_gb_per_s or ()],
            }
        )
    changed.restore()
    return out


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    p.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 128, 512])
    p.add_argument("--mib", type=int, default=100, help="weights of one shape")
    args = p.parse_args(argv)
    shapes = [(2048, 5632), (2048, 256)]
    if args.smoke:
        shapes, args.rows, args.mib, args.repeats = [(64, 96)], [1, 5], 1, 2
    common.prepare(args)
    question = "Do linear layers gain from prepacked weights?"
    doc = common.document("linears", question, args)
    stream = Stream(8 << 20 if args.smoke else common.STREAM_BYTES)
    doc["cases"] = [
        case for d in args.dtype for s in shapes for case in measure(doc, args, d, s, stream)
    ]
    table = Table(
        [
            "dtype, shape",
            "rows",
            "plain / packed",
            "min",
            "max",
            *(f"packed / {form}" for form in ROUNDED),
            "oneDNN / packed",
            "GB/s",
            "stream",
        ]
    )
    for c in doc["cases"]:
        ratio = c["plain_over_packed"]
        figures = (f"{ratio[k]:.2f}" for k in ("median", "min", "max"))
        table.add(
            f"{c['dtype']}, {c['shape'][0]} x {c['shape'][1]}",
            c["rows"],
            *figures,
            *(
                "" if c[k] is None else f"{c[k]['median']:.2f}"
                for k in (*(f"packed_over_{form}" for form in ROUNDED), "onednn_over_packed")
            ),
            c["packed_gb_per_s"],
            f"{min(c['stream_gb_per_s']):.1f}" if c["stream_gb_per_s"] else "",
        )
    return common.report(doc, args, [table])


if __name__ == "__main__":
    main()
