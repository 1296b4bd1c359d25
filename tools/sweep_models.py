"""Run every causal-LM class of the installed transformers, tiny and random, and write docs/models.md.

    python tools/sweep_models.py --check quire_check:check          # all classes, docs/models.md
    python tools/sweep_models.py --check quire_check:check llama jamba --out -   # two, to stdout

Without `--check` the sweep only says which classes can be built and what transformers says itself.

The check is `check(model) -> (way, equal, n, error)`: which way in the model was run, how many of
`n` texts came out token for token as transformers' own, and the largest error of the first new
logits in sigmas. It raises to refuse; an exception defined in `quire` is a refusal and its message
the reason, any other is a failure. Each class has a process and a time limit of its own, so neither
a crash nor a hang takes the others along.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

Check = Callable[[Any], tuple[str, int, int, float]]

ERROR_LIMIT_SIGMA = 1e-3
WAYS = ("packed", "patched", "rows", "dense")
# Imported once, before the processes fork: what every model file needs and takes seconds to load.
PRELOAD = (
    "torch._dynamo",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mamba2.modeling_mamba2",
    "transformers.models.mixtral.modeling_mixtral",
)


@dataclass(frozen=True)
class Row:
    """What came of one class.

    Attributes:
        model_type: key of the auto mapping.
        cls: name of the model class.
        way: one of `WAYS`; "built" when nothing was checked; "refused", "failed" or "not built".
        equal: texts equal token for token, of `n`.
        error_sigma: largest error of the first new logits over their standard deviation.
        reason: why refused, failed or not built.
        seconds: wall time, building included.
    """

    model_type: str
    cls: str
    way: str
    equal: int = 0
    n: int = 0
    error_sigma: float | None = None
    reason: str = ""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether every text is equal and the logits agree."""
        close = self.error_sigma is not None and self.error_sigma < ERROR_LIMIT_SIGMA
        return self.way in WAYS and self.equal == self.n > 0 and close


# --- One class ------------------------------------------------------------------------------------


def sweep_one(model_type: str, check: Check | None) -> Row:
    """Build one class and check it; whatever happens ends up in the row."""
    import zoo_sweep

    cls = zoo_sweep.class_name(model_type)
    try:
        model = zoo_sweep.build_any(model_type)
    except zoo_sweep.UnbuildableError as error:
        return Row(model_type, cls, "not built", reason=one_line(error))
    except Exception as error:  # noqa: BLE001 - the row says what happened
        return Row(
            model_type, cls, "not built", reason=f"{type(error).__name__}: {one_line(error)}"
        )
    if check is None:
        return Row(model_type, cls, "built")
    try:
        way, equal, n, error_sigma = check(model)
    except Exception as error:  # noqa: BLE001 - the row says what happened
        if type(error).__module__.split(".")[0] == "quire":
            return Row(model_type, cls, "refused", reason=one_line(error))
        return Row(model_type, cls, "failed", reason=f"{type(error).__name__}: {one_line(error)}")
    return Row(model_type, cls, way, equal, n, error_sigma)


