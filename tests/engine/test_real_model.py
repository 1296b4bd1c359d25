"""The engine over the real bridge and a real, small model: the published texts, token for token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.engine import Engine, SamplingParams, SchedulerConfig

connect = pytest.importorskip("quire.models.attach").connect
runners = pytest.importorskip("quire.models.runner")


@pytest.fixture(scope="module")
def stories(shared: Path) -> tuple[Any, Any, list[dict[str, Any]]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cases = json.loads((folder / "reference.json").read_text())["cases"]
    return model, AutoTokenizer.from_pretrained(folder), cases


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A model this small only waits for its threads, minutes of it when the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["roomy", "tight", "none"])
def engine(request: pytest.FixtureRequest, stories: Any) -> Iterator[Engine]:
    from quire.spec import KVConfig

    model, tokenizer, _ = stories
    if request.param == "none":
        yield Engine(runners.NoCacheRunner(model), tokenizer)
        return
    memory = {"roomy": 64 << 20, "tight": 4 << 20}[request.param]
    bridge = connect(model, KVConfig(), memory=memory)
    config = SchedulerConfig(step_tokens=64)
    try:
        with Engine(runners.ModelRunner(bridge), tokenizer, config=config) as engine:
            yield engine
            assert bridge.store.usage().held_bytes == 0
            if request.param == "tight":
                assert engine.stats().scheduler.preemptions > 0
    finally:
        bridge.patches.undo()


def test_published_texts_and_seeds_in_one_batch(engine: Engine, stories: Any) -> None:
    """Greedy texts beside sampled forks; the pool of the tight run holds about a third of them at a time."""
    _, _, cases = stories
    none = isinstance(engine.runner, runners.NoCacheRunner)
    n_tokens = 30 if none else 200
    copies = 1 if none else 3
    greedy = SamplingParams(max_tokens=n_tokens, ignore_eos=True)
    warm = SamplingParams(max_tokens=30, temperature=1.0, top_p=0.95, seed=3, n=2, ignore_eos=True)
    prompts = [case["prompt_ids"] for case in cases] * copies
    outputs = engine.generate([*prompts, *prompts], [greedy] * len(prompts) + [warm] * len(prompts))
    for case, output in zip(cases * copies, outputs, strict=False):
        assert output.token_ids == case["greedy_ids"][:n_tokens]
    for prompt, output in zip(prompts[: len(cases)], outputs[len(prompts) :], strict=False):
        [alone] = engine.generate([prompt], warm)
        assert [o.token_ids for o in output.outputs] == [o.token_ids for o in alone.outputs]
