"""What does a client of the server see: of a prompt that comes again, and of long prompts beside its own stream?

Starts `quire serve` on the packaged model as a process of its own and is its client, over loopback.

1. The same prompt twice, several times: from sending it to the first token.
2. Streams that write side by side, in turns with and without a prompt of 2,000 tokens that nobody has seen arriving
   every second: the time between a stream's tokens.

    python benchmarks/serving.py --streams 16 64
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import common
from common import Document, Spread, Table

from quire.bench.load import Ask, Seen, Target, percentiles, poisson, run

QUESTION = "What does a client of the server see?"
BAR = 3.0
"""The 99th percentile between tokens stays below so many medians."""

MODEL = "served"


@contextmanager
def server(args: argparse.Namespace) -> Iterator[Target]:
    """`quire serve`, ended with SIGTERM."""
    command = [sys.executable, "-m", "quire.cli", "serve", "--port", "0", "--name", MODEL]
    command += ["--memory", args.memory, "--beside-tokens", str(args.beside_tokens)]
    command += ["--max-running", str(max(args.streams) + args.seconds)]  # long prompts are let in
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"at (http://\S+)/v1", line.replace("\n", "")):
                yield Target(found[1], MODEL)
                return
        raise SystemExit(f"the server did not start: {said}")
    finally:
        with process:
            process.terminate()


def ask(target: Target, asks: Sequence[Ask]) -> list[Seen]:
    return asyncio.run(run(target, asks))


def prompts(n: int, tokens: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts that share no beginning."""
    return [a.prompt for a in poisson(1.0, n, tokens, 1, seed=seed)]


def repeated(target: Target, args: argparse.Namespace) -> dict[str, Any]:
    """First and second time of each prompt, one request at a time."""
    first, second, cached = [], [], []
    for prompt in prompts(args.repeats + 1, args.prompt_tokens, args.seed):
        (a,) = ask(target, [Ask(0.0, prompt, 2)])
        (b,) = ask(target, [Ask(0.0, prompt, 2)])
        if not (a.ok and b.ok):
            raise SystemExit(f"a request failed: {a.error or b.error}")
        first.append(a.token_s[0])
        second.append(b.token_s[0])
        cached.append(b.cached_tokens)
    ratio = [a / b for a, b in zip(first, second, strict=True)]
    return {  # the first prompt warms up
        "prompt_tokens": args.prompt_tokens,
        "first_ms": Spread.of(1000 * s for s in first[1:]).json(),
        "again_ms": Spread.of(1000 * s for s in second[1:]).json(),
        "times_faster": Spread.of(ratio[1:]).json(),
        "cached_tokens": min(cached[1:]),
    }


def beside(target: Target, args: argparse.Namespace, streams: int, turn: int) -> dict[str, Any]:
    """Streams alone, and beside long prompts: what lies between their tokens."""
    row: dict[str, Any] = {"streams": streams, "turn": turn}
    for name, long_ones in (("alone", 0), ("beside", args.seconds)):
        seed = args.seed + 1000 * turn + streams + 7 * bool(long_ones)
        own = [Ask(0.0, p, args.out) for p in prompts(streams, 32, seed)]
        others = (
            [
                Ask(1.0 + i, p, 4)
                for i, p in enumerate(prompts(long_ones, args.long_tokens, seed + 1))
            ]
            if long_ones
            else []
        )
        seen = ask(target, own + others)
        mine, theirs = seen[: len(own)], seen[len(own) :]
        failed = [s.error for s in seen if not s.ok]
        if failed:
            raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
        # between all first tokens and the first end: as many streams write all the time
        begun = max(s.token_s[0] for s in mine)
        gaps = [
            b - a
            for s in mine
            for a, b in pairwise(s.token_s)
            if a >= begun and (not theirs or b >= 1.0 or args.smoke)
        ]
        found = percentiles(gaps)
        assert found is not None
        row[name] = {
            **{key: round(1000 * value, 3) for key, value in found.items()},
            "p99_to_p50": found["p99"] / found["p50"],
            "first_token_of_long_ms": percentiles([1000 * s.token_s[0] for s in theirs]),
            "long_read_meanwhile": sum(
                s.ask.at_s + s.token_s[0] < min(m.token_s[-1] for m in mine) for s in theirs
            ),
        }
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    made = common.parser(__doc__)
    made.add_argument("--streams", type=int, nargs="+", default=[16, 64])
    made.add_argument("--out", type=int, default=600, help="tokens of each stream")
    made.add_argument("--prompt-tokens", type=int, default=1500)
    made.add_argument("--long-tokens", type=int, default=2000)
    made.add_argument("--seconds", type=int, default=10, help="long prompts, one a second")
    made.add_argument("--beside-tokens", type=int, default=64)
    made.add_argument("--memory", default="1GiB")
    args = made.parse_args(arguments)
    if args.smoke:
        args.streams, args.out, args.seconds, args.memory = [2], 30, 1, "64MiB"
        args.prompt_tokens, args.long_tokens, args.repeats = 100, 100, 2
    doc: Document = common.document("serving", QUESTION, args, with_torch=False)
    with server(args) as target:
        prompt = prompts(1, 40, 99)[0]
        seen = ask(target, [Ask(0.0, prompt, 5), Ask(0.0, prompt, 5)])
        common.check(doc, "two requests are answered to the end", all(s.ok for s in seen))
        common.check(doc, "each wrote its tokens", [s.output_tokens for s in seen] == [5, 5])
        doc["repeated"] = repeated(target, args)
        rows = [
            beside(target, args, n, turn)
            for turn in range(1 if args.smoke else min(3, args.repeats))
            for n in args.streams
        ]
    doc["beside"] = rows
    doc["verdicts"] = [verdict(n, rows) for n in args.streams]
    common.report(doc, args, tables(doc))


def verdict(streams: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of the turns against the bar."""
    ratio = statistics.median(r["beside"]["p99_to_p50"] for r in rows if r["streams"] == streams)
    return {"streams": streams, "p99_to_p50": ratio, "bar": BAR, "met": ratio < BAR}


def tables(doc: Document) -> list[Table]:
    again = Table(("prompt tokens", "first ms", "again ms", "times faster", "cached"))
    r = doc["repeated"]
    again.add(
        r["prompt_tokens"],
        f"{r['first_ms']['median']:.1f}",
        f"{r['again_ms']['median']:.1f}",
        f"{r['times_faster']['median']:.1f}",
        r["cached_tokens"],
    )
    gaps = Table(("streams", "turn", "", "p50 ms", "p99 ms", "p99 / p50"))
    for row in doc["beside"]:
        for name in ("alone", "beside"):
            g = row[name]
            ratio = f"{g['p99_to_p50']:.2f}"
            gaps.add(row["streams"], row["turn"], name, g["p50"], g["p99"], ratio)
    return [again, gaps]


if __name__ == "__main__":
    main()
