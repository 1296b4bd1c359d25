"""What an evaluation found as one HTML file with nothing to fetch: plots and tables, light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from quire.evaluate.plots import Line, Point, cells, colour, lines, scatter
from quire.evaluate.report import Evaluation, Layer, Row

__all__ = ["document", "layer_field", "page", "table"]

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2126;--dim:#5d6872;--edge:#d9dee3;--row:#f4f6f8;
--c0:#1f6fb4;--c1:#c8501e;--c2:#2b8a3e;--c3:#8b3fa8;--c4:#a67c00;--c5:#0b8793;--c6:#c2255c;--c7:#5c6b7a}
@media(prefers-color-scheme:dark){:root{--bg:#14181c;--fg:#e6eaee;--dim:#97a3ae;--edge:#343c44;--row:#1c2228;
--c0:#6cb2f2;--c1:#f59562;--c2:#69c77e;--c3:#cf8fe8;--c4:#dcb849;--c5:#4ccbd6;--c6:#f27ba3;--c7:#a5b2be}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);
max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem}p{color:var(--dim);max-width:50rem}
svg{max-width:100%;height:auto;display:block;font:13px system-ui,sans-serif}svg text{fill:var(--fg)}
svg .small{font-size:11px;fill:var(--dim)}svg .in{font-size:11px}
.grid{stroke:var(--edge);fill:none}.front{stroke:var(--dim);fill:none;stroke-dasharray:5 4}
.best{stroke:var(--fg);stroke-width:1.5}.line{fill:none;stroke-width:2}.band{fill-opacity:.13;stroke:none}
.mark{stroke:var(--dim);stroke-dasharray:2 4;fill:none}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px;width:100%}.wide{overflow-x:auto}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--edge);white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr:nth-child(even) td{background:var(--row)}
.warn{color:var(--c1)}figure{margin:0 1.2rem 1rem 0;display:inline-block;vertical-align:top}code{font-size:13px}
"""


