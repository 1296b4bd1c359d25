"""Configs read by hand: what each family keeps, to the byte, and what is refused or assumed when a field is missing."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import zoo
from quire.errors import ConfigError
from quire.plan.catalogue import known_model, model_names
from quire.plan.checked import CHECKED
from quire.plan.demand import Demand, Setup
from quire.plan.fields import Fields
from quire.plan.layout import KVLayer, StateLayer
from quire.plan.shape import ModelShape, read_shape
from quire.plan.weights import count_parameters
from quire.spec import Chunked, Full, KVConfig, Window

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "intermediate_size": 14336,
}
MAMBA = {"model_type": "mamba", "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16} | {
    "conv_kernel": 4,
    "torch_dtype": "float32",
}


def of(name: str) -> ModelShape:
    row = known_model(name)
    assert row is not None, name
    return read_shape(row["config"], name)


def demand(shape: ModelShape, kv: str = "auto", **more: Any) -> Demand:
    return Demand(Setup(shape, KVConfig(kv), **more))


def kinds(shape: ModelShape) -> list[str]:
    return [
        "s" if isinstance(x, StateLayer) else {Full: "f", Window: "w", Chunked: "c"}[type(x.span)]
        for x in shape.layers
    ]


# -- by hand -----------------------------------------------------------------------------------------------------


def test_latents_of_deepseek() -> None:
    """61 layers x (512 + 64) numbers x 2 bytes, whatever the 128 heads."""
    shape = of("deepseek-v3")
    assert demand(shape).bytes_per_token == 61 * 576 * 2 == 70_272
    assert {x.heads for x in shape.layers if isinstance(x, KVLayer)} == {1}


def test_gemma_3_keeps_five_windows_for_one_full_layer() -> None:
    shape = of("gemma-3-27b-it")
    assert "".join(kinds(shape))[:12] == "wwwwwfwwwwwf"
    assert kinds(shape).count("f") == 10
    d = demand(shape)
    token = 16 * 128 * 2 * 2
    assert d.bytes_per_token == 62 * token
    assert d.spec.bytes_per_token == 10 * token
    blocks = 131_072 // 32 * 10 + (1023 + 31) // 32 * 52 + 52
    assert d.sequence_bytes(131_072) == blocks * 32 * token


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({"model_type": "gemma2", "sliding_window": 64}, "wfwfwfwf"),
        ({"model_type": "gemma3_text", "sliding_window": 64}, "wwwwwfww"),
        ({"model_type": "cohere2", "sliding_window": 64, "sliding_window_pattern": 4}, "wwwfwwwf"),
        (
            {"model_type": "exaone4", "sliding_window": 64, "sliding_window_pattern": "LLG"},
            "wwfwwfww",
        ),
        ({"model_type": "mistral", "sliding_window": 64}, "wwwwwwww"),
        ({"model_type": "mistral", "sliding_window": None}, "ffffffff"),
        ({"model_type": "qwen2", "sliding_window": 64}, "ffffffff"),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 64,
                "use_sliding_window": True,
                "max_window_layers": 6,
            },
            "ffffffww",
        ),
        ({"model_type": "llama4_text", "attention_chunk_size": 64}, "cccfcccf"),
        (
            {
                "model_type": "llama4_text",
                "attention_chunk_size": 64,
                "no_rope_layers": [0, 1, 1, 1, 1, 1, 1, 0],
            },
            "fccccccf",
        ),
    ],
)
def test_windows_where_no_layers_are_listed(config: dict[str, Any], want: str) -> None:
    shape = read_shape(LLAMA | {"num_hidden_layers": 8, "head_dim": 128} | config)
    assert "".join(kinds(shape)) == want


def test_llama_4_has_chunks_of_8192_on_three_layers_of_four() -> None:
    shape = of("llama-4-scout-17b-16e")
    assert "".join(kinds(shape)[:8]) == "cccfcccf"
    token = 8 * 128 * 2 * 2
    assert demand(shape).sequence_bytes(131_072) == (12 * 131_072 + 36 * 8192) * token


def test_jamba_attends_in_one_layer_of_eight() -> None:
    """4 attention layers of 8 heads; 28 Mamba layers of 8,192 channels, 16 states in float32 and 4 inputs in bf16."""
    shape = of("jamba-v0.1")
    d = demand(shape)
    assert d.bytes_per_token == 4 * 8 * 128 * 2 * 2 == 16_384
    assert d.bytes_per_sequence == 28 * 8192 * (16 * 4 + 4 * 2) == 16_515_072


def test_qwen3_next_keeps_a_square_per_value_head() -> None:
    """12 attention layers of 2 heads of 256; 36 layers of 32 x 128 x 128 in float32 and a convolution of 8,192."""
    d = demand(of("qwen3-next-80b-a3b"))
    assert d.bytes_per_token == 12 * 2 * 256 * 2 * 2 == 24_576
    assert d.bytes_per_sequence == 36 * (32 * 128 * 128 * 4 + 8192 * 4 * 2) == 77_856_768


def test_gpt_oss_has_a_window_of_128_on_every_other_layer() -> None:
    shape = of("gpt-oss-120b")
    assert "".join(kinds(shape)[:4]) == "wfwf"
    token = 8 * 64 * 2 * 2
    assert demand(shape).bytes_per_token == 36 * token
    assert demand(shape).sequence_bytes(4096) == 18 * 4096 * token + 18 * 5 * 32 * token


def test_falcon_shares_one_head_or_eight() -> None:
    assert demand(of("falcon-7b")).bytes_per_token == 32 * 1 * 64 * 2 * 2
    assert demand(of("falcon-40b")).bytes_per_token == 60 * 8 * 64 * 2 * 2
    old = {"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32}
    old |= {"num_attention_heads": 71, "num_kv_heads": 71, "torch_dtype": "bfloat16"}
    assert demand(read_shape(old)).bytes_per_token == 32 * 64 * 2 * 2  # multi_query is the default
    old["multi_query"] = False
    assert demand(read_shape(old)).bytes_per_token == 32 * 71 * 64 * 2 * 2


def test_layers_that_read_anothers_keys_store_nothing() -> None:
    config = LLAMA | {
        "model_type": "gemma3n_text",
        "num_hidden_layers": 6,
        "head_dim": 256,
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 3,
    }
    shape = read_shape(config)
    assert [x.layer for x in shape.layers] == [0, 1, 2]
    assert shape.shared == {3: 1, 4: 1, 5: 2}


def test_layers_may_differ_in_heads_and_width() -> None:
    config = LLAMA | {"num_hidden_layers": 3, "num_key_value_heads": [2, 4, 8]}
    config["per_layer_config"] = {"1": {"head_dim": 64}}
    shape = read_shape(config)
    assert [(x.heads, x.fields[0].shape) for x in shape.layers if isinstance(x, KVLayer)] == [
        (2, (128,)),
        (4, (64,)),
        (8, (128,)),
    ]


def test_an_encoder_decoder_keeps_its_input_once() -> None:
    """Whisper large: 32 layers x 20 heads x 64 x 2 x 2 bytes, for 1,500 frames and for every token."""
    d = demand(of("whisper-large-v3"))
    token = 32 * 20 * 64 * 2 * 2
    assert d.bytes_per_token == token
    assert d.bytes_per_sequence == 47 * 32 * token  # 1,500 frames in whole blocks
    t5 = {"model_type": "t5", "is_encoder_decoder": True, "d_model": 512, "d_kv": 64}
    t5 |= {"num_layers": 6, "num_decoder_layers": 6, "num_heads": 8, "torch_dtype": "float32"}
    with pytest.raises(ConfigError, match="--encoder-tokens"):
        demand(read_shape(t5)).sequence_bytes(100)
    assert demand(read_shape(t5), encoder_tokens=64).sequence_bytes(32) == 3 * 32 * 6 * 8 * 64 * 8


def test_a_composite_is_read_from_its_text_part() -> None:
    whole = {"model_type": "llava", "text_config": LLAMA, "vision_config": {}}
    assert read_shape(whole).layers == read_shape(LLAMA).layers
    assert read_shape(whole | {"mm_tokens_per_image": 256}).image_tokens == 256


# -- what is missing ---------------------------------------------------------------------------------------------


def without(*names: str, **more: Any) -> dict[str, Any]:
    return {k: v for k, v in (LLAMA | more).items() if k not in names}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (without("num_hidden_layers"), "lacks its number of layers.*num_hidden_layers"),
        (without("hidden_size"), "lacks its hidden size"),
        (without("num_attention_heads"), "hidden_size|attention heads"),
        (without(num_attention_heads=33), "33 heads do not divide"),
        (without(num_hidden_layers=0), "num_hidden_layers must be .* not 0"),
        (without(num_key_value_heads=-8), "num_key_value_heads must be .* not -8"),
        (without(num_key_value_heads=True), "num_key_value_heads must be .* not True"),
        (without(layer_types=["full_attention"]), "names 1 layers and the model has 32"),
        (without(layer_types=["telepathy"] * 32), "telepathy, whose cache is not known"),
        (without(layer_types=["linear_attention"] * 32), "size of the recurrent state"),
        (without(layer_types=["sliding_attention"] * 32), "lacks the length of its windows"),
        (without(layer_types=["mlp"] * 32), "none of its 32 layers stores anything"),
        (without(model_type="gemma3_text"), "sliding_window is missing"),
        (without(model_type="deepseek_v3"), "kv_lora_rank .* is missing"),
        (without(kv_lora_rank=512), "lacks the rotated part of its keys"),
        (without(model_type="zamba2"), "layers attend is missing"),
        (without(attn_layer_period=8), "attn_layer_offset is missing"),
        (without(torch_dtype="int3"), "unknown dtype 'int3'"),
        (without(layer_types=5), "layer_types must list a name per layer, not 5"),
        (without(model_type="jamba"), "not alike, and attn_layer_period, .* is missing"),
        (without(model_type="llama4_text"), "attention_chunk_size, .* is missing"),
        (without(model_type="qwen3_next"), "layer_types, which tells them apart, is missing"),
        (without(model_type="deepseek_v4"), "attention over compressed blocks"),
        (without(num_key_value_heads=[8]), r"num_key_value_heads cannot be \[8\] in a llama"),
        (without(head_dim=128, v_head_dim=-64), "v_head_dim must be .* not -64"),
        (MAMBA | {"expand": -2}, r"layer 0 would store conv0 of shape \[1, -"),
        (without(per_layer_config=7), "per_layer_config cannot be 7"),
        (
            without(num_hidden_layers=10**9),
            "num_hidden_layers is 1,000,000,000, which no model has",
        ),
    ],
)
def test_what_cannot_be_known_is_refused_by_name(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as e:
        read_shape(config, "m")
    assert str(e.value).startswith("m: ")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("config", "words", "per_token"),
    [
        (without("num_key_value_heads"), "all 32 heads are assumed", 32 * 32 * 128 * 4),
        (without("torch_dtype"), "bfloat16 is assumed", 32 * 8 * 128 * 4),
        (without(model_type="qwen3", hidden_size=2560), "head_dim is missing: 128", 32 * 8 * 512),
        (
            without(model_type="gemma2", sliding_window=64),
            "every 2. layer is full",
            32 * 8 * 256 * 4,
        ),
        (
            without(model_type="llama9"),
            "llama9 is not a model type that this planner was checked with",
            32 * 8 * 128 * 4,
        ),
    ],
)
def test_what_is_assumed_is_said(config: dict[str, Any], words: str, per_token: int) -> None:
    shape = read_shape(config, "m")
    assert any(words in a for a in shape.assumed), shape.assumed
    assert demand(shape).bytes_per_token == per_token
    assert read_shape(LLAMA).assumed == ()


JUNK = st.sampled_from([None, 0, -1, 3, 2.5, True, "x", "", [], [1], [[2]], {}, {"a": 1}])


@given(st.sampled_from(model_names()), st.data())
def test_a_config_with_junk_in_it_is_refused_or_planned(name: str, data: st.DataObject) -> None:
    """Whatever one field holds or lacks: one line that is a refusal, or bytes; never another error, never nothing."""
    row = known_model(name)
    assert row is not None
    config = copy.deepcopy(dict(row["config"]))
    section = config.get("text_config", config)
    field = data.draw(st.sampled_from(sorted(section)))
    section[field] = data.draw(JUNK)
    refused = ""
    try:
        shape = read_shape(config, "m")
        n_bytes = Demand(Setup(shape, KVConfig(), encoder_tokens=10)).sequence_bytes(64)
    except ConfigError as e:
        refused = str(e)
    if refused:
        assert refused.startswith("m: ") or "token" in refused, refused  # a window of none, say
        assert "\n" not in refused
        return
    assert n_bytes > 0
    with suppress(ConfigError):
        assert count_parameters(shape).total > 0


def test_checked_types_are_the_catalogue_s_and_those_that_tests_build() -> None:
    rows = [known_model(name) for name in model_names()]
    kinds = {Fields(row["config"], "m").kind for row in rows if row is not None}
    built = {Fields(zoo.build(n).config.to_dict(), n).kind for n in zoo.names()}
    assert kinds | built <= CHECKED
    assert len(CHECKED) >= 150


def test_every_row_of_the_catalogue_can_be_planned_and_says_where_it_is_from() -> None:
    assert len(model_names()) >= 60
    for name in model_names():
        row = known_model(name)
        assert row is not None
        assert len(row["source"]) > 10
        d = demand(of(name))
        assert d.bytes_per_token > 0 or d.bytes_per_sequence > 0
        assert d.sequence_bytes(1) > 0
