"""Token for token what `generate()` says: every family, packed with others or as rows, prompts cut into chunks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import zoo
from models.driving import engine_texts, reference, runner_for
from quire.attention.reference import ReferenceBackend
from quire.models.runner import ModelRunner
from quire.spec import Full

MAIN = [
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3",
        "phi3",
        "gpt2",
        "gpt_neox",
        "mixtral",
        "olmo2",
        "granite",
    ),
    *("cohere2", "gpt_oss", "llama4", "deepseek_v2", "deepseek_v3", "gemma3n", "falcon"),
    *("jamba", "qwen3_next", "bamba", "mamba2"),
]
CONTROLS = [(n, c) for n in MAIN for c in zoo.ZOO[n].controls]


@pytest.mark.parametrize("name", zoo.names())
def test_text_equals_generate(name: str) -> None:
    texts = zoo.prompts()
    want = reference(name, texts)
    assert zoo.wanders(want)
    runner = runner_for(zoo.build(name))
    assert runner.bridge.way == zoo.ZOO[name].way
    if name in MAIN:
        assert runner.bridge.way != "dense"
    assert engine_texts(runner, texts) == want
    assert runner.usage().held_bytes == 0


def test_main_list_is_whole() -> None:
    assert set(MAIN) <= set(zoo.names())


class _Without(ReferenceBackend):
    """Attention that forgets one feature."""

    def __init__(self, feature: str) -> None:
        self.feature = feature

    def run(self, *args: object, **options: object) -> torch.Tensor:
        if self.feature in options:
            options[self.feature] = None
        return super().run(*args, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "feature"), CONTROLS)
def test_control_breaks_it(name: str, feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: leave one feature out of our attention and every text changes."""
    texts = zoo.prompts()
    runner = runner_for(zoo.build(name), way=zoo.ZOO[name].way)
    broken = _Without(feature)
    runner.bridge.backend = broken
    if feature in ("window", "chunk"):
        monkeypatch.setattr(type(runner.bridge.layout.spec.groups[0].span), "visible", Full.visible)
        for group in runner.bridge.layout.spec.groups:
            monkeypatch.setattr(type(group.span), "visible", Full.visible)
            monkeypatch.setattr(type(group.span), "needs", Full.needs)
    got, want = engine_texts(runner, texts), reference(name, texts)
    wrong = [a != b for a, b in zip(got, want, strict=True)]
    assert all(wrong), f"{name} does not notice that {feature} is gone"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_stay_close(dtype: torch.dtype) -> None:
    """First-token logits in 16 bits: within the model's own rounding of its own attention."""
    texts = zoo.prompts()
    model = zoo.build("llama").to(dtype)
    with torch.no_grad():
        want = [model(torch.tensor([t])).logits[0, -1].float() for t in texts]
    runner = runner_for(model)
    assert (
        runner.bridge.layout.spec.groups[0].codec
        == {"float16": "fp16", "bfloat16": "bf16"}[str(dtype)[6:]]
    )
    got = _first_logits(runner, texts)
    for a, b in zip(got, want, strict=True):
        assert float((a - b).abs().max() / b.std()) < 0.15


def _first_logits(runner: ModelRunner, texts: list[zoo.Tokens]) -> torch.Tensor:
    from quire.engine.runner import Item

    items = []
    for t in texts:
        table = runner.open()
        table.append(len(t))
        items.append(Item(table, t, 0, len(t), 1))
    return runner.forward(items)


def test_published_text(shared: Path) -> None:
    """stories260K: the greedy text that llama2.c publishes for it, 200 tokens, and five more."""
    folder = shared / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cases = json.loads((folder / "reference.json").read_text())["cases"]
    runner = runner_for(model)
    got = engine_texts(runner, [c["prompt_ids"] for c in cases], 200, budget=64)
    for text, case in zip(got, cases, strict=True):
        assert text == case["greedy_ids"], case["prompt"]
    assert len(cases) >= 5
