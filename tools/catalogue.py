"""Catalogues made from docstrings: one part per file of src/quire/codecs, and per file of src/quire/retention.

python tools/catalogue.py --write docs/codecs.md
python tools/catalogue.py --policies docs/retention.md     what stands above the mark in that file stays
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from quire.codecs import available  # noqa: E402
from quire.codecs.recipe import codec_class  # noqa: E402
from quire.retention import available as policies_available  # noqa: E402
from quire.retention.contract import Scored  # noqa: E402
from quire.retention.recipe import policy_class  # noqa: E402

HEAD = """# Codecs

How a sealed block is stored: what `--kv`, `quire.attach(model, kv=…)` and `KVConfig(kv=…)` take. Made by `make docs`
from the docstrings in `src/quire/codecs`, where one file is one codec. Which model takes which: see
[What composes](matrix.md).

```
auto                             the model's own dtype
int4                             one codec for everything
kivi:bits=4,residual=64          with parameters
k=int8,v=int4                    one codec for keys, another for values
int4;skip_layers=0,1,-1          options for all codecs: layers that stay in the model's dtype,
int4;sinks=4;window=128          so many first and so many recent tokens that stay in it
```

Codecs that learn from a text (`cq`, `kvquant`) name the file that `quire calibrate` wrote, once per model and codec:

```
quire calibrate --codec cq:form=4c8b --text learn.txt --out cq.safetensors
quire run --kv cq:form=4c8b,file=cq.safetensors …
```

What they lose here, and what their papers say: [Methods](methods.md).

D counts the channels of a head, B the tokens of a block; other letters are in [Shape letters](shapes.md).
"""
MARK = "<!-- Below: made by `make docs` from the docstrings in src/quire/retention. -->"
SECTION = re.compile(r"(Idea|Source|Differs|Needs|Cost|Error): ")


def paragraphs(text: str) -> list[str]:
    """A docstring as Markdown: drawings fenced, `Source: …` and its like as paragraphs with a bold head."""
    out: list[str] = []
    for part in re.split(r"\n\s*\n", text.strip()):
        lines = part.splitlines()
        if all(line.startswith("    ") for line in lines):
            out.append("\n".join(["```", *(line[4:] for line in lines), "```"]))
            continue
        items: list[str] = []
        for line in lines:
            if SECTION.match(line) or not items:
                items.append(line.strip())
            else:
                items[-1] += " " + line.strip()
        for item in items:
            head = SECTION.match(item)
            text = item[head.end() :] if head else item
            text = text[:1].upper() + text[1:]
            out.append(f"**{head[1]}.** {text}" if head else text)
    return out


def part(name: str) -> str:
    """One codec."""
    cls: Any = codec_class(name)
    lines = described(cls)
    known = fields(cls)
    if known:
        about = (cls.__doc__ or "").strip().replace("Parameters ", "").replace("Parameter ", "")
        lines += [f"**Parameters.** {about} By default {defaults(known)}.", ""]
    return "\n".join(lines)


def policy_part(name: str) -> str:
    """One policy; parameters that all scores share are said once, above."""
    cls: Any = policy_class(name)
    common = {f.name: f.default for f in fields(Scored)} if issubclass(cls, Scored) else {}
    own = [
        f
        for f in (x for x in fields(cls) if x.init)
        if f.name not in ("inner", "options", "given")
        and (f.name not in common or f.default != common[f.name])
    ]
    lines = described(cls)
    if own:
        about = " ".join((cls.__doc__ or "").split())
        about = re.sub(r"`Scored`'s parameters(, and |; )?", "", about)
        about = re.sub(r"^Parameters? ", "", about)
        about = about[:1].upper() + about[1:]
        usual = [f for f in own if f.default != ""]
        about += f" By default {defaults(usual)}." if usual else ""
        lines += [f"**Parameters of its own.** {about}", ""]
    return "\n".join(lines)


def defaults(known: Sequence[Field[Any]]) -> str:
    """Each parameter as it would be written."""
    return ", ".join(f"`{f.name}={str(f.default).lower()}`" for f in known)


def described(cls: Any) -> list[str]:
    """Title, sentence and paragraphs of a class's file."""
    text = importlib.import_module(cls.__module__).__doc__ or ""
    first, _, rest = text.partition("\n")
    title, _, sentence = first.partition(": ")
    lines = [f"## {title}", "", sentence[:1].upper() + sentence[1:], ""]
    for p in paragraphs(rest):
        lines += [p, ""]
    return lines


def policies_page(old: str) -> str:
    """What was written by hand, and all policies in the order of their names."""
    head, mark, _ = old.partition(MARK)
    if not mark:
        raise SystemExit(f"no line {MARK!r}: nothing to write below")
    return "\n".join([head + MARK, "", *(policy_part(name) for name in policies_available())])


def page() -> str:
    """All of them, in the order of their names."""
    return "\n".join([HEAD, *(part(name) for name in available())])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="file to write; standard output without it")
    parser.add_argument("--policies", type=Path, help="file whose part below the mark to write")
    options = parser.parse_args()
    if options.policies:
        text = policies_page(options.policies.read_text(encoding="utf-8"))
        options.policies.write_text(text, encoding="utf-8")
    elif options.write:
        options.write.write_text(page(), encoding="utf-8")
    else:
        print(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
