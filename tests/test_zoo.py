"""The zoo can fail: texts wander, no choice is close, and every control changes the text."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers

import sweep_models
import zoo
import zoo_sweep

N_TOKENS = 24
CONTROLS = [(entry.name, feature) for entry in zoo.ZOO.values() for feature in entry.controls]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by threads, and lose tenfold on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def said(name: str) -> tuple[list[zoo.Tokens], list[torch.Tensor]]:
    return zoo.reference(zoo.build(name), zoo.prompts(), N_TOKENS)


@pytest.mark.parametrize("name", zoo.names())
def test_text_can_tell_right_from_wrong(name: str) -> None:
    texts = zoo.prompts()
    tokens, logits = said(name)
    assert zoo.wanders(tokens), f"{name} repeats itself"
    assert zoo.no_near_ties(logits), f"{name}: margin {zoo.smallest_margin(logits):.1e} sigma"
    # The far past matters: other first ten tokens, the same last twenty-one, another answer.
    other = torch.tensor([texts[3][:10][::-1] + texts[3][10:]])
    with torch.no_grad():
        changed = zoo.build(name)(other).logits[0, -1]
    assert float((changed - logits[3][0]).abs().max() / logits[3][0].std()) > 0.1


@pytest.mark.parametrize(("name", "feature"), CONTROLS)
def test_control_changes_every_text(name: str, feature: str) -> None:
    texts = zoo.prompts()
    with_it, without = zoo.build(name), zoo.build(name, without=feature)
    weights = without.state_dict()
    for key, value in with_it.state_dict().items():
        assert key.endswith(".sinks") or torch.equal(value, weights[key]), key
    right, _ = said(name)
    wrong, _ = zoo.reference(without, texts, N_TOKENS)
    assert all(a != b for a, b in zip(right, wrong, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "jamba", "gemma3n"])
def test_build_repeats(name: str) -> None:
    first, second = zoo.build(name).state_dict(), zoo.build(name).state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@torch.no_grad()
@pytest.mark.parametrize("name", zoo.names("rows"))
def test_chunked_says_whether_a_forward_of_many_tokens_may_continue(name: str) -> None:
    model = zoo.build(name)
    text = torch.tensor([zoo.prompts()[3]])
    takes = inspect.signature(model.forward).parameters
    kwargs: dict[str, Any] = {"use_cache": True}
    kwargs["cache_params" if "cache_params" in takes else "past_key_values"] = (
        transformers.DynamicCache(config=model.config)
    )
    whole = model(text, use_cache=False).logits[0, -1]
    last = torch.empty(0)
    for start, stop in ((0, 16), (16, 31)):
        if "position_ids" in takes:  # Bamba's own default forgets what is cached
            kwargs["position_ids"] = torch.arange(start, stop)[None]
        last = model(text[:, start:stop], **kwargs).logits[0, -1]
    gap = float((last - whole).abs().max() / whole.std())
    assert (gap < 1e-3) if zoo.ZOO[name].chunked else (gap > 0.1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "phi3_longrope", "llama_dynamic"])
def test_regime_follows_the_longest_position_of_the_forward(name: str) -> None:
    model = zoo.build(name)
    text = torch.tensor([zoo.prompts()[1]])
    limit = zoo.ZOO[name].regime_tokens
    short = model(text[:, : limit or 16], use_cache=False).logits
    longer = model(text[:, : (limit or 16) + 1], use_cache=False).logits[:, :-1]
    gap = float((short - longer).abs().max() / short.std())
    assert (gap > 0.1) if limit else (gap < 1e-4)


def test_refused_entries_are_what_they_say() -> None:
    assert not zoo.build("bert").can_generate()
    assert zoo.build("t5").config.is_encoder_decoder
    assert zoo.names("refused")
    assert not set(zoo.names("refused")) & set(zoo.names())


# --- The sweep ------------------------------------------------------------------------------------


class RefusedError(Exception):
    """Stands for an exception of the package."""

    __module__ = "quire.errors"


def fake_check(model: torch.nn.Module) -> tuple[str, int, int, float]:
    """Says something else of every class."""
    kind = type(model).__name__
    if kind == "Qwen2ForCausalLM":
        raise RefusedError("not today,\n  because")
    if kind == "PhiForCausalLM":
        raise KeyError("oops")
    return ("packed", 3, 3, 2e-6) if kind == "LlamaForCausalLM" else ("rows", 2, 3, 0.5)


def test_sweep_writes_a_page_that_tells_right_from_wrong() -> None:
    types = ["llama", "mamba2", "qwen2", "phi", "gemma4_assistant"]
    rows = {row.model_type: row for row in sweep_models.sweep(types, fake_check)}
    assert rows["llama"].good
    assert not rows["mamba2"].good
    assert (rows["qwen2"].way, rows["qwen2"].reason) == ("refused", "not today, because")
    assert (rows["phi"].way, rows["phi"].reason) == ("failed", "KeyError: 'oops'")
    assert rows["gemma4_assistant"].way == "not built"
    count = sweep_models.totals(list(rows.values()))
    assert (count["packed"], count["all"], count["wrong"], count["refused"]) == (1, 1, 1, 1)
    page = sweep_models.page(list(rows.values()), versions="v")
    assert "| llama | LlamaForCausalLM | packed | 3/3 | 2e-06 |  |" in page
    assert "| mamba2 | Mamba2ForCausalLM | **rows: wrong** | 2/3 | 5e-01 |  |" in page
    assert "| **all ways** | **1** |" in page


def test_sweep_outlives_a_class_that_hangs_and_one_that_dies() -> None:
    def check(model: torch.nn.Module) -> tuple[str, int, int, float]:
        os._exit(7) if type(model).__name__ == "LlamaForCausalLM" else time.sleep(60)
        raise AssertionError

    (died,) = sweep_models.sweep(["llama"], check)
    assert died.reason == "died, exit 7"
    (hung,) = sweep_models.sweep(["phi"], check, limit_s=3.0)
    assert hung.reason == "no answer within 3 s"


def test_recipe_knows_the_whole_mapping() -> None:
    types = zoo_sweep.all_causal_types()
    assert {"llama", "jamba", "gemma3"} <= set(types)
    assert set(zoo_sweep.EXCLUDED) <= set(types)
    assert set(zoo_sweep.SPECIAL) <= set(types)


@pytest.mark.parametrize("model_type", ["llama", "gemma3", "bart", "falcon_h1"])
def test_swept_models_can_tell_right_from_wrong(model_type: str) -> None:
    model = zoo_sweep.build_any(model_type)
    again = zoo_sweep.build_any(model_type).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    tokens, logits = zoo.reference(model, zoo_sweep.TEXTS, zoo_sweep.N_TOKENS)
    assert len({t for text in tokens for t in text}) >= 8
    assert zoo.no_near_ties(logits)
    assert zoo_sweep.first_error([text[0] for text in logits], logits) == 0
    assert zoo_sweep.first_error([text[1] for text in logits], logits) > 0.1
