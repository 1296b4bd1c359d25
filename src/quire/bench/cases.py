"""What is measured, as programs of the engine: each returns its tokens, and how long the part that counts took.

decode          ctx tokens of prompt each, then the steps after the first token
prefill         the prompts alone
concurrent      prompts and outputs, all submitted at once
shared-prefix   one prompt of ctx tokens, prefilled once, forked into `batch` texts
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quire.engine import Engine, SamplingParams
from quire.errors import CapacityError, ConfigError

__all__ = ["CASES", "Case", "Run", "check_fits", "run", "step_bytes"]

CASES = ("decode", "prefill", "concurrent", "shared-prefix")


@dataclass(frozen=True)
class Case:
    """What to run.

    Args:
        name: one of `CASES`.
        ctx: tokens of each prompt.
        batch: requests, or texts of one request.
        out: output tokens of each; a prefill has one.
        seed: of prompts and of what is drawn.
    """

    name: str
    ctx: int
    batch: int
    out: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in CASES:
            raise ConfigError(f"unknown case {self.name!r}; known: {', '.join(CASES)}")
        for name in ("ctx", "batch", "out"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.name == "decode" and self.out < 2:
            raise ConfigError("a decode is timed after the first token: --out must be at least 2")

    @property
    def outputs(self) -> int:
        """Output tokens of each text."""
        return 1 if self.name == "prefill" else self.out


@dataclass(frozen=True)
class Run:
    """One run of a case: the texts, the tokens that count and their seconds."""

    texts: list[list[int]]
    tokens: int
    seconds: float


def run(case: Case, runner: Any, clock: Callable[[], float] = time.perf_counter) -> Run:
    """Runs a case once, on an engine of its own; the runner is left open."""
    draw = random.Random(case.seed)
    forked = case.name == "shared-prefix"
    prompts = [
        [draw.randrange(runner.vocab_size) for _ in range(case.ctx)]
        for _ in range(1 if forked else case.batch)
    ]
    params = SamplingParams(
        max_tokens=case.outputs,
        ignore_eos=True,
        n=case.batch if forked else 1,
        temperature=1.0 if forked else 0.0,
        seed=case.seed,
    )
    engine = Engine(runner, eos_token_ids=())
    done: dict[str, list[list[int]]] = {}
    started: set[tuple[str, int]] = set()
    before, waiting, began = 0, case.name == "decode", clock()
    try:
        ids = [engine.add_request(p, params) for p in prompts]
        while engine.has_work:
            for delta in engine.step():
                if delta.error is not None:
                    raise delta.error
                started.add((delta.request_id, delta.index))
                if delta.output is not None:
                    done[delta.request_id] = [o.token_ids for o in delta.output.outputs]
            if waiting and len(started) == case.batch:
                before, waiting, began = engine.core.output_tokens, False, clock()
        seconds = clock() - began
        tokens = engine.core.output_tokens - before
    finally:
        engine.close()
    texts = [text for i in ids for text in done[i]]
    return Run(texts, case.batch * case.ctx if case.name == "prefill" else tokens, seconds)


def check_fits(case: Case, runner: Any) -> None:
    """Raises ConfigError, CapacityError: the context or the cache is too small for the case."""
    last = case.ctx + case.outputs
    if last > runner.max_context_tokens:
        raise ConfigError(
            f"--ctx {case.ctx} and --out {case.outputs} make {last} tokens and the model's context ends at "
            f"{runner.max_context_tokens}; ask for fewer"
        )
    bridge = getattr(runner, "bridge", None)
    if bridge is None:
        return
    have = runner.usage().total_bytes
    need = case.batch * bridge.layout.spec.bytes_for(last)
    if need > have or not runner.fits(last):
        raise CapacityError(
            f"{case.batch} x {last} tokens need {need:,} bytes of cache and --memory gives {have:,}; give more, or "
            "lower --batch or --ctx"
        )


def step_bytes(case: Case, runner: Any) -> tuple[int, int]:
    """What one decode step reads: the weights once, and in the middle of the output every text's cache.

    Returns:
        Bytes of weights (an embedding is looked up, not read, unless the head shares it), and of cache.
    """
    model = runner.model
    head = model.get_output_embeddings()
    table = model.get_input_embeddings().weight
    shared = head is not None and head.weight is table
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not shared:
        weights -= table.numel() * table.element_size()
    middle = case.ctx + case.outputs // 2
    return weights, round(case.batch * middle * runner.bytes_per_token)
