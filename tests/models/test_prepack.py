"""Packed weights: the same bits out, the same bits back, and nothing packed that somebody else needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quire
import zoo
from models.driving import engine_texts, runner_for
from quire.errors import ConfigError
from quire.kernels import native
from quire.models import prepack
from quire.models.load import Loaded, full_digest, weights_digest
from quire.models.open import open_runner
from quire.models.small import Small

TEXTS = zoo.prompts()[:3]

needs_onednn = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here"
)
needs_packing = pytest.mark.skipif(
    not (native.load() or torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no bfloat16 here, and the CPU kernels were not built",
)


def llama(dtype: torch.dtype = torch.bfloat16) -> Any:
    return zoo.build("llama").to(dtype)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear}


def packed(model: nn.Module) -> set[str]:
    return {n for n, m in linears(model).items() if prepack.is_packed(m.weight)}


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone().view(torch.uint8) for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@needs_packing
def test_the_same_text_and_the_same_weights_afterwards() -> None:
    plain = runner_for(llama(), weights="plain")
    assert plain.weights is None
    want = engine_texts(plain, TEXTS)
    model = llama()
    before, trained = bits(model), {n: p.requires_grad for n, p in model.named_parameters()}
    runner = runner_for(model)
    assert packed(model) == set(linears(model))
    assert runner.weights is not None
    assert runner.weights.n_layers == len(linears(model))
    plain_bytes = sum(2 * m.weight.numel() for m in linears(model).values())
    assert plain_bytes <= runner.weights.n_bytes <= 1.01 * plain_bytes  # zeros at the edges
    assert engine_texts(runner, TEXTS) == want
    runner.close()
    assert not packed(model)
    assert same(bits(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trained
    assert all("forward" not in m.__dict__ for m in linears(model).values())
    runner.close()  # again: nothing happens


@needs_onednn
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("bias", [False, True])
def test_one_layer_is_the_plain_one(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(130, 257, bias=bias).bfloat16().requires_grad_(False)
    x = torch.randn(2, rows, 130).bfloat16()
    want = layer(x)
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
    with torch.inference_mode():
        assert torch.equal(prepack._forward(weight, layer.bias)(x), want)


def test_float32_only_when_asked() -> None:
    want = engine_texts(runner_for(llama(torch.float32)), TEXTS)
    model = llama(torch.float32)
    before = bits(model)
    assert runner_for(model).weights is None
    model = llama(torch.float32)
    runner = runner_for(model, weights="prepacked")
    assert packed(model) == set(linears(model))
    assert engine_texts(runner, TEXTS) == want
    runner.close()
    assert same(bits(model), before)


@needs_packing
def test_a_tied_head_stays_plain() -> None:
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    runner = runner_for(model)
    assert packed(model) == set(linears(model)) - {"lm_head"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    runner.close()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@needs_packing
def test_adapters_stay_plain() -> None:
    peft = pytest.importorskip("peft", reason="adapters need the peft package")
    model = llama()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    runner = runner_for(model.eval())
    assert packed(model)
    assert not any("q_proj" in n for n in packed(model))
    runner.close()


@needs_packing
def test_absorbed_latents_keep_the_matrix_that_they_read() -> None:
    texts = zoo.prompts()[:2]
    want = engine_texts(runner_for(zoo.build("deepseek_v3"), weights="plain"), texts)
    model = zoo.build("deepseek_v3")
    runner = runner_for(model, weights="prepacked")
    assert packed(model)
    assert not any("kv_b_proj" in n for n in packed(model))
    assert engine_texts(runner, texts) == want


class Reader(nn.Module):
    """Somebody's module that reads its layer's weight by itself."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.inner.weight)


@needs_packing
def test_a_model_that_reads_its_weights_itself_is_left_alone() -> None:
    model = llama()
    model.model.layers[1].mlp.down_proj = Reader(model.model.layers[1].mlp.down_proj)
    before = bits(model)
    assert runner_for(model, way="packed").weights is None
    assert not packed(model)
    assert same(bits(model), before)
    model = llama()
    model.model.layers[1].mlp.down_proj = Reader(model.model.layers[1].mlp.down_proj)
    with pytest.raises(ConfigError, match=r"own code does not take them.*use auto or plain"):
        runner_for(model, weights="prepacked")
    assert model.config._attn_implementation != "quire"  # given back whole


@needs_packing
def test_a_packed_model_that_differs_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(forward: Any) -> Any:
        def made(*args: Any) -> Any:
            right = forward(*args)
            return lambda x: -right(x)

        return made

    monkeypatch.setattr(prepack, "_forward", wrong(prepack._forward))
    monkeypatch.setattr(prepack, "panel_forward", wrong(prepack.panel_forward))
    model = llama()
    with pytest.raises(ConfigError, match="logits differ by"):
        runner_for(model, weights="prepacked")
    assert not packed(model)


@needs_packing
def test_what_somebody_packed_is_left_to_him() -> None:
    model = llama()
    before = bits(model)
    first = prepack.Prepacked(model)
    first.pack_layers()
    assert packed(model) == set(linears(model))
    assert prepack.prepack(model) is None
    assert packed(model) == set(linears(model))
    first.restore()
    assert same(bits(model), before)


