"""What each retention policy costs in recall: kept shares, questions that come before and after tokens go, equal bytes.

    python tools/policies_table.py --text book.txt --runs out/policies.jsonl --write docs/retention-quality.md

One line per policy, share, task and order is written to --runs as soon as it is measured, and what stands there already
is not measured again: a run that was stopped goes on, and one more policy costs only itself. The page is made of them;
tables of a page that is there stay where --runs has no row of theirs, if they are of the same texts and weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from quire import packaged  # noqa: E402
from quire.evaluate import evaluate  # noqa: E402

SHARES = (0.5, 0.25, 0.1)
TASKS = ("passkey", "kv:asked=3", "token-kv:asked=3", "needle:asked=3")
FULL = "full"
BASELINES = ("random", "lru")
POLICIES = (
    *BASELINES,
    "window",
    "sinks",
    "h2o",
    "h2o:age=true",
    "tova",
    "snapkv",
    "expected",
    "keydiff",
    "lagkv",
    "rkv",
    "kvzip",
    "kvzap",
    "ada(snapkv)",
    "ada(expected)",
    "ada(kvzip)",
    "pyramid(snapkv)",
    "fastgen",
    "duo",
    "quest",
)
SINKS = 4


def spelled(policy: str, share: float, length: int) -> str:
    """The policy with a budget of that share of `length` tokens, as `--keep` takes it."""
    tokens = round(share * length)
    if policy == "window":
        return f"window:{tokens}"
    if policy == "sinks":
        return f"sinks:{SINKS}+window:{tokens - SINKS}"
    if policy == "duo":
        streaming = share / 2  # what its streaming heads keep; retrieval heads get the rest
        window = max(1, round(streaming * length) - 4 * SINKS)
        whole = round((share - streaming) / (1 - streaming), 3)
        return f"duo:retrieval={whole},sinks={4 * SINKS},window={window}"
    if policy == "quest":
        return f"quest:budget={share},skip=0"
    head, paren, rest = policy.partition("(")
    if paren:
        return f"{head}({spelled(rest.removesuffix(')'), share, length)})"
    name, _, more = policy.partition(":")
    return f"{name}:budget={share}" + (f",{more}" if more else "")


def units(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is to be measured, the dearest last."""
    for ask in options.ask:
        for task in options.task:
            if ask == "before" and task.startswith("token-kv"):
                continue  # its answer of one token is known before any token goes
            for share in options.share:
                for policy in options.policy:
                    yield {
                        "policy": policy,
                        "keep": spelled(policy, share, options.length),
                        "share": share,
                        "task": task,
                        "ask": ask,
                        "length": options.length,
                        "examples": options.examples,
                    }
                yield {
                    "policy": FULL,
                    "keep": FULL,
                    "share": 1.0,
                    "task": task,
                    "ask": ask,
                    "length": options.length,
                    "examples": options.examples,
                }


KEY = ("keep", "task", "ask", "length", "examples")


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """By which a row is found again."""
    return tuple(row[k] for k in KEY)


def measured(path: Path) -> list[dict[str, Any]]:
    """The rows that stand in a file; a last line that was cut off is left out."""
    if not path.exists():
        return []
    rows = []
    for line in filter(None, path.read_text(encoding="utf-8").splitlines()):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}: a line that is no JSON is left out", file=sys.stderr)
    return rows


def measure(options: argparse.Namespace) -> None:
    """Adds what is missing to the file, one task, share and order at a time."""
    folder = options.model or packaged.path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = options.text.read_text(encoding="utf-8") if options.text else None
    done = {key(r) for r in measured(options.runs)}
    todo: dict[tuple[str, str], dict[tuple[Any, ...], dict[str, Any]]] = {}
    for unit in units(options):
        if key(unit) not in done:
            todo.setdefault((unit["ask"], unit["task"]), {})[key(unit)] = unit
    options.runs.parent.mkdir(parents=True, exist_ok=True)
    if options.runs.exists() and not options.runs.read_bytes().endswith(b"\n"):
        with options.runs.open("a", encoding="utf-8") as out:
            print(file=out)  # a line that was cut off does not spoil the next
    for (ask, task), found in todo.items():
        batch = list(found.values())
        for i in range(0, len(batch), options.at_once):
            part = batch[i : i + options.at_once]
            began = time.monotonic()
            result = evaluate(
                model,
                tokenizer,
                [("auto", u["keep"]) for u in part],
                [task],
                text,
                length_tokens=options.length,
                examples=options.examples,
                ask=ask,
            )
            with options.runs.open("a", encoding="utf-8") as out:
                for unit in part:
                    rows = [r for r in result.rows if r.keep == unit["keep"] and r.depth is None]
                    recall = next(r for r in rows if r.metric == "recall")
                    less = next(r for r in rows if r.metric == "drecall")
                    line = unit | {
                        "recall": recall.value,
                        "low": recall.low,
                        "high": recall.high,
                        "answers": recall.count,
                        "drecall": less.value,
                        "dlow": less.low,
                        "dhigh": less.high,
                        "bytes": recall.bytes_per_token / recall.full_bytes_per_token,
                        "digest": result.digest,
                    }
                    print(json.dumps(line), file=out)
            seconds = time.monotonic() - began
            print(f"{ask} {task}: {len(part)} configurations, {seconds:.0f} s", file=sys.stderr)


