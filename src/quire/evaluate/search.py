"""The search behind `quire tune`, without a model: forms of layers, what they take, and the best mix within a budget.

per layer    (keys' codec, values' codec)  ->  bytes at the context, loss measured alone
all layers   the mix of least loss within the bytes: states of (bytes, loss) that nothing beats, layer by layer
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from quire.codecs.recipe import available, codec_class, load_codec
from quire.errors import ConfigError
from quire.plan.demand import PREFILL_TOKENS
from quire.plan.kept import Kept
from quire.plan.layout import KVLayer, StateLayer, build_layout
from quire.retention import parse_keep
from quire.spec import KVConfig

__all__ = [
    "Form",
    "Mix",
    "best_mix",
    "bytes_of",
    "codecs_to_try",
    "forms_of",
    "map_text",
    "policy_bytes",
    "recipe_of",
    "step_bytes",
]

STATES = 4096
"""Most states that are carried from layer to layer."""

Loss = Mapping[tuple[str, int, str], float]
"""(codec, layer, field) to what it costs alone."""


@dataclass(frozen=True)
class Form:
    """One layer in one recipe: bytes of a sequence, and its loss."""

    recipe: str
    n_bytes: int
    loss: float


@dataclass(frozen=True)
class Mix:
    """A recipe per layer, in order of the layers."""

    recipes: tuple[str, ...]
    n_bytes: int
    loss: float


T = TypeVar("T", Form, Mix)


def codecs_to_try(
    layers: Sequence[KVLayer | StateLayer], dtype: str, block_tokens: int
) -> tuple[list[str], list[tuple[str, str]]]:
    """The recipes that serve a model in fewer bytes: what every codec shows of itself, or has searched.

    Returns:
        Recipes, and those that do not serve it with the reason.
    """
    found, refused = [], []
    exact = bytes_of(layers, "auto", dtype=dtype, block_tokens=block_tokens, context=1 << 16)
    for name in available():
        codec = codec_class(name)
        for recipe in getattr(codec, "searched", getattr(codec, "shown", (name,))):
            try:
                size = bytes_of(
                    layers, recipe, dtype=dtype, block_tokens=block_tokens, context=1 << 16
                )
            except ConfigError as e:
                refused.append((recipe, str(e)))
            else:
                if size < exact:
                    found.append(recipe)
    return found, refused


def recipe_of(codecs: Mapping[str, str], options: str = "") -> str:
    """The recipe with a codec per field, and options where one of them rounds: `k=int8,v=int4;sinks=4`."""
    names = set(codecs.values())
    body = next(iter(names)) if len(names) == 1 else ",".join(f"{f}={c}" for f, c in codecs.items())
    if options and any(c != "auto" and not load_codec(c).plain for c in names):
        return f"{body};{options}"
    return body


def bytes_of(
    layers: Sequence[KVLayer | StateLayer], kv: str, *, dtype: str, block_tokens: int, context: int
) -> int:
    """Bytes that one sequence holds at most on its way to `context` tokens. Raises ConfigError.

    Its prompt is computed in pieces as small as the room demands, as the engine does; see `step_bytes`.
    """
    config = KVConfig(kv, block_tokens=block_tokens)
    return build_layout(layers, config, dtype=dtype).spec.bytes_for(context)


def step_bytes(
    layers: Sequence[KVLayer | StateLayer], kv: str, *, dtype: str, block_tokens: int, context: int
) -> int:
    """The same where there is room for steps of `PREFILL_TOKENS`: a step's tokens are raw until they are sealed."""
    config = KVConfig(kv, block_tokens=block_tokens)
    spec = build_layout(layers, config, dtype=dtype).spec
    return spec.bytes_for(context, chunk_tokens=PREFILL_TOKENS)


def policy_bytes(
    layers: Sequence[KVLayer | StateLayer],
    keep: str,
    *,
    dtype: str,
    block_tokens: int,
    context: int,
) -> tuple[int, int]:
    """Bytes of one sequence under a policy and the exact codec. Raises ConfigError.

    Returns:
        At most after a prompt of `context` tokens; and at its end, when all of it is there beside what stays.
    """
    layout = build_layout(layers, KVConfig("auto", keep, block_tokens), dtype=dtype)
    rule = parse_keep(keep)
    if rule.full or rule.spans or rule.reads:
        held = layout.spec.bytes_for(context)
        return held, held
    kept = Kept(layout, rule.policy)
    return kept.most_bytes(context, context), kept.peak_bytes(context)


