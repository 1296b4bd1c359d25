"""The report: fronts are what no other beats, every picture is whole SVG, and the page needs nothing else."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.evaluate.page import page
from quire.evaluate.plots import Axis, Line, Point, front, lines, scatter
from quire.evaluate.report import Cost, Evaluation, Layer, Position, Row

FIGURES = st.integers(0, 6).map(float)


@given(st.lists(st.tuples(FIGURES, FIGURES), min_size=1, max_size=9), st.booleans())
def test_the_front_is_what_no_other_beats(places: list[tuple[float, float]], lower: bool) -> None:
    points = [Point(str(i), x, y) for i, (x, y) in enumerate(places)]
    sign = 1 if lower else -1

    def beaten(p: Point) -> bool:
        return any(
            q.x <= p.x and sign * q.y <= sign * p.y and (q.x, q.y) != (p.x, p.y) for q in points
        )

    found = front(points, lower_is_better=lower)
    assert {(p.x, p.y) for p in found} == {(p.x, p.y) for p in points if not beaten(p)}
    assert [p.x for p in found] == sorted({p.x for p in found})


@given(FIGURES, FIGURES, st.booleans())
def test_places_lie_within_the_axis_and_in_order(a: float, b: float, log: bool) -> None:
    axis = Axis("x", 0.5 if log else 0.0, 7.0, 100, 20, log=log)
    assert 20 <= axis.at(a) <= 100
    assert (axis.at(a) >= axis.at(b)) or a > b
    assert all(axis.low <= t <= axis.high * 1.001 for t in axis.ticks())


def test_a_point_and_a_line_lie_where_their_figures_say() -> None:
    drawn = scatter([Point("a", 0, 0.2), Point("b", 100, 0.1)], x="bytes", y="loss")
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)
    (ax, ay), (bx, by) = [(float(x), float(y)) for x, y in circles]
    assert ax == 74
    assert bx == pytest.approx(74 + (760 - 150 - 74) / 1.04, abs=0.1)
    assert ay < by, "a greater loss is higher up"
    path = re.search(
        r'class="line" stroke="red" d="M([^"]+)"',
        lines([Line("l", [0, 1, 2], [3, 5, 3], stroke="red")], x="", y=""),
    )
    assert path is not None
    ys = [float(p.split()[1]) for p in path.group(1).split("L")]
    assert ys[0] == ys[2] > ys[1]


def found() -> Evaluation:
    kvs = ("int8", "k=int8,v=int4 <&>")
    rows = [
        Row(kv, "full", "ppl", m, v, v / 2, v * 2, 100.0 + 9 * i, 9, 64, count=9, full_bytes_per_token=200.0)
        for i, kv in enumerate(kvs)
        for m, v in (("kl", 0.01 * i), ("agreement", 0.9))
    ]  # fmt: skip
    rows += [
        Row(kv, "full", "kv", "recall", 0.25 * i, None, None, 100.0, 9, n, depth)
        for (i, kv), n, depth in product(enumerate(kvs), (64, 128), (0.0, 1.0, None))
    ]
    places = [Position(kv, "full", 64, a, a + 8, 0.1, 0.0, 0.2) for kv in kvs for a in (0, 8, 16)]
    layers = [Layer("int8", n, f, 1e-3 * n, 0.0, None, None) for n in (0, 1) for f in "kv"]
    costs = [Cost(kv, "full", 64, 100.0, 12.5, 7, 700) for kv in ("auto", *kvs)]
    about: dict[str, Any] = {"model": "m<1>"}
    return Evaluation(
        tuple(rows), "d" * 64, {}, 3, injected=True, about=about,
        positions=tuple(places), layers=tuple(layers), costs=tuple(costs),
    )  # fmt: skip


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    text = page(found())
    assert "http://www.w3.org/2000/svg" in text
    assert not re.search(r'(src|href)="|url\(|@import|<script', text)
    assert "prefers-color-scheme:dark" in text
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 2 + 1 + 2 + 1, "front twice, position, recall per recipe, layers"
    for picture in pictures:
        ET.fromstring(picture)
    heads = re.findall(r"<h[123]>(.*?)</h", text)
    assert heads == [
        "quire eval: m&lt;1&gt;",
        "Quality over bytes",
        "Loss over position",
        "Recall over depth and length",
        "kv",
        "Sensitivity by layer",
        "Speed and capacity",
        "All figures",
    ]
    assert "k=int8,v=int4 &lt;&amp;&gt;" in text
    assert "<&>" not in text
    assert "outliers injected" in text


def test_what_was_not_measured_is_not_drawn() -> None:
    only = Evaluation(found().rows[-3:], "d" * 64, {}, about={"model": "m"})
    assert len(re.findall("<svg", page(only))) == 1
