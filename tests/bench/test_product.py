"""What a prompt multiplies, counted by hand; and a product's forms, which give the same numbers."""

from __future__ import annotations

import pytest
import torch

import zoo
from models.driving import runner_for
from quire.bench.models import SIZES, random_llama
from quire.bench.product import Product, prompt_work
from quire.models.open import open_runner


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("weights", ["plain", "auto"])
def test_a_llamas_work(kv: str, weights: str) -> None:
    shape = SIZES["tiny"]
    runner = open_runner(
        random_llama("tiny", context=64).model, kv=kv, weights=weights, memory="16MiB"
    )
    n, width = 10, shape["hidden"]
    kv_width = width // shape["heads"] * shape["kv_heads"]
    layer = 2 * width * width + 2 * width * kv_width + 3 * width * shape["intermediate"]
    linear = n * shape["layers"] * layer + width * shape["vocab"]
    attention = shape["layers"] * 2 * width * (n * (n + 1) // 2)
    assert prompt_work(runner, n) == 2 * (linear + attention)
    runner.close()


def test_windows_bound_what_is_read() -> None:
    model = zoo.build("mistral")
    window = model.config.sliding_window
    layers, wide = model.config.num_hidden_layers, model.config.num_attention_heads
    wide *= model.config.head_dim
    runner = runner_for(model)
    within, beyond = (prompt_work(runner, n) for n in (window, window + 1))
    assert within is not None
    assert beyond is not None
    token = sum(m.weight.numel() for m in model.model.modules() if type(m) is torch.nn.Linear)
    assert beyond - within == 2 * (token + layers * 2 * wide * window)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt2", "jamba"])
def test_what_is_not_counted_has_no_work(name: str) -> None:
    assert prompt_work(runner_for(zoo.build(name)), 10) is None


def test_experts_are_not_counted_as_if_all_were_asked() -> None:
    model = zoo.build("llama")
    runner = runner_for(model)
    assert prompt_work(runner, 10) is not None
    model.config.num_experts = 4
    assert prompt_work(runner, 10) is None


def test_latents_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_for(zoo.build("llama"))
    assert prompt_work(runner, 10) is not None
    monkeypatch.setattr(runner.bridge, "layers", lambda: [(0, ("latent", "k_rope"))])
    assert prompt_work(runner, 10) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forms_give_one_result(dtype: torch.dtype) -> None:
    product = Product(dtype, (7, 32, 48))
    assert product.work == 2 * 7 * 32 * 48
    assert product.form in product.forms
    x = torch.randn(5, 32).to(dtype)
    first, *others = (form(x).float() for form in product.forms.values())
    for other in others:
        assert torch.allclose(first, other, rtol=2e-2, atol=2e-2)
    assert product.gflop_per_s() > 0
