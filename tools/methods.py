"""What codecs claim, what they do here, and docs/methods.md, which says so.

    python tools/methods.py --learn wikitext2-tail.txt --texts wikitext2-valid.txt moby_dick.txt --work DIR
    python tools/methods.py --work DIR --write docs/methods.md      what is in DIR to docs/methods.jsonl, and the page
    python tools/methods.py --write docs/methods.md                 the page alone
    python tools/methods.py --missing --learn … --texts … --work DIR        what the repository has no figure of

Calibrates every variant that a claim needs, scores all of them in decode mode, plain and with injected outliers, and
keeps each figure in DIR/rows.jsonl: what is there is not computed again, and a run that was killed goes on. One capture
of the model's keys, values and gradients serves all variants, which is what `quire calibrate` does one by one, with the
same tables.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from methods_page import BARS, CQ, KQ, KVARN_2, Rows, growth, page, read_recall  # noqa: E402
from oscar_trial import registered  # noqa: E402
from quire.codecs.calibrated import Calibrated  # noqa: E402 - found by the line above
from quire.codecs.recipe import load_codec  # noqa: E402
from wide_products import wide_products  # noqa: E402

FAR_TEXT_AT = 1
"""The second text is another domain."""
FIGURES = ROOT / "docs" / "methods.jsonl"
"""What is known, for the page."""
KEPT = (
    *("text", "injected", "kv", "tokens", "length", "bytes_per_token", "table_bytes"),
    *("dnll", "dnll_low", "dnll_high", "kl", "kl_low", "kl_high", "agreement"),
)
"""Of a figure, in FIGURES."""

OSCAR = ("oscar", "oscar:residual=96", "oscar:rotate=false", "oscar:norm=false")
BESIDE = tuple(f"{KVARN_2},tile={x};window=128" for x in (32, 64, "64,rotate=false"))
"""What the trial of OScaR is held against beside `kivi`."""
BATCHES: tuple[tuple[str, bool, tuple[str, ...]], ...] = (
    ("first", True, ("kvarn", f"{KVARN_2};window=128", "kivi")),
    ("first", True, (f"{CQ}8c8b", f"{CQ}4c8b", f"{CQ}2c8b", f"{KQ}2")),
    ("first", False, (f"{CQ}8c8b,fisher=false", f"{CQ}4c8b,fisher=false", f"{CQ}8c10b")),
    ("first", False, ("kvarn", f"{KVARN_2};window=128", "kivi", "int4")),
    ("first", False, ("int8", "fp8", "kivi:bits=4")),
    ("first", True, (f"{KQ}4", f"{KQ}3", f"{KQ}3,rope=after", f"{KQ}3,keys=token")),
    ("first", True, (f"{CQ}8c8b;window=128", f"{CQ}8c8b,fisher=false", f"{CQ}8c10b", "int4")),
    ("first", True, (f"{KQ}3,fisher=false", f"{KQ}3,outliers=matrix", f"{KQ}3,sink=0")),
    ("first", False, (f"{CQ}4c4b", f"{CQ}2c2b", f"{CQ}2c4b", f"{CQ}8c8b,rope=after")),
    ("first", False, (f"{KQ}3,sparse=0", f"{KQ}2,qnorm=false", KVARN_2)),
    ("first", False, (*OSCAR, *BESIDE)),
    ("first", True, (*OSCAR, *BESIDE)),
    ("first", False, (f"{KQ}4", f"{KQ}3", f"{KQ}2", f"{KQ}3,rope=after", f"{KQ}3,fisher=false")),
    ("first", False, (f"{KQ}3,outliers=matrix", f"{KQ}3,keys=token", f"{KQ}3,sink=0")),
    ("first", False, (f"{CQ}2c8b", f"{CQ}4c8b", f"{CQ}8c8b", f"{CQ}8c8b;window=128")),
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


def read_rows(path: Path) -> Rows:
    """Figures of a file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def add_rows(more: Rows) -> Rows:
    """Adds figures to FIGURES; of two of the same tokens the new one stays. Returns all."""
    known = {_key(r): r for r in [*read_rows(FIGURES), *more]}
    rows = [{k: r[k] for k in KEPT if k in r} for r in known.values()]
    FIGURES.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return rows


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in KEPT[:5])


def known_to(rows: Rows, length: int, max_tokens: int) -> Rows:
    """Those of about as many tokens in windows as long."""
    return [r for r in rows if r["length"] == length and abs(r["tokens"] - max_tokens) < 2 * length]


def run(
    work: Path,
    learn: Path,
    texts: Sequence[Path],
    max_tokens: int,
    length: int,
    seconds: float,
    batch: int | None = None,
    elsewhere: Rows = [],  # noqa: B006 - read alone
) -> bool:
    """What is not known yet, in the folder or elsewhere, until the time is up; whether all is known now."""
    bench: Bench | None = None
    began = time.monotonic()
    for i, (which, injected, recipes) in enumerate(BATCHES):
        if (which == "second" and len(texts) < 2) or (batch is not None and i != batch):
            continue
        text = texts[FAR_TEXT_AT if which == "second" else 0]
        rows = [*elsewhere, *read_rows(work / "rows.jsonl")]
        known = {(r["text"], r["injected"], r["kv"]) for r in rows}
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


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--work", type=Path, help="a folder that lasts, for figures that are made")
    p.add_argument("--learn", type=Path, help="a text to calibrate on")
    p.add_argument("--texts", type=Path, nargs="+", default=[], help="a text, and another domain's")
    p.add_argument("--max-tokens", type=int, default=51_200, help="of each text")
    p.add_argument("--length", type=int, default=1024, help="tokens of a window")
    p.add_argument("--batch", type=int, help=f"only this of BATCHES, 0 to {len(BATCHES) - 1}")
    p.add_argument("--missing", action="store_true", help=f"nothing that {FIGURES.name} has")
    p.add_argument("--write", type=Path, help="the page")
    p.add_argument("--seconds", type=float, default=math.inf, help="ends soon after so many")
    args = p.parse_args()
    if args.texts:
        if args.work is None or args.learn is None:
            p.error(
                "figures are made in a folder, from a text to learn from: give --work and --learn"
            )
        args.work.mkdir(parents=True, exist_ok=True)
        there = read_rows(FIGURES) if args.missing else []
        elsewhere = known_to(there, args.length, args.max_tokens)
        options = (args.max_tokens, args.length, args.seconds, args.batch, elsewhere)
        with registered(), wide_products():
            whole = run(args.work, args.learn, args.texts, *options)
        print("all is known" if whole else "more is to be done: call again")
    if args.write:
        rows = add_rows([] if args.work is None else read_rows(args.work / "rows.jsonl"))
        recall = (ROOT / "docs" / "retention-quality.md").read_text(encoding="utf-8")
        args.write.write_text(page(rows, read_recall(recall)), encoding="utf-8")


if __name__ == "__main__":
    main()
