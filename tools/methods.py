"""What the calibrated codecs claim, what they do here, and docs/methods.md, which says so.

    python tools/methods.py --learn wikitext2-tail.txt --texts wikitext2-valid.txt moby_dick.txt --work DIR
    python tools/methods.py --work DIR --write docs/methods.md          the page alone, from what is in DIR

Calibrates every variant that a claim needs, scores all of them in decode mode, plain and with injected outliers, and
keeps each figure in DIR/rows.jsonl: what is there is not computed again. One capture of the model's keys, values and
gradients serves all variants, which is what `quire calibrate` does one by one, with the same tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from oscar_trial import registered  # noqa: E402
from quire.codecs.calibrated import Calibrated  # noqa: E402 - found by the line above
from quire.codecs.recipe import load_codec  # noqa: E402

Rows = dict[tuple[str, bool, str], dict[str, Any]]
"""(text, injected, recipe) to figures; in the order in which they were made."""

FAR_TEXT_AT = 1
"""The second text is another domain."""


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


KQ, CQ = "kvquant:bits=", "cq:form="
KVARN_2 = "kvarn:key_bits=2"
OSCAR = ("oscar", "oscar:residual=96", "oscar:rotate=false", "oscar:norm=false")
BESIDE = tuple(f"{KVARN_2},tile={x};window=128" for x in (32, 64, "64,rotate=false"))
"""What the trial of OScaR is held against beside `kivi`."""
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
    Sign("kvarn K2V2 beside kivi-2", "kvarn:key_bits=2", "kivi"),
)
BATCHES: tuple[tuple[str, bool, tuple[str, ...]], ...] = (
    ("first", True, ("kvarn", "kvarn:key_bits=2;window=128", "kivi")),
    ("first", True, (f"{CQ}8c8b", f"{CQ}4c8b", f"{CQ}2c8b", f"{KQ}2")),
    ("first", False, (f"{CQ}8c8b,fisher=false", f"{CQ}4c8b,fisher=false", f"{CQ}8c10b")),
    ("first", False, ("kvarn", "kvarn:key_bits=2;window=128", "kivi", "int4")),
    ("first", True, (f"{KQ}4", f"{KQ}3", f"{KQ}3,rope=after", f"{KQ}3,keys=token")),
    ("first", True, (f"{CQ}8c8b;window=128", f"{CQ}8c8b,fisher=false", f"{CQ}8c10b", "int4")),
    ("first", True, (f"{KQ}3,fisher=false", f"{KQ}3,outliers=matrix", f"{KQ}3,sink=0")),
    ("first", False, (f"{CQ}4c4b", f"{CQ}2c2b", f"{CQ}2c4b", f"{CQ}8c8b,rope=after")),
    ("first", False, (f"{KQ}3,sparse=0", f"{KQ}2,qnorm=false", "kvarn:key_bits=2")),
    ("first", False, (*OSCAR, *BESIDE)),
    ("first", True, (*OSCAR, *BESIDE)),
    ("second", False, tuple(b.recipe for b in BARS)),
)
"""What is scored side by side, in the order in which it is worth having."""
TOKENS = {"cq": 16_384, "kvquant": 32_768, f"{CQ}8c10b": 40_960}
"""That each codec learns from; 1,024 centres want more than 256."""


def learned(recipe: str) -> str | None:
    """What must be calibrated for a recipe, as its `settings` say; None for a codec that learns nothing."""
    codec: Any = load_codec(recipe.partition(";")[0])
    return codec.settings if isinstance(codec, Calibrated) else None


def with_file(recipe: str, path: Path) -> str:
    """The recipe that names a calibration."""
    body, semicolon, options = recipe.partition(";")
    return f"{body}{',' if ':' in body else ':'}file={path}{semicolon}{options}"


class Bench:
    """One model, its calibrations and its figures, all of which last in a folder."""

    def __init__(self, work: Path, learn: str, max_tokens: int, length: int) -> None:
        from quire.models.load import check_source, load_model

        self.work, self.learn, self.max_tokens, self.length = work, learn, max_tokens, length
        self.loaded = load_model(check_source(None))
        self.captured: dict[tuple[Any, ...], list[Any]] = {}

    def calibrate(self, settings: str, *, injected: bool) -> Path:
        """The file of a codec's tables, made where it is not there."""
        from quire.evaluate.calibration import calibrate
        from quire.models.capture import Capture

        name = settings.replace(":", "-").replace(",", "-").replace("=", "")
        path = self.work / f"{'injected-' if injected else ''}{name}.safetensors"
        if path.exists():
            return path
        whole = Capture.read  # one for all variants
        n = TOKENS.get(settings, TOKENS[settings.partition(":")[0]])

        def once(seen: Any, windows: Any, layers: Any, progress: Any) -> Any:
            key = (injected, len(windows), seen.turner is None, tuple(layers))
            if key not in self.captured:
                weighted, seen.weighted = seen.weighted, True
                self.captured = {key: list(whole(seen, windows, layers, progress))}
                seen.weighted = weighted
            for layer, field, x, weight in self.captured[key]:
                yield layer, field, x, weight if seen.weighted else None

        Capture.read = once  # type: ignore[method-assign]
        try:
            made = calibrate(
                self.loaded.model,
                settings,
                self.learn,
                tokenizer=self.loaded.tokenizer,
                tokens=n,
                injected=injected,
            )
        finally:
            Capture.read = whole  # type: ignore[method-assign]
        made.save(path)
        return path

    def score(self, text: Path, recipes: Sequence[str], *, injected: bool) -> list[dict[str, Any]]:
        """Figures of some recipes on one text."""
        from quire.evaluate import evaluate
        from quire.evaluate.journal import Journal, digest_of

        named, bytes_of = {}, {}
        for recipe in recipes:
            settings = learned(recipe)
            if settings is None:
                named[recipe] = recipe
                continue
            path = self.calibrate(settings, injected=injected)
            named[with_file(recipe, path)] = recipe
            bytes_of[recipe] = path.stat().st_size
        words = text.read_text(encoding="utf-8")
        asked = {"text": digest_of(words), "kv": list(named), "injected": injected}
        asked |= {"length": self.length, "max_tokens": self.max_tokens, "files": _digests(named)}
        journal = Journal(self.work / f"{digest_of(asked)}.part", asked)
        found = evaluate(
            self.loaded.model,
            self.loaded.tokenizer,
            [(kv, "full") for kv in named],
            ["ppl"],
            words,
            length_tokens=self.length,
            max_tokens=self.max_tokens,
            injected=injected,
            journal=journal,
        )
        journal.done()
        out: dict[str, dict[str, Any]] = {}
        for row in found.rows:
            recipe = named[row.kv]
            made = out.setdefault(
                recipe,
                {"text": text.name, "injected": injected, "kv": recipe, "tokens": row.tokens}
                | {"bytes_per_token": row.bytes_per_token, "length": self.length}
                | {"table_bytes": bytes_of.get(recipe, 0)},
            )
            made[row.metric] = row.value
            if row.low is not None:
                made[f"{row.metric}_low"], made[f"{row.metric}_high"] = row.low, row.high
        return list(out.values())


