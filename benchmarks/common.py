"""What every benchmark needs: the machine, the commit, how fast memory reads, medians of turns, one document.

    python benchmarks/common.py --json        the machine alone

Everything that is compared runs in one process, in turns (A B A B ...), so that a busy neighbour slows all sides alike;
ratios are taken within a turn, and their median, least and greatest are stated. A streaming read before and after each
figure shows how quiet the machine was.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.bench.machine import CLOCKS, STREAM_BYTES, Spread, Stream, commit, hardware, timed

os.environ.setdefault(
    "THP_MEM_ALLOC_ENABLE", "1"
)  # as the command line does, before torch allocates

ROOT = Path(__file__).resolve().parents[1]

Document = dict[str, Any]


# -- the command line ----------------------------------------------------------------------------------------------


def parser(doc: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; the rest of its help is its module's text."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", action="store_true", help="one JSON document on stdout")
    made.add_argument(
        "--smoke", action="store_true", help="tiny sizes: shows that it works, measures nothing"
    )
    made.add_argument(
        "--repeats", type=int, default=7, help="turns of each side (default: %(default)s)"
    )
    made.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu: this process's own time, for one thread on a busy machine (default: wall)",
    )
    made.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own)")
    made.add_argument("--seed", type=int, default=0)
    return made


def prepare(args: argparse.Namespace) -> None:
    """Seeds and threads, before anything is built."""
    import torch

    if args.clock == "cpu" and args.threads != 1:
        raise SystemExit("--clock cpu needs --threads 1: more threads spin while they wait")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)


# -- time ----------------------------------------------------------------------------------------------------------


@dataclass
class Turns:
    """Seconds of each side, turn by turn, and the streaming reads before and after."""

    seconds: dict[str, list[float]]
    stream_gb_per_s: tuple[float, float] | None = None

    def spread(self, name: str, per: int = 1) -> Spread:
        """Of one side, over `per` steps a turn."""
        return Spread.of(s / per for s in self.seconds[name])

    def ratio(self, above: str, below: str) -> Spread:
        """Of two sides, within each turn."""
        return Spread.of(
            a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True)
        )


def take_turns(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warm_up: int = 1,
    clock: str = "wall",
    stream: Stream | None = None,
) -> Turns:
    """Runs all sides in turns: A B A B ...; the first `warm_up` turns are not counted."""
    for _ in range(warm_up):
        for work in sides.values():
            work()
    before = stream.gb_per_s() if stream else 0.0
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, work in sides.items():
                seconds[name].append(timed(work, clock))
    finally:
        if collecting:
            gc.enable()
    return Turns(seconds, (before, stream.gb_per_s()) if stream else None)


def line_fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares `y = at_zero + slope * x`, with the share of the variance that it explains."""
    n = len(x)
    mx, my = sum(x) / n, sum(y) / n
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum(
        (a - mx) ** 2 for a in x
    )
    start = my - slope * mx
    left = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    all_of_it = sum((b - my) ** 2 for b in y)
    return {"at_zero": start, "slope": slope, "r2": 1 - left / all_of_it if all_of_it else 1.0}


# -- models --------------------------------------------------------------------------------------------------------


def random_llama(
    *,
    layers: int = 8,
    hidden: int = 512,
    heads: int = 8,
    kv_heads: int = 2,
    vocab: int = 8192,
    context: int = 16384,
    dtype: str = "float32",
    attention: str = "sdpa",
    seed: int = 0,
) -> Any:
    """A Llama with random weights; intermediate size 8/3 of the width, in multiples of 64."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=-(-hidden * 8 // 3 // 64) * 64,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=context,
        attn_implementation=attention,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def random_tokens(n: int, vocab: int, seed: int) -> list[int]:
    """A prompt: the same for the same seed on every machine."""
    import random

    draw = random.Random(seed)
    return [draw.randrange(vocab) for _ in range(n)]


# -- a sequence under a policy -------------------------------------------------------------------------------------


class Kept:
    """One policy's sequence of `ctx` random tokens, whose prompt is over and whose next token has come."""

    def __init__(self, runner: Any, keep: str, ids: list[int], ctx: int) -> None:
        from quire.retention import parse_keep

        self.runner, self.keep, self.ids, self.ctx = runner, keep, ids, ctx
        self.table = runner.open(parse_keep(keep), prompt_tokens=ctx)
        fill(runner, self.table, ctx)
        self.full_bytes = self.table.held_bytes()
        self.step()
        self.bytes = self.table.held_bytes()

    def step(self) -> None:
        """One token."""
        from quire.engine.runner import Item

        start = self.table.length
        self.table.append(1)
        self.runner.forward([Item(self.table, self.ids, start, start + 1, 1)])
        self.table.commit()

    def plan(self) -> Any:
        """The last token's step, for its attention alone."""
        from quire.attention import Row, Step

        bridge, n = self.runner.bridge, self.table.length
        return Step(bridge.store, bridge.layout, [Row(self.table, n - 1, n)], bridge.device)


