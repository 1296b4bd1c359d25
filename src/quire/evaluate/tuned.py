"""What `quire tune` leaves: a configuration file with the evidence in it, and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quire.evaluate.choice import Candidate, Tuned
from quire.evaluate.metrics import Estimate
from quire.evaluate.page import document, layer_field, table
from quire.evaluate.plots import Point, colour, front, scatter

__all__ = ["summary", "tuned_page", "tuned_toml"]

_KINDS = ("uniform", "map", "policy")


def summary(found: Tuned) -> list[str]:
    """The outcome in a few lines."""
    c, goal = found.chosen, found.goal
    assert c.agreement is not None
    assert c.kl is not None
    share = c.n_bytes / found.exact_bytes
    lines = [
        f"{c.label}: {c.n_bytes:,} bytes for {goal.users:,} x {goal.context:,} tokens, {c.peak_bytes:,} at the peak",
        f"{share:.1%} of the exact cache's {found.exact_bytes:,}; budget {found.budget:,}",
        f"held out, {found.held_tokens:,} tokens in {found.judged_in}: top-1 agreement {_interval(c.agreement, '.4f')}",
        f"    KL {_interval(c.kl, '.2e')}",
    ]
    if found.served is not None:
        lines.append(
            f"as it is served, the model's own rounding included: agreement {_interval(found.served[0], '.4f')}, "
            f"KL {_interval(found.served[1], '.2e')}"
        )
    lines.append(
        f"the exact cache there with its sums in another order: agreement {found.floor[0]:.4f}, "
        f"KL {found.floor[1]:.2e}"
    )
    if found.gain is not None and found.uniform is not None:
        lines.append(
            f"KL less than the best uniform recipe's ({found.uniform.label}): {_interval(found.gain, '+.2e')}, paired"
        )
    elif found.uniform is None:
        lines.append("no uniform recipe within the budget was measured")
    else:
        lines.append("the best uniform recipe is the choice")
    if not found.meets:
        lines.append(
            f"nothing that was measured meets the floor of {goal.quality:g}: the best within the budget has "
            f"{c.agreement.value:.4f}"
        )
    return lines


def tuned_toml(found: Tuned, name: str, choices: Mapping[str, Any]) -> str:
    """The file that `--config` takes.

    Args:
        name: of the file itself: a map lies in it.
        choices: further keys of the top, as model and dtype.
    """
    c = found.chosen
    kv = f"map:{name}" if c.map else c.kv
    head = {**choices, "kv": kv, "keep": c.keep}
    lines = ["# written by quire tune; run, serve, chat and attach take it as their config"]
    lines += [f"{key} = {_toml(value)}" for key, value in head.items()]
    if c.map:
        lines += ["", c.map.rstrip()]
    goal = found.goal
    facts = {
        "meets_floor": found.meets,
        "quality": goal.quality,
        "budget_bytes": found.budget,
        "bytes": c.n_bytes,
        "peak_bytes": c.peak_bytes,
        "exact_bytes": found.exact_bytes,
        "context": goal.context,
        "users": goal.users,
        "held_out_tokens": found.held_tokens,
        "agreement": _list(c.agreement),
        "kl": _list(c.kl),
        "judged_in": found.judged_in,
        "rounding_agreement": found.floor[0],
        "rounding_kl": found.floor[1],
        "weights": found.digest,
        "injected": found.injected,
        "seed": found.seed,
    }
    if found.served is not None:
        facts |= {"served_agreement": _list(found.served[0]), "served_kl": _list(found.served[1])}
    if found.step_bytes is not None:
        facts["peak_bytes_in_large_steps"] = found.step_bytes
    if found.uniform is not None:
        facts["best_uniform"] = found.uniform.label
    if found.gain is not None:
        facts["kl_less_than_uniform"] = _list(found.gain)
    lines += ["", "[tune]  # figures with their 95 % interval: [value, low, high]"]
    lines += [f"{key} = {_toml(value)}" for key, value in facts.items()]
    for other in found.candidates:
        lines += ["", "[[tune.measured]]"]
        figures = {
            "kv": other.label,
            "bytes": other.n_bytes,
            "peak_bytes": other.peak_bytes,
            "agreement": _list(other.agreement),
            "kl": _list(other.kl),
            "why_not": other.why,
        }
        lines += [f"{key} = {_toml(value)}" for key, value in figures.items() if value != ""]
    for what, why in found.rejected:
        lines += ["", "[[tune.rejected]]", f"what = {_toml(what)}", f"why = {_toml(why)}"]
    return "\n".join(lines) + "\n"


def tuned_page(found: Tuned, model: str) -> str:
    """The evidence as a page: the front on the text that chose, layers, and all that was measured or not."""
    drawn = [c for c in found.candidates if c.kl is not None]
    points = [_point(c) for c in drawn]
    best = {p.label for p in front(points)}
    words = [f"<p>{line}</p>" for line in map(_escaped, summary(found))]
    rows = [
        (
            "configuration",
            "kind",
            "bytes",
            "at the peak",
            "of exact",
            "KL",
            "agreement",
            "on the front",
            "why not",
        )
    ]
    rows += [
        (
            c.label,
            c.kind,
            f"{c.n_bytes:,}",
            f"{c.peak_bytes:,}",
            f"{c.n_bytes / found.exact_bytes:.1%}",
            _interval(c.kl, ".2e"),
            _interval(c.agreement, ".4f"),
            "yes" if c.label in best else "",
            c.why or "chosen",
        )
        for c in sorted(drawn, key=lambda c: c.n_bytes)
    ]
    parts = [
        *words,
        "<h2>Quality over bytes</h2>",
        "<p>All configurations that were measured as wholes, on the text that chose among them.</p>",
        scatter(
            points,
            x=f"bytes of {found.goal.users:,} x {found.goal.context:,} tokens",
            y="KL divergence, nats",
            log=all(p.y > 0 for p in points),
            mark=(float(found.budget), "budget"),
        ),
        table(rows),
        *layer_field(found.layers),
        "<h2>The choice, layer by layer</h2>",
        table([("layer", "recipe"), *_by_layer(found)]),
    ]
    if found.rejected:
        parts += ["<h2>Not measured</h2>", table([("what", "why"), *found.rejected])]
    subtitle = f"weights {found.digest[:16]}, seed {found.seed}"
    return document(
        f"quire tune: {model}", subtitle + ", outliers injected" * found.injected, parts
    )


def _by_layer(found: Tuned) -> Sequence[tuple[str, str]]:
    """Layers, or KV heads as LAYER.HEAD, in order."""
    return [*found.chosen.recipes.items()] or [("all", found.chosen.label)]


def _point(c: Candidate) -> Point:
    assert c.kl is not None
    tint = colour(_KINDS.index(c.kind))
    return Point(c.label, float(c.n_bytes), c.kl.value, c.kl.low, c.kl.high, tint)


def _interval(e: Estimate | None, form: str) -> str:
    if e is None:
        return "–"
    if e.low is None or e.high is None:
        return f"{e.value:{form}}"
    return f"{e.value:{form}} ({e.low:{form}} to {e.high:{form}})"


def _list(e: Estimate | None) -> list[float]:
    return [] if e is None else [x for x in (e.value, e.low, e.high) if x is not None]


def _toml(value: Any) -> str:
    """Of a string, a number, a Boolean or a list of numbers; TOML writes these as JSON does."""
    return json.dumps(value, ensure_ascii=False)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
