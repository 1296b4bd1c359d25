"""What do weights of 8 and 4 bits cost: perplexity, likely tokens, divergence?

The model computes in float32 from its weights as they are and as each form rounds them, so that nothing but the
rounding differs; windows of a text are scored without a cache. Intervals are paired, over runs of neighbouring tokens.

    python benchmarks/rounding.py --text wikitext2-valid.txt
    python benchmarks/rounding.py --model FOLDER --text book.txt --max-tokens 51200
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import ROOT, Document, Table

from quire.evaluate.metrics import (
    kl_divergence,
    log_probs,
    paired_bootstrap,
    perplexity,
    runs,
    top1_agreement,
)
from quire.models.load import check_source, load_model
from quire.models.prepack import BITS, Prepacked

FORMS = ("bfloat16", *(form for form, bits in BITS.items() if bits < 16))


def rounded(args: argparse.Namespace, form: str) -> tuple[Any, float]:
    """The model in float32 with weights as a form has them, and the bits of a packed weight, scales included."""
    model: Any = load_model(check_source(args.model), dtype="bfloat16").model
    bits = 16.0
    if form in BITS:
        packed = Prepacked(model)
        packed.pack_layers(form)
        bits = 8 * packed.n_bytes / sum(m.weight.numel() for m in packed.layers())
        packed.restore()
    return model.float(), bits


@torch.inference_mode()
def logits(model: Any, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of each window, `[T - 1, vocabulary]`."""
    for window in windows:
        yield model(window[None], use_cache=False).logits[0, :-1].float()


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--model", help="a folder or a name (default: the packaged model)")
    p.add_argument("--text", type=Path, default=ROOT / "README.md")
    p.add_argument("--length", type=int, default=1024, help="tokens of a window")
    p.add_argument("--max-tokens", type=int, default=20_480)
    args = p.parse_args(argv)
    if args.smoke:
        args.length, args.max_tokens = 64, 192
    common.prepare(args)
    doc = common.document("rounding", "What do weights of fewer bits cost?", args)
    source = load_model(check_source(args.model), dtype="float32")
    if source.tokenizer is None:
        p.error("this model has no tokenizer to read the text with")
    ids = source.tokenizer(args.text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    n = min(len(ids), args.max_tokens) // args.length
    if not n:
        p.error(f"{args.text} has {len(ids)} tokens, less than a window of {args.length}")
    windows = torch.tensor(ids[: n * args.length]).view(n, args.length)
    units = runs([args.length - 1] * n)
    full, scored = [], []
    for x, window in zip(logits(source.model, windows), windows, strict=True):
        scored.append(-log_probs(x, window[1:]).numpy())
        full.append(x.half())  # of divergences alone, far above its step
    base = np.concatenate(scored)
    table = Table(
        ["weights", "bits", "perplexity", "growth", "low", "high", "KL", "same top token"]
    )
    table.add("float32", 32, round(perplexity(base), 3), *[""] * 5)
    doc["perplexity"], doc["cases"] = perplexity(base), []
    for form in FORMS:
        model, bits = rounded(args, form)
        nll, kl, top = [], [], []
        for x, want, window in zip(logits(model, windows), full, windows, strict=True):
            nll.append(-log_probs(x, window[1:]).numpy())
            kl.append(kl_divergence(want.float(), x).numpy())
            top.append(top1_agreement(want.float(), x).numpy())
        lost = paired_bootstrap(np.concatenate(nll) - base, units, seed=args.seed)
        common.check(doc, f"{form} is finite", math.isfinite(lost.value), lost.value)
        growth = [100 * math.expm1(x) for x in (lost.value, lost.low or 0.0, lost.high or 0.0)]
        row = {
            "weights": form,
            "bits": round(bits, 2),
            "perplexity": perplexity(np.concatenate(nll)),
            "dnll": [lost.value, lost.low, lost.high],
            "growth_percent": [round(x, 3) for x in growth],
            "kl": float(np.concatenate(kl).mean()),
            "agreement": float(np.concatenate(top).mean()),
        }
        doc["cases"].append(row)
        table.add(
            form,
            row["bits"],
            round(row["perplexity"], 3),
            *(f"{x:+.2f} %" for x in growth),
            f"{row['kl']:.4f}",
            f"{row['agreement']:.1%}",
        )
    return common.report(doc, args, [table])


if __name__ == "__main__":
    main()
