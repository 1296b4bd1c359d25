"""docs/claims.md, as `quire claims --write` makes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

__all__ = ["page"]

_HEAD = """# Claims, run

Headline statements about KV caches, each run or worked out by `quire claims`, with a verdict: **reproduced** (run
here, and it holds), **contradicted** (with our figure), **arithmetic** (nothing to run: it follows from shapes, and
the sum comes out) or **not here** (a part that Quire does not have yet, or a machine that this is not). Sizes come
from the planner, which the engine's own bytes are held to ([planning](plan.md)); counts are exact; times are those of
one machine and the packaged model.
"""


def page(document: Mapping[str, Any], picture: str = "") -> str:
    """The whole page.

    Args:
        document: of `quire claims --json`.
        picture: name of the drawing beside it, if there is one.
    """
    rows = document["claims"]
    counts = Counter(r["verdict"] for r in rows)
    summary = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
    where = f"Written by `{document['command']}` at commit {document['commit']}, {document['hardware']}."
    lines = [_HEAD, f"{where} {len(rows)} claims: {summary}.", ""]
    if picture:
        lines += [f"![Claimed and found, in times, on a scale of doublings]({picture})", ""]
    lines += ["| Claim | Source | Ours | Verdict | Why |", "| --- | --- | --- | --- | --- |"]
    for r in rows:
        cells = (r["claim"], r["source"], r["ours"] or "–", f"**{r['verdict']}**", r["why"] or "–")
        lines.append("| " + " | ".join(_cell(c) for c in cells) + " |")
    lines += ["", "## Slips in circulation", "", "| Said | Right | Why |", "| --- | --- | --- |"]
    for s in document["slips"]:
        lines.append("| " + " | ".join(_cell(s[k]) for k in ("said", "right", "why")) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