HEAD = """# What policies cost in recall

Made by `tools/policies_table.py`. Every figure reads the cache back, as in decoding: the share of answers that are
right after tokens went (an answer counts when each of its tokens is the likeliest), {examples} texts of {length}
tokens per task, facts hidden in {text}, weights {digest}. *After*: three questions come when tokens have gone.
*Before*: one question is part of the prompt, whose last query gives its answer's first token before any goes; so there
is no such table of `token-kv`, whose answers are one token.

In brackets what the cache held at the text's end, as a share of the full one's: protected tokens and those that
came since tokens last went count. **Bold**: better than both baselines that choose without a score, `random` and
`lru`; *cursive*: worse than `random`; both where the 95 % intervals are apart.
"""


MARK = "\n## "


def page(rows: Sequence[dict[str, Any]], text: str, old: str = "") -> str:
    """The tables, one per task and order, of those policies and shares that were measured.

    Args:
        old: a page, whose other tables stay. Raises SystemExit where it is of other texts or weights.
    """
    head, *kept = old.split(MARK)
    tables = {part.partition("\n")[0]: part.strip() for part in kept}
    if rows:
        first = rows[0]
        now = HEAD.format(
            examples=first["examples"],
            length=first["length"],
            text=text,
            digest=first["digest"][:16],
        )
        if old and head.strip() != now.strip():
            raise SystemExit("the page is of other texts or weights; name another for --write")
        head = now
        for title, *lines in _tables(rows):
            tables[title] = "\n".join([title, *lines]).strip()
    return MARK.join([head.rstrip() + "\n", *(t + "\n" for t in tables.values())])


def _tables(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """A title and lines for each task and order."""
    for ask, task in dict.fromkeys((r["ask"], r["task"]) for r in rows):
        here = [r for r in rows if (r["ask"], r["task"]) == (ask, task)]
        found = {(r["policy"], r["share"]): r for r in here}
        shares = sorted({s for p, s in found if p != FULL}, reverse=True)
        full = found.get((FULL, 1.0))
        n = here[0]["answers"]
        out = [f"`{task}`, asked {ask}", ""]
        out += [f"{n} answers" + (f"; full cache {full['recall']:.1%}." if full else "."), ""]
        out += ["| policy | " + " | ".join(f"{s:.0%} kept" for s in shares) + " |"]
        out += ["| --- |" + " ---: |" * len(shares)]
        names = dict.fromkeys(p for p, _ in found if p != FULL)
        for name in sorted(names, key=lambda p: -mean(found, p, shares)):
            out.append(f"| `{name}` | " + " | ".join(_cell(found, name, s) for s in shares) + " |")
        yield out


def mean(found: dict[tuple[str, float], dict[str, Any]], policy: str, shares: list[float]) -> float:
    """Of a policy over the shares that were measured."""
    values = [found[policy, s]["recall"] for s in shares if (policy, s) in found]
    return sum(values) / len(values)


def _cell(found: dict[tuple[str, float], dict[str, Any]], policy: str, share: float) -> str:
    row = found.get((policy, share))
    if row is None:
        return ""
    text, blind = f"{row['recall']:.1%}", [found.get((b, share)) for b in BASELINES]
    if policy not in BASELINES and all(blind):
        if all(row["low"] > b["high"] for b in blind if b):
            text = f"**{text}**"
        elif blind[0] and row["high"] < blind[0]["low"]:
            text = f"*{text}*"
    return f"{text} ({row['bytes']:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or hub id; default: the packaged model")
    parser.add_argument("--text", type=Path, help="what facts are hidden in; default: built in")
    parser.add_argument("--runs", type=Path, default=ROOT / "out" / "policies.jsonl")
    parser.add_argument("--policy", nargs="+", default=list(POLICIES))
    parser.add_argument("--share", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--task", nargs="+", default=list(TASKS))
    parser.add_argument("--ask", nargs="+", default=["after", "before"])
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=25)
    parser.add_argument("--at-once", type=int, default=10, help="configurations side by side")
    parser.add_argument("--write", type=Path, help="page to make of all that --runs holds")
    options = parser.parse_args()
    measure(options)
    if options.write:
        name = f"`{options.text.name}`" if options.text else "built-in filler"
        old = options.write.read_text(encoding="utf-8") if options.write.exists() else ""
        options.write.write_text(page(measured(options.runs), name, old), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