@needs_packing
def test_norms_that_would_change_the_model_stay_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def replace(self: Small) -> None:
        tried.append("lent")
        norm = self._model.model.norm
        object.__setattr__(norm, "forward", lambda x: -x)
        self._undo.append(lambda: object.__delattr__(norm, "forward"))

    monkeypatch.setattr(Small, "replace", replace)
    model = llama()
    found = prepack.prepack(model, "prepacked")
    assert found is not None
    assert tried == ["lent"]
    assert packed(model) == set(linears(model))
    assert "forward" not in vars(model.model.norm)
    found.restore()


@needs_packing
def test_gradients_flow_through_a_plain_copy() -> None:
    ids = torch.tensor([[1, 2, 3, 4]])

    def embedding_gradient(model: Any) -> torch.Tensor:
        model(input_ids=ids, labels=ids).loss.backward()
        return model.model.embed_tokens.weight.grad

    grads = []
    for weights in ("plain", "prepacked"):
        model = llama()
        runner_for(model, weights=weights)
        grads.append(embedding_gradient(model))
    assert torch.equal(*grads)


@needs_packing
def test_generate_is_lent_a_cache_and_nothing_else_unless_asked() -> None:
    model = llama()
    with quire.attach(model, memory="32MiB"):
        assert not packed(model)
    before = bits(model)
    with quire.attach(model, memory="32MiB", weights="auto") as attached:
        assert packed(model)
        assert attached.bridge.weights is not None
    assert same(bits(model), before)


@needs_packing
def test_without_a_cache_they_are_packed_too() -> None:
    model = llama()
    before = bits(model)
    runner = open_runner(model, kv="none")
    assert packed(model)
    runner.close()
    assert same(bits(model), before)


@needs_packing
def test_digests_are_of_the_plain_weights() -> None:
    """What was calibrated for a model fits it while another runner has packed it."""

    def digests(model: Any) -> tuple[str, bytes, str]:
        loaded = Loaded(model, None, "")
        return loaded.digest, full_digest(model.named_parameters()), weights_digest(model)

    model = llama()
    before = digests(model)
    runner = runner_for(model)
    assert packed(model)
    assert digests(model) == before
    runner.close()


@pytest.mark.skipif(native.load() is None, reason="the CPU kernels were not built here")
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_fewer_bits_halve_the_weights_and_round_them(form: str) -> None:
    ids = torch.tensor([[5, 9, 11, 3, 77]])
    with torch.inference_mode():
        want = llama()(ids).logits.float()
    model = llama()
    plain = {n: m.weight.float() for n, m in linears(model).items()}
    runner = open_runner(model, memory="32MiB", weights=form)
    assert runner.weights is not None
    assert runner.weights.form == form
    assert packed(model) == set(plain)
    bits = {n: 8 if form == "int8" or n == "lm_head" else 4 for n in plain}
    expected = sum(w.numel() * {8: 1.0, 4: 4.5 / 8}[bits[n]] for n, w in plain.items())
    assert 1 <= runner.weights.n_bytes / expected <= 1.15  # scales, and zeros at the edges
    with torch.inference_mode():
        got = model(ids).logits.float()
    runner.close()
    assert not packed(model)
    for name, layer in linears(model).items():
        w = plain[name]
        if bits[name] == 4:
            w = F.pad(w, (0, -w.shape[1] % 32)).unflatten(1, (-1, 32))
        step = w.abs().amax(-1, keepdim=True) / (127 if bits[name] == 8 else 7)
        # 8 bits reach the largest weight; 4 may clip it by a tenth, and fit the scale to all
        most = 0.502 * step + 2**-8 * step * 127 if bits[name] == 8 else 1.6 * step
        off = (
            F.pad(layer.weight.float(), (0, w[0].numel() - plain[name].shape[1]))
            if bits[name] == 4
            else layer.weight.float()
        )
        assert ((off.view(w.shape) - w).abs() <= most).all()
    with torch.inference_mode():
        rounded = model(ids).logits.float()
    # the same weights, in plain form
    assert float((got - rounded).abs().max() / want.std()) < 0.1
    off = float((got - want).square().mean().sqrt() / want.std())
    assert 0 < off < {"int8": 0.1, "int4": 0.8}[form]


def test_refusals_say_why() -> None:
    if native.load() is not None:
        for form in ("int8", "int4"):
            with pytest.raises(ConfigError, match=rf"{form}.*in bfloat16, and this one.*float32"):
                open_runner(llama(torch.float32), kv="none", weights=form)
    model = llama(torch.float16)
    with pytest.raises(ConfigError, match="computes in float16; use auto or plain"):
        open_runner(model, kv="none", weights="prepacked")
    assert open_runner(model, kv="none").weights is None
    with pytest.raises(ConfigError, match="unknown weights 'packed'; known: auto, plain"):
        open_runner(model, weights="packed")
    gpt2 = zoo.build("gpt2")  # Conv1D, and a head that it usually shares
    gpt2.lm_head.weight = gpt2.transformer.wte.weight
    with pytest.raises(ConfigError, match="none of this model's layers is a plain linear layer"):
        open_runner(gpt2, kv="none", weights="prepacked")
