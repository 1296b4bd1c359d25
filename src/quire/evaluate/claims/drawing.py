"""What is claimed beside what we found, for claims that are a number of times: an SVG that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

__all__ = ["drawing"]

WIDTH, ROW, LEFT, RIGHT, TOP = 820, 46, 310, 90, 46
_FONT = 'font-family="sans-serif" font-size="13"'
CLAIMED, OURS = "#b0bec5", "#e64a19"


def drawing(rows: Sequence[dict[str, Any]]) -> str:
    """Bars on a scale of doublings.

    Args:
        rows: of `quire claims --json`; those without `ratios` are not drawn.

    Returns:
        The SVG, or "" when there is nothing to draw.
    """
    bars = [tuple(r) for row in rows for r in row["ratios"]]
    if not bars:
        return ""
    most = math.ceil(math.log2(max(max(a, b) for _, a, b in bars)))
    unit = (WIDTH - LEFT - RIGHT) / most
    height = TOP + ROW * len(bars) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {_FONT}>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<rect x="{LEFT}" y="14" width="12" height="12" fill="{CLAIMED}"/><text x="{LEFT + 18}" y="25">claimed</text>',
        f'<rect x="{LEFT + 99}" y="14" width="12" height="12" fill="{OURS}"/><text x="{LEFT + 117}" y="25">here</text>',
    ]
    for i in range(most + 1):
        x = LEFT + i * unit
        parts.append(f'<path d="M{x:.1f} {TOP}V{height - 26}" stroke="#e0e0e0"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{height - 10}" text-anchor="middle" fill="#616161">{2**i}×</text>'
        )
    for i, (label, claimed, ours) in enumerate(bars):
        y = TOP + i * ROW
        parts.append(
            f'<text x="{LEFT - 10}" y="{y + 27}" text-anchor="end">{escape(str(label))}</text>'
        )
        for at, value, fill in ((6, claimed, CLAIMED), (22, ours, OURS)):
            width = max(1.0, math.log2(max(value, 1.0)) * unit)
            parts.append(
                f'<rect x="{LEFT}" y="{y + at}" width="{width:.1f}" height="14" fill="{fill}"/>'
            )
            parts.append(
                f'<text x="{LEFT + width + 6:.1f}" y="{y + at + 12}" font-size="12">{value:.3g}×</text>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"
