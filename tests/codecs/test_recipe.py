"""Recipes: what a kv= string means, and the one line that refuses a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from quire.codecs import available, load_codec, parse_recipe, recipe
from quire.codecs.plain import Plain
from quire.errors import ConfigError
from quire.plan import KVLayer, StateLayer, build_layout
from quire.plan.layout import check_config
from quire.spans import Full, Residual
from quire.spec import Field, KVCodec, KVConfig


@dataclass(frozen=True)
class Fancy(Plain):
    """A codec with parameters, as other packages bring them."""

    bits: int = 4
    residual: int = 0
    name: ClassVar[str] = "fancy"
    dtype: ClassVar[str] = "float16"


@pytest.fixture
def fancy(monkeypatch: pytest.MonkeyPatch) -> None:
    known = recipe.codec_class
    monkeypatch.setattr(recipe, "available", lambda: (*available(), "fancy"))
    monkeypatch.setattr(recipe, "codec_class", lambda n: Fancy if n == "fancy" else known(n))


def fields(*names: str) -> tuple[Field, ...]:
    return tuple(Field(n, (4,), "float32") for n in names or ("k", "v"))


def groups_of(kv: str, layers: int = 3, dtype: str = "float32") -> dict[str, tuple[int, ...]]:
    """Codec text of each group, to its layers."""
    made = build_layout(
        [KVLayer(i, 1, fields()) for i in range(layers)], KVConfig(kv=kv), dtype=dtype
    )
    return {g.codec: g.layers for g in made.spec.groups}


def test_the_folder_is_the_registry() -> None:
    assert {"fp64", "fp32", "fp16", "bf16"} <= set(available())
    for name in available():
        codec = load_codec(name)
        assert isinstance(codec, KVCodec)
        assert codec.name == name
        assert recipe.codec_text(codec) == name


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("float64", "fp64"), ("float32", "fp32"), ("float16", "fp16"), ("bfloat16", "bf16")],
)
def test_auto_is_the_models_own_dtype(dtype: str, name: str) -> None:
    assert groups_of("auto", dtype=dtype) == {name: (0, 1, 2)}


@pytest.mark.parametrize(
    ("text", "codecs", "skip"),
    [
        ("auto", {"": "auto"}, ()),
        (" bf16 ", {"": "bf16"}, ()),
        ("bf16;skip_layers=0,1,-1", {"": "bf16"}, (0, 1, -1)),
        ("bf16 ; skip_layers = 0", {"": "bf16"}, (0,)),
        ("k=fp16,v=bf16", {"k": "fp16", "v": "bf16"}, ()),
        ("k=fp16", {"k": "fp16"}, ()),
        ("fancy:bits=2,residual=128", {"": "fancy:bits=2,residual=128"}, ()),
        ("k=fancy:bits=2,residual=128,v=fp16", {"k": "fancy:bits=2,residual=128", "v": "fp16"}, ()),
        ("latent=fp16,k_rope=auto", {"latent": "fp16", "k_rope": "auto"}, ()),
        ("k=int8,v=auto;sinks=4;skip_layers=2", {"k": "int8", "v": "auto"}, (2,)),
    ],
)
def test_what_a_recipe_means(
    fancy: None, text: str, codecs: Mapping[str, str], skip: tuple[int, ...]
) -> None:
    parsed = parse_recipe(text)
    assert parsed.codecs == codecs
    assert parsed.skip_layers == skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int5", "unknown codec 'int5'; known: auto, bf16"),
        ("plain", "unknown codec 'plain'"),
        ("recipe", "unknown codec 'recipe'"),
        ("", "unknown codec ''"),
        ("bf16:bits=4", "codec bf16: unknown parameter 'bits=4'; it takes no parameters"),
        ("fancy:bots=4", "codec fancy: unknown parameter 'bots=4'; it takes bits, residual"),
        ("fancy:bits", "codec fancy: unknown parameter 'bits'"),
        ("fancy:bits=", "codec fancy: unknown parameter 'bits='"),
        ("fancy:bits=2,bits=3", "codec fancy: bits is given twice"),
        ("k=bf16,k=fp16", "k is given twice"),
        ("q=bf16", "unknown field 'q'; fields are k, v, latent, k_rope"),
        ("k=fp16,residual=4", "unknown field 'residual'"),
        ("bf16;skip=1", "unknown option 'skip'; known: skip_layers=0,1,-1, sinks=4, window=128"),
        ("bf16;", "unknown option ''"),
        ("bf16;skip_layers=a", "skip_layers takes layer numbers"),
        ("bf16;skip_layers=", "skip_layers takes layer numbers"),
        ("int8;sinks=4,8", "sinks takes a number of tokens, as in sinks=4"),
        ("int8;sinks=-1", "sinks takes a number of tokens, as in sinks=4"),
        ("int8;window=", "window takes a number of tokens, as in window=4"),
        ("int8;window=1;window=2", "window is given twice"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(fancy: None, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_codec_text_loads_an_equal_codec(fancy: None) -> None:
    for text in ("fancy", "fancy:bits=2", "fancy:bits=2,residual=128"):
        codec = load_codec(text)
        assert recipe.codec_text(codec) == text
        assert load_codec(recipe.codec_text(codec)) == codec


# -- recipes on layers -------------------------------------------------------------------------------------------


def test_skipped_layers_keep_the_models_dtype() -> None:
    assert groups_of("fp16;skip_layers=0,-1", dtype="bfloat16") == {"bf16": (0, 2), "fp16": (1,)}


def test_codecs_of_one_class_name_are_not_one_form() -> None:
    assert groups_of("fp16;skip_layers=1") == {"fp16": (0, 2), "fp32": (1,)}


def test_a_group_says_its_codecs_parameters(fancy: None) -> None:
    assert groups_of("fancy:bits=2") == {"fancy:bits=2": (0, 1, 2)}
    assert groups_of("k=fancy:bits=2,v=fp16") == {"k=fancy:bits=2,v=fp16": (0, 1, 2)}


@pytest.mark.parametrize(
    ("kv", "says"),
    [
        ("fp16;skip_layers=3", "skip_layers must lie within -3..2"),
        ("fp16;skip_layers=-4", "skip_layers must lie within -3..2"),
        ("latent=fp16", "this model caches k, v, not latent"),
    ],
)
def test_a_recipe_the_model_cannot_have_is_refused(kv: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        groups_of(kv)


def test_a_purely_recurrent_model_takes_no_codec() -> None:
    layers = [StateLayer(0, (Field("state", (4,), "float32", "block"),))]
    assert len(build_layout(layers, KVConfig(), dtype="float32").spec.groups) == 1
    with pytest.raises(ConfigError, match="recurrent state only"):
        build_layout(layers, KVConfig(kv="fp16"), dtype="float32")


def test_given_codecs_respect_skipped_layers() -> None:
    layers = [KVLayer(i, 1, fields()) for i in range(2)]
    config = KVConfig(kv="auto;skip_layers=0")
    made = build_layout(layers, config, dtype="float32", codecs={"": load_codec("fp16")})
    assert {g.codec: g.layers for g in made.spec.groups} == {"fp32": (0,), "fp16": (1,)}


# -- sinks, windows and blocks -----------------------------------------------------------------------------------


def raw_span(kv: str, **config: Any) -> Residual:
    layers = [KVLayer(0, 1, (Field("k", (64,), "float32"), Field("v", (64,), "float32")))]
    _, raw = build_layout(layers, KVConfig(kv, **config), dtype="bfloat16").spec.groups
    assert raw.codec == "bf16"
    assert isinstance(raw.span, Residual)
    return raw.span


def test_sinks_and_window_are_read_raw() -> None:
    assert raw_span("int8") == Residual(32, 0)
    assert raw_span("int8;sinks=4;window=100") == Residual(32, 100, Full(), 4)
    assert raw_span("k=int8,v=bf16;sinks=4") == Residual(32, 0, Full(), 4)
    assert raw_span("kivi") == Residual(32, 128)
    assert raw_span("k=kivi:residual=40,v=int8") == Residual(32, 40)
    assert raw_span("kivi:group=64;window=200") == Residual(64, 200)
    assert raw_span("kvquant") == raw_span("k=int8,v=kvquant") == Residual(64, 0, Full(), 1)
    assert raw_span("kvquant;sinks=4").sinks == raw_span("kvquant:sink=4;sinks=2").sinks == 4
    assert raw_span("kvquant:sink=0").sinks == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("auto;sinks=4", "sinks and window keep tokens out of a codec that rounds them"),
        ("bf16;window=64", "and none does here; drop them"),
        ("k=bf16;sinks=4", "drop them"),
    ],
)
def test_options_that_would_change_nothing_are_refused(text: str, says: str) -> None:
    for check in (lambda: check_config(KVConfig(text)), lambda: groups_of(text)):
        with pytest.raises(ConfigError) as caught:
            check()
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_blocks_hold_whole_groups() -> None:
    assert raw_span("int8", block_tokens=48) == Residual(48, 0)
    for check in (check_config, lambda c: raw_span(c.kv, block_tokens=c.block_tokens)):
        with pytest.raises(ConfigError) as caught:
            check(KVConfig("int8", block_tokens=24))
        assert str(caught.value) == (
            "blocks of 24 tokens do not hold whole groups of int8; take a multiple of 16, as 32"
        )
