"""What a step waits for: bytes in decode, products in prefill. Timed on a random model larger than a processor's cache.

seconds of a decode step = fixed + bytes of cache / bandwidth        fitted over contexts
fixed                    = bytes of weights / bandwidth + what does not fit
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from quire.evaluate.claims.claim import Claim, Outcome

__all__ = ["CLAIMS", "Bounds", "Line", "Machine", "fit", "measure"]

CHUNK = 512
"""Tokens written at a time, and of the prompt that is timed."""
SHAPE = dict(layers=4, hidden=1024, heads=8, intermediate=2816, vocab=8192)
STREAM_BYTES = 256 << 20
MIN_R2 = 0.9
"""Below it, times of steps are no line in their bytes, and what was measured is something else."""
PRODUCT = 2 * 1024**3
"""Operations of a product of two matrices of 1,024 rows and columns."""


@dataclass(frozen=True)
class Line:
    """seconds = fixed + slope x bytes, and the share of the variance that it explains."""

    fixed_s: float
    s_per_byte: float
    r2: float


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """The line of least squares through (bytes, seconds)."""
    slope, fixed = statistics.linear_regression(*zip(*points, strict=True))
    seconds = [s for _, s in points]
    left = sum((s - fixed - slope * b) ** 2 for b, s in points)
    mean = statistics.fmean(seconds)
    return Line(fixed, slope, 1 - left / sum((s - mean) ** 2 for s in seconds))


class Machine:
    """A random Llama in float32 with every head of its own, and texts of several contexts in its cache.

    Args:
        contexts: tokens of each text. Their keys and values are random, written through the backend: only the last
            token of a text is ever computed, and reading costs the same whatever the numbers are.
    """

    def __init__(self, contexts: Sequence[int]) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from quire.models.open import open_runner

        torch.manual_seed(0)
        config = LlamaConfig(
            num_hidden_layers=SHAPE["layers"],
            hidden_size=SHAPE["hidden"],
            num_attention_heads=SHAPE["heads"],
            num_key_value_heads=SHAPE["heads"],
            intermediate_size=SHAPE["intermediate"],
            vocab_size=SHAPE["vocab"],
            max_position_embeddings=max(contexts) + CHUNK,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        model: Any = LlamaForCausalLM(config).eval()
        per_token = 2 * SHAPE["layers"] * SHAPE["hidden"] * 4
        room = (sum(contexts) + 3 * CHUNK) * per_token + (16 << 20)
        self.runner: Any = open_runner(model, memory=room)
        table = model.get_input_embeddings().weight
        self.parameters: int = sum(p.numel() for p in model.parameters()) - table.numel()
        self.texts = {n: self._filled(n) for n in contexts}

    @property
    def weight_bytes(self) -> int:
        """That a step reads: all but the embedding, of which it takes a row."""
        return 4 * self.parameters

    def cache_bytes(self, context: int) -> int:
        """That a step behind so many tokens reads."""
        return int(context * self.runner.bytes_per_token)

    def _filled(self, n: int) -> Any:
        import torch

        from quire.attention import Row, Step

        bridge, table = self.runner.bridge, self.runner.open()
        heads, width = SHAPE["heads"], SHAPE["hidden"] // SHAPE["heads"]
        with torch.inference_mode():
            for start in range(0, n, CHUNK):
                stop = min(n, start + CHUNK)
                table.append(stop - start)
                step = Step(bridge.store, bridge.layout, [Row(table, start, stop)], bridge.device)
                for layer in range(SHAPE["layers"]):
                    k, v = torch.randn(2, stop - start, heads, width)
                    bridge.backend.write(step, layer, {"k": k, "v": v})
                table.commit()
        return table

    def decode(self, context: int) -> None:
        """One step behind a text."""
        from quire.engine.runner import Item

        table = self.texts[context]
        n = table.length
        table.append(1)
        self.runner.forward([Item(table, [1] * (n + 1), n, n + 1, 1)])
        table.truncate(n)

    def prefill(self) -> None:
        """A prompt of CHUNK tokens."""
        from quire.engine.runner import Item

        table = self.runner.open()
        table.append(CHUNK)
        self.runner.forward([Item(table, [1] * CHUNK, 0, CHUNK, 1)])
        table.release()

    @cached_property
    def _buffers(self) -> tuple[Any, Any]:
        import torch

        return torch.ones(STREAM_BYTES // 4), torch.ones(1024, 1024)

    def stream(self) -> None:
        """One pass over memory."""
        self._buffers[0].sum()

    def multiply(self) -> None:
        """A product of PRODUCT operations."""
        self._buffers[1].mm(self._buffers[1])

    def close(self) -> None:
        """Hands the memory back."""
        self.runner.close()


def measure(machine: Machine, turns: int) -> dict[Any, float]:
    """Least seconds of a step behind each context, a prompt, a streaming read and a product, all taken in turns.

    The least, because whatever else the machine does only adds, and unevenly.
    """
    works: dict[Any, Callable[[], object]] = {n: partial(machine.decode, n) for n in machine.texts}
    works |= {"prompt": machine.prefill, "read": machine.stream, "product": machine.multiply}
    seconds: dict[Any, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: min(each) for name, each in seconds.items()}


@dataclass(frozen=True)
class Bounds:
    """What a piece of work takes, and the least that its bytes and its operations would take at the machine's rates."""

    seconds: float
    read_s: float
    compute_s: float

    def __str__(self) -> str:
        return (
            f"{1e3 * self.seconds:.1f} ms (its bytes {1e3 * self.read_s:.1f}, its operations "
            f"{1e3 * self.compute_s:.1f})"
        )


