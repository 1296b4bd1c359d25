"""One layer's keys or values at a time: nothing else is coded, and the layer that is told wrong shows."""

from __future__ import annotations

from typing import Any

import pytest

from quire.codecs import parse_recipe
from quire.errors import ConfigError
from quire.evaluate.sensitivity import alone, fields_of, sensitivity
from quire.plan.layout import KVLayer, build_layout
from quire.spec import Field, KVConfig

OPTIONS: dict[str, Any] = {"length_tokens": 64, "memory": 16 << 20, "block_tokens": 16}


@pytest.mark.parametrize(
    "kv", ["int4", "k=int8,v=int4", "int4;sinks=4;window=32", "int4;skip_layers=1"]
)
def test_one_field_of_one_layer_and_no_other(kv: str) -> None:
    fields = tuple(Field(n, (16,), "float32") for n in ("k", "v"))
    layers = [KVLayer(i, 2, fields) for i in range(3)]
    recipe = parse_recipe(kv)
    for layer in range(3):
        for field in ("k", "v"):
            text = alone(recipe, layer, field, 3)
            if recipe.skips(layer, 3):
                assert text is None
                continue
            assert text is not None
            layout = build_layout(layers, KVConfig(text), dtype="float32")
            coded = [g for g in layout.spec if g.raw is not None]
            assert [g.layers for g in coded] == [(layer,)]
            codecs = layout.codecs_of(coded[0])
            assert codecs[field] == recipe.codec(field, "float32")
            other = "v" if field == "k" else "k"
            assert codecs[other].plain
            span = next(g.span for g in layout.spec if g.name == coded[0].raw)
            assert (span.sinks, span.residual_tokens) == (recipe.sinks, recipe.window or 0)  # type: ignore[union-attr]


def test_a_plain_field_is_not_measured() -> None:
    assert alone(parse_recipe("k=int8,v=auto"), 0, "v", 2) is None
    assert alone(parse_recipe("int8"), 0, "k", 1) == "k=int8"


def test_every_layer_and_field_once(llama: Any, text: list[int]) -> None:
    fields = fields_of(llama)
    assert fields == {0: ("k", "v"), 1: ("k", "v"), 2: ("k", "v")} or len(fields) > 1
    asked = []
    found = sensitivity(
        llama, None, ["fp32", "kivi:bits=2,residual=0,group=16"], text,
        progress=lambda *p: asked.append(p), **OPTIONS,
    )  # fmt: skip
    assert {(x.layer, x.field) for x in found} == {(n, f) for n, fs in fields.items() for f in fs}
    assert {x.kv for x in found} == {"kivi:bits=2,residual=0,group=16"}
    assert all(x.kl > 0 for x in found)
    assert asked[-1] == ("layers", len(found), len(found))
    again = sensitivity(
        llama, None, ["kivi:bits=2,residual=0,group=16"], text, fields=fields, **OPTIONS
    )
    assert again == found, "to the last digit"
    none = sensitivity(
        llama, None, ["kivi:bits=2,residual=0,group=16"], text, until=lambda: True, **OPTIONS
    )
    assert none == []


def test_nothing_that_rounds_is_refused(llama: Any, text: list[int]) -> None:
    with pytest.raises(ConfigError, match="give one, as --kv int4"):
        sensitivity(llama, None, ["auto", "fp32"], text, **OPTIONS)
