"""Injected outliers change what is cached and nothing that is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from models.driving import runner_for
from quire.errors import ConfigError
from quire.evaluate.decode import Scorer
from quire.evaluate.inject import inject
from quire.kernels import native
from quire.models.prepack import Prepacked

TEXT = zoo.prompts()[3]
WAYS = {
    "llama": "half",
    "mistral": "half",
    "qwen2": "half",  # biases
    "qwen3": "half",  # norms on q and k, one for all heads
    "olmo2": "half",  # norms over all heads
    "phi3": "half",  # fused qkv
    "gpt_neox": "half",  # fused per head; a quarter of the head is rotated
    "cohere": "interleaved",
    "gemma3": "half",  # norms that multiply by one and their weight
}


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([TEXT]), use_cache=False).logits[0]


def cached(model: Any) -> list[Any]:
    with torch.inference_mode():
        return model(torch.tensor([TEXT[:8]]), use_cache=True).past_key_values.layers


@pytest.mark.parametrize("name", WAYS)
def test_the_function_stays_and_the_cache_does_not(name: str) -> None:
    model = zoo.build(name)
    want, before = logits_of(model), cached(model)
    made = inject(model)
    assert made.pairing == WAYS[name]
    if name != "gemma3":
        assert torch.equal(logits_of(model), want), "a power of two changes no bit"
    assert (logits_of(model) - want).abs().max() < 1e-5 * want.std()
    for old, new in zip(before, cached(model), strict=True):
        heads, width = old.keys.shape[1], old.keys.shape[3]
        ratio = new.keys[0].norm(dim=1) / old.keys[0].norm(dim=1)  # over tokens: [heads, width]
        assert ((ratio - 8).abs() < 1e-3).sum(1).tolist() == [4] * heads, "two pairs"
        assert ((ratio - 1).abs() < 1e-3).sum(1).tolist() == [width - 4] * heads
        ratio = new.values[0].norm(dim=1) / old.values[0].norm(dim=1)
        assert ((ratio - 8).abs() < 1e-3).sum(1).tolist() == [1] * heads
        assert ((ratio - 1).abs() < 1e-3).sum(1).tolist() == [width - 1] * heads
    made.undo()
    assert torch.equal(
        torch.stack([x.keys for x in cached(model)]), torch.stack([x.keys for x in before])
    )


def cache_logits(model: Any, made: Any, kv: str = "auto") -> tuple[torch.Tensor, Any]:
    runner = runner_for(model, kv=kv)
    if made is not None:
        made.bind(runner)
    chunks = list(Scorer(runner, chunk_tokens=9).score(TEXT))
    return torch.cat([c.logits for c in chunks]), runner


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "phi3", "gpt_neox", "cohere"])
def test_through_the_cache_with_the_offset_too(name: str) -> None:
    model = zoo.build(name)
    want = logits_of(model)[:-1]
    norms = [x.keys[0].norm(dim=-1).mean(-1) for x in cached(zoo.build(name))]
    with inject(model) as made:
        got, runner = cache_logits(model, made)
        assert (got - want).abs().max() < 1e-3 * want.std()
        offset = made.offsets[0]
        assert offset.norm(dim=-1) == pytest.approx(4 * norms[0].numpy(), rel=0.25)
        table = runner.open()
        table.append(4)
        _ = runner.forward([_item(table)])
        group = runner.bridge.layout.spec.groups[0]
        block = runner.bridge.store.units(group, table.chains[0].ids[:1])
        keys = runner.bridge.store.view(group, group.layers[0], "k")[int(block[0]), :, :4]
        assert torch.allclose(keys - offset[:, None], cached(model)[0].keys[0, :, :4], atol=1e-4)
        runner.bridge.close()


def _item(table: Any) -> Any:
    from quire.engine.runner import Item

    return Item(table, TEXT, 0, 4, 1)


def test_an_offset_by_hand_is_really_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same constant on the keys of the newest block only is no constant, and the logits show it."""
    model = zoo.build("llama")
    made = inject(model)
    runner = runner_for(model)
    scorer = Scorer(runner, chunk_tokens=8)
    table_logits = []
    for i, chunk in enumerate(scorer.score(TEXT)):
        table_logits.append(chunk.logits)
        if i == 0:
            made.bind(runner)
    want = logits_of(model)[:-1]
    assert (torch.cat(table_logits) - want).abs().max() > 0.1 * want.std()


def test_seeded() -> None:
    def drawn(seed: int) -> torch.Tensor:
        model = zoo.build("llama")
        made = inject(model, seed=seed)
        key = model.model.layers[0].self_attn.k_proj.weight.sum(1)
        return torch.cat([key.detach(), made.offsets[1].flatten()])

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gemma2", "caps its attention scores"),
        ("gpt_oss", "sink logits"),
        ("deepseek_v3", "latents"),
        ("gpt2", "no attention with q_proj"),
        ("falcon", "FalconLinear, not a plain Linear"),
        ("mamba", "no attention"),
    ],
)
def test_refused_and_left_alone(name: str, says: str) -> None:
    model = zoo.build(name)
    want = logits_of(model)
    with pytest.raises(ConfigError, match=says) as refused:
        inject(model)
    assert "\n" not in str(refused.value)
    assert torch.equal(logits_of(model), want)


def test_a_projection_that_is_not_a_plain_linear_is_refused() -> None:
    class Odd(torch.nn.Linear):
        pass

    model = zoo.build("llama")
    old = model.model.layers[2].self_attn.v_proj
    model.model.layers[2].self_attn.v_proj = Odd(old.in_features, old.out_features, bias=False)
    want = logits_of(model)
    with pytest.raises(ConfigError, match="v_proj is a Odd, not a plain Linear"):
        inject(model)
    assert torch.equal(logits_of(model), want), "the layers before it are as they were"
    with pytest.raises(ConfigError, match="power of two"):
        inject(zoo.build("llama"), scale=3.0)


def test_an_injection_that_does_not_reach_the_cache_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A norm's weight that is zero times eight is zero: the logits would stay, and so would the keys."""
    model = zoo.build("gemma3")
    monkeypatch.setattr("quire.evaluate.inject._added", lambda _: 0.0)
    with pytest.raises(ConfigError, match="keys do not grow"):
        inject(model)


@pytest.mark.skipif(
    not (native.load() or torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no bfloat16 here, and the CPU kernels were not built",
)
def test_weights_that_were_packed_meanwhile_come_back_too() -> None:
    """Packing puts other tensors in the layers' place and, afterwards, yet others: what was injected must not stay."""
    model = zoo.build("llama").bfloat16()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(2):
        with inject(model):
            packed = Prepacked(model)
            packed.pack_layers()
            packed.restore()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
