"""Policies on models of every kind of attention, and what each kind refuses."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import zoo
from quire.engine import Engine, SamplingParams
from quire.errors import ConfigError
from quire.models.open import open_runner
from quire.retention import parse_keep
from retention.kept import PLAIN, check_kept, prompts, run, small

CASES = [
    (name, policy)
    for name in ("gpt2", "falcon", "gemma2", "gemma3", "gpt_oss", "jamba")
    for policy in ("snapkv", "ada(h2o)", "pyramid(keydiff)")
] + [(name, "expected") for name in ("falcon", "gemma2", "gemma3", "gpt_oss", "jamba")]
[PROMPT] = prompts([100], zoo.VOCAB)


@cache
def model(name: str) -> Any:
    return zoo.build(name)


def full_heads(name: str) -> list[tuple[int, int]]:
    """Coordinates that keep every token, from the configuration alone."""
    config = model(name).config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if name == "jamba":
        kinds = config.layers_block_type
    heads = (
        1
        if name in ("deepseek_v3", "falcon")
        else getattr(config, "num_key_value_heads", config.num_attention_heads)
    )
    full = [i for i, k in enumerate(kinds) if k in ("full_attention", "attention")]
    return [(layer, h) for layer in full for h in range(heads)]


def works(name: str, policy: str) -> None:
    keep = small(policy)
    got = run(model(name), [(PROMPT, keep), (PROMPT[:60], "full")], n_tokens=10)
    found = got.seen.of(100)
    assert sorted(found) == [100, 108]
    for n, kept in found.items():
        assert sorted(kept) == full_heads(name)
        check_kept(keep, n, 100, kept, 0.4)
    covering = run(model(name), [(PROMPT, small(policy, "1.0"))], n_tokens=10)
    assert covering.tokens[0] == full(name)


@cache
def full(name: str) -> list[int]:
    return run(model(name), [(PROMPT, "full")], n_tokens=10).tokens[0]


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_kinds_of_attention(name: str, policy: str) -> None:
    works(name, policy)


@pytest.mark.parametrize("policy", [*(p for p in PLAIN if p != "fastgen"), "pyramid(expected)"])
def test_latents(policy: str) -> None:
    works("deepseek_v3", policy)


@pytest.mark.parametrize(
    ("name", "keep", "says"),
    [
        ("deepseek_v3", "ada(h2o)", "one latent for all heads"),
        ("deepseek_v3", "pyramid(ada(h2o))", "one latent for all heads"),
        ("deepseek_v3", "fastgen", "one latent for all heads"),
        ("mistral", "h2o", "no layer of this model keeps every token"),
        ("mamba2", "h2o", "recurrent state only|no layer of this model keeps every token"),
        ("bloom", "h2o", "wants the whole history"),
        ("gpt2", "expected", "no RoPE of this model explains"),
        ("phi3_longrope", "expected", "use snapkv or keydiff"),
        ("llama_dynamic", "pyramid(expected)", "use snapkv or keydiff"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(name: str, keep: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as e:
        open_runner(model(name), keep=keep, memory="8MiB")
    assert "\n" not in str(e.value)


def test_sinks_as_the_runners_own_policy_in_a_narrow_window() -> None:
    """The RoPE is found out before anything is turned back, also where the store itself holds streams."""
    runner = open_runner(model("llama"), keep="sinks:2+window:6", memory="8MiB", block_tokens=8)
    try:
        [own] = Engine(runner).generate([PROMPT], SamplingParams(max_tokens=10, ignore_eos=True))
    finally:
        runner.close()
    asked = run(model("llama"), [(PROMPT, "sinks:2+window:6")], n_tokens=10)
    assert own.token_ids == asked.tokens[0]


@pytest.mark.parametrize("keep", ["sinks:2+window:6", small("expected")])
def test_the_rope_is_found_under_a_codec_with_small_blocks(keep: str) -> None:
    """What one block of the probe reads of an earlier one would be rounded."""
    got = run(model("llama"), [(PROMPT, keep)], n_tokens=4, kv="int4", block_tokens=16)
    assert len(got.tokens[0]) == 4


def test_latents_are_turned_where_they_carry_rope() -> None:
    runner = open_runner(model("deepseek_v3"), memory="8MiB")
    try:
        turn = runner.rules(parse_keep("expected")).turn(1)  # type: ignore[union-attr]
        config, theta = model("deepseek_v3").config, 10000.0
        still, rotated = config.kv_lora_rank, config.qk_rope_head_dim
        x = torch.randn(2, 1, still + rotated)
        y = turn(x, torch.arange(5))
        assert y.shape == (2, 5, still + rotated)
        assert torch.equal(y[..., :still], x[..., :still].expand(-1, 5, -1))
        angles = theta ** -(torch.arange(0, rotated, 2) / rotated)
        for by in range(5):
            a, b = x[:, 0, still:].chunk(2, -1)
            cos, sin = (by * angles).cos(), (by * angles).sin()
            want = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
            torch.testing.assert_close(y[:, by, still:], want)
    finally:
        runner.close()


def test_a_layer_that_others_read_keeps_its_own_queries() -> None:
    """Shared KV: queries of the layers above would be taken for later ones, and cuts of a prompt would show."""
    whole, cut = (
        run(model("gemma3n"), [(PROMPT, small("expected"))], n_tokens=2, step_tokens=n)
        for n in (200, 17)
    )
    assert whole.seen.of(100) == cut.seen.of(100)
    assert whole.tokens == cut.tokens
