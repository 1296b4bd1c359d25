"""docs/methods.md from figures: claims beside ours, what is held to a bar, signs of ablations. Run by `methods.py`."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Rows = list[Row]
"""Figures of (text, injected, recipe, tokens), in the order in which they were made."""
Recall = dict[tuple[str, str], tuple[float, ...]]
"""(a section of docs/retention-quality.md, policy) to recall at each share kept, in per cent."""


@dataclass(frozen=True)
class Bar:
    """A recipe whose perplexity may grow by so many per cent."""

    recipe: str
    most: float


@dataclass(frozen=True)
class Sign:
    """`better` must lose less than `worse`: what the paper's ablation says of `what`."""

    what: str
    better: str
    worse: str


@dataclass(frozen=True)
class Claim:
    """What was published of a method, and the recipes whose figures here stand beside it."""

    recipes: tuple[str, ...]
    says: str
    source: str


KQ, CQ = "kvquant:bits=", "cq:form="
KVARN_2 = "kvarn:key_bits=2"
BARS = (
    *(Bar(f"{KQ}{b}", most) for b, most in ((4, 0.5), (3, 2.0), (2, 10.0))),
    *(Bar(f"{CQ}{f}", most) for f, most in (("2c8b", 1.0), ("4c8b", 8.0), ("8c8b", 50.0))),
    Bar(f"{CQ}8c8b;window=128", 10.0),
    Bar("kvarn", 2.0),
)
SIGNS = (
    Sign("keys before RoPE, not after", f"{KQ}3", f"{KQ}3,rope=after"),
    Sign("levels weighted by Fisher information", f"{KQ}3", f"{KQ}3,fisher=false"),
    Sign("outliers of each vector, not of the matrix", f"{KQ}3", f"{KQ}3,outliers=matrix"),
    Sign("outliers apart at all", f"{KQ}3", f"{KQ}3,sparse=0"),
    Sign("the first token in 16 bits", f"{KQ}3", f"{KQ}3,sink=0"),
    Sign("keys by channel, values by token", f"{KQ}3", f"{KQ}3,keys=token"),
    Sign("Q-Norm at 2 bits", f"{KQ}2", f"{KQ}2,qnorm=false"),
    Sign("centres weighted by Fisher information, 1 bit", f"{CQ}8c8b", f"{CQ}8c8b,fisher=false"),
    Sign("centres weighted by Fisher information, 2 bits", f"{CQ}4c8b", f"{CQ}4c8b,fisher=false"),
    Sign("1 bit: 4 channels together, not 2", f"{CQ}4c4b", f"{CQ}2c2b"),
    Sign("1 bit: 8 channels together, not 4", f"{CQ}8c8b", f"{CQ}4c4b"),
    Sign("2 bits: 4 channels together, not 2", f"{CQ}4c8b", f"{CQ}2c4b"),
    Sign("keys before RoPE, not after (1 bit)", f"{CQ}8c8b", f"{CQ}8c8b,rope=after"),
    Sign("kvarn K2V2 beside kivi-2, at fewer bytes", f"{KVARN_2};window=128", "kivi"),
    Sign("OScaR beside kivi-2, at fewer bytes", "oscar:residual=96", "kivi"),
    Sign("OScaR: rotated, not scaled by length alone", "oscar", "oscar:rotate=false"),
    Sign("OScaR: scaled by length, not rotated alone", "oscar", "oscar:norm=false"),
)
CLAIMS = (
    Claim(
        ("int8",),
        "8 bits by token and head: no paper of its own; the usual step before 4 bits",
        "",
    ),
    Claim(
        ("fp8",), "more than 98 % of four reasoning scores, Qwen3-30B", "vLLM's blog, 2026-05-11"
    ),
    Claim(
        ("int4",),
        "mean of five reasoning scores 70.84 to 69.97 at 4.25 bits a number, Qwen3-8B",
        "SAW-INT4, in OSCAR's code",
    ),
    Claim(
        ("kivi:bits=4", "kivi"),
        "perplexity 28.87 to 29.63 and 44.85, SmolLM2-135M",
        "VeloxQuant-MLX#271",
    ),
    Claim(
        (f"{KQ}4", f"{KQ}3", f"{KQ}2"),
        "perplexity 5.68 to 5.69, 5.75, 6.01 at 4.32, 3.32, 2.32 bits, LLaMA-7B",
        "arXiv 2401.18079",
    ),
    Claim(
        (f"{CQ}2c8b", f"{CQ}4c8b", f"{CQ}8c10b", f"{CQ}8c8b"),
        "perplexity 5.68 to 5.70, 5.97, 6.78, 8.09 at 4, 2, 1.25, 1 bits, LLaMA-7B",
        "arXiv 2405.03917",
    ),
    Claim(
        ("kvarn", f"{KVARN_2};window=128"),
        "K4V2: AIME25 53.3 as the exact cache, at 2.77 times less memory, GLM-4.7-Flash",
        "KVarN's released code",
    ),
    Claim(
        ("oscar", "oscar:residual=96"),
        "LongBench-E 41.70 to 41.75 where kivi-2 has 39.84, Llama-3.1-8B; here on trial, no codec",
        "arXiv 2605.19660",
    ),
)
POLICY_CLAIMS = (
    (
        ("kvzip",),
        "RULER-4k 95.7 to 95.5, 94.9, 90.5 at 50, 20, 10 % kept, Llama-3.1-8B",
        "kvpress#93, #38",
    ),
    (
        ("kvzap",),
        "RULER-4k 95.32 to 95.09 at 25 to 28 % kept, Qwen3-8B (an MLP; here a ridge)",
        "arXiv 2601.07891",
    ),
    (("ada(snapkv)", "snapkv"), "RULER-4k 88.1 and 81.8 at 25 % kept", "kvpress#93, #38"),
    (("ada(expected)", "expected"), "RULER-4k 93.6 and 88.5 at 25 % kept", "kvpress#93, #38"),
)
POLICY_SIGNS = (
    Sign("budgets by head, of SnapKV's scores", "ada(snapkv)", "snapkv"),
    Sign("budgets by head, of expected attention's", "ada(expected)", "expected"),
    Sign("budgets by layer as a pyramid", "pyramid(snapkv)", "snapkv"),
    Sign("H2O's sums divided by age", "h2o:age=true", "h2o"),
    Sign("scores of a repeated context, not of the last queries", "kvzip", "snapkv"),
    Sign("redundancy beside attention, not the last queries alone", "rkv", "snapkv"),
)
SHARES = (50, 25, 10)
AT = 1
"""Of SHARES: where signs of policies are read."""

