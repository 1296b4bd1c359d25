"""What each layer costs by itself: its keys or its values coded, everything else exact.

kv="int4", layer 3, keys:    k=int4;skip_layers=0,1,2,4,5
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quire.codecs.recipe import Recipe, parse_recipe, plain_codec
from quire.errors import ConfigError
from quire.evaluate.decode import twin
from quire.evaluate.journal import Journal
from quire.evaluate.report import Layer
from quire.evaluate.run import evaluate
from quire.models.open import open_runner

__all__ = ["LAYER_TOKENS", "alone", "fields_of", "sensitivity"]

LAYER_TOKENS = 4096
"""Of a text that is enough to tell layers apart: the differences are paired."""
AT_ONCE = 8
"""Caches that score a text side by side."""


def fields_of(model: Any) -> dict[int, tuple[str, ...]]:
    """Layer to the fields that it caches per token, of the layers that have any."""
    runner = open_runner(twin(model), kv="auto", memory=1 << 26, weights="plain")
    try:
        layout = runner.bridge.layout  # type: ignore[union-attr]
        found = {
            layer: tuple(f.name for f in layout.fields_of(g))
            for g in layout.spec
            if not g.recurrent
            for layer in g.layers
        }
    finally:
        runner.bridge.close()  # type: ignore[union-attr]
    return dict(sorted(found.items()))


def alone(recipe: Recipe, layer: int, field: str, n_layers: int) -> str | None:
    """The recipe on one field of one layer and no other; None where it leaves that field as it is."""
    codec = recipe.codecs.get(field, recipe.codecs.get("", "auto"))
    if codec == "auto" or recipe.skips(layer, n_layers):
        return None
    options = [f"{field}={codec}"]
    others = [str(i) for i in range(n_layers) if i != layer]
    if others:
        options.append(f"skip_layers={','.join(others)}")
    if recipe.sinks:
        options.append(f"sinks={recipe.sinks}")
    if recipe.window is not None:
        options.append(f"window={recipe.window}")
    return ";".join(options)


def sensitivity(
    model: Any,
    tokenizer: Any,
    recipes: Sequence[str],
    text: str | Sequence[int],
    *,
    fields: dict[int, tuple[str, ...]] | None = None,
    journal: Journal | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    until: Callable[[], bool] = lambda: False,
    **options: Any,
) -> list[Layer]:
    """Scores a text once per recipe, layer and field.

    Args:
        recipes: of which those of the model's own dtype are passed over.
        text: short: the differences are paired, so a few thousand tokens tell layers apart.
        fields: of `fields_of`, where it is known already.
        until: asked between batches; True ends the measurement early, with whole batches only.
        options: of `evaluate`: lengths, tokens, seed, memory, injected.

    Raises:
        ConfigError: no recipe that rounds anything.
    """
    fields = fields_of(model) if fields is None else fields
    n_layers = 1 + max(fields, default=0)
    exact = plain_codec(str(model.dtype).removeprefix("torch."))
    asked = []
    for text_of in recipes:
        recipe = parse_recipe(text_of)
        if all(c == exact for c in recipe.loaded()):
            continue
        for layer, names in fields.items():
            for field in names:
                kv = alone(recipe, layer, field, n_layers)
                if kv is not None:
                    asked.append((text_of, layer, field, kv))
    if not asked:
        raise ConfigError("layers are told apart by a codec that rounds; give one, as --kv int4")
    found: list[Layer] = []
    for at in range(0, len(asked), AT_ONCE):
        if until():
            break
        some = asked[at : at + AT_ONCE]
        done = evaluate(
            model,
            tokenizer,
            [(kv, "full") for *_, kv in some],
            ("ppl",),
            text,
            journal=journal,
            **options,
        )
        rows = {(r.kv, r.metric): r for r in done.rows}
        for name, layer, field, kv in some:
            kl, dnll = rows[kv, "kl"], rows[kv, "dnll"]
            found.append(Layer(name, layer, field, kl.value, dnll.value, kl.low, kl.high))
        if progress is not None:
            progress("layers", min(len(asked), at + AT_ONCE), len(asked))
    return found
