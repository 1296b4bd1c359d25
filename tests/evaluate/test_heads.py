"""KV heads apart: which layers are worth it, what is measured of them, and the map that says so."""

from __future__ import annotations

from pathlib import Path

from quire.codecs import parse_recipe
from quire.evaluate.heads import Item, contenders, head_items, items_of, loss_of, unlike
from quire.evaluate.report import Layer
from quire.evaluate.search import Form, best_mix, bytes_of, forms_of, map_text
from quire.plan.layout import KVLayer
from quire.spec import Field

FIELDS = tuple(Field(n, (64,), "bfloat16") for n in ("k", "v"))
LAYERS = [KVLayer(0, 1, FIELDS), KVLayer(1, 2, FIELDS), KVLayer(2, 2, FIELDS)]
SHAPE = {"dtype": "bfloat16", "block_tokens": 32, "context": 512}


def head(layer: int, h: int, kl: float, field: str = "k", kv: str = "int4") -> Layer:
    return Layer(kv, layer, field, kl, 0.0, 0.9 * kl, 1.1 * kl, head=h)


MEASURED = [
    *(head(1, h, kl) for h, kl in enumerate((0.1, 0.11))),
    *(head(1, h, 0.1, "v") for h in (0, 1)),
    *(head(2, h, kl) for h, kl in enumerate((0.001, 0.5))),
    *(head(2, h, 0.001, "v") for h in (0, 1)),
]


def test_layers_whose_heads_differ_beyond_their_intervals_are_split() -> None:
    assert unlike(MEASURED) == {2: 0.499}
    assert head_items(LAYERS, MEASURED) == [
        Item(LAYERS[0]),
        Item(LAYERS[1]),
        Item(LAYERS[2], 0),
        Item(LAYERS[2], 1),
    ]
    assert head_items(LAYERS, ()) == items_of(LAYERS)


def test_what_the_best_mixes_use_contends_the_costliest_layer_first() -> None:
    mixes = [
        [Form("int4", 1, 9.0), Form("k=int8,v=auto", 1, 0.1), Form("int4;sinks=4", 1, 0.5)],
        [Form("auto", 1, 0.0), Form("auto", 1, 0.0), Form("k=kvarn,v=int4", 1, 0.3)],
    ]
    found = contenders(LAYERS, mixes)
    assert [(x.layer, f, c) for x, f, c in found] == [
        (2, "k", "int4"), (2, "k", "kvarn"), (2, "v", "int4"), (1, "k", "int8"),
    ], "a layer of one head has nothing to tell apart"  # fmt: skip


def test_a_sensitive_head_is_spared_where_its_layer_could_not_be(tmp_path: Path) -> None:
    """The budget holds one exact head of two: by layers it is of no use, by heads it is all that is needed."""
    whole = [
        Layer("int4", n, f, kl, 0.0, None, None) for n, kl in ((1, 0.2), (2, 0.5)) for f in "kv"
    ]
    items = head_items(LAYERS[1:], MEASURED)
    forms = [
        forms_of(i.shape, ["int4"], loss_of(i, whole, MEASURED, 0.0), "", **SHAPE) for i in items
    ]
    exact = bytes_of([KVLayer(0, 1, FIELDS)], "k=auto,v=int4", **SHAPE)
    budget = (
        bytes_of(LAYERS[1:], "int4", **SHAPE)
        - bytes_of([KVLayer(0, 1, FIELDS)], "int4", **SHAPE)
        + exact
    )
    found = best_mix(forms, budget)
    assert found is not None
    assert found.recipes == ("int4", "int4", "k=auto,v=int4")
    every: dict[int, str | tuple[str, ...]] = {0: "auto", 1: "int4", 2: ("int4", "k=auto,v=int4")}
    file = tmp_path / "m.toml"
    file.write_text(map_text(LAYERS, every, ""))
    bit_map = parse_recipe(f"map:{file}").map
    assert bit_map is not None
    assert [bit_map.at(n, h).text for n, h in ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1))] == [
        "auto", "int4", "int4", "int4", "k=auto,v=int4",
    ]  # fmt: skip
    plain = bytes_of([LAYERS[0]], "auto", **SHAPE)
    assert bytes_of(LAYERS, f"map:{file}", **SHAPE) == found.n_bytes + plain, (
        "parts cost what the whole does"
    )
