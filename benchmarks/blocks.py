"""What should a block hold? Tokens per second of decode by block size, beside what the last block wastes.

One random Llama under every block size in turn, a batch of ragged prompts, whole engine steps; waste is what the tables
hold and do not use at the end, and (with `--lengths`) what real conversations would waste.

    python benchmarks/blocks.py --lengths ../shared/data/traces/sharegpt8k-lengths.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import waste
from common import Document, Stream, Table

from quire.engine import Engine, SamplingParams
from quire.engine.schedule import SchedulerConfig
from quire.models.open import open_runner
from quire.spec import DEFAULT_BLOCK_TOKENS


class Decode:
    """An engine in the middle of decoding a ragged batch, with blocks of one size."""

    def __init__(self, args: argparse.Namespace, block_tokens: int) -> None:
        model = common.random_llama(
            layers=args.layers,
            hidden=args.hidden,
            heads=args.hidden // 64,
            kv_heads=max(1, args.hidden // 256),
            vocab=args.vocab,
            dtype=args.dtype,
            seed=args.seed,
        )
        self.runner: Any = open_runner(model, memory=args.memory, block_tokens=block_tokens)
        self.engine = Engine(self.runner, config=SchedulerConfig(step_tokens=2048))
        self.texts: dict[str, list[int]] = {}
        for i in range(args.batch):
            n = args.ctx + 7 * i
            prompt = common.random_tokens(n, args.vocab, args.seed + i)
            params = SamplingParams(max_tokens=None, ignore_eos=True)
            self.engine.add_request(prompt, params, on_delta=self._note)
        while len(self.texts) < args.batch:
            self.engine.step()

    def _note(self, delta: Any) -> None:
        self.texts.setdefault(delta.request_id, []).extend(delta.token_ids)

    def steps(self, n: int) -> None:
        for _ in range(n):
            self.engine.step()

    def waste(self) -> float:
        tables = list(self.runner.bridge.store.tables)
        held = sum(t.held_bytes() for t in tables)
        return 1 - sum(t.used_bytes() for t in tables) / held if held else 0.0


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--blocks", type=int, nargs="+", default=list(waste.BLOCKS))
    p.add_argument("--batch", type=int, default=8)
    p.add_argument(
        "--ctx", type=int, default=1024, help="shortest prompt; each next one is 7 longer"
    )
    p.add_argument("--steps", type=int, default=8, help="steps of a turn")
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--hidden", type=int, default=512, help="a multiple of 256")
    p.add_argument("--vocab", type=int, default=8192)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--memory", default="512MiB", help="of each arena")
    p.add_argument("--lengths", type=Path, default=waste.LENGTHS, help="CSV of token counts")
    args = p.parse_args(argv)
    if args.smoke:
        args.blocks, args.batch, args.ctx, args.steps, args.repeats = [8, 32], 2, 20, 2, 2
        args.layers, args.hidden, args.vocab, args.memory = 2, 256, 512, "16MiB"
    common.prepare(args)
    doc = common.document("blocks", "What should a block hold?", args)
    lengths = waste.read_lengths(args.lengths) if args.lengths.is_file() and not args.smoke else []
    doc["settings"]["lengths"] = args.lengths.name if lengths else None
    sides = {b: Decode(args, b) for b in args.blocks}
    for d in sides.values():
        d.steps(4)
    texts = {b: {k: v[:5] for k, v in d.texts.items()} for b, d in sides.items()}
    first = texts[args.blocks[0]]
    for b, text in texts.items():
        common.check(doc, f"same text, blocks of {b}", text == first or args.dtype != "float32")
    stream = Stream(8 << 20 if args.smoke else common.STREAM_BYTES)
    turns = common.take_turns(
        {str(b): (lambda d=d: d.steps(args.steps)) for b, d in sides.items()},  # type: ignore[misc]
        args.repeats,
        clock=args.clock,
        stream=stream,
    )
    base = str(DEFAULT_BLOCK_TOKENS if DEFAULT_BLOCK_TOKENS in args.blocks else args.blocks[0])
    doc["stream_gb_per_s"] = [round(x, 1) for x in turns.stream_gb_per_s or ()]
    doc["rows"] = []
    for b, d in sides.items():
        step = turns.spread(str(b), args.steps)
        doc["rows"].append(
            {
                "block_tokens": b,
                "tokens_per_s": round(args.batch / step.median, 2),
                "step_ms": step.json(1e3, 3),
                "step_to_default": turns.ratio(str(b), base).json(digits=3),
                "waste_here": d.waste(),
                "waste_on_lengths": waste.internal(lengths, b) if lengths else None,
            }
        )
        d.engine.close()
    table = Table(
        [
            "block tokens",
            "tokens/s",
            f"time to {base}",
            "min",
            "max",
            "waste here %",
            "waste on lengths %",
        ]
    )
    for r in doc["rows"]:
        t, w = r["step_to_default"], r["waste_on_lengths"]
        table.add(
            r["block_tokens"],
            r["tokens_per_s"],
            *(f"{t[k]:.3f}" for k in ("median", "min", "max")),
            f"{100 * r['waste_here']:.2f}",
            "" if w is None else f"{100 * w:.2f}",
        )
    return common.report(doc, args, [table])


if __name__ == "__main__":
    main()
