"""Seen attention is the model's own: against transformers' eager probabilities, query by query."""

from __future__ import annotations

import math

import pytest
import torch

import zoo
from quire.errors import ConfigError, RequestError
from quire.evaluate.attention import FAR_TOKENS, SINK_SHARE, SINK_TOKENS, look
from quire.models.open import open_runner

TEXT = zoo.prompts(lengths=(37,))[0]


def eager(name: str) -> list[torch.Tensor]:
    model = zoo.build(name)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return [
            a[0].double() for a in model(torch.tensor([TEXT]), output_attentions=True).attentions
        ]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize("chosen", [-1, 20, 0])
def test_it_is_the_models_own(name: str, chosen: int) -> None:
    want = eager(name)
    runner = open_runner(zoo.build(name), memory="8MiB", block_tokens=4)
    seen = look(runner, TEXT, chosen)
    n, at = len(TEXT), chosen % len(TEXT)
    assert seen.chosen == at
    assert [(h.layer, h.head) for h in seen.heads] == [
        (layer, head) for layer, a in enumerate(want) for head in range(a.shape[0])
    ]
    for h in seen.heads:
        p = want[h.layer][h.head][:, :n]
        received = p.sum(0) / torch.arange(n, 0, -1)
        assert h.received == pytest.approx(received.tolist(), abs=2e-5)
        assert h.reads == pytest.approx(p[at, : at + 1].tolist(), abs=2e-5)
        heavy = p.sum(0).sort(descending=True).values[: math.ceil(0.2 * n)].sum() / p.sum()
        assert h.heavy_share == pytest.approx(float(heavy), abs=1e-4)
        far = p[FAR_TOKENS:].mean(0)
        assert h.sinks == tuple(j for j in range(8) if far[j] > SINK_SHARE)
    mean = torch.stack([a[:, at, : at + 1] for a in want]).flatten(0, 1).mean(0)
    assert seen.mean_reads() == pytest.approx(mean.tolist(), abs=2e-5)
    assert runner.usage().held_bytes == 0
    assert runner.bridge.observer is None
    runner.close()


@pytest.mark.parametrize("n", [2, SINK_TOKENS - 1, SINK_TOKENS])
def test_a_short_prompt_has_no_sinks_to_speak_of(n: int) -> None:
    """Where all attention is spread evenly, no head has a sink; of a few tokens nothing is said."""
    model = zoo.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    runner = open_runner(model, memory="8MiB", block_tokens=4)
    seen = look(runner, TEXT[:n])
    assert seen.heads[0].received[0] > (0.12 if n >= SINK_TOKENS else 0.1)
    assert {h.sinks for h in seen.heads} == ({()} if n >= SINK_TOKENS else {None})
    runner.close()


def test_what_cannot_be_looked_at() -> None:
    runner = open_runner(zoo.build("llama"), memory="8MiB")
    for tokens, chosen, words in (
        (TEXT[:1], -1, "from 2 to"),
        (TEXT, 37, "0 to 36 are"),
        (TEXT, -38, "0 to 36 are"),
    ):
        with pytest.raises(RequestError, match=words):
            look(runner, tokens, chosen)
    assert runner.usage().held_bytes == 0
    runner.close()
    with pytest.raises(ConfigError, match="keeps no cache"):
        look(open_runner(zoo.build("llama"), kv="none"), TEXT)
    dense = open_runner(zoo.build("bloom"), memory="8MiB")
    with pytest.raises(ConfigError, match="cannot be watched"):
        look(dense, TEXT)
    dense.close()