def one_line(error: BaseException, limit: int = 200) -> str:
    """The message on one line, cut where it becomes a novel."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _child(model_type: str, check: Check | None, pipe: Connection) -> None:
    import torch

    for stream in (1, 2):  # models talk while they are made
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pipe.send(sweep_one(model_type, check))


# --- All classes ----------------------------------------------------------------------------------


def sweep(
    model_types: Sequence[str], check: Check | None, *, jobs: int = 2, limit_s: float = 90.0
) -> Iterator[Row]:
    """The rows of these types as they come, `jobs` at a time, each in a process of its own."""
    import transformers

    import zoo_sweep

    transformers.logging.set_verbosity_error()
    for name in PRELOAD:
        importlib.import_module(name)
    fork = multiprocessing.get_context("fork")
    waiting = list(model_types)[::-1]
    running: list[tuple[str, multiprocessing.process.BaseProcess, Connection, float]] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            model_type = waiting.pop()
            ours, theirs = fork.Pipe(duplex=False)
            process: multiprocessing.process.BaseProcess = fork.Process(
                target=_child, args=(model_type, check, theirs), daemon=True
            )
            with warnings.catch_warnings():  # newer Pythons warn of threads; the child makes none
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            running.append((model_type, process, ours, time.monotonic()))
        multiprocessing.connection.wait([ours for _, _, ours, _ in running], timeout=1.0)
        for entry in list(running):
            model_type, process, ours, started = entry
            seconds = time.monotonic() - started
            cls = zoo_sweep.class_name(model_type)
            if ours.poll():
                try:
                    row = ours.recv()
                except EOFError:
                    process.join()
                    row = Row(model_type, cls, "failed", reason=f"died, exit {process.exitcode}")
            elif seconds > limit_s:
                process.kill()
                row = Row(model_type, cls, "failed", reason=f"no answer within {limit_s:.0f} s")
            else:
                continue
            process.join()
            running.remove(entry)
            yield Row(**{**asdict(row), "seconds": round(seconds, 2)})


# --- The page -------------------------------------------------------------------------------------


def totals(rows: Sequence[Row]) -> dict[str, int]:
    """Classes run rightly by each way, in all, and what became of the others."""
    counted = {way: sum(r.good and r.way == way for r in rows) for way in WAYS}
    counted["all"] = sum(counted.values())
    counted["wrong"] = sum(r.way in WAYS and not r.good for r in rows)
    for way in ("refused", "failed", "not built", "built"):
        counted[way] = sum(r.way == way for r in rows)
    return counted


def page(rows: Sequence[Row], *, versions: str) -> str:
    """The text of docs/models.md."""
    rows = sorted(rows, key=lambda r: r.model_type)
    count = totals(rows)
    lines = [
        "# Models",
        "",
        "Every class of the causal-LM auto mapping of transformers, built tiny with random weights,",
        "run by Quire and compared with transformers' own `generate()` and its own cache: greedy,",
        "float32, several requests of different lengths, prefilled in chunks where the model allows",
        "it. Written by `make sweep`; do not edit.",
        "",
        "- **packed**: requests of any length concatenated into one forward, through the attention",
        "  interface.",
        "- **patched**: the same, for models outside the interface, whose attention is replaced.",
        "- **rows**: recurrent and hybrid models; decode as rows of a batch, prefill one at a time.",
        "- **dense**: keys and values in Quire's blocks, handed to the model's own attention, one",
        "  request per forward.",
        "- **refused**: `attach` says no, and why.",
        "",
        f"{versions}. Right: all texts equal, first-logit error below {ERROR_LIMIT_SIGMA:g} sigma.",
        "",
        "| | classes |",
        "| --- | ---: |",
        *(f"| {way} | {count[way]} |" for way in WAYS),
        f"| **all ways** | **{count['all']}** |",
        *(f"| {w} | {count[w]} |" for w in ("wrong", "refused", "failed", "not built", "built")),
        f"| in the mapping | {len(rows)} |",
        "",
        "| type | class | way | equal | error (σ) | |",
        "| --- | --- | --- | ---: | ---: | --- |",
        *map(table_line, rows),
        "",
    ]
    return "\n".join(lines)


def table_line(row: Row) -> str:
    """One class as a line of the table."""
    equal = f"{row.equal}/{row.n}" if row.n else ""
    error = "" if row.error_sigma is None else f"{row.error_sigma:.0e}"
    way = row.way if row.good or row.way not in WAYS else f"**{row.way}: wrong**"
    reason = row.reason.replace("|", "\\|")
    return f"| {row.model_type} | {row.cls} | {way} | {equal} | {error} | {reason} |"


# --- The command ----------------------------------------------------------------------------------


def load_check(spec: str | None) -> Check | None:
    """The function named `module:function`."""
    if spec is None:
        return None
    module, _, name = spec.partition(":")
    found: Check = getattr(importlib.import_module(module), name)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep, write the page, and fail when a class is wrong or too few are right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("types", nargs="*", help="model types; all of the mapping by default")
    parser.add_argument("--check", help="module:function called with each model")
    parser.add_argument("--out", default=str(ROOT / "docs" / "models.md"), help="- for stdout")
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--limit-s", type=float, default=90.0, help="per class")
    parser.add_argument("--need-packed", type=int, default=0, help="fail below this many")
    parser.add_argument("--need-all", type=int, default=0, help="fail below this many")
    args = parser.parse_args(argv)

    import torch
    import transformers

    import zoo_sweep

    rows: list[Row] = []
    check = load_check(args.check)
    wanted = args.types or zoo_sweep.all_causal_types()
    for row in sweep(wanted, check, jobs=args.jobs, limit_s=args.limit_s):
        rows.append(row)
        print(f"[{len(rows)}/{len(wanted)}] {table_line(row)} {row.seconds:.1f} s", file=sys.stderr)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    text = page(rows, versions=versions)
    if args.out == "-":
        print(text)
    else:
        Path(args.out).write_text(text, encoding="utf-8")
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    count = totals(rows)
    print(", ".join(f"{name} {n}" for name, n in count.items()), file=sys.stderr)
    enough = count["packed"] >= args.need_packed and count["all"] >= args.need_all
    return 0 if enough and not count["wrong"] and not count["failed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
