"""The tour's page: headings, paragraphs, tables and two kinds of text plot, all within the width of the console."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from quire.cli.console import out
from quire.cli.report import show

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["Page", "bar", "columns"]

_UP = " ▁▂▃▄▅▆▇█"
_ALONG = " ▏▎▍▌▋▊▉█"
_PLAIN = "    #####"
"""For terminals and files whose encoding has no block elements."""


class Page:
    """Lays panels out on stdout."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = out() if console is None else console

    @property
    def width(self) -> int:
        """Columns."""
        return self.console.width

    @property
    def plain(self) -> bool:
        """Whether the console's encoding lacks block elements."""
        try:
            "█".encode(self.console.encoding)
        except (UnicodeEncodeError, LookupError):
            return True
        return False

    def heading(self, text: str) -> None:
        """A line that begins a panel."""
        rule = "-" if self.plain else "─"
        self.line()
        self.line(Text.assemble((f"{text} ", "bold"), (rule * (self.width - len(text) - 1), "dim")))

    def words(self, text: str, style: str = "") -> None:
        """A paragraph."""
        lines = Text(text, style=style).wrap(self.console, self.width)
        for line in lines:
            line.rstrip()
            self.line(line)

    def line(self, text: Text | str = "") -> None:
        """A line as it is; only a terminal would wrap it."""
        self.console.print(Text(text) if isinstance(text, str) else text, soft_wrap=True)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[RenderableType]]) -> None:
        """Columns of figures, to the right but for the first; names ending in < are to the left."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="cyan", pad_edge=False)
        for i, name in enumerate(head):
            left = i == 0 or name.endswith("<")
            table.add_column(
                name.removesuffix("<"),
                justify="left" if left else "right",
                no_wrap=i > 0,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*row)
        show(self.console, table)

    def more(self, command: str) -> None:
        """The command that shows more. Where it is broken, a backslash lets it be pasted as it is."""
        label = "more: "
        parts: list[str] = []
        for word in map(shlex.quote, shlex.split(command)):
            valued = parts and parts[-1].startswith("--") and " " not in parts[-1]
            if valued and not word.startswith("--"):
                parts[-1] += f" {word}"  # a flag keeps its value
            else:
                parts.append(word)
        lines = [""]
        for part in parts:
            if lines[-1] and len(label) + len(lines[-1]) + 1 + len(part) + 2 > self.width:
                lines.append("")
            lines[-1] += f" {part}" if lines[-1] else part
        for i, line in enumerate(lines):
            end = " \\" if i < len(lines) - 1 else ""
            self.line(
                Text.assemble((" " * len(label) if i else label, "dim"), (line + end, "green"))
            )


def bar(share: float, width: int, *, plain: bool = False) -> str:
    """A horizontal bar over `share` (0 to 1) of `width` cells; something above zero shows."""
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    if share > 0:
        eighths = max(1, eighths)
    whole, part = divmod(eighths, 8)
    if plain:
        return "#" * max(whole + (part >= 4), int(share > 0))
    return "█" * whole + (_ALONG[part] if part else "")


def columns(
    charts: Sequence[tuple[str, Sequence[float], str]],
    at: Sequence[int],
    *,
    width: int,
    rows: int = 8,
    unit: str = "ms",
    plain: bool = False,
) -> list[Text]:
    """Charts of vertical bars side by side on one scale, so that their heights compare.

    Args:
        charts: title, values and colour of each; None of it depends on the colour.
        at: what the bars stand at, ascending; the first and the last are written under them.
    """
    top = max(max(values) for _, values, _ in charts)
    label = f"{top:,.0f} {unit}" if top >= 10 else f"{top:,.2f} {unit}"
    margin, gap = len(label) + 2, 3
    room = (width - gap * (len(charts) - 1)) // len(charts) - margin
    pitch = max(2, min(8, room // len(at)))
    inner = pitch * len(at)
    lines = [_line([[(title.ljust(margin + inner), "bold")] for title, _, _ in charts], gap)]
    for row in range(rows - 1, -1, -1):
        mark = {rows - 1: label, 0: f"0 {unit}"}.get(row, "").rjust(margin - 2)
        axis = f"{mark} {'|' if plain else '┤'}"
        parts = []
        for _, values, colour in charts:
            shares = (v / top if top else 0.0 for v in values)
            cells = "".join(_cell(x, row, rows, plain) * (pitch - 1) + " " for x in shares)
            parts.append([(axis, "dim"), (cells, colour)])
        lines.append(_line(parts, gap))
    low, high = f"{at[0]:,}", f"{at[-1]:,} tokens"
    under = " " * margin + low + high.rjust(max(len(high) + 1, inner - 1 - len(low))) + " "
    lines.append(_line([[(under.ljust(margin + inner), "dim")]] * len(charts), gap))
    return lines


def _cell(share: float, row: int, rows: int, plain: bool) -> str:
    """What a bar of `share` of the height shows in one row, counted from below."""
    level = round(share * rows * 8) - row * 8
    if row == 0 and share > 0:
        level = max(1 if not plain else 4, level)
    return (_PLAIN if plain else _UP)[min(8, max(0, level))]


def _line(charts: Sequence[Sequence[tuple[str, str]]], gap: int) -> Text:
    """The (text, style) parts of every chart, charts `gap` columns apart."""
    line = Text()
    for i, parts in enumerate(charts):
        line.append(" " * gap * (i > 0))
        for text, style in parts:
            line.append(text, style)
    line.rstrip()
    return line
