"""What is measured, as programs of the engine: each returns its tokens, and how long the part that counts took.

decode          ctx tokens of prompt each, then the steps in which all texts go on
prefill         the prompts alone
concurrent      prompts and outputs, all submitted at once
shared-prefix   prompts that begin with the same ctx tokens and go on with `own` of their own, all submitted at once
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
        ctx: tokens of each prompt, or of the prefix that all share.
        batch: requests.
        out: output tokens of each; a prefill has one.
        own: tokens of each prompt behind a shared prefix.
        seed: of prompts and of what is drawn.
    """

    name: str
    ctx: int
    batch: int
    out: int
    seed: int = 0
    own: int = 0

    def __post_init__(self) -> None:
        if self.name not in CASES:
            raise ConfigError(f"unknown case {self.name!r}; known: {', '.join(CASES)}")
        for name in ("ctx", "batch", "out"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.shared and self.own < 1:
            raise ConfigError(f"--own must be at least 1, not {self.own}")
        if self.own and not self.shared:
            raise ConfigError(f"--own is of shared-prefix, not of {self.name}; drop it")
        if self.name == "decode" and self.out < 2:
            raise ConfigError("a decode is timed after the first token: --out must be at least 2")

    @property
    def outputs(self) -> int:
        """Output tokens of each text."""
        return 1 if self.name == "prefill" else self.out

    @property
    def shared(self) -> bool:
        """Whether the prompts have a beginning in common."""
        return self.name == "shared-prefix"

    @property
    def longest(self) -> int:
        """Tokens of one text, prompt and output."""
        return self.ctx + self.own + self.outputs

    @property
    def least_computed(self) -> int:
        """Token positions that must pass through the model when what is shared is computed once."""
        return self.ctx + self.batch * (self.own + self.outputs - 1)


@dataclass(frozen=True)
class Run:
    """One run of a case: the texts, the tokens that count, their seconds, and the positions that were computed."""

    texts: list[list[int]]
    tokens: int
    seconds: float
    computed: int = 0


def run(
    case: Case,
    runner: Any,
    clock: Callable[[], float] = time.perf_counter,
    *,
    timed: bool = True,
) -> Run:
    """Runs a case once, on an engine of its own and over an empty cache; the runner is left open.

    Raises:
        ConfigError: what is to be timed has no step that all texts take part in.
    """
    prompts = _prompts(case, runner.vocab_size)
    sharing = getattr(runner, "sharing", None)
    if sharing is not None:
        sharing.clear()
    params = SamplingParams(max_tokens=case.outputs, ignore_eos=True, seed=case.seed)
    engine = Engine(runner, eos_token_ids=())
    done: dict[str, list[list[int]]] = {}
    started: set[tuple[str, int]] = set()
    computed = 0
    before, waiting, began = 0, case.name == "decode", clock()
    ended: tuple[float, int] | None = None  # of a decode: when the first text ends, all have run
    try:
        ids = [engine.add_request(p, params) for p in prompts]
        while engine.has_work:
            for delta in engine.step():
                if delta.error is not None:
                    raise delta.error
                started.add((delta.request_id, delta.index))
                if delta.output is not None:
                    done[delta.request_id] = [o.token_ids for o in delta.output.outputs]
                    computed += delta.output.figures.computed_tokens
            if case.name == "decode" and done and ended is None:
                ended = clock(), engine.core.output_tokens
            if waiting and len(started) == case.batch:
                before, waiting, began = engine.core.output_tokens, False, clock()
        end, last = ended or (clock(), engine.core.output_tokens)
        seconds, tokens = end - began, last - before
    finally:
        engine.close()
    if timed and tokens <= 0:
        raise ConfigError(
            f"the first of {case.batch} texts ended before the last began, so no step had all of them: give more than "
            f"--out {case.outputs}"
        )
    texts = [text for i in ids for text in done[i]]
    counted = case.batch * case.ctx if case.name == "prefill" else tokens
    return Run(texts, counted, seconds, computed)


def _prompts(case: Case, vocab_size: int) -> list[list[int]]:
    draw = random.Random(case.seed)

    def some(n: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(n)]

    if not case.shared:
        return [some(case.ctx) for _ in range(case.batch)]
    prefix = some(case.ctx)
    # each goes on with a token of its own, so that what is in common is the prefix and no more
    return [[*prefix, i % vocab_size, *some(case.own - 1)] for i in range(case.batch)]


def check_fits(case: Case, runner: Any) -> None:
    """Raises ConfigError, CapacityError: the context or the cache is too small for the case."""
    last = case.longest
    if last > runner.max_context_tokens:
        own = f", --own {case.own}" if case.own else ""
        raise ConfigError(
            f"--ctx {case.ctx}{own} and --out {case.outputs} make {last} tokens and the model's context ends at "
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
    middle = case.ctx + case.own + case.outputs // 2
    return weights, round(case.batch * middle * runner.bytes_per_token)
