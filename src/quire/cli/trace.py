"""`quire run --trace`: one line per step and sequence. Intervals are half-open: 3:12 is positions 3 to 11."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from quire.cli.meter import StepItem

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Trace", "spans_text"]

_COLUMNS = (
    ("step", 4, ">"),
    ("seq", 3, ">"),
    ("phase", 7, "<"),
    ("input", 15, "<"),
    ("computed", 9, ">"),
    ("cached", 15, ">"),
    ("read", 7, ">"),
    ("KV bytes", 9, ">"),
)


class Trace:
    """Collects steps and shows them as they come.

    Args:
        runner: for its groups; without a cache every step computes [0, stop).
        tokenizer: None: inputs are shown as ids.
        prompt_tokens: of each sequence, in order.
        console: where lines are printed as they come; None: nowhere.
    """

    def __init__(
        self, runner: Any, tokenizer: Any, prompt_tokens: Sequence[int], console: Console | None
    ) -> None:
        bridge = getattr(runner, "bridge", None)
        self.groups = () if bridge is None else bridge.layout.spec.groups
        self.cached = bridge is not None
        self.tokenizer = tokenizer
        self.prompt_tokens = prompt_tokens
        self.rows: list[dict[str, Any]] = []
        self.steps = 0
        self._console = console
        wider = 0 if console is None else max(0, console.width - 80) // 2
        self._columns = [
            (name, width + wider * (name == "input"), side)
            for name, width, side in _COLUMNS
            if name != "seq" or len(prompt_tokens) > 1
        ]
        if console is not None:
            self._head(console)

    def add(self, items: Sequence[StepItem], seconds: float) -> None:
        """A step has been computed."""
        self.steps += 1
        for i, item in enumerate(items):
            phase = "prefill" if item.start < self.prompt_tokens[item.sequence] else "decode"
            row = {
                "step": self.steps,
                "sequence": item.sequence,
                "phase": phase,
                "input": list(item.tokens),
                "computed": [item.start if self.cached else 0, item.stop],
                "cached_before": item.before,
                "cached_after": item.after,
                "read": item.read,
                "blocks": item.blocks,
                "kv_bytes": item.held_bytes,
                "seconds": seconds,
            }
            self.rows.append(row)
            if self._console is not None:
                self._line(self._console, row, first=i == 0)

    def _head(self, out: Console) -> None:
        if not self.cached:
            out.print("no cache: every step computes the whole sequence", style="dim")
        for g in self.groups:
            layers = _numbers(list(g.layers))
            heads = len(g.coords) // len(g.layers)
            span = type(g.span).__name__.lower()
            out.print(
                Text(
                    f"group {g.name}: {g.codec}, {span}, layers {layers}, {heads} KV heads, "
                    f"{g.block_tokens}-token blocks, {g.block_bytes:,} B",
                    style="dim",
                ),
            )
        head = " ".join(f"{name:{side}{width}}" for name, width, side in self._columns)
        out.print(Text(f"{head}  blocks", style="cyan"), soft_wrap=True)

    def _line(self, out: Console, row: dict[str, Any], *, first: bool) -> None:
        a, b = row["computed"]
        before, after = (self._spans(row[f"cached_{x}"]) for x in ("before", "after"))
        cells = {
            "step": str(row["step"]) if first else "",
            "seq": str(row["sequence"] + 1),
            "phase": row["phase"],
            "input": self._input(row["input"]),
            "computed": f"{a}:{b}",
            "cached": f"{before}→{after}" if self.cached else "–",
            "read": self._spans(row["read"]),
            "KV bytes": f"{row['kv_bytes']:,}",
        }
        line = Text()
        for name, width, side in self._columns:
            style = {"prefill": "yellow", "decode": "green"}.get(cells[name], "")
            line.append(_cell(cells[name], width, side), style if name == "phase" else "")
            line.append(" ")
        blocks = self._blocks(row["blocks"])
        if cell_len(line.plain) + 1 + len(blocks) <= out.width:
            line.append(f" {blocks}")
        elif blocks:
            line.append(f"\n{'':12} blocks {blocks}")
        out.print(line, soft_wrap=True)

    def _input(self, ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return " ".join(map(str, ids[:6])) + ("…" if len(ids) > 6 else "")
        text = self.tokenizer.decode(list(ids[:32]))
        return repr(text) + ("…" if len(ids) > 32 else "")

    def _spans(self, by_group: dict[str, list[tuple[int, int]]]) -> str:
        """Equal groups once, different ones in the order of the legend."""
        texts = list(dict.fromkeys(spans_text(s) for s in by_group.values()))
        return "|".join(texts) or "–"

    def _blocks(self, by_group: dict[str, list[int]]) -> str:
        return " | ".join(_numbers(ids) for ids in by_group.values())


def spans_text(spans: Sequence[tuple[int, int]]) -> str:
    """`0:4,20:32`; – for none."""
    return ",".join(f"{a}:{b}" for a, b in spans) or "–"


def _numbers(ids: Sequence[int]) -> str:
    """`0-3 7 · 9`: runs of consecutive ids; · where a block was given back."""
    parts: list[list[int]] = []
    for i in ids:
        if parts and i >= 0 and parts[-1][1] + 1 == i and parts[-1][0] >= 0:
            parts[-1][1] = i
        elif not (parts and i < 0 and parts[-1][0] < 0):
            parts.append([i, i])
    return " ".join("·" if a < 0 else str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _cell(text: str, width: int, side: str) -> str:
    """Padded by what a terminal shows; cut with … only where it is prose."""
    if side == ">":
        return " " * max(0, width - cell_len(text)) + text
    if cell_len(text) > width:
        return set_cell_size(text, width - 1) + "…"
    return set_cell_size(text, width)