def _bound(bench: Any) -> Outcome:
    contexts = (512, 2048, 4096, 8192) if bench.quick else (512, 2048, 4096, 8192, 16_384)
    machine = Machine(contexts)
    try:
        s = measure(machine, 6 if bench.quick else 16)
        weights, n_weights = machine.weight_bytes, machine.parameters
        cache = {n: machine.cache_bytes(n) for n in contexts}
    finally:
        machine.close()
    stream, rate = STREAM_BYTES / s["read"], PRODUCT / s["product"]
    line = fit([(cache[n], s[n]) for n in contexts])
    if line.r2 < MIN_R2 or line.s_per_byte <= 0:
        times = ", ".join(f"{1e3 * s[n]:.1f}" for n in contexts)
        return Outcome(
            "",
            "not here",
            f"this machine was too busy to be timed: steps of {times} ms behind more and more tokens; run it again "
            "when nothing else runs",
        )
    steps = {  # two operations a weight, and as many per element of the cache, whose heads are not shared
        n: Bounds(s[n], (weights + cache[n]) / stream, 2 * (n_weights + cache[n] / 4) / rate)
        for n in contexts
    }
    prompt = Bounds(s["prompt"], weights / stream, 2 * n_weights * CHUNK / rate)
    short, long = steps[contexts[0]], steps[contexts[-1]]
    slope = 1 / line.s_per_byte
    decode = slope > stream / 3 and short.read_s > 3 * short.compute_s
    prefill = prompt.compute_s > 0.5 * prompt.seconds and prompt.read_s < 0.2 * prompt.seconds
    return Outcome(
        f"a step behind {contexts[0]:,} tokens takes {short}, behind {contexts[-1]:,} {long}; more context costs a "
        f"line in its bytes (r2 {line.r2:.3f}) at {slope / 1e9:.1f} GB/s, {slope / stream:.0%} of a streaming read. "
        f"{CHUNK} tokens of a prompt take {prompt}",
        "reproduced" if decode and prefill else "contradicted",
        f"a random Llama of {n_weights / 1e6:.0f} M weights in float32; {stream / 1e9:.1f} GB/s and "
        f"{rate / 1e9:.0f} G operations/s in the same turns, the least time of each. What does not fit: the cache is "
        f"read at {slope / stream:.0%} of that rate, and {1e3 * (line.fixed_s - weights / stream):.1f} ms of every "
        "step are neither (products with one row, and Python between the layers)",
    )


CLAIMS = (
    Claim(
        "bound-run",
        "Decode is bound by bandwidth (its time is bytes read over bandwidth) and prefill by arithmetic",
        "common knowledge",
        _bound,
    ),
)