def forms_of(
    layer: KVLayer,
    codecs: Sequence[str],
    loss: Loss,
    options: str,
    *,
    dtype: str,
    block_tokens: int,
    context: int,
) -> list[Form]:
    """Every choice for one layer that no other beats in bytes and loss, fewest bytes first."""
    names = [f.name for f in layer.fields]
    found = []
    for choice in product(["auto", *codecs], repeat=len(names)):
        lost = [
            0.0 if c == "auto" else loss.get((c, layer.layer, f))
            for f, c in zip(names, choice, strict=True)
        ]
        if any(x is None for x in lost):
            continue
        recipe = recipe_of(dict(zip(names, choice, strict=True)), options)
        try:
            size = bytes_of(
                [layer], recipe, dtype=dtype, block_tokens=block_tokens, context=context
            )
        except ConfigError:
            continue  # codecs whose groups do not share a block, or a window that one of them already has
        found.append(Form(recipe, size, sum(x or 0.0 for x in lost)))
    return _best(found)


def best_mix(forms: Sequence[Sequence[Form]], budget: int) -> Mix | None:
    """The mix of least loss within the budget; of equals the one of fewest bytes. None where nothing fits.

    Args:
        forms: of each layer.
    """
    states = [Mix((), 0, 0.0)]
    least = [min((f.n_bytes for f in some), default=budget + 1) for some in forms]
    for i, some in enumerate(forms):
        rest = sum(least[i + 1 :])
        grown = [
            Mix((*s.recipes, f.recipe), s.n_bytes + f.n_bytes, s.loss + f.loss)
            for s in states
            for f in some
            if s.n_bytes + f.n_bytes + rest <= budget
        ]
        states = _best(grown)
        if len(states) > STATES:
            step = len(states) / STATES
            states = [states[int(j * step)] for j in range(STATES)] + states[-1:]
    return min(states, key=lambda s: (s.loss, s.n_bytes), default=None)


def _best(found: Iterable[T]) -> list[T]:
    """What nothing beats in both, ascending in bytes and falling in loss."""
    out: list[T] = []
    for x in sorted(found, key=lambda x: (x.n_bytes, x.loss)):
        if not out or x.loss < out[-1].loss:
            out.append(x)
    return out


def map_text(
    layers: Sequence[KVLayer | StateLayer],
    recipes: Mapping[int, str | tuple[str, ...]],
    digest: str,
) -> str:
    """The `[map]` of a recipe per layer, as `quire.codecs.maps` reads it; layers of one recipe share a part.

    Args:
        recipes: layer to its recipe, or to one of each of its KV heads.
        digest: of the weights that it is for; empty for any.
    """
    kv = [x for x in layers if isinstance(x, KVLayer)]
    by_recipe: dict[str, list[int]] = {}
    by_head: dict[tuple[int, str], list[int]] = {}
    for layer, recipe in sorted(recipes.items()):
        if isinstance(recipe, str) or len(set(recipe)) == 1:
            one = recipe if isinstance(recipe, str) else recipe[0]
            by_recipe.setdefault(one, []).append(layer)
            continue
        for head, own in enumerate(recipe):
            by_head.setdefault((layer, own), []).append(head)
    usual = max(by_recipe, key=lambda r: len(by_recipe[r]), default="auto")
    lines = ["[map]", f"layers = {1 + max(x.layer for x in layers)}"]
    lines += [f"heads = {max(x.heads for x in kv)}"]
    lines += [f'digest = "{digest}"'] if digest else []
    lines += [f'kv = "{usual}"']
    for recipe, some in by_recipe.items():
        if recipe != usual:
            lines += ["", "[[map.parts]]", f"layers = {some}", f'kv = "{recipe}"']
    for (layer, recipe), some in by_head.items():
        if recipe != usual:
            lines += ["", "[[map.parts]]", f"layers = [{layer}]", f"heads = {some}"]
            lines += [f'kv = "{recipe}"']
    return "\n".join(lines) + "\n"
