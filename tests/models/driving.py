"""How the tests of the bridge run a model: through the engine, in small chunks, requests of all lengths together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import zoo
from quire.engine import Engine, SamplingParams
from quire.engine.schedule import SchedulerConfig
from quire.models.open import open_runner
from quire.models.runner import ModelRunner

N_TOKENS = 20


def reference(name: str, texts: Sequence[zoo.Tokens], n_tokens: int = N_TOKENS) -> list[zoo.Tokens]:
    """transformers' own greedy text; a fresh model per prompt where its modules remember earlier ones."""
    if name == "llama_dynamic":
        return [zoo.reference(zoo.build(name), [t], n_tokens)[0][0] for t in texts]
    return zoo.reference(zoo.build(name), texts, n_tokens)[0]


def runner_for(model: Any, **options: Any) -> ModelRunner:
    """A runner over a small arena."""
    runner = open_runner(model, **{"memory": "32MiB", "block_tokens": 8, **options})
    assert isinstance(runner, ModelRunner)
    return runner


def engine_texts(
    runner: Any, texts: Sequence[zoo.Tokens], n_tokens: int = N_TOKENS, *, budget: int = 12
) -> list[zoo.Tokens]:
    """Greedy text of all prompts as one continuous batch; prompts are cut so that chunks mix with decodes."""
    engine = Engine(runner, config=SchedulerConfig(step_tokens=budget))
    outputs = engine.generate(
        [list(t) for t in texts], SamplingParams(max_tokens=n_tokens, ignore_eos=True)
    )
    return [list(o.token_ids) for o in outputs]
