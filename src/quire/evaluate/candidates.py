"""What `tune` tries: uniform recipes, and mixes of recipes by layer, head and tensor, that fit a budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire.errors import ConfigError
from quire.evaluate.choice import Candidate
from quire.evaluate.heads import Item, by_head, contenders, head_items, items_of, loss_of
from quire.evaluate.report import Layer
from quire.evaluate.search import Form, Mix, best_mix, bytes_of, forms_of, map_text
from quire.evaluate.trial import Trial

__all__ = ["candidates", "heads_alone"]

WINDOWS = ("", "sinks=4", "sinks=4;window=64")
"""Raw tokens beside a codec's own that are tried with every recipe."""
MAX_UNIFORM = 12
"""Uniform recipes that are measured: those of most bytes within the budget."""
AROUND = (0.85, 1.0, 1.2)
"""Shares of the budget: what the best mixes there use is worth measuring head by head."""


def candidates(
    trial: Trial,
    recipes: Sequence[str],
    layers: Sequence[Layer],
    rounding: float,
    budget: int,
    rejected: list[tuple[str, str]],
    heads: Sequence[Layer] = (),
) -> list[Candidate]:
    """Uniform recipes and mixes that fit the budget, no two alike.

    Args:
        rounding: KL of the exact cache with its sums in another order.
        heads: what single KV heads cost, of layers where they were measured.
    """
    uniform: list[Candidate] = []
    for recipe in ["auto", *recipes]:
        for options in WINDOWS if recipe != "auto" else ("",):
            kv = f"{recipe};{options}" if options else recipe
            try:
                size = trial.bytes(kv)
            except ConfigError as e:
                rejected.append((kv, str(e)))
                continue
            if size > budget:
                rejected.append(
                    (kv, f"takes {size:,} bytes, {size / budget - 1:+.1%} of the budget")
                )
            else:
                uniform.append(Candidate(kv, "full", "uniform", size, size))
    uniform.sort(key=lambda c: -c.n_bytes)
    why = f"not measured: {MAX_UNIFORM} others use more of the budget"
    rejected += [(c.kv, why) for c in uniform[MAX_UNIFORM:]]
    found = uniform[:MAX_UNIFORM]
    known = {c.kv for c in found}
    whole = items_of(trial.kv_layers)
    split = head_items(trial.kv_layers, heads)
    for options in WINDOWS:
        for items in [whole] if len(split) == len(whole) else [whole, split]:
            # what any change of the arithmetic costs is no layer's own, so one search goes without it
            for taken_off in (rounding, 0.0):
                mix = _mix(trial, recipes, (layers, heads), items, taken_off, options, budget)
                mixed = None if mix is None else _candidate(trial, items, mix, options, budget)
                if mixed is not None and mixed.kv not in known:
                    known.add(mixed.kv)
                    mixed.number = 1 + sum(c.kind == "map" for c in found)
                    found.append(mixed)
    return found


def heads_alone(
    trial: Trial,
    recipes: Sequence[str],
    layers: Sequence[Layer],
    rounding: float,
    budget: int,
    texts: list[Any],
) -> list[Layer]:
    """What single heads cost under the codecs that contend in their layers at about this budget."""
    items = items_of(trial.kv_layers)
    mixes = []
    for share in AROUND:
        forms = _forms(trial, recipes, (layers, ()), items, rounding, "")
        found = best_mix(forms, int(share * budget) // trial.goal.users - _states(trial))
        if found is not None:
            by_recipe: list[dict[str, Form]] = [{f.recipe: f for f in some} for some in forms]
            mixes.append([of[r] for of, r in zip(by_recipe, found.recipes, strict=True)])
    return by_head(trial, contenders(trial.kv_layers, mixes), texts)


def _states(trial: Trial) -> int:
    """Bytes of a sequence's recurrent layers, which no recipe changes."""
    plain = sum(
        bytes_of(
            [x],
            "auto",
            dtype=trial.dtype,
            block_tokens=trial.block_tokens,
            context=trial.goal.context,
        )
        for x in trial.kv_layers
    )
    return max(0, trial.bytes("auto") // trial.goal.users - plain)


def _forms(
    trial: Trial,
    recipes: Sequence[str],
    measured: tuple[Sequence[Layer], Sequence[Layer]],
    items: Sequence[Item],
    taken_off: float,
    options: str,
) -> list[list[Form]]:
    """What each item may be, by the losses of layers and heads alone."""
    return [
        forms_of(
            item.shape,
            recipes,
            loss_of(item, *measured, taken_off),
            options,
            dtype=trial.dtype,
            block_tokens=trial.block_tokens,
            context=trial.goal.context,
        )
        for item in items
    ]


def _mix(
    trial: Trial,
    recipes: Sequence[str],
    measured: tuple[Sequence[Layer], Sequence[Layer]],
    items: Sequence[Item],
    taken_off: float,
    options: str,
    budget: int,
) -> Mix | None:
    """The best mix within the budget."""
    forms = _forms(trial, recipes, measured, items, taken_off, options)
    return best_mix(forms, budget // trial.goal.users - _states(trial))


def _candidate(
    trial: Trial, items: Sequence[Item], mix: Mix, options: str, budget: int
) -> Candidate | None:
    """A mix as a map, or as the one recipe that it has; None where the whole is over the budget."""
    if len(set(mix.recipes)) == 1:
        kv = mix.recipes[0]
        size = trial.bytes(kv)
        return Candidate(kv, "full", "uniform", size, size)
    by_layer: dict[int, str | tuple[str, ...]] = {}
    named: dict[str, str] = {}
    for item, recipe in zip(items, mix.recipes, strict=True):
        n = item.layer.layer
        named[str(n) if item.head is None else f"{n}.{item.head}"] = recipe
        if item.head is None:
            by_layer[n] = recipe
        else:
            by_layer[n] = (*by_layer.get(n, ()), recipe)
    text = map_text(trial.layers, by_layer, trial.digest)
    # injected weights have another digest, so what is measured names none
    kv = trial.map_file(map_text(trial.layers, by_layer, ""))
    size = trial.bytes(kv)
    if size > budget:
        return None
    return Candidate(kv, "full", "map", size, size, text, named, options=options)
