"""What KIVI's keys by channel are worth: its two bits beside two bits by token, at equal groups, in decode mode.

The other side is no codec of the package: it is `tests/evaluate/codecs_made_here.PerToken`, KIVI's own codes, groups
and window with the keys scaled as the values are. Known as `int2` for this run alone.

    python tools/two_bits.py --text wikitext2-valid.txt --max-tokens 22000
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from quire.bench.machine import commit
from quire.codecs import recipe
from quire.evaluate import evaluate
from quire.models.load import check_source, load_model

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("kivi:bits=2", "int2:bits=2")


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--text", type=Path, required=True, help="a file of running text")
    p.add_argument("--model", help="a folder or a hub id (default: the packaged model)")
    p.add_argument("--length", type=int, default=1024, help="tokens of a passage")
    p.add_argument("--max-tokens", type=int, default=22_000, help="of the text, at most")
    p.add_argument(
        "--residual", type=int, nargs="+", default=[128, 0], help="raw tokens at the end"
    )
    p.add_argument("--attention", default="auto", help="auto, cpu, torch or reference")
    p.add_argument("--inject", action="store_true", help="with large channels put into the keys")
    args = p.parse_args()
    know_int2()
    loaded = load_model(check_source(args.model, dtype="float32"))
    found = evaluate(
        loaded.model,
        loaded.tokenizer,
        [(f"{side},residual={r}", "full") for r in args.residual for side in SIDES],
        ["ppl"],
        args.text.read_text(encoding="utf-8"),
        length_tokens=args.length,
        attention=args.attention,
        max_tokens=args.max_tokens,
        injected=args.inject,
    )
    for line in found.table():
        print("  ".join(line))
    loss = {row.kv: row.value for row in found.rows if row.metric == "dnll"}
    for kivi, other in zip(*[iter(loss)] * 2, strict=True):
        share = loss[kivi] / loss[other]
        print(f"{kivi} loses {share:.3f} of what {other} loses")
    print(f"weights {found.digest[:16]}, {'injected, ' * args.inject}commit {commit()}")


def know_int2() -> None:
    """Lets recipes name the tests' codec."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "evaluate")]
    from codecs_made_here import PerToken

    known, names = recipe.codec_class, (*recipe.available(), PerToken.name)
    recipe.available = lambda: names
    recipe.codec_class = lambda name: PerToken if name == PerToken.name else known(name)


if __name__ == "__main__":
    main()
