"""Panel 3: the formula for the cache's size beside the bytes that the pool really handed out."""

from __future__ import annotations

import math
from typing import Any

from quire.cli.report import bytes_text
from quire.cli.tour.page import Page
from quire.cli.tour.stage import PROMPT, Stage
from quire.engine.runner import Item
from quire.spec import DTYPE_BYTES, CacheGroup, Field

TITLE = "What a token takes: the formula and the pool"

WORDS = (
    "What a token leaves in the cache follows from the model's shape. The pool hands memory out in whole blocks, so it "
    "holds more than the formula says, by the places of the last, open block that are still empty."
)


def run(stage: Stage) -> dict[str, Any]:
    """A text of several lengths, each computed, measured and released."""
    page = stage.page
    if page is not None:
        page.words(WORDS)
        page.line()
    size = stage.options.block_tokens
    lengths = sorted(
        {n for n in (1, size, size + 1, 7 * size // 2, 16 * size) if 0 < n <= stage.room}
    )
    with stage.opened() as runner, stage.working("filling the cache …"):
        layout = runner.bridge.layout
        terms = [_term(g, layout.fields_of(g)) for g in layout.spec.groups]
        rows = [_measure(runner, terms, stage.ids, n) for n in lengths]
    weights = sum(p.numel() * p.element_size() for p in stage.loaded.model.parameters())
    per_token = sum(t["bytes"] for t in terms if t["per"] == "token")
    found = {
        "terms": terms,
        "bytes_per_token": per_token,
        "weight_bytes": weights,
        "rows": rows,
        "more": stage.command("run", PROMPT, "--max-tokens", 100, "--ignore-eos"),
    }
    if page is not None:
        _show(page, found)
    return found


def _term(group: CacheGroup, fields: tuple[Field, ...]) -> dict[str, Any]:
    """The formula of one group, from the model's own fields."""
    heads = len(group.coords) / len(group.layers)
    elements = [math.prod(f.shape) for f in fields]
    width = DTYPE_BYTES[fields[0].dtype]
    return {
        "group": group.name,
        "span": type(group.span).__name__.lower(),
        "per": "sequence" if group.recurrent else "token",
        "layers": len(group.layers),
        "heads": heads,
        "fields": {f.name: n for f, n in zip(fields, elements, strict=True)},
        "element_bytes": width,
        "bytes": len(group.coords)
        * sum(n * DTYPE_BYTES[f.dtype] for f, n in zip(fields, elements, strict=True)),
    }


def _measure(runner: Any, terms: list[dict[str, Any]], ids: list[int], n: int) -> dict[str, Any]:
    """Computes `n` tokens and asks the pool."""
    store = runner.bridge.store
    before = store.usage().held_bytes
    table = runner.open()
    try:
        table.append(n)
        runner.forward([Item(table, ids, 0, n, 0)])
        table.commit()
        held = store.usage().held_bytes - before
        kept = [1 if c.group.recurrent else len(c.positions(n)) for c in table.chains]
        formula = sum(k * t["bytes"] for k, t in zip(kept, terms, strict=True))
        open_bytes = held - table.used_bytes()
        blocks = sum(c.held for c in table.chains)
        places = sum(
            c.held * c.group.block_tokens - k
            for c, k in zip(table.chains, kept, strict=True)
            if not c.group.recurrent
        )
    finally:
        table.release()
    return {
        "tokens": n,
        "formula_bytes": formula,
        "blocks": blocks,
        "held_bytes": held,
        "open_bytes": open_bytes,
        "empty_places": places,
        "other_bytes": held - formula - open_bytes,
        "left_bytes": store.usage().held_bytes - before,
    }


def _show(page: Page, found: dict[str, Any]) -> None:
    for t in found["terms"]:
        page.words(f"{_formula_text(t)} = {t['bytes']:,} bytes per {t['per']}", "bold")
    page.line()
    rows = [
        (
            f"{r['tokens']:,}",
            f"{r['formula_bytes']:,}",
            f"{r['blocks']:,}",
            f"{r['held_bytes']:,}",
            f"{r['held_bytes'] - r['formula_bytes']:,}",
            f"{r['empty_places']:,}",
        )
        for r in found["rows"]
    ]
    page.table(
        ("tokens", "formula, bytes", "blocks", "held by the pool", "difference", "empty places"),
        rows,
    )
    page.line()
    other = max(r["other_bytes"] for r in found["rows"])
    if other:
        page.words(f"Beside the empty places, alignment takes up to {bytes_text(other)}.")
    if found["bytes_per_token"]:
        even = -(-found["weight_bytes"] // found["bytes_per_token"])
        page.words(
            f"The weights take {bytes_text(found['weight_bytes'])}: by the formula, as much as the cache of {even:,} "
            "tokens, be they one user's or many users' together."
        )


def _formula_text(t: dict[str, Any]) -> str:
    """`6 layers × 2 KV heads × 64 channels × 2 (k, v) × 4 bytes`."""
    sizes = list(t["fields"].values())
    layers = f"{t['layers']} layer{'s' * (t['layers'] != 1)}"
    if t["per"] == "sequence":
        return f"{layers} × ({' + '.join(f'{n:,}' for n in sizes)}) elements of state × {t['element_bytes']} bytes"
    if t["span"] != "full":
        layers += f" ({t['span']})"
    heads = f"{t['heads']:g} KV head{'s' * (t['heads'] != 1)}"
    if list(t["fields"]) == ["k", "v"] and len(set(sizes)) == 1:
        inner = f"{sizes[0]} channels × 2 (k, v)"
    else:
        inner = "(" + " + ".join(f"{n} {name}" for name, n in t["fields"].items()) + ")"
    return f"{layers} × {heads} × {inner} × {t['element_bytes']} bytes"
