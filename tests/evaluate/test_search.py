"""The search: the mix that brute force finds, in the bytes that a layout says, written as a map that reads back."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.codecs import parse_recipe
from quire.evaluate.search import (
    Form,
    best_mix,
    bytes_of,
    codecs_to_try,
    forms_of,
    map_text,
    recipe_of,
)
from quire.plan.layout import KVLayer, build_layout
from quire.spec import Field, KVConfig

FIELDS = tuple(Field(n, (64,), "bfloat16") for n in ("k", "v"))
LAYERS = [KVLayer(i, 2, FIELDS) for i in range(3)]
SHAPE = {"dtype": "bfloat16", "block_tokens": 32, "context": 512}

FORM = st.builds(Form, st.sampled_from("abc"), st.integers(1, 9), st.integers(0, 9).map(float))


@given(st.lists(st.lists(FORM, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 30))
def test_the_mix_is_the_best_of_all(forms: list[list[Form]], budget: int) -> None:
    fit = [
        (sum(f.loss for f in mix), sum(f.n_bytes for f in mix))
        for mix in product(*forms)
        if sum(f.n_bytes for f in mix) <= budget
    ]
    found = best_mix(forms, budget)
    assert (found is None) == (not fit)
    if found is not None:
        assert (found.loss, found.n_bytes) == min(fit)
        assert len(found.recipes) == len(forms)


def test_forms_are_the_layers_own_choices_that_nothing_beats() -> None:
    loss = {
        (c, n, f): x * (3 if f == "k" else 1)
        for c, x in (("int8", 0.01), ("int4", 0.2), ("kvarn", 0.5))
        for n in range(3)
        for f in "kv"
    }
    forms = forms_of(LAYERS[1], ["int8", "int4", "kvarn"], loss, "", **SHAPE)
    assert [f.n_bytes for f in forms] == sorted({f.n_bytes for f in forms})
    assert [f.loss for f in forms] == sorted({f.loss for f in forms}, reverse=True)
    assert forms[-1] == Form("auto", 512 * 2 * 2 * 64 * 2, 0.0)
    by_recipe = {f.recipe: f for f in forms}
    assert by_recipe["k=int8,v=int4"].loss == pytest.approx(0.03 + 0.2)
    assert "k=int4,v=int8" not in by_recipe, "as many bytes and a greater loss"
    for f in forms:
        assert f.n_bytes == bytes_of([LAYERS[1]], f.recipe, **SHAPE)
    without = forms_of(LAYERS[1], ["int8", "int4"], {("int8", 1, "k"): 0.1}, "", **SHAPE)
    assert {f.recipe for f in without} == {"auto", "k=int8,v=auto"}, (
        "what was not measured is left out"
    )


def test_a_map_of_a_mix_reads_back_in_the_bytes_of_its_parts(tmp_path: Path) -> None:
    recipes = {0: "k=int8,v=int4;sinks=4", 1: "auto", 2: "k=int8,v=int4;sinks=4"}
    file = tmp_path / "m.toml"
    file.write_text(map_text(LAYERS, recipes, "00"))
    kv = f"map:{file}"
    bit_map = parse_recipe(kv).map
    assert bit_map is not None
    assert {n: bit_map.at(n, h).text for n in range(3) for h in range(2)} == recipes
    assert bit_map.digest == "00"
    each = sum(bytes_of([x], recipes[x.layer], **SHAPE) for x in LAYERS)
    assert bytes_of(LAYERS, kv, **SHAPE) == each


def test_options_stand_only_where_something_rounds() -> None:
    assert recipe_of({"k": "int8", "v": "int8"}, "sinks=4") == "int8;sinks=4"
    assert recipe_of({"k": "auto", "v": "auto"}, "sinks=4") == "auto"
    assert recipe_of({"k": "auto", "v": "int4"}) == "k=auto,v=int4"


def test_what_is_tried_serves_the_model_and_saves() -> None:
    found, refused = codecs_to_try(LAYERS, "bfloat16", 32)
    assert {"int8", "fp8", "int4", "kivi:bits=2", "kvarn"} <= set(found)
    assert "kivi:bits=4,residual=32" in found, "what a codec has searched beside what it shows"
    assert not {"bf16", "fp16", "fp32"} & set(found)
    for recipe in found:
        build_layout(LAYERS, KVConfig(recipe), dtype="bfloat16")
    assert {"bf16", "fp16"} <= set(codecs_to_try(LAYERS, "float32", 32)[0])
    odd = [KVLayer(0, 2, tuple(Field(n, (40,), "bfloat16") for n in ("k", "v")))]
    found, refused = codecs_to_try(odd, "bfloat16", 32)
    assert "kivi:bits=2" in dict(refused)
    assert "int8" in found
