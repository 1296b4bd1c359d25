"""What `tune` tries: uniform recipes, and mixes of recipes by layer and tensor, that fit a budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence

from quire.errors import ConfigError
from quire.evaluate.choice import Candidate
from quire.evaluate.journal import digest_of
from quire.evaluate.report import Layer
from quire.evaluate.search import best_mix, bytes_of, forms_of, map_text
from quire.evaluate.trial import Trial

__all__ = ["candidates"]

WINDOWS = ("", "sinks=4", "sinks=4;window=64")
"""Raw tokens beside a codec's own that are tried with every recipe."""
MAX_UNIFORM = 12
"""Uniform recipes that are measured: those of most bytes within the budget."""


def candidates(
    trial: Trial,
    recipes: Sequence[str],
    layers: Sequence[Layer],
    rounding: float,
    budget: int,
    rejected: list[tuple[str, str]],
) -> list[Candidate]:
    """Uniform recipes and mixes that fit the budget, no two alike."""
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
                uniform.append(Candidate(kv, "full", "uniform", size))
    uniform.sort(key=lambda c: -c.n_bytes)
    why = f"not measured: {MAX_UNIFORM} others use more of the budget"
    rejected += [(c.kv, why) for c in uniform[MAX_UNIFORM:]]
    found = uniform[:MAX_UNIFORM]
    known = {c.kv for c in found}
    for options in WINDOWS:
        # what any change of the arithmetic costs is no layer's own, so one search goes without it
        for taken_off in (rounding, 0.0):
            mixed = _mix(trial, recipes, layers, taken_off, options, budget)
            if mixed is not None and mixed.kv not in known:
                known.add(mixed.kv)
                mixed.number = 1 + sum(c.kind == "map" for c in found)
                found.append(mixed)
    return found


def _mix(
    trial: Trial,
    recipes: Sequence[str],
    layers: Sequence[Layer],
    taken_off: float,
    options: str,
    budget: int,
) -> Candidate | None:
    """The best mix by the losses of layers alone, as a map."""
    loss = {
        (x.kv, x.layer, x.field): max(0.0, x.kl - taken_off) + 1e-3 * max(0.0, x.kl) for x in layers
    }
    forms = [
        forms_of(
            x,
            recipes,
            loss,
            options,
            dtype=trial.dtype,
            block_tokens=trial.block_tokens,
            context=trial.goal.context,
        )
        for x in trial.kv_layers
    ]
    states = trial.bytes("auto") // trial.goal.users - sum(
        bytes_of(
            [x],
            "auto",
            dtype=trial.dtype,
            block_tokens=trial.block_tokens,
            context=trial.goal.context,
        )
        for x in trial.kv_layers
    )  # of recurrent layers, which no recipe changes
    found = best_mix(forms, budget // trial.goal.users - max(0, states))
    if found is None:
        return None
    by_layer = {x.layer: r for x, r in zip(trial.kv_layers, found.recipes, strict=True)}
    if len(set(found.recipes)) == 1:
        kv = found.recipes[0]
        return Candidate(kv, "full", "uniform", trial.bytes(kv))
    text = map_text(trial.layers, by_layer, trial.digest)
    trial.folder.mkdir(parents=True, exist_ok=True)
    file = trial.folder / f"{digest_of(text)}.toml"
    # injected weights have another digest, so what is measured names none
    file.write_text(map_text(trial.layers, by_layer, ""), encoding="utf-8")
    kv = f"map:{file}"
    size = trial.bytes(kv)
    if size > budget:
        return None
    return Candidate(kv, "full", "map", size, text, by_layer, options=options)
