"""The sweep's check: three prompts through the engine, chunks mixed with decodes, against transformers' own texts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

import zoo  # noqa: E402 - the tests' models
from quire.engine import Engine, SamplingParams  # noqa: E402
from quire.engine.schedule import SchedulerConfig  # noqa: E402
from quire.models.open import open_runner  # noqa: E402
from quire.models.runner import ModelRunner  # noqa: E402

N_TOKENS = 10


class _FirstLogits:
    """A runner that remembers the first logits of every sequence."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.first: dict[tuple[int, ...], Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def forward(self, items: Any, adapter: str | None = None) -> Any:
        logits = self.runner.forward(items, adapter)
        at = 0
        for item in items:
            if item.logits:
                at += item.logits
                self.first.setdefault(tuple(item.tokens[:5]), logits[at - 1].clone())
        return logits


def check(model: Any) -> tuple[str, int, int, float]:
    """(way, equal texts, of how many, largest error of the first new logits in sigmas). Raises to refuse."""
    if not hasattr(model, "generate"):
        open_runner(model, memory="32MiB")
    vocab = min(zoo.VOCAB, int(model.config.get_text_config(decoder=True).vocab_size))
    texts = zoo.prompts(vocab)[:3]
    want, logits = zoo.reference(model, texts, N_TOKENS)
    runner = open_runner(model, memory="64MiB", block_tokens=8)
    assert isinstance(runner, ModelRunner)
    watched = _FirstLogits(runner)
    engine = Engine(watched, config=SchedulerConfig(step_tokens=12))  # type: ignore[arg-type]
    outputs = engine.generate(
        [list(t) for t in texts], SamplingParams(max_tokens=N_TOKENS, ignore_eos=True)
    )
    equal = sum(list(o.token_ids) == w for o, w in zip(outputs, want, strict=True))
    errors = [
        float((watched.first[tuple(t[:5])] - first[0]).abs().max() / first[0].std())
        for t, first in zip(texts, logits, strict=True)
    ]
    return runner.bridge.way, equal, len(texts), max(errors)