def _digests(recipes: Iterable[str]) -> list[str]:
    """What was learned, so that other tables do not go on with these figures."""
    codecs: list[Any] = [load_codec(r.partition(";")[0]) for r in recipes]
    return [getattr(codec, "stamp", "") for codec in codecs]


def read_rows(work: Path) -> Rows:
    """What is known already."""
    path = work / "rows.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(r["text"], r["injected"], r["kv"]): r for r in rows}


def run(
    work: Path,
    learn: Path,
    texts: Sequence[Path],
    max_tokens: int,
    length: int,
    seconds: float,
    batch: int | None = None,
) -> bool:
    """What is not known yet, until the time is up; whether all is known now."""
    bench: Bench | None = None
    began = time.monotonic()
    for i, (which, injected, recipes) in enumerate(BATCHES):
        if (which == "second" and len(texts) < 2) or (batch is not None and i != batch):
            continue
        text = texts[FAR_TEXT_AT if which == "second" else 0]
        known = read_rows(work)
        missing = [r for r in recipes if (text.name, injected, r) not in known]
        if not missing:
            continue
        bench = bench or Bench(work, learn.read_text(encoding="utf-8"), max_tokens, length)
        for row in bench.score(text, missing, injected=injected):
            with (work / "rows.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row["text"], row["injected"], row["kv"], f"{growth(row):+.2f} %", flush=True)
        if time.monotonic() - began > seconds:
            return False
    return True


# -- the page ----------------------------------------------------------------------------------------------------


def growth(row: dict[str, Any], part: str = "dnll") -> float:
    """Of the perplexity over the exact cache's, in per cent."""
    return 100 * (math.exp(row[part]) - 1)


HEAD = """# Codecs that learn: claims and figures

Made by `python tools/methods.py --work DIR --write docs/methods.md` from the figures in DIR, which the same tool
makes. Every figure is decode-mode perplexity: each query reads the cache back. Growth is over the exact cache on the
same tokens, with a 95 % interval; bytes are all that the cache holds per token, raw blocks and padding included. What
the codecs are: see [Codecs](codecs.md).

```
quire calibrate --codec cq:form=8c8b --text learn.txt --out cq.safetensors --tokens 16384
quire calibrate --codec kvquant:bits=3 --text learn.txt --out kvquant.safetensors
quire eval --kv cq:form=8c8b,file=cq.safetensors --task ppl --text judge.txt --length 1024 --max-tokens 51200
python tools/methods.py --learn learn.txt --texts judge.txt other.txt --work DIR      all of what stands below
```

With injected outliers both commands take `--inject`: such a model has other weights, and a calibration of its own.

## What the papers say

| Method | Published, on a 7B model | Source |
| --- | --- | --- |
| `kvquant` 4, 3, 2 bits | perplexity 5.68 to 5.69, 5.75, 6.01 at 4.32, 3.32, 2.32 bits a number | arXiv 2401.18079 |
| `cq` 2c8b, 4c8b, 8c10b, 8c8b | 5.68 to 5.70, 5.97, 6.78, 8.09 at 4, 2, 1.25, 1 bits | arXiv 2405.03917 |
| `kvarn` K4V2 | the exact cache's score on AIME25 at 2.77 times less memory | KVarN's released code |

"""


SAID = (
    "What the paper says is better, and what is compared with it. A sign is *as published* where loss and divergence "
    "both say so, *contradicted* where neither does. The packaged model hardly has a sink ([what it is like]"
    "(packaged-model.md)), so it says little of the first token; keys by token have scales of their own here and take "
    "more bytes."
)


def page(rows: Rows) -> str:
    """docs/methods.md."""
    texts = list(dict.fromkeys(text for text, _, _ in rows))
    first = texts[0]
    other = next((t for t in texts[1:]), "")
    there = next((r["tokens"] for (text, _, _), r in rows.items() if text == other), 0)
    some = next(iter(rows.values()))
    lines = [
        HEAD
        + f"Here: the packaged model (5 M parameters), {some['tokens']:,} tokens of `{first}` in windows of "
        f"{some['length']:,}; the other domain is {there:,} tokens of `{other}`. Learned from another part of the "
        "first text. A first token in 16 bits takes a raw block of 64, which at this length is 192 of kvquant's bytes "
        "a token.",
        "",
        "## What is held to a bar",
        "",
        "| Codec | Bytes a token | Tables, bytes | Growth of perplexity | Bar | | Other domain | Injected outliers |",
        "| --- | --: | --: | --: | --: | --- | --: | --: |",
    ]
    for bar in BARS:
        row = rows.get((first, False, bar.recipe))
        if row is None:
            continue
        met = "met" if growth(row) <= bar.most else "**missed**"
        more = (
            _grown(rows.get(key)) for key in ((other, False, bar.recipe), (first, True, bar.recipe))
        )
        lines.append(
            f"| `{bar.recipe}` | {row['bytes_per_token']:,.0f} | {row['table_bytes']:,} | "
            f"{_grown(row, interval=True)} | {bar.most:g} % | {met} | {' | '.join(more)} |"
        )
    lines += [
        "",
        "## Signs of the ablations",
        "",
        SAID,
        "",
        "| What | Better | Loss, nats | KL | Other | Loss, nats | KL | Sign |",
        "| --- | --- | --: | --: | --- | --: | --: | --- |",
    ]
    for sign, injected in itertools.product(SIGNS, (False, True)):
        better, worse = (rows.get((first, injected, r)) for r in (sign.better, sign.worse))
        if better is None or worse is None:
            continue
        sides = (
            f"`{kv}` | {r['dnll']:+.4f} | {r['kl']:.4f}"
            for kv, r in ((sign.better, better), (sign.worse, worse))
        )
        what = f"{sign.what}{', injected' if injected else ''}"
        lines.append(f"| {what} | {' | '.join(sides)} | {_sign(better, worse)} |")
    lines += [
        "",
        "## Every figure",
        "",
        "| Text | Tokens | Outliers | Codec | Bytes a token | Loss, nats | KL | Same top token |",
        "| --- | --: | --- | --- | --: | --: | --: | --: |",
    ]
    for (text, injected, kv), row in rows.items():
        lines.append(
            f"| {text} | {row['tokens']:,} | {'injected' if injected else ''} | `{kv}` | "
            f"{row['bytes_per_token']:,.0f} | {row['dnll']:+.4f} "
            f"({row['dnll_low']:+.4f} to {row['dnll_high']:+.4f}) | {row['kl']:.4f} | "
            f"{100 * row['agreement']:.1f} % |"
        )
    return "\n".join([*lines, ""])


def _grown(row: dict[str, Any] | None, *, interval: bool = False) -> str:
    if row is None:
        return ""
    text = f"{growth(row):+.2f} %"
    if interval:
        text += f" ({growth(row, 'dnll_low'):+.2f} to {growth(row, 'dnll_high'):+.2f})"
    return text


def _sign(better: dict[str, Any], worse: dict[str, Any]) -> str:
    loss, kl = (better[part] < worse[part] for part in ("dnll", "kl"))
    if loss and kl:
        return "as published"
    return (
        "**contradicted**"
        if not loss and not kl
        else f"mixed: {'loss' if loss else 'KL'} alone says so"
    )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--work", type=Path, required=True, help="a folder that lasts")
    p.add_argument("--learn", type=Path, help="a text to calibrate on")
    p.add_argument("--texts", type=Path, nargs="+", default=[], help="a text, and another domain's")
    p.add_argument("--max-tokens", type=int, default=51_200, help="of each text")
    p.add_argument("--length", type=int, default=1024, help="tokens of a window")
    p.add_argument("--batch", type=int, help=f"only this of BATCHES, 0 to {len(BATCHES) - 1}")
    p.add_argument("--write", type=Path, help="the page")
    p.add_argument("--seconds", type=float, default=math.inf, help="ends soon after so many")
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.texts:
        options = (args.max_tokens, args.length, args.seconds, args.batch)
        with registered():
            whole = run(args.work, args.learn, args.texts, *options)
        print("all is known" if whole else "more is to be done: call again")
    if args.write:
        args.write.write_text(page(read_rows(args.work)), encoding="utf-8")


if __name__ == "__main__":
    main()
