"""Models that carry adapters or quantised weights run as they are; each request has its adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quire
import zoo
from models.driving import engine_texts, runner_for
from quire.engine import Engine, SamplingParams
from quire.errors import RequestError

peft = pytest.importorskip("peft", reason="adapters need the peft package")

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:Already found a `peft_config`:UserWarning"
    ),  # two on purpose
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    ),  # peft's
]
N = 12
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "down_proj"],
    "deepseek_v3": ["kv_b_proj", "o_proj"],
}


def lora(name: str) -> Any:
    return peft.LoraConfig(r=4, target_modules=TARGETS[name], init_lora_weights=False)


def randomise(model: Any) -> None:
    """Adapters as loud as the weights, so that no text survives the wrong one."""
    torch.manual_seed(1)
    for key, p in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(p, std=0.3)


def carrying(name: str) -> Any:
    """Two adapters by transformers' own integration; ada is active."""
    model = zoo.build(name)
    for who in ("ada", "bob"):
        model.add_adapter(lora(name), adapter_name=who)
    randomise(model)
    model.set_adapter("ada")
    return model.eval()


def wanted(model: Any, name: str | None) -> list[zoo.Tokens]:
    if name is None:
        model.disable_adapters()
    else:
        model.enable_adapters()
        model.set_adapter(name)
    return zoo.reference(model, zoo.prompts(), N)[0]


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_each_request_has_its_adapter(name: str) -> None:
    model = carrying(name)
    want = {who: wanted(model, who) for who in ("bob", "ada")}
    assert all(a != b for a, b in zip(want["ada"], want["bob"], strict=True))
    runner = runner_for(model)
    assert runner.bridge.way == "packed", "latents are absorbed with the adapter in them"
    engine, asked, got = Engine(runner), {}, {}
    for i, text in enumerate(zoo.prompts()):
        for who in (None, "bob", "ada"):
            params = SamplingParams(max_tokens=N, ignore_eos=True)
            asked[engine.add_request(list(text), params, adapter=who)] = (i, who or "ada")
    while engine.has_work:
        got.update(
            {d.request_id: d.output.token_ids for d in engine.step() if d.output is not None}
        )
    for request, (i, who) in asked.items():
        assert list(got[request]) == want[who][i], (i, who)


def test_disabled_adapters_stay_disabled() -> None:
    model = carrying("llama")
    want = wanted(model, None)
    assert engine_texts(runner_for(model), zoo.prompts(), N) == want


def test_wrapped_model() -> None:
    """PEFT's own wrapper, through the engine and through its `generate()`."""
    wrapped = peft.get_peft_model(zoo.build("llama"), lora("llama"), adapter_name="ada")
    randomise(wrapped)
    wrapped.eval()
    want = zoo.reference(wrapped, zoo.prompts(), N)[0]
    runner = runner_for(wrapped)
    assert engine_texts(runner, zoo.prompts(), N) == want
    runner.bridge.close()
    with quire.attach(wrapped, memory="32MiB", block_tokens=8) as attached:
        assert zoo.reference(wrapped, zoo.prompts(), N)[0] == want
        assert attached.bridge.store.pools


def test_unknown_adapter_is_refused() -> None:
    runner = runner_for(carrying("llama"))
    with pytest.raises(RequestError, match="it has ada, bob"):
        runner.check_adapter("eve")
    with pytest.raises(RequestError, match="is not one of"):
        runner.adapters.use("eve")
    plain = runner_for(zoo.build("llama"))
    with pytest.raises(RequestError, match="carries no adapters"):
        plain.adapters.use("eve")


class Int8Linear(torch.nn.Module):
    """Weights quantised per output channel, as bitsandbytes and GPTQ hold them: no float matrix to read."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.scale = torch.nn.Parameter(scale, requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.codes  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.codes.to(x.dtype) * self.scale).T  # type: ignore[operator]


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gpt_oss"])
def test_quantised_weights(name: str) -> None:
    model = zoo.build(name)
    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and child.bias is None and key != "lm_head":
                setattr(module, key, Int8Linear(child))
    want = zoo.reference(model, zoo.prompts(), N)[0]
    runner = runner_for(model)
    assert runner.bridge.way == "packed"
    assert engine_texts(runner, zoo.prompts(), N) == want