def document(title: str, subtitle: str, parts: Sequence[str]) -> str:
    """A whole page around its parts."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(subtitle)}</p>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def table(lines_: Sequence[Sequence[str]]) -> str:
    """A table, its heading first."""
    head = "".join(f"<th>{escape(c)}</th>" for c in lines_[0])
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in line) + "</tr>" for line in lines_[1:]
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def page(found: Evaluation) -> str:
    """The report of `quire eval --report`."""
    about = found.about
    names = list(dict.fromkeys(name(r) for r in found.rows))
    tints = {n: colour(i) for i, n in enumerate(names)}
    said = [f"{k} {v}" for k, v in _facts(about).items()]
    subtitle = ", ".join([*said, f"weights {found.digest[:16]}", f"seed {found.seed}"])
    if found.injected:
        subtitle += ", outliers injected"
    parts = [f'<p class="warn">{escape(w)}</p>' for w in found.warnings]
    for length in dict.fromkeys(r.length for r in found.rows if r.task == "ppl"):
        parts += _quality(found.rows, length, tints)
        parts += _position(found, length, tints)
    parts += _recall(found.rows, names, tints)
    parts += layer_field(found.layers)
    if found.costs:
        parts += [
            "<h2>Speed and capacity</h2>",
            _cost_text(found),
            table(found.cost_table()),
        ]
    parts += ["<h2>All figures</h2>", table(found.table())]
    return document(f"quire eval: {about.get('model', 'a model')}", subtitle, parts)


def name(row: Any) -> str:
    """A configuration in a word."""
    return str(row.kv) if row.keep == "full" else f"{row.kv} {row.keep}"


def _cost_text(found: Evaluation) -> str:
    cost = found.costs[0]
    return (
        f"<p>One sequence of {cost.length:,} tokens, decoded token by token; "
        f"capacity in {cost.memory_bytes / 2**30:,.1f} GiB.</p>"
    )


def _facts(about: Mapping[str, Any]) -> dict[str, Any]:
    return {k: about[k] for k in ("dtype", "device") if k in about}


def _points(rows: Sequence[Row], tints: Mapping[str, str]) -> list[Point]:
    return [
        Point(name(r), r.bytes_per_token, r.value, r.low, r.high, tints[name(r)])
        for r in rows
        if math.isfinite(r.value)
    ]


def _quality(rows: Sequence[Row], length: int, tints: Mapping[str, str]) -> list[str]:
    mine = [r for r in rows if r.task == "ppl" and r.length == length]
    out = []
    for metric, title, lower in (
        ("kl", "KL divergence, nats", True),
        ("agreement", "top-1 agreement", False),
    ):
        points = _points([r for r in mine if r.metric == metric], tints)
        if not points:
            continue
        exact = mine[0].full_bytes_per_token
        # a logarithm needs something above zero
        log = lower and any(p.y > 0 for p in points)
        out.append(
            scatter(
                points,
                x="bytes per token, all live bytes",
                y=title,
                log=log,
                lower_is_better=lower,
                mark=(exact, "exact cache"),
            )
        )
    if not out:
        return []
    text = (
        f"Windows of {length:,} tokens, {mine[0].count:,} of them predicted through the cache. Bars are 95 % intervals "
        "of a paired bootstrap; the dashed line is the front: what no other beats in both."
    )
    return ["<h2>Quality over bytes</h2>", f"<p>{text}</p>", *out]


def _position(found: Evaluation, length: int, tints: Mapping[str, str]) -> list[str]:
    mine = [p for p in found.positions if p.length == length and math.isfinite(p.dnll)]
    drawn = []
    for n in dict.fromkeys(name(p) for p in mine):
        some = [p for p in mine if name(p) == n]
        drawn.append(
            Line(
                n,
                [(p.start + p.stop) / 2 for p in some],
                [p.dnll for p in some],
                [p.low for p in some],
                [p.high for p in some],
                tints[n],
            )
        )
    if not drawn or all(len(line.xs) < 2 for line in drawn):
        return []
    return [
        "<h2>Loss over position</h2>",
        f"<p>ΔNLL by where in windows of {length:,} a token stands; above zero is worse than the exact cache.</p>",
        lines(drawn, x="position in the window", y="ΔNLL, nats", zero=True),
    ]


def _recall(rows: Sequence[Row], names: Sequence[str], tints: Mapping[str, str]) -> list[str]:
    mine = [r for r in rows if r.metric == "recall"]
    if not mine:
        return []
    out = [
        "<h2>Recall over depth and length</h2>",
        "<p>Share of right answers, by where in the text the asked fact stands, and how long the text is.</p>",
    ]
    for task in dict.fromkeys(r.task for r in mine):
        out.append(f"<h3>{escape(task)}</h3>")
        for n in names:
            some = [r for r in mine if r.task == task and name(r) == n]
            if not some:
                continue
            at = {(r.depth, r.length): r.value for r in some}
            depths = sorted({r.depth for r in some if r.depth is not None})
            lengths = sorted({r.length for r in some})
            keys: list[float | None] = [*depths, None]
            heads = [*(f"depth {d:.2f}" for d in depths), "all depths"]
            values = [[at.get((d, length)) for length in lengths] for d in keys]
            drawn = cells(
                heads,
                [f"{length:,}" for length in lengths],
                values,
                say=lambda v: f"{v:.0%}",
                share=lambda v: v,
                row_title=n,
                column_title="tokens",
                tint=tints[n],
            )
            out.append(f"<figure>{drawn}</figure>")
    return out


def layer_field(layers: Sequence[Layer]) -> list[str]:
    """What each layer's keys and values alone cost, per recipe, and each head's where that was measured."""
    alone = "alone in the codec, and all else exact."
    out = []
    for title, of, head in (("layer", "one layer's", False), ("head", "one KV head's", True)):
        some = [x for x in layers if (x.head is not None) is head]
        if some:
            out += [f"<h2>Sensitivity by {title}</h2>"]
            out += [f"<p>KL divergence (nats) with {of} keys or values {alone}</p>"]
            out += [_field(some, title)]
    return out


def _field(layers: Sequence[Layer], title: str) -> str:
    values = [x.kl for x in layers if x.kl > 0]
    low, high = (math.log10(min(values)), math.log10(max(values))) if values else (0.0, 1.0)

    def share(v: float) -> float:
        return (math.log10(v) - low) / (high - low or 1.0) if v > 0 else 0.0

    places = {x.place: (x.layer, x.head or 0) for x in layers}
    numbers = sorted(places, key=places.__getitem__)
    recipes = list(dict.fromkeys((x.kv, x.field) for x in layers))
    at = {(x.kv, x.field, x.place): x.kl for x in layers}
    return cells(
        [f"{kv}, {field}" for kv, field in recipes],
        numbers,
        [[at.get((kv, field, n)) for n in numbers] for kv, field in recipes],
        say=lambda v: f"{v:.1e}",
        share=share,
        column_title=title,
        tint="var(--c1)",
    )
