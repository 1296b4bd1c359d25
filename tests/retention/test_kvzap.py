"""`kvzap`: what a map says of hidden states reaches the score of the right token, and maps belong to their model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fit_kvzap
import zoo
from models.driving import engine_texts, runner_for
from quire import attach, packaged
from quire.errors import ConfigError
from quire.models.hidden import attentions
from quire.models.load import weights_digest
from quire.models.open import open_runner
from quire.retention.kvzap import Policy

TEXTS = zoo.prompts(lengths=(60, 41))
PARAMETERS = "budget=0.5,sinks=2,window=4,boundary=3,every=8"


def fitted(model: Any, folder: Path, seed: int = 0, digest: str | None = None) -> str:
    """A random map of a model, as a policy."""
    torch.manual_seed(seed)
    config = model.config
    tensors = {}
    for layer in range(config.num_hidden_layers):
        tensors[f"{layer}.weight"] = torch.randn(config.num_key_value_heads, config.hidden_size)
        tensors[f"{layer}.bias"] = torch.randn(config.num_key_value_heads)
    path = folder / "map.safetensors"
    save_file(tensors, path, {"digest": digest or weights_digest(model)})
    return f"kvzap:map={path},{PARAMETERS}"


def by_hand(model: Any, text: list[int], policy: Policy) -> dict[tuple[int, int], torch.Tensor]:
    """What the map says of the states that transformers' own forward brings to each attention."""
    states: dict[int, torch.Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(
            lambda _m, _a, kw, n=n: states.__setitem__(n, kw["hidden_states"][0]), with_kwargs=True
        )
        for n, m in attentions(model).items()
    ]
    with torch.no_grad():
        model(torch.tensor([text]))
    for h in hooks:
        h.remove()
    out = {}
    for n, x in states.items():
        weight, bias = policy.maps[n]
        for head, row in enumerate((x @ weight.T + bias).T):
            out[n, head] = row
    return out


def collect(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int, int], torch.Tensor]:
    """(length, layer, head) to what the policy was shown."""
    shown: dict[tuple[int, int, int], torch.Tensor] = {}
    plain = Policy.score

    def score(self: Policy, seen: Any) -> torch.Tensor:
        for (layer, head), notes in zip(seen.coords, seen.notes.clone(), strict=True):
            shown[seen.length, layer, head] = notes
        return plain(self, seen)

    monkeypatch.setattr(Policy, "score", score)
    return shown


@pytest.mark.parametrize("way", ["packed", "dense batch"])
def test_scores_are_the_map_of_the_hidden_states(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the engine two prompts of a packed row in chunks; in `generate()` a padded batch."""
    model = zoo.build("llama")
    keep = fitted(model, tmp_path)
    shown = collect(monkeypatch)
    if way == "packed":
        runner = runner_for(model, keep=keep, attention="reference")
        policy = runner.rules(runner.keep).policy
        engine_texts(runner, TEXTS, 12, budget=50)
        runner.close()
    else:
        ids = torch.zeros(2, 60, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(TEXTS):
            ids[row, 60 - len(text) :] = torch.tensor(text)
            mask[row, 60 - len(text) :] = 1
        with attach(model, keep=keep, memory="32MiB", block_tokens=8) as attached:
            policy = attached.bridge.rules(attached.bridge.keep).policy
            model.generate(
                ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
            )
    for text in TEXTS:
        for (layer, head), want in by_hand(model, text, policy).items():
            torch.testing.assert_close(shown[len(text), layer, head], want, atol=1e-3, rtol=1e-3)


def test_generated_tokens_are_noted_too_and_hooks_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build("llama")
    shown = collect(monkeypatch)
    runner = runner_for(model, attention="reference")
    assert not any(m._forward_pre_hooks for m in attentions(model).values())
    from quire.engine import Engine, SamplingParams

    engine = Engine(runner)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    engine.add_request(TEXTS[0], params, keep=fitted(model, tmp_path))
    while engine.has_work:
        list(engine.step())
    later = {k: x for k, x in shown.items() if k[0] == 68}
    assert later
    assert all((x[-8:] != 0).all() for x in later.values())
    assert any(m._forward_pre_hooks for m in attentions(model).values())
    runner.close()
    assert not any(m._forward_pre_hooks for m in attentions(model).values())


def test_a_map_belongs_to_one_model(tmp_path: Path) -> None:
    model = zoo.build("llama")
    with pytest.raises(ConfigError, match=r"no map is known of this model.*kvzap:map=FILE"):
        runner_for(model, keep="kvzap:budget=0.5")
    with pytest.raises(ConfigError, match="made for another model"):
        runner_for(model, keep=fitted(model, tmp_path, digest="0" * 64))
    with pytest.raises(ConfigError, match="cannot be read"):
        runner_for(model, keep=f"kvzap:map={tmp_path / 'none'}")
    (tmp_path / "bad").write_text("no tensors")
    with pytest.raises(ConfigError, match=r"is no map that tools/fit_kvzap.py wrote"):
        runner_for(model, keep=f"kvzap:map={tmp_path / 'bad'}")


def test_a_wrapper_binds_what_it_wraps(tmp_path: Path) -> None:
    model = zoo.build("llama")
    runner = runner_for(model, keep=f"ada({fitted(model, tmp_path)})")
    assert sorted(runner.rules(runner.keep).policy.inner.maps) == [0, 1, 2]
    runner.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_packaged_model_has_a_map_in_any_dtype(dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(packaged.path(), dtype=dtype).eval()
    runner = open_runner(model, keep="kvzap:budget=0.5", memory="64MiB")
    assert sorted(runner.rules(runner.keep).policy.maps) == list(range(6))  # type: ignore[union-attr]
    runner.close()


def test_the_fit_finds_a_linear_map_again() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(8, 2), torch.tensor([3.0, -40.0])
    sums = fit_kvzap.Sums(8, 2)
    for n in range(20):
        x = torch.randn(50, 8)
        sums.add(x, x @ weight + bias, held=n % 10 == 9)
    found = sums.solve(1e-9)
    torch.testing.assert_close(found[:-1].float(), weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[-1].float(), bias, atol=1e-4, rtol=1e-4)
    assert min(sums.r2(found)) > 0.999
    drawn = sums.solve(1e6)
    assert drawn[:-1].abs().max() < 1e-3
    assert abs(float(drawn[-1, 1]) + 40) < 1, "the bias is not drawn to zero"


def test_fitting_a_small_model_gives_a_map_that_it_takes(tmp_path: Path) -> None:
    model = zoo.build("llama")
    torch.manual_seed(0)
    samples = [torch.randint(1, zoo.VOCAB, (80,)).tolist() for _ in range(10)]
    tensors, good = fit_kvzap.fit(model, iter(samples), 64, 1e-4)
    path = tmp_path / "map.safetensors"
    save_file(tensors, path, {"digest": weights_digest(model)})
    assert sorted(good) == [0, 1, 2]
    runner = runner_for(model, keep=f"kvzap:map={path},{PARAMETERS}")
    assert len(engine_texts(runner, TEXTS, 12)[0]) == 12
    runner.close()
