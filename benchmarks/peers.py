"""How fast is the same random Llama in Quire, transformers, OpenVINO GenAI, llama.cpp and vLLM, side by side?

The script makes the model, each peer gets it in its own format with weights of 16 bits, and each runs in a process of
its own, in the environment that you name; one that you do not name, or that does not start, is left out and said so:

    python -m venv ov && ov/bin/pip install openvino-genai optimum-intel        --openvino-python ov/bin/python
    python -m venv ll && ll/bin/pip install llama-cpp-python gguf               --llama-python ll/bin/python
    vLLM, built for CPUs                                                        --vllm-python ...

    python benchmarks/peers.py --random 55m --openvino-python ov/bin/python --llama-python ll/bin/python

A side is PEER:KV, where KV is what the peer calls its cache's form. First every side continues short prompts, and
transformers' model judges its tokens: each must be the best there, or nearly. Then all sides take turns, in rounds,
a streaming read before each turn. The floor is what memory allows: weights in 16 bits and the side's cache over that.
With --lock FILE the timed part alone holds a lock on that file, for machines where others measure too.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from common import Document, Spread, Stream, Table, timed

from quire.bench.models import SIZES, random_llama

HERE = Path(__file__).parent / "sides"
PYTHONS = {
    "quire": "this one",
    "transformers": "this one",
    "openvino": "--openvino-python",
    "llama": "--llama-python",
    "vllm": "--vllm-python",
}
SIDES = (
    *("quire:auto", "quire:int8", "quire:int4", "transformers:dynamic", "openvino:f16"),
    *("openvino:u8", "llama:f16", "llama:q8_0", "vllm:auto"),
)
PLAIN = {"auto", "bf16", "fp16", "fp32", "dynamic", "static", "f16", "f32"}
"""Caches of 16 bits or more, by the names that the peers give them."""

NEAR, NEAR_LOSSY = 0.2, 1.0
"""Standard deviations of the logits that a token may lie below the best one: rounding, and what a codec costs."""

VERIFIED = 2, 48, 10
"""Texts, tokens of their prompts, and tokens that are judged."""

ROOM = 256


class SideError(Exception):
    """A side that cannot go on."""


class Process:
    """A peer in its own process."""

    def __init__(self, peer: str, python: str, folder: Path, args: argparse.Namespace) -> None:
        command = [
            python,
            str(HERE / f"{peer}_side.py"),
            str(folder),
            "--threads",
            str(args.threads),
        ]
        if peer == "quire":
            command += ["--memory", args.memory, "--weights", args.weights]
        environment = dict(os.environ, OMP_NUM_THREADS=str(args.threads))
        if peer in ("quire", "transformers"):
            environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        else:
            environment.pop("PYTHONPATH", None)
        pipe = subprocess.PIPE
        quiet = None if args.verbose else subprocess.DEVNULL
        try:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=quiet, text=True, env=environment
            )
        except OSError as e:
            raise SideError(str(e)) from None
        try:
            self.about = self._answer()
        except SideError:
            self.close()
            raise

    def ask(self, op: str, **what: Any) -> dict[str, Any]:
        """Raises SideError."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"op": op, **what}) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise SideError("it ended") from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SideError("it ended (--verbose shows what it said)")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise SideError(found["error"])
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Run:
    """The sides that still run, and what became of the others."""

    def __init__(self, args: argparse.Namespace, folder: Path, doc: Document) -> None:
        self.args, self.folder, self.doc = args, folder, doc
        self.processes: dict[str, Process] = {}
        self.sides: list[str] = []
        self.vocab = SIZES[args.random]["vocab"]

    def start(self) -> None:
        """Starts what is installed."""
        asked = [s.partition(":")[0] for s in self.args.sides]
        pythons = {"quire": sys.executable, "transformers": sys.executable}
        for peer in dict.fromkeys(["transformers", *asked]):
            python = pythons.get(peer) or getattr(self.args, f"{peer}_python")
            if not python:
                self.without(peer, f"no {PYTHONS[peer]} was given")
                continue
            common.say(f"starting {peer}")
            try:
                self.processes[peer] = Process(peer, python, self.folder, self.args)
            except SideError as e:
                self.without(peer, str(e))
        self.sides = [s for s in self.args.sides if s.partition(":")[0] in self.processes]
        self.doc["peers"] = {name: p.about for name, p in self.processes.items()}

    def without(self, what: str, reason: str) -> None:
        """Leaves a peer or a side out."""
        common.say(f"{what}: left out: {reason}")
        self.doc["left_out"][what] = reason
        self.sides = [s for s in self.sides if s != what]

    def ask(self, side: str, op: str, **what: Any) -> dict[str, Any]:
        return self.processes[side.partition(":")[0]].ask(op, key=side, **what)

    def close(self) -> None:
        for p in self.processes.values():
            p.close()

    def prompts(self, batch: int, ctx: int) -> list[list[int]]:
        return [common.random_tokens(ctx, self.vocab, self.args.seed + i) for i in range(batch)]

    # -- right before fast ---------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Has transformers' model judge what every side says; a text of chance must be noticed."""
        batch, ctx, out = VERIFIED
        prompts = self.prompts(batch, ctx)
        judge = self.processes["transformers"]
        for side in list(self.sides):
            common.say(f"verifying {side}")
            try:
                kv = side.partition(":")[2]
                self.ask(side, "open", kv=kv, prompts=prompts, room=ROOM)
                self.ask(side, "steps", n=out - 1)
                texts = self.ask(side, "texts")["texts"]
                self.ask(side, "close")
            except SideError as e:
                self.without(side, str(e))
                continue
            texts = [text[:out] for text in texts]
            gap = max(map(max, judge.ask("judge", prompts=prompts, texts=texts)["gaps"]))
            bound = NEAR if side.partition(":")[2] in PLAIN else NEAR_LOSSY
            right = gap <= bound and all(len(text) == out for text in texts)
            common.check(self.doc, f"{side}: its tokens are transformers' best", right, gap)
        chance = [common.random_tokens(out, self.vocab, 99 + i) for i in range(batch)]
        gaps = judge.ask("judge", prompts=prompts, texts=chance)["gaps"]
        least = min(map(max, gaps))
        common.check(self.doc, "tokens of chance are noticed", least > NEAR_LOSSY, least)
        if not any(s.startswith("transformers:") for s in self.sides):
            self.processes.pop("transformers").close()

    # -- decode --------------------------------------------------------------------------------------------------

    def decode(self, batch: int, ctx: int, weights: int, stream: Stream) -> None:
        """One batch and context, all sides in rounds."""
        args, kv_bytes, prompts = self.args, {}, self.prompts(batch, ctx)
        for side in list(self.sides):
            common.say(f"decode {batch} x {ctx}: prompts, {side}")
            try:
                room = (args.repeats + 2) * args.steps + 2
                kv = side.partition(":")[2]
                kv_bytes[side] = self.ask(side, "open", kv=kv, prompts=prompts, room=room)[
                    "kv_bytes"
                ]
            except SideError as e:
                self.without(side, f"decode {batch} x {ctx}: {e}")
        with self.locked():
            rounds = self.rounds(
                {s: partial(self.ask, s, "steps", n=args.steps) for s in kv_bytes}, stream
            )
        for side, turns in rounds.items():
            self.ask(side, "close")
            moved = args.steps * (weights + kv_bytes[side])
            self.doc["cases"].append(
                {"case": "decode", "side": side, "batch": batch, "ctx": ctx}
                | _figures(turns, rounds, batch * args.steps)
                | {
                    "share_of_floor": Spread.of(moved / read / s for s, read in turns).json(
                        digits=3
                    ),
                    "kv_bytes": kv_bytes[side],
                }
            )

    def rounds(self, sides: dict[str, Any], stream: Stream) -> dict[str, list[tuple[float, float]]]:
        """(seconds, streaming read in bytes a second) of every side's turns; the first round is not counted."""
        turns: dict[str, list[tuple[float, float]]] = {s: [] for s in sides}
        for i in range(self.args.repeats + 1):
            for side, work in sides.items():
                read = stream.n_bytes / timed(stream.read)
                seconds = work()["seconds"]
                if i:
                    turns[side].append((seconds, read))
        return turns

    # -- prompts -------------------------------------------------------------------------------------------------

    def prefill(self, ctx: int, stream: Stream) -> None:
        """One prompt length, all sides in rounds, with products of large matrices among them."""
        prompts = self.prompts(1, ctx)
        products = {f"product {d}": _product(d) for d in ("bfloat16", "float32")}
        sides: dict[str, Any] = {
            s: partial(self.ask, s, "prefill", kv=s.partition(":")[2], prompts=prompts, room=ROOM)
            for s in self.sides
        }
        sides |= {name: work for name, (work, _) in products.items()}
        common.say(f"prefill {ctx}: timing")
        with self.locked():
            rounds = self.rounds(sides, stream)
        peaks = {
            name: [flops / s for s, _ in rounds[name]] for name, (_, flops) in products.items()
        }
        best = [max(pair) for pair in zip(*peaks.values(), strict=True)]
        needed = _work(self.args.random, ctx)
        for side in self.sides:
            shares = [needed / s / p for (s, _), p in zip(rounds[side], best, strict=True)]
            self.doc["cases"].append(
                {"case": "prefill", "side": side, "batch": 1, "ctx": ctx}
                | _figures(rounds[side], rounds, ctx)
                | {
                    "share_of_product": Spread.of(shares).json(digits=3),
                    "product_gflop_per_s": {
                        n: Spread.of(x).json(1e-9, 1) for n, x in peaks.items()
                    },
                }
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds `--lock` while it times."""
        if self.args.lock is None:
            yield
            return
        with self.args.lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)


def _figures(
    turns: list[tuple[float, float]], rounds: dict[str, Any], tokens: int
) -> dict[str, Any]:
    first = next(iter(rounds.values()))  # Quire's, by default
    return {
        "tokens_per_s": Spread.of(tokens / s for s, _ in turns).json(digits=2),
        "to_first_side": Spread.of(a / b for (a, _), (b, _) in zip(first, turns, strict=True)).json(
            digits=3
        ),
        "stream_gb_per_s": Spread.of(read for _, read in turns).json(1e-9, 1),
    }


def _product(dtype: str) -> tuple[Any, int]:
    m, k, n = 1024, 2048, 2048
    a, b = (torch.randn(*s).to(getattr(torch, dtype)) for s in ((m, k), (k, n)))
    return lambda: {"seconds": timed(partial(torch.mm, a, b))}, 2 * m * k * n


def _work(size: str, n_tokens: int) -> int:
    """Multiplications and additions of a prompt; the head answers one position."""
    s = SIZES[size]
    wide = s["hidden"] // s["heads"] * (s["heads"] + 2 * s["kv_heads"])
    layer = s["hidden"] * (wide + s["hidden"] + 3 * s["intermediate"])
    pairs = n_tokens * (n_tokens + 1) // 2
    linear = s["layers"] * layer * n_tokens + s["vocab"] * s["hidden"]
    return 2 * (linear + 2 * s["layers"] * s["hidden"] * pairs)


def make_model(args: argparse.Namespace, folder: Path) -> int:
    """Writes the random Llama, unless it is there; returns the bytes of weights that a step reads."""
    if not (folder / "model.safetensors").exists():
        common.say("making the model")
        made: Any = random_llama(args.random, context=args.context, seed=args.seed).model
        made.generation_config.eos_token_id = None
        made.save_pretrained(folder, max_shard_size="100GB")
    config = json.loads((folder / "config.json").read_text())
    shape = SIZES[args.random]
    have = config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]
    if have != (shape["layers"], shape["hidden"], shape["vocab"]):
        raise SystemExit(f"peers: {folder} holds another model than --random {args.random}")
    if config["max_position_embeddings"] < args.context:
        raise SystemExit(f"peers: the model in {folder} has a shorter context; give another folder")
    table = shape["vocab"] * shape["hidden"] * 2
    return (folder / "model.safetensors").stat().st_size - table


def cases(text: str) -> tuple[int, int]:
    batch, _, ctx = text.partition("x")
    return int(batch), int(ctx)


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--random", default="55m", help=f"the model's size: {', '.join(SIZES)}")
    p.add_argument("--folder", type=Path, help="keeps the model in its formats (default: nowhere)")
    p.add_argument("--sides", nargs="+", default=list(SIDES), metavar="PEER:KV")
    p.add_argument("--decode", nargs="*", default=["1x512", "8x1024"], metavar="BATCHxCTX")
    p.add_argument("--prefill", nargs="*", type=int, default=[1024], metavar="CTX")
    p.add_argument("--steps", type=int, default=8, help="steps of a turn")
    for peer in ("openvino", "llama", "vllm"):
        p.add_argument(f"--{peer}-python", help="the interpreter of the peer's environment")
    p.add_argument("--memory", default="1GiB", help="of each of Quire's arenas")
    p.add_argument("--weights", default="auto", help="of Quire: auto, plain, prepacked")
    p.add_argument("--lock", type=Path, help="a file to lock while it times")
    p.add_argument("--verbose", action="store_true", help="show what the peers print")
    args = p.parse_args(argv)
    if args.smoke:
        args.random, args.decode, args.prefill, args.steps = "tiny", ["1x40", "2x30"], [50], 2
        args.sides = ["quire:auto", "quire:int8", "transformers:dynamic", "openvino:f16"]
        args.memory = "16MiB"
    try:
        asked = [cases(x) for x in args.decode]
    except ValueError:
        raise SystemExit("peers: --decode takes BATCHxCTX, as 8x1024") from None
    unknown = [s for s in args.sides if s.partition(":")[0] not in PYTHONS or ":" not in s]
    if unknown or args.random not in SIZES:
        raise SystemExit(
            f"peers: --sides are PEER:KV with a peer of {', '.join(PYTHONS)}; --random is one of {', '.join(SIZES)}"
        )
    common.prepare(args)
    args.threads = args.threads or torch.get_num_threads()
    longest = [ctx for _, ctx in asked] + args.prefill
    args.context = max([*longest, 64]) + ROOM + (args.repeats + 2) * args.steps
    doc = common.document("peers", "How fast is one random Llama in Quire and its peers?", args)
    doc["cases"], doc["left_out"] = [], {}
    stream = Stream(8 << 20 if args.smoke else common.STREAM_BYTES)
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or Path(made)
        weights = make_model(args, folder)
        run = Run(args, folder, doc)
        try:
            run.start()
            run.verify()
            for batch, ctx in asked:
                run.decode(batch, ctx, weights, stream)
            for ctx in args.prefill:
                run.prefill(ctx, stream)
        except SideError as e:
            raise SystemExit(f"peers: {e}") from None
        finally:
            run.close()
    doc["verdicts"] = [f"{what}: left out: {why}" for what, why in doc["left_out"].items()]
    return common.report(doc, args, [table(doc)])


def table(doc: Document) -> Table:
    out = Table(
        ["case, side", "tokens/s", "min", "max", "x first", "of floor, product %", "KV bytes"]
    )
    for r in doc["cases"]:
        share = r.get("share_of_floor") or r["share_of_product"]
        out.add(
            f"{r['case']} {r['batch']} x {r['ctx']}, {r['side']}",
            *(f"{r['tokens_per_s'][k]:.1f}" for k in ("median", "min", "max")),
            f"{r['to_first_side']['median']:.2f}",
            f"{100 * share['median']:.0f}",
            f"{r['kv_bytes']:,}" if "kv_bytes" in r else "",
        )
    return out


if __name__ == "__main__":
    main()