def fill(runner: Any, table: Any, ctx: int, chunk: int = 2048) -> None:
    """Random keys and values for `ctx` tokens."""
    import torch

    from quire.attention import Row, Step

    bridge = runner.bridge
    group = bridge.layout.spec.groups[0]
    field = bridge.layout.fields_of(group)[0]
    for start in range(0, ctx, chunk):
        n = min(chunk, ctx - start)
        table.append(n)
        step = Step(bridge.store, bridge.layout, [Row(table, start, start + n)], bridge.device)
        for layer, names in bridge.layers():
            k, v = torch.randn(2, n, len(group.heads(layer)), *field.shape).to(runner.model.dtype)
            bridge.backend.write(step, layer, {names[0]: k, names[1]: v})
        table.commit()


# -- the document --------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """Rows for people; the document is for machines."""

    head: Sequence[str]
    rows: list[Sequence[object]] = field(default_factory=list)

    def add(self, *row: object) -> None:
        self.rows.append(row)

    def text(self) -> str:
        cells = [list(map(str, r)) for r in (self.head, *self.rows)]
        widths = [max(len(r[i]) for r in cells) for i in range(len(self.head))]
        return "\n".join(
            "  ".join(
                c.ljust(w) if i == 0 else c.rjust(w)
                for i, (c, w) in enumerate(zip(r, widths, strict=True))
            ).rstrip()
            for r in cells
        )


def document(
    name: str, question: str, args: argparse.Namespace, *, with_torch: bool = True
) -> Document:
    """The keys that every document has; `checks` is filled before anything is timed."""
    return {
        "benchmark": name,
        "question": question,
        "command": shlex.join(["python", f"benchmarks/{name}.py", *sys.argv[1:]])
        if Path(sys.argv[0]).stem == name
        else f"benchmarks/{name}.py",
        "hardware": hardware(with_torch=with_torch),
        "commit": commit(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "smoke": bool(args.smoke),
        "settings": {k: _plain(v) for k, v in sorted(vars(args).items()) if k != "json"},
        "checks": {},
    }


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def check(doc: Document, name: str, ok: bool, seen: object = None) -> None:  # noqa: FBT001 - the verdict is the point
    """Notes a correctness check, and ends the run where it fails: what is wrong is not timed."""
    doc["checks"][name] = {"ok": bool(ok)} | ({} if seen is None else {"seen": seen})
    if not ok:
        raise SystemExit(f"{doc['benchmark']}: check failed, nothing was timed: {name} ({seen})")


def report(doc: Document, args: argparse.Namespace, tables: Sequence[Table]) -> Document:
    """Prints the document, or the tables and the machine."""
    if args.json:
        print(json.dumps(doc, indent=1))
    else:
        print(doc["question"])
        for table in tables:
            print(f"\n{table.text()}")
        for line in doc.get("verdicts", ()):
            print(line)
        print(f"\n{doc['hardware']}; commit {doc['commit']}; load {doc['load_1min']}")
    return doc


def say(*words: object) -> None:
    """Progress, to stderr."""
    print(*words, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> Document:
    """The machine's own document."""
    args = parser(__doc__ or "").parse_args(argv)
    prepare(args)
    doc = document("common", "Which machine is this, and how fast does it read?", args)
    stream = Stream(8 << 20 if args.smoke else STREAM_BYTES)
    speeds = Spread.of(stream.gb_per_s() for _ in range(args.repeats))
    doc["stream_gb_per_s"] = speeds.json(digits=1)
    table = Table(["stream GB/s", "median", "min", "max"])
    table.add("", f"{speeds.median:.1f}", f"{speeds.least:.1f}", f"{speeds.greatest:.1f}")
    return report(doc, args, [table])


if __name__ == "__main__":
    main()
