"""Panel 5: every technique that is installed: its bytes, its speed, and how far it is from the exact cache.

Nothing is listed here: codecs are the files of `quire.codecs` and the entry points of other packages, policies what
`quire.retention` has. A codec whose parameters matter names the recipes that are worth a row:

    shown: ClassVar[tuple[str, ...]] = ("kivi:bits=4", "kivi:bits=2,residual=128")     default: its bare name
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

from quire.cli.tour.page import Page
from quire.cli.tour.stage import Stage
from quire.codecs import recipe
from quire.engine.runner import Item
from quire.errors import CapacityError, ConfigError, RequestError
from quire.spec import DTYPE_BYTES

TITLE = "What each technique saves, and what it costs"

Technique = tuple[str, str]
"""(kv, keep)"""

EXACT: Technique = ("auto", "full")

WIDE = 100
"""Columns from which on the interval has room."""

REFUSALS = (ConfigError, CapacityError, RequestError)
""""Not with this model": said in a line where a row would be."""


def run(stage: Stage) -> dict[str, Any]:
    """A row per technique, measured one after the other."""
    page, pace = stage.page, stage.pace
    length = min(pace.window_tokens, stage.room)
    if page is not None:
        page.words(
            f"Scored on {length - 1:,} tokens of Quire's own source; every prediction reads the cache back, as in "
            "decoding. KL: how far the predictions lie from the exact cache's, in nats, 0 for the same. Same top: how "
            "often the most likely token is the same one."
        )
        page.line()
    chosen, wider, refused = techniques(stage.dtype)
    with stage.working("measuring techniques …") as status:
        speeds = _speeds(stage, [EXACT, *chosen], refused)
        rows: list[dict[str, Any]] = []
        left_out: list[str] = []
        began, limit_s = time.monotonic(), stage.limit_s(pace.techniques_s)
        for i, (technique, speed) in enumerate(speeds.items()):
            name = name_of(technique)
            if rows and time.monotonic() - began > limit_s:
                left_out.append(name)
                continue
            if status is not None:
                status.update(f"{name}: {i + 1} of {len(speeds)} techniques")
            try:
                rows.append({"technique": name} | speed | _fidelity(stage, technique, length))
            except REFUSALS as e:
                refused.append((name, " ".join(str(e).split())))
    if not rows:
        raise ConfigError("; ".join(f"{name}: {reason}" for name, reason in refused))
    rows.sort(key=lambda r: ((r["kv"], r["keep"]) != EXACT, -r["bytes_per_token"]))
    recipes = [r["kv"] for r in rows if r["keep"] == "full"]
    found = {
        "tokens": length - 1,
        "rows": rows,
        "refused": [{"technique": name, "reason": reason} for name, reason in refused],
        "wider_than_the_model": wider,
        "left_out": left_out,
        "more": stage.command(
            *("eval", "--kv", ",".join(recipes), "--task", "token-kv"),
            *("--length", min(256, stage.room), "--examples", 5),
        ),
    }
    if page is not None:
        _show(page, found, stage)
    return found


def techniques(dtype: str) -> tuple[list[Technique], list[str], list[tuple[str, str]]]:
    """What is worth a row for a model that computes in `dtype`.

    Returns:
        Techniques beside the exact one, plain codecs last, since time may run out; plain codecs that hold the same
        numbers in more bytes; what cannot be loaded, with the reason.
    """
    chosen: list[Technique] = []
    plain: list[Technique] = []
    wider: list[str] = []
    broken: list[tuple[str, str]] = []
    for name in recipe.available():
        if name == recipe.PLAIN_OF_DTYPE.get(dtype):
            continue
        try:
            codec = recipe.codec_class(name)
        except (ImportError, AttributeError) as e:
            broken.append((name, f"cannot be imported: {' '.join(str(e).split())}"))
            continue
        own = getattr(codec, "dtype", dtype) if getattr(codec, "plain", False) else dtype
        if DTYPE_BYTES[own] > DTYPE_BYTES[dtype]:
            wider.append(name)
        else:
            rows = [(text, "full") for text in getattr(codec, "shown", (name,))]
            (plain if getattr(codec, "plain", False) else chosen).extend(rows)
    chosen += plain
    chosen += [("auto", policy) for policy in _policies()]
    return chosen, wider, broken


def _policies() -> tuple[str, ...]:
    """The retention policies that name themselves as worth a row (`shown`, as codecs do)."""
    return tuple(importlib.import_module("quire.retention").shown())


def name_of(technique: Technique) -> str:
    """As a user would ask for it, shortly: what is as usual is not said."""
    kv, keep = technique
    if keep == "full":
        return kv
    return keep if kv == "auto" else f"{kv} {keep}"


def _speeds(
    stage: Stage, wanted: Sequence[Technique], refused: list[tuple[str, str]]
) -> dict[Technique, dict[str, Any]]:
    """Decodes with all techniques in turn, a step each, so that a machine that is busy for a while slows all of them.

    What cannot be opened, or computed, is put into `refused`.
    """
    from quire.evaluate.decode import twin
    from quire.models.memory import arena_bytes
    from quire.models.open import open_runner

    model, o, pace = stage.loaded.model, stage.options, stage.pace
    context = max(1, min(pace.speed_tokens, stage.room - pace.speed_steps))
    share = arena_bytes(o.memory, model.device) // len(wanted)
    cells: dict[Technique, _Cell] = {}
    try:
        for technique in wanted:
            try:
                runner = open_runner(
                    twin(model),
                    kv=technique[0],
                    keep=technique[1],
                    memory=share,
                    block_tokens=o.block_tokens,
                    attention=o.attention,
                )
                cells[technique] = cell = _Cell(runner, stage.ids)
                cell.step(context)
                cell.seconds.clear()
            except REFUSALS as e:
                cells.pop(technique, None)
                refused.append((name_of(technique), " ".join(str(e).split())))
        began, limit_s = time.monotonic(), stage.limit_s(pace.speed_s)
        for i in range(pace.speed_steps):
            if i and time.monotonic() - began > limit_s:
                break
            for cell in cells.values():
                cell.step(1)
        return {t: cell.figures(t, context) for t, cell in cells.items()}
    finally:
        for cell in cells.values():
            cell.close()


class _Cell:
    """One technique at work on one sequence."""

    def __init__(self, runner: Any, ids: list[int]) -> None:
        self.runner = runner
        self.ids = ids
        self.table = runner.open()
        self.seconds: list[float] = []

    def step(self, n_tokens: int) -> None:
        """Computes so many more tokens."""
        start = self.table.length
        began = time.perf_counter()
        self.table.append(n_tokens)
        logits = self.runner.forward([Item(self.table, self.ids, start, start + n_tokens, 1)])
        int(logits[-1].argmax())  # waits for a device
        self.table.commit()
        self.seconds.append(time.perf_counter() - began)

    def figures(self, technique: Technique, context: int) -> dict[str, Any]:
        """What the steps took."""
        groups = self.runner.bridge.layout.spec.groups
        raw = {g.raw for g in groups}
        return {
            "kv": technique[0],
            "keep": technique[1],
            "codec": ", ".join(dict.fromkeys(g.codec for g in groups if g.name not in raw)),
            "tokens_per_s": 1 / statistics.median(self.seconds),
            "context": context,
        }

    def close(self) -> None:
        """Gives everything back."""
        self.table.release()
        self.runner.bridge.close()


def _fidelity(stage: Stage, technique: Technique, length: int) -> dict[str, Any]:
    """Bytes and distance from the exact cache, both as decoding would meet them."""
    from quire.evaluate.run import evaluate

    o = stage.options
    found = evaluate(
        stage.loaded.model,
        stage.loaded.tokenizer,
        [technique],
        text=stage.text_ids,
        length_tokens=length,
        max_tokens=length,
        block_tokens=o.block_tokens,
        memory=o.memory,
        attention=o.attention,
    )
    by_metric = {r.metric: r for r in found.rows}
    kl = by_metric["kl"]
    return {
        "bytes_per_token": kl.bytes_per_token,
        "exact_bytes_per_token": found.full_bytes_per_token["ppl"],
        "kl": kl.value,
        "kl_low": kl.low,
        "kl_high": kl.high,
        "agreement": by_metric["agreement"].value,
        "dnll": by_metric["dnll"].value,
    }


def _show(page: Page, found: dict[str, Any], stage: Stage) -> None:
    wide = page.width >= WIDE
    interval = ["KL, 95 % interval"] * wide
    rows = []
    for r in found["rows"]:
        exact = (r["kv"], r["keep"]) == EXACT
        low, high = r["kl_low"], r["kl_high"]
        between = "–" if exact or low is None else f"{_small(low)} to {_small(high)}"
        rows.append(
            (
                f"{r['technique']} ({r['codec']}, exact)" if exact else r["technique"],
                f"{r['bytes_per_token']:,.0f}",
                f"{100 * r['bytes_per_token'] / r['exact_bytes_per_token']:.1f} %",
                f"{r['tokens_per_s']:,.0f}",
                _small(r["kl"]),
                *[between] * wide,
                f"{100 * r['agreement']:.2f} %",
            )
        )
    head = ("technique", "bytes/token", "of exact", "tokens/s", "KL", *interval, "same top")
    page.table(head, rows)
    page.line()
    for r in found["refused"]:
        page.words(f"{r['technique']}: not for this model: {r['reason']}", "yellow")
    if found["wider_than_the_model"]:
        wider = ", ".join(found["wider_than_the_model"])
        page.words(
            f"Without a row: {wider}: the same numbers in more bytes than the model's own {stage.dtype}.",
            "dim",
        )
    if found["left_out"]:
        page.words(f"Left out to save time: {', '.join(found['left_out'])}.", "dim")
    context = ", ".join(sorted({f"{r['context']:,}" for r in found["rows"]}))
    page.words(
        f"Bytes are all that the cache held at the text's end. Tokens per second: one request, decoding behind "
        f"{context} tokens. Weights {stage.loaded.digest[:16]}.",
        "dim",
    )


def _small(x: float) -> str:
    if x == 0:
        return "0"
    return "<0.000001" if abs(x) < 1e-6 else f"{x:.6f}" if x < 0.01 else f"{x:.4f}"
