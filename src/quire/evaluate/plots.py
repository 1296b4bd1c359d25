"""Plots as SVG that needs nothing else: points with a front, lines, and fields of cells. Colours are the page's.

Every function returns one `<svg>`; classes and `var(--c0)` … `var(--c7)` are defined by the page around it
(`quire.evaluate.page`), so a plot is light or dark as the page is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

__all__ = ["Axis", "Line", "Point", "cells", "colour", "front", "lines", "scatter"]

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 74, 150, 18, 48
COLOURS = 8


def colour(i: int) -> str:
    """The i-th of the page's colours."""
    return f"var(--c{i % COLOURS})"


@dataclass(frozen=True)
class Point:
    """One configuration in the plane; `low` and `high` are the interval of y."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    fill: str = "var(--c0)"


@dataclass(frozen=True)
class Line:
    """Points joined in order, with a band where both bounds are known."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    lows: Sequence[float | None] = ()
    highs: Sequence[float | None] = ()
    stroke: str = "var(--c0)"


@dataclass(frozen=True)
class Axis:
    """A scale from figures to places."""

    title: str
    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    say: Callable[[float], str] = lambda x: f"{x:g}"

    def at(self, x: float) -> float:
        """Where a figure lies; beyond the ends it lies on them."""
        a, b = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        v = math.log10(max(x, self.low)) if self.log else x
        share = (v - a) / (b - a) if b > a else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round figures within: powers of ten with steps between where they are few, or steps of 1, 2 or 5."""
        if self.log:
            a, b = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            found: list[float] = []
            for steps in ((1,), (1, 2, 5), tuple(range(1, 10))):
                every = [m * 10.0**e for e in range(a, b + 1) for m in steps]
                found = [v for v in every if self.low <= v * 1.0001 and v <= self.high * 1.0001]
                if len(found) > 2:
                    break
            return found
        span = self.high - self.low or 1.0
        step = 10.0 ** math.floor(math.log10(span / 5))
        step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 7)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def front(points: Sequence[Point], *, lower_is_better: bool = True) -> list[Point]:
    """The points that no other beats in both: fewer x, and better y. Ascending in x."""
    sign = 1.0 if lower_is_better else -1.0
    found: list[Point] = []
    for p in sorted(points, key=lambda p: (p.x, sign * p.y)):
        if not found or sign * p.y < sign * found[-1].y:
            found.append(p)
    return found


def scatter(
    points: Sequence[Point],
    *,
    x: str,
    y: str,
    log: bool = False,
    lower_is_better: bool = True,
    say_x: Callable[[float], str] = lambda v: f"{v:,.0f}",
    mark: tuple[float, str] | None = None,
) -> str:
    """Points with their intervals, their labels, and the front.

    Args:
        x, y: titles of the axes.
        log: of y; figures of zero lie on the lower edge.
        mark: an x with a line of its own, and what it says.
    """
    floor = min((p.y for p in points if p.y > 0), default=1e-6) / 3 if log else 0.0
    tops = [max(p.y, p.high or p.y) for p in points]
    least = [p.y if p.low is None else p.low for p in points]
    low = floor if log else min(least) - 0.05 * (max(tops) - min(least) or 1.0)
    high = max(tops) * 1.3 if log else max(tops) + 0.05 * (max(tops) - min(least) or 1.0)
    widest = max([p.x for p in points] + ([mark[0]] if mark else []))
    across = Axis(x, 0.0, widest * 1.04, LEFT, WIDTH - RIGHT, say=say_x)
    up = Axis(y, low, max(high, low * 1.01), HEIGHT - BOTTOM, TOP, log=log, say=_short)
    parts = [*_frame(across, up)]
    if mark is not None:
        at = across.at(mark[0])
        parts.append(f'<path class="mark" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="small" x="{at + 5:.1f}" y="{TOP + 11}">{escape(mark[1])}</text>'
        )
    best = front(points, lower_is_better=lower_is_better)
    path = "L".join(f"{across.at(p.x):.1f} {up.at(p.y):.1f}" for p in best)
    parts.append(f'<path class="front" d="M{path}"/>')
    spots = [(up.at(p.y), across.at(p.x), p) for p in points]
    for py, px, p in spots:
        if p.low is not None and p.high is not None:
            a, b = up.at(max(p.low, low)), up.at(p.high)
            parts.append(f'<path stroke="{p.fill}" d="M{px:.1f} {a:.1f}V{b:.1f}"/>')
        ring = ' class="best"' if p in best else ""
        tip = escape(f"{p.label}: {_short(p.y)} at {say_x(p.x)}")
        parts.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{p.fill}"{ring}><title>{tip}</title></circle>'
        )
    taken: list[tuple[float, float]] = []
    for py, px, p in sorted(spots, key=lambda s: (s[0], s[1])):
        at = py + 4
        while any(abs(at - ty) < 13 and abs(px - tx) < 7.2 * len(p.label) + 12 for tx, ty in taken):
            at += 13
        taken.append((px, at))
        left = px + 9 + 7.2 * len(p.label) > WIDTH
        where = f'text-anchor="end" x="{px - 9:.1f}"' if left else f'x="{px + 9:.1f}"'
        parts.append(f'<text {where} y="{at:.1f}">{escape(p.label)}</text>')
    return _svg(HEIGHT, parts)


def lines(
    found: Sequence[Line],
    *,
    x: str,
    y: str,
    zero: bool = False,
    say_x: Callable[[float], str] = lambda v: f"{v:,.0f}",
) -> str:
    """Lines with their bands, and labels at their ends.

    Args:
        zero: draw a line at 0.
    """
    every = [v for line in found for v in (*line.ys, *line.lows, *line.highs) if v is not None]
    low, high = min([*every, *([0.0] if zero else [])]), max([*every, *([0.0] if zero else [])])
    pad = 0.06 * (high - low or 1.0)
    xs = [v for line in found for v in line.xs]
    across = Axis(x, min(xs), max(xs), LEFT, WIDTH - RIGHT, say=say_x)
    up = Axis(y, low - pad, high + pad, HEIGHT - BOTTOM, TOP, say=_short)
    parts = [*_frame(across, up)]
    if zero:
        parts.append(f'<path class="mark" d="M{LEFT} {up.at(0):.1f}H{WIDTH - RIGHT}"/>')
    ends: list[tuple[float, Line]] = []
    for line in found:
        spots = [(across.at(a), up.at(b)) for a, b in zip(line.xs, line.ys, strict=True)]
        if line.lows and all(v is not None for v in (*line.lows, *line.highs)):
            above = [
                f"{px:.1f} {up.at(v or 0):.1f}"
                for (px, _), v in zip(spots, line.highs, strict=True)
            ]
            below = [
                f"{px:.1f} {up.at(v or 0):.1f}" for (px, _), v in zip(spots, line.lows, strict=True)
            ]
            area = "L".join([*above, *reversed(below)])
            parts.append(f'<path class="band" fill="{line.stroke}" d="M{area}Z"/>')
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in spots)
        parts.append(f'<path class="line" stroke="{line.stroke}" d="M{path}"/>')
        ends.append((spots[-1][1], line))
    at = -math.inf
    for end, line in sorted(ends, key=lambda e: e[0]):
        at = max(at + 14, end + 4)
        parts.append(
            f'<text x="{WIDTH - RIGHT + 8}" y="{at:.1f}" style="fill:{line.stroke}">{escape(line.label)}</text>'
        )
    return _svg(HEIGHT, parts)


def cells(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    say: Callable[[float], str],
    share: Callable[[float], float],
    row_title: str = "",
    column_title: str = "",
    tint: str = "var(--c0)",
) -> str:
    """A field of figures, each in a cell as strong as its share.

    Args:
        values: `[rows][columns]`, None where nothing was measured.
        share: figure to strength, 0 to 1.
    """
    left = 20 + max([7 * len(r) for r in rows] + [7 * len(row_title)])
    wide = min(76, max(44, (WIDTH - left - 10) // max(1, len(columns))))
    tall, top = 27, 40
    parts = [
        f'<text class="small" x="8" y="{top - 8}">{escape(row_title)}</text>',
        f'<text class="small" x="{left}" y="14">{escape(column_title)}</text>',
    ]
    for j, name in enumerate(columns):
        x = left + j * wide + wide / 2
        parts.append(f'<text text-anchor="middle" x="{x:.0f}" y="{top - 8}">{escape(name)}</text>')
    for i, (name, line) in enumerate(zip(rows, values, strict=True)):
        y = top + i * tall
        parts.append(f'<text x="8" y="{y + 18}">{escape(name)}</text>')
        for j, v in enumerate(line):
            if v is None:
                continue
            x, strong = left + j * wide, min(1.0, max(0.0, share(v)))
            parts.append(
                f'<rect x="{x + 1}" y="{y + 1}" width="{wide - 2}" height="{tall - 2}" rx="3" fill="{tint}" '
                f'fill-opacity="{0.06 + 0.64 * strong:.3f}"/>'
            )
            parts.append(
                f'<text class="in" text-anchor="middle" x="{x + wide / 2:.0f}" y="{y + 17}">{escape(say(v))}</text>'
            )
    width = left + wide * len(columns) + 10
    return _svg(top + tall * len(rows) + 6, parts, width)


def _frame(across: Axis, up: Axis) -> list[str]:
    parts = []
    for v in up.ticks():
        y = up.at(v)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="small" text-anchor="end" x="{LEFT - 8}" y="{y + 4:.1f}">{escape(up.say(v))}</text>'
        )
    for v in across.ticks():
        x = across.at(v)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="small" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}">'
            f"{escape(across.say(v))}</text>"
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text text-anchor="middle" x="{middle}" y="{HEIGHT - 10}">{escape(across.title)}</text>'
    )
    height = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text text-anchor="middle" transform="translate(16 {height}) rotate(-90)">{escape(up.title)}</text>'
    )
    return parts


def _svg(height: float, parts: Sequence[str], width: float = WIDTH) -> str:
    box = f'viewBox="0 0 {width:.0f} {height:.0f}" style="width:{width:.0f}px"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box}>'
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def _short(v: float) -> str:
    if v == 0:
        return "0"
    return (
        f"{v:.3g}" if 1e-3 <= abs(v) < 1e5 else f"{v:.0e}".replace("e-0", "e-").replace("e+0", "e")
    )