HEAD = """# Methods: claims and figures

Made by `python tools/methods.py --write docs/methods.md` from the figures in `docs/methods.jsonl`, which the same tool
makes, and from [what policies cost in recall](retention-quality.md). Every figure of a codec is decode-mode perplexity:
each query reads the cache back. Growth is over the exact cache on the same tokens, with a 95 % interval; bytes are all
that the cache holds per token, raw blocks and padding included. What the codecs are: see [Codecs](codecs.md); the
policies: [Retention](retention.md).

```
quire calibrate --codec cq:form=8c8b --text learn.txt --out cq.safetensors --tokens 16384
quire calibrate --codec kvquant:bits=3 --text learn.txt --out kvquant.safetensors
quire eval --kv cq:form=8c8b,file=cq.safetensors --task ppl --text judge.txt --length 1024 --max-tokens 51200
python tools/methods.py --learn learn.txt --texts judge.txt other.txt --work DIR --write docs/methods.md   all of it
```

With injected outliers both commands take `--inject`: such a model has other weights, and a calibration of its own.

"""
SAID = (
    "What the paper says is better, and what is compared with it, on the same tokens. A sign is *as published* where "
    "loss and divergence both say so, *contradicted* where neither does. The packaged model hardly has a sink "
    "([what it is like](packaged-model.md)), so it says little of the first token; keys by token have scales of their "
    "own here and take more bytes."
)
FEW = 50_000
"""Tokens below which a figure says how many it has."""


def longest(rows: Rows, text: str, recipe: str, *, injected: bool) -> Row | None:
    """The figure of most tokens, the latest of equals."""
    found = [r for r in rows if (r["text"], r["injected"], r["kv"]) == (text, injected, recipe)]
    return max(reversed(found), key=lambda r: r["tokens"], default=None)


def pair(rows: Rows, text: str, sign: Sign, *, injected: bool) -> tuple[Row, Row] | None:
    """Both sides of a sign on the same tokens, as many as there are."""
    best: tuple[Row, Row] | None = None
    for a, b in itertools.product(rows, rows):
        if (a["kv"], b["kv"]) != (sign.better, sign.worse) or a["tokens"] != b["tokens"]:
            continue
        same = all((x["text"], x["injected"]) == (text, injected) for x in (a, b))
        if same and (best is None or a["tokens"] >= best[0]["tokens"]):
            best = a, b
    return best


