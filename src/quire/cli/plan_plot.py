"""`quire plan --plot`: memory over context for several recipes against the device's line, drawn by matplotlib."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.plan.demand import Setup

__all__ = ["curves", "draw"]

FORMS = (".png", ".svg", ".html")
_RECIPES = ("auto", "int8", "int4", "kivi:bits=2")
_GIB = 1 << 30
_POINTS = 64
_RANGE = 256
"""The longest context drawn over the shortest."""


def draw(path: Path, setups: Sequence[Setup], document: Mapping[str, Any]) -> None:
    """Writes the picture.

    Args:
        path: its suffix says how: .png, .svg, or .html, which holds the drawing and all figures.
        setups: one per recipe asked for; of a single one the usual recipes are drawn beside it.
        document: of the first, for the title and for .html.

    Raises:
        ConfigError: another suffix; no matplotlib; a file that cannot be written.
    """
    if path.suffix.lower() not in FORMS:
        raise ConfigError(f"--plot {path}: the name must end in {', '.join(FORMS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'quire[plot]'"
        ) from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    _fill(figure.add_subplot(), setups, document)
    try:
        if path.suffix.lower() == ".html":
            path.write_text(_page(figure, document), encoding="utf-8")
        else:
            figure.savefig(path, dpi=150)
    except OSError as e:
        raise ConfigError(f"--plot {path}: {e.strerror or e}") from e


def curves(setups: Sequence[Setup], context: int) -> dict[str, list[tuple[int, int]]]:
    """Recipe to (context, bytes that one user's cache takes on all ranks), from a 32nd to eight times."""
    from quire.plan.demand import Demand

    if len(setups) == 1:
        asked = setups[0].config.kv
        names = dict.fromkeys((asked, *_RECIPES))
        setups = [replace(setups[0], config=replace(setups[0].config, kv=n)) for n in names]
    points = sorted(
        {max(1, round(8 * context * _RANGE ** (i / _POINTS - 1))) for i in range(_POINTS + 1)}
    )
    out = {}
    for setup in setups:
        try:
            demand = Demand(setup)
        except ConfigError:
            continue  # this codec cannot serve the model
        out[setup.config.kv] = [(n, demand.sequence_bytes(n) * setup.ranks) for n in points]
    return out


def _fill(axes: Any, setups: Sequence[Setup], document: Mapping[str, Any]) -> None:
    users, weights = document["users"], document["weight_bytes"] or 0
    for name, points in curves(setups, document["context"]).items():
        xs = [n for n, _ in points]
        axes.plot(xs, [(weights + users * b) / _GIB for _, b in points], label=f"--kv {name}")
    if weights:
        axes.axhline(weights / _GIB, color="0.5", linestyle=":", label="weights alone")
    if document["device_bytes"]:
        room = (weights + document["kv_room_bytes"]) / _GIB
        whole = document["device_bytes"] / _GIB
        axes.axhline(whole, color="black", label=_device(document))
        axes.axhline(room, color="black", linestyle="--", label="less its allowance")
    trained = document["max_trained_context"]
    if trained and document["context"] / 32 <= trained < 8 * document["context"]:
        axes.axvline(trained, color="0.8", zorder=0, label=f"trained context {trained:,}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    if document["device_bytes"]:  # what is far above the device's line needs no room
        top = max(document["device_bytes"], weights + document["kv_bytes"])
        axes.set_ylim(top=1.4 * top / _GIB)
    axes.set_xlabel("cached tokens per user")
    axes.set_ylabel("GiB: weights and cache")
    axes.xaxis.set_major_formatter(lambda x, _: _tokens(x))
    axes.set_title(f"{document['model']}, {users:,} user{'s' * (users != 1)}")
    axes.grid(visible=True, color="0.93")
    axes.figure.legend(fontsize="small", frameon=False, loc="outside lower center", ncols=4)


def _device(document: Mapping[str, Any]) -> str:
    """`4 x h100: 320 GiB`, or only the size where the device is no more than one."""
    name, whole = str(document["device"]), f"{document['device_bytes'] / _GIB:,.4g} GiB"
    many = f"{document['ranks']} x " if document["ranks"] > 1 else ""
    return f"{many}{name}" + ("" if name[0].isdigit() and not many else f": {whole}")


def _tokens(x: float) -> str:
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if x >= size:
            return f"{x / size:g}{unit}"
    return f"{x:g}"


def _page(figure: Any, document: Mapping[str, Any]) -> str:
    """One file with nothing to fetch: the drawing as SVG, the figures as a table."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    rows = "\n".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(_cell(value))}</td></tr>"
        for key, value in document.items()
        if key not in ("groups", "bytes_per_token_per_layer")
    )
    title = html.escape(f"quire plan: {document['model']}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        "<style>body{font:15px sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "svg{max-width:100%;height:auto}th{text-align:left;padding-right:2rem;font-weight:normal;color:#555}"
        "td{font-family:monospace;overflow-wrap:anywhere}</style>\n"
        f"<h1>{title}</h1>\n{svg}\n<table>\n{rows}\n</table></html>\n"
    )


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)
