"""The codecs' page, made from their docstrings: one part per file of src/quire/codecs.

python tools/catalogue.py --write docs/codecs.md
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from quire.codecs import available  # noqa: E402
from quire.codecs.recipe import codec_class  # noqa: E402

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

D counts the channels of a head, B the tokens of a block; other letters are in [Shape letters](shapes.md).
"""
SECTION = re.compile(r"(Idea|Source|Differs|Cost|Error): ")


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
    text = importlib.import_module(cls.__module__).__doc__ or ""
    first, _, rest = text.partition("\n")
    title, _, sentence = first.partition(": ")
    lines = [f"## {title}", "", sentence[:1].upper() + sentence[1:], ""]
    for p in paragraphs(rest):
        lines += [p, ""]
    known = fields(cls)
    if known:
        defaults = ", ".join(f"`{f.name}={str(f.default).lower()}`" for f in known)
        about = (cls.__doc__ or "").strip().replace("Parameters ", "").replace("Parameter ", "")
        lines += [f"**Parameters.** {about} By default {defaults}.", ""]
    return "\n".join(lines)


def page() -> str:
    """All of them, in the order of their names."""
    return "\n".join([HEAD, *(part(name) for name in available())])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="file to write; standard output without it")
    options = parser.parse_args()
    if options.write:
        options.write.write_text(page(), encoding="utf-8")
    else:
        print(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