def growth(row: Row, part: str = "dnll") -> float:
    """Of the perplexity over the exact cache's, in per cent."""
    return 100 * (math.exp(row[part]) - 1)


def read_recall(words: str) -> Recall:
    """The figures of docs/retention-quality.md."""
    out: Recall = {}
    section = ""
    for line in words.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").replace("`", "")
        found = re.match(r"\| `([^`]+)` \|(.+)\|$", line)
        if found is not None and section:
            cells = re.findall(r"([\d.]+)%", found[2])
            out[section, found[1]] = tuple(map(float, cells))
    return out


def page(rows: Rows, recall: Recall) -> str:
    """docs/methods.md."""
    texts = list(dict.fromkeys(r["text"] for r in rows))
    first = texts[0]
    other = next((t for t in texts[1:]), "")
    every, length = rows, rows[0]["length"]
    rows = [r for r in every if r["length"] == length]
    most = max(r["tokens"] for r in rows)
    there = max((r["tokens"] for r in rows if r["text"] == other), default=0)
    lines = [
        HEAD
        + f"Here: the packaged model (5 M parameters), {most:,} tokens of `{first}` in windows of "
        f"{length:,} unless a figure says fewer; the other domain is {there:,} tokens of `{other}`. Learned "
        "from another part of the first text. A first token in 16 bits takes a raw block of 64, which at this length "
        "is 192 of kvquant's bytes a token.",
        *_claims(rows, first),
        *_bars(rows, first, other),
        *_signs(rows, first),
        *_generated([r for r in every if r["length"] > length]),
        *_policies(recall),
        "",
        "## Every figure",
        "",
        "| Text | Tokens | Window | Outliers | Codec | Bytes a token | Loss, nats | KL | Same top token |",
        "| --- | --: | --: | --- | --- | --: | --: | --: | --: |",
        *map(_figure, every),
    ]
    return "\n".join([*lines, ""])


def _claims(rows: Rows, first: str) -> Iterator[str]:
    yield from ("", "## What was published, and what it is here", "")
    yield "| Published | Source | Codec | Bytes a token | Growth of perplexity | KL | Injected: growth | KL |"
    yield "| --- | --- | --- | --: | --: | --: | --: | --: |"
    for claim in CLAIMS:
        said = f"{claim.says} | {claim.source}"
        for recipe in claim.recipes:
            plain, hurt = (longest(rows, first, recipe, injected=i) for i in (False, True))
            size = next((f"{r['bytes_per_token']:,.0f}" for r in (plain, hurt) if r), "")
            if size:
                yield f"| {said} | `{recipe}` | {size} | {_two(plain)} | {_two(hurt)} |"
                said = " | "


def _bars(rows: Rows, first: str, other: str) -> Iterator[str]:
    yield from ("", "## What is held to a bar", "")
    yield "| Codec | Bytes a token | Tables, bytes | Growth of perplexity | Bar | | Other domain | Injected outliers |"
    yield "| --- | --: | --: | --: | --: | --- | --: | --: |"
    for bar in BARS:
        row = longest(rows, first, bar.recipe, injected=False)
        if row is None:
            continue
        met = "met" if growth(row) <= bar.most else "**missed**"
        far = longest(rows, other, bar.recipe, injected=False)
        hurt = longest(rows, first, bar.recipe, injected=True)
        yield (
            f"| `{bar.recipe}` | {row['bytes_per_token']:,.0f} | {row['table_bytes']:,} | "
            f"{_grown(row, interval=True)} | {bar.most:g} % | {met} | {_grown(far)} | {_grown(hurt)} |"
        )


def _signs(rows: Rows, first: str) -> Iterator[str]:
    yield from ("", "## Signs of the ablations", "", SAID, "")
    yield "| What | Better | Loss, nats | KL | Other | Loss, nats | KL | Tokens | Sign |"
    yield "| --- | --- | --: | --: | --- | --: | --: | --: | --- |"
    for sign, injected in itertools.product(SIGNS, (False, True)):
        both = pair(rows, first, sign, injected=injected)
        if both is None:
            continue
        sides = " | ".join(f"`{r['kv']}` | {r['dnll']:+.4f} | {r['kl']:.4f}" for r in both)
        what = f"{sign.what}{', injected' if injected else ''}"
        yield f"| {what} | {sides} | {both[0]['tokens']:,} | {_sign(*both)} |"


def _generated(rows: Rows) -> Iterator[str]:
    """What longer windows say, in which more tokens stand behind one prompt."""
    for (text, length, injected), some in itertools.groupby(
        sorted(rows, key=lambda r: (r["text"], r["length"], r["injected"], -r["tokens"])),
        key=lambda r: (r["text"], r["length"], r["injected"]),
    ):
        found = list(some)
        yield from ("", f"## Windows of {length:,} tokens{', injected' if injected else ''}", "")
        yield (
            f"`{text}`; every query reads the cache as it is when that token is decoded, so that the last one of a "
            f"window has {length - 2:,} tokens before it."
        )
        yield from ("", "| Codec | Bytes a token | Growth of perplexity | KL | Tokens |")
        yield "| --- | --: | --: | --: | --: |"
        for r in found:
            yield (
                f"| `{r['kv']}` | {r['bytes_per_token']:,.0f} | {_spread(r)} | {r['kl']:.4f} | {r['tokens']:,} |"
            )


def _policies(recall: Recall) -> Iterator[str]:
    """Claims of policies and their signs, from the recall of all tasks."""
    if not recall:
        return
    sections = list(dict.fromkeys(s for s, _ in recall))
    shares = ", ".join(map(str, SHARES[:-1])) + f" and {SHARES[-1]} %"
    yield from ("", "## Policies", "")
    yield (
        f"Recall of facts in the packaged model's texts of 1,000 tokens, in per cent, at {shares} kept; all of it and "
        "the commands: [What policies cost in recall](retention-quality.md)."
    )
    yield from ("", f"| Published | Source | Policy | {' | '.join(sections)} |")
    yield "| --- | --- | --- |" + " --: |" * len(sections)
    for policies, says, source in POLICY_CLAIMS:
        said = f"{says} | {source}"
        for name in policies:
            figures = [
                ", ".join(f"{x:.1f}" for x in recall.get((section, name), ()))
                for section in sections
            ]
            if any(figures):
                yield f"| {said} | `{name}` | {' | '.join(figures)} |"
                said = " | "
    yield from ("", f"Signs at {SHARES[AT]} % kept, task by task:", "")
    yield f"| What | Better | Other | {' | '.join(sections)} | Sign |"
    yield "| --- | --- | --- |" + " --: |" * len(sections) + " --- |"
    for sign in POLICY_SIGNS:
        sides = [(recall.get((s, sign.better)), recall.get((s, sign.worse))) for s in sections]
        known = [(a[AT], b[AT]) for a, b in sides if a and b]
        if known:
            cells = (f"{a[AT]:.1f}, {b[AT]:.1f}" if a and b else "" for a, b in sides)
            yield (
                f"| {sign.what} | `{sign.better}` | `{sign.worse}` | {' | '.join(cells)} | "
                f"{_policy_sign(known)} |"
            )


def _policy_sign(known: Iterable[tuple[float, float]]) -> str:
    up = [a > b for a, b in known if a != b]
    if not up:
        return "no difference"
    if all(up):
        return "as published"
    return "mixed" if any(up) else "**contradicted**"


def _figure(row: Row) -> str:
    return (
        f"| {row['text']} | {row['tokens']:,} | {row['length']:,} | {'injected' if row['injected'] else ''} | "
        f"`{row['kv']}` | "
        f"{row['bytes_per_token']:,.0f} | {row['dnll']:+.4f} "
        f"({row['dnll_low']:+.4f} to {row['dnll_high']:+.4f}) | {row['kl']:.4f} | "
        f"{100 * row['agreement']:.1f} % |"
    )


def _two(row: Row | None) -> str:
    return " | " if row is None else f"{_grown(row)} | {row['kl']:.4f}"


def _grown(row: Row | None, *, interval: bool = False) -> str:
    if row is None:
        return ""
    text = _spread(row) if interval else f"{growth(row):+.2f} %"
    if row["tokens"] < FEW:
        text += f" of {row['tokens']:,}"
    return text


def _spread(row: Row) -> str:
    low, high = growth(row, "dnll_low"), growth(row, "dnll_high")
    return f"{growth(row):+.2f} % ({low:+.2f} to {high:+.2f})"


def _sign(better: Row, worse: Row) -> str:
    loss, kl = (better[part] < worse[part] for part in ("dnll", "kl"))
    if loss and kl:
        return "as published"
    if not loss and not kl:
        return "**contradicted**"
    return f"mixed: {'loss' if loss else 'KL'} alone says so"
