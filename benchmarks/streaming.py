"""How long can a stream run in a small cache, at what speed and perplexity, with sinks and without?

A text of `--tokens` goes through one sequence with `keep="sinks:S+window:W"`, S + W = `--cache` tokens, and through one
with a plain window of as many. It goes in chunks; `--singles` tokens of each 500 go one by one, which is decoding, and
are timed. At `--samples` positions beyond the cache, evenly apart, the same query is computed anew: by the model with
its own attention, over the last S + W tokens alone, which is what people did before.

    step     median time of a single token, of each tenth of the stream: flat when the cache is bounded
    held     most bytes that the sequence held
    ppl      at the sampled positions, beside recomputing; bar: at most 2 % worse
    sink     share of attention that goes to position 0, per head: on a model without a sink a window loses nothing

    python benchmarks/streaming.py --text ../shared/data/text/gutenberg-melville-moby_dick.txt
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from common import Document, Table

ROUND = 500


def stream(
    args: argparse.Namespace, model: Any, keep: str, ids: list[int], at: set[int]
) -> dict[str, Any]:
    """One policy: step times, bytes, and log-probabilities of the tokens that follow the sampled positions."""
    import torch

    from quire.engine.runner import Item
    from quire.models.open import open_runner

    runner: Any = open_runner(model, kv=args.kv, keep=keep, memory=args.memory, weights="plain")
    table = runner.open()
    held, steps, found = 0, [], {}
    try:
        start = 0
        while start < len(ids) - 1:
            single = start % ROUND >= ROUND - args.singles
            left = 1 if single else ROUND - args.singles - start % ROUND
            stop = min(len(ids) - 1, start + min(left, args.chunk))
            began = time.perf_counter()
            table.append(stop - start)
            logits = runner.forward([Item(table, ids, start, stop, stop - start)])
            table.commit()
            if single and start > args.cache:
                steps.append(time.perf_counter() - began)
            held = max(held, table.held_bytes())
            for i in range(start, stop):
                if i in at:
                    found[i] = float(logits[i - start].log_softmax(-1)[ids[i + 1]])
            if not bool(torch.isfinite(logits).all()):
                raise SystemExit(f"streaming: logits are no numbers at {start}")
            start = stop
        full = runner.bridge.layout.narrowed(runner.rules(runner.keep).keep).blocks_for(args.cache)
    finally:
        table.release()
        runner.close()
    tenth = max(1, len(steps) // 10)
    parts = [steps[i : i + tenth] for i in range(0, len(steps) - tenth + 1, tenth)]
    return {
        "keep": keep,
        "held_bytes": held,
        "blocks_of_cache": sum(full.values()),
        "step_ms": [round(1e3 * statistics.median(p), 4) for p in parts],
        "logprobs": found,
    }


def recomputed(
    args: argparse.Namespace, model: Any, ids: list[int], at: Sequence[int]
) -> dict[int, float]:
    """By the model's own attention over the last tokens alone."""
    import torch

    out = {}
    with torch.inference_mode():
        for i in at:
            window = torch.tensor([ids[i + 1 - args.cache : i + 1]])
            logits = (
                model(input_ids=window, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            )
            out[i] = float(logits.log_softmax(-1)[ids[i + 1]])
    return out


def sink_share(model: Any, ids: list[int], n_tokens: int) -> list[float]:
    """Per layer and head, the mean share of attention to position 0 by the later half of a text, largest first."""
    import torch
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(
        model.config.name_or_path, attn_implementation="eager"
    )
    with torch.inference_mode():
        seen = own(torch.tensor([ids[:n_tokens]]), output_attentions=True).attentions
    half = n_tokens // 2
    shares = [float(x) for a in seen for x in a[0, :, half:, 0].float().mean(1)]
    return sorted(shares, reverse=True)


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument(
        "--text", type=Path, help="default: the plain text of quire's recall tasks, repeated"
    )
    p.add_argument("--tokens", type=int, default=100_000)
    p.add_argument("--cache", type=int, default=2048, help="S + W")
    p.add_argument("--sinks", type=int, default=4)
    p.add_argument("--chunk", type=int, default=128)
    p.add_argument("--singles", type=int, default=20, help="of each 500 tokens, one by one")
    p.add_argument("--samples", type=int, default=1000)
    p.add_argument("--kv", default="auto")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--memory", default="256MiB")
    args = p.parse_args(argv)
    if args.smoke:
        args.tokens, args.cache, args.samples, args.memory = 700, 96, 5, "32MiB"
    if not 0 < args.sinks < args.cache < args.tokens or not 0 < args.singles < ROUND:
        raise SystemExit("streaming: 0 < --sinks < --cache < --tokens and 0 < --singles < 500")
    common.prepare(args)
    from quire.evaluate.decode import twin
    from quire.evaluate.tasks import PLAIN_TEXT
    from quire.models.load import load_model

    loaded = load_model(dtype=args.dtype)
    text = PLAIN_TEXT * 2000 if args.text is None else args.text.read_text(encoding="utf-8")
    ids = [int(t) for t in loaded.tokenizer.encode(text)][: args.tokens]
    args.tokens = len(ids)
    step = (len(ids) - 2 - 2 * args.cache) // args.samples
    at = list(range(2 * args.cache, len(ids) - 1, max(1, step)))[: args.samples]
    doc = common.document("streaming", "How long can a stream run in a small cache?", args)
    window = args.cache - args.sinks
    policies = [f"sinks:{args.sinks}+window:{window}", f"window:{args.cache}"]
    common.say("recomputing", len(at), "windows")
    again = recomputed(args, loaded.model, ids, at)
    doc["sink_share"] = [round(x, 4) for x in sink_share(loaded.model, ids, min(512, args.cache))]
    doc["recomputed_ppl"] = math.exp(-statistics.fmean(again.values()))
    doc["cases"] = []
    for keep in policies:
        common.say(keep, len(ids), "tokens")
        row = stream(args, twin(loaded.model), keep, ids, set(at))
        found = row.pop("logprobs")
        common.check(
            doc, f"{keep}: every sampled position was computed", found.keys() == again.keys()
        )
        row["ppl"] = math.exp(-statistics.fmean(found.values()))
        row["ppl_to_recomputed"] = row["ppl"] / doc["recomputed_ppl"]
        row["step_last_to_first"] = row["step_ms"][-1] / row["step_ms"][0]
        doc["cases"].append(row)
    met = doc["cases"][0]["ppl_to_recomputed"] <= 1.02
    sinks = sum(x > 0.3 for x in doc["sink_share"])
    doc["verdicts"] = [
        (
            f"sinks: perplexity {100 * (doc['cases'][0]['ppl_to_recomputed'] - 1):+.2f} % of recomputing "
            f"({'met' if met else 'missed'}: at most +2 %)"
        ),
        f"heads that give position 0 more than 30 %: {sinks} of {len(doc['sink_share'])}",
    ]
    out = Table(["policy", "held MB", "step ms, first tenth", "last tenth", "ppl", "to recomputed"])
    out.add("recomputed", "", "", "", f"{doc['recomputed_ppl']:.3f}", "1.000")
    for r in doc["cases"]:
        steps = (f"{r['step_ms'][0]:.2f}", f"{r['step_ms'][-1]:.2f}")
        out.add(
            r["keep"],
            f"{r['held_bytes'] / 1e6:.2f}",
            *steps,
            f"{r['ppl']:.3f}",
            f"{r['ppl_to_recomputed']:.4f}",
        )
    return common.report(doc, args, [out])


if __name__ == "__main__":
    main()
