"""KV heads one by one, where the search by layers leaves a choice and the heads of a layer differ.

    layers     the best mixes at the budget and around it name, for each layer and field, the codecs that contend there
    heads      each head alone in each of those; layers whose heads are measurably unlike are searched head by head

Most layers are not worth it: heads of a layer share its recipe unless the 95 % intervals of two of them are apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from quire.evaluate.report import Layer
from quire.evaluate.search import Form, Loss, map_text
from quire.evaluate.sensitivity import AT_ONCE
from quire.evaluate.trial import Trial
from quire.plan.layout import KVLayer

__all__ = ["Item", "by_head", "contenders", "head_items", "items_of", "loss_of", "unlike"]

MOST_ITEMS = 64
"""Layers and single heads of one search."""
TIME_LEFT = 0.4
"""Heads are measured as long as more than this share of the time is left."""


@dataclass(frozen=True)
class Item:
    """What gets a recipe of its own: a layer, or one KV head of it."""

    layer: KVLayer
    head: int | None = None

    @property
    def shape(self) -> KVLayer:
        """As much of a layer as it is: bytes of heads add up to a layer's."""
        return self.layer if self.head is None else replace(self.layer, heads=1)


def items_of(layers: Sequence[KVLayer]) -> list[Item]:
    """Every layer as a whole."""
    return [Item(x) for x in layers]


def head_items(layers: Sequence[KVLayer], measured: Sequence[Layer]) -> list[Item]:
    """Layers, and in place of those with heads unlike each other their heads, the most unequal first if too many."""
    found = unlike(measured)
    room, split = MOST_ITEMS - len(layers), set[int]()
    sizes = {x.layer: x.heads for x in layers}
    for layer in sorted(found, key=lambda n: (-found[n], n)):
        if sizes[layer] - 1 <= room:
            split.add(layer)
            room -= sizes[layer] - 1
    return [
        item
        for x in layers
        for item in ([Item(x, h) for h in range(x.heads)] if x.layer in split else [Item(x)])
    ]


def unlike(measured: Sequence[Layer]) -> dict[int, float]:
    """Layers of which two heads' intervals are apart under one codec, and by how many nats the heads then differ."""
    groups: dict[tuple[str, int, str], list[Layer]] = {}
    for x in measured:
        groups.setdefault((x.kv, x.layer, x.field), []).append(x)
    out: dict[int, float] = {}
    for (_, layer, _), heads in groups.items():
        low = max(x.kl if x.low is None else x.low for x in heads)
        high = min(x.kl if x.high is None else x.high for x in heads)
        if low > high:
            gap = max(x.kl for x in heads) - min(x.kl for x in heads)
            out[layer] = max(gap, out.get(layer, 0.0))
    return out


def contenders(
    layers: Sequence[KVLayer], mixes: Sequence[Sequence[Form]]
) -> list[tuple[KVLayer, str, str]]:
    """(layer, field, codec) that the best mixes use, of layers with several heads; those that cost most come first.

    Args:
        mixes: a form per layer, of each mix.
    """
    from quire.codecs.recipe import parse_recipe

    cost: dict[tuple[int, str, str], float] = {}
    for mix in mixes:
        for x, form in zip(layers, mix, strict=True):
            recipe = parse_recipe(form.recipe)
            for f in x.fields:
                codec = recipe.codecs.get(f.name, recipe.codecs.get("", "auto"))
                if codec != "auto" and x.heads > 1:
                    key = (x.layer, f.name, codec)
                    cost[key] = max(form.loss, cost.get(key, 0.0))
    by_layer = {x.layer: x for x in layers}
    most = {n: max(v for (m, *_), v in cost.items() if m == n) for n, *_ in cost}
    order = sorted(cost, key=lambda k: (-most[k[0]], k))
    return [(by_layer[n], f, codec) for n, f, codec in order]


def by_head(
    trial: Trial, asked: Sequence[tuple[KVLayer, str, str]], texts: list[object]
) -> list[Layer]:
    """Every head alone under what contends in its layer, as far as the time goes; of whole layers only."""
    each = [(x, h, f, c) for x, f, c in asked for h in range(x.heads)]
    found: list[Layer] = []
    done = 0
    for at in range(0, len(each), AT_ONCE):
        if trial.left() < TIME_LEFT:
            break
        some = each[at : at + AT_ONCE]
        recipes = [_alone(trial, *one) for one in some]
        rows, _ = trial.rows([(kv, "full") for kv in recipes], texts, f"heads {at // AT_ONCE + 1}")
        by = {(r.kv, r.metric): r for r in rows}
        for kv, (x, h, f, c) in zip(recipes, some, strict=True):
            kl = by[kv, "kl"]
            found.append(
                Layer(c, x.layer, f, kl.value, by[kv, "dnll"].value, kl.low, kl.high, head=h)
            )
        done = at + len(some)
    cut = {x.layer for x, *_ in each[done:]}
    return [x for x in found if x.layer not in cut]


def loss_of(item: Item, layers: Sequence[Layer], heads: Sequence[Layer], taken_off: float) -> Loss:
    """(codec, layer, field) to what it costs an item alone, less what rounding alone does."""
    own: Sequence[Layer] = layers
    if item.head is not None:
        own = [x for x in heads if (x.layer, x.head) == (item.layer.layer, item.head)]
    return {
        (x.kv, x.layer, x.field): max(0.0, x.kl - taken_off) + 1e-3 * max(0.0, x.kl) for x in own
    }


def _alone(trial: Trial, layer: KVLayer, head: int, field: str, codec: str) -> str:
    """A map with one field of one head in a codec and nothing else; its name says what is in it."""
    every = dict.fromkeys((x.layer for x in trial.kv_layers), "auto")
    recipes: Mapping[int, str | tuple[str, ...]] = every | {
        layer.layer: tuple(f"{field}={codec}" if h == head else "auto" for h in range(layer.heads))
    }
    return trial.map_file(map_text(trial.layers, recipes, ""))
