"""Claims that are run, on the packaged model and this machine. Counts are exact; times are of this machine alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.resources import files
from typing import Any

from quire.evaluate.claims.arithmetic import projections
from quire.evaluate.claims.claim import Claim, Outcome

__all__ = ["CLAIMS", "Bench"]

MEMORY_BYTES = 256 << 20


class Bench:
    """What claims run on: the packaged model, loaded when it is first asked for.

    Args:
        quick: shorter runs.
        requests: recorded ones, for the claims that need some: (prompt, output) in tokens, or (tokens,).
    """

    def __init__(self, *, quick: bool = False, requests: Sequence[tuple[int, ...]] = ()) -> None:
        self.quick = quick
        self.lengths = [sum(parts) for parts in requests]
        self.requests = [(p[0], p[1]) for p in requests if len(p) == 2]

    @cached_property
    def loaded(self) -> Any:
        """The packaged model in float32."""
        from quire.models.load import load_model

        return load_model(dtype="float32")

    @cached_property
    def ids(self) -> list[int]:
        """Tokens of a text that every installation has: Quire's own source."""
        text = files("quire").joinpath("spec.py").read_text(encoding="utf-8")
        found: list[int] = self.loaded.tokenizer.encode(text)
        return found

    @contextmanager
    def opened(self, kv: str, **more: Any) -> Iterator[Any]:
        """A runner over a fresh cache, or over none. `more` are options of `open_runner`."""
        from quire.models.open import open_runner

        options: dict[str, Any] = {} if kv == "none" else {"memory": MEMORY_BYTES} | more
        runner = open_runner(self.loaded.model, kv=kv, weights="plain", **options)
        try:
            yield runner
        finally:
            runner.close()

    def generate(self, runner: Any, prompt: int, output: int) -> list[float]:
        """Writes `output` tokens behind `prompt`, alone. Returns the seconds of each step."""
        from quire.engine import Engine, SamplingParams

        engine = Engine(runner, self.loaded.tokenizer)
        engine.add_request(self.ids[:prompt], SamplingParams(max_tokens=output, ignore_eos=True))
        seconds = []
        while engine.has_work:
            began = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - began)
        return seconds

    @contextmanager
    def counting(self) -> Iterator[list[int]]:
        """Rows that pass a key projection, one number per forward."""
        rows: list[int] = []
        layer = self.loaded.model.get_decoder().layers[0].self_attn.k_proj

        def note(_: Any, inputs: tuple[Any, ...], __: Any) -> None:
            rows.append(int(inputs[0].numel() // inputs[0].shape[-1]))

        handle = layer.register_forward_hook(note)
        try:
            yield rows
        finally:
            handle.remove()


def _projections(bench: Bench) -> Outcome:
    prompt, output = (64, 32) if bench.quick else (256, 64)
    counts = {}
    for kv in ("none", "auto"):
        with bench.opened(kv) as runner, bench.counting() as rows:
            bench.generate(runner, prompt, output)
            counts[kv] = sum(rows)
    want = projections(prompt, output)
    return Outcome(
        f"{prompt} + {output} tokens: {counts['none']:,} rows through a key projection without a cache, "
        f"{counts['auto']:,} with it",
        "reproduced" if (counts["none"], counts["auto"]) == want else "contradicted",
        f"counted in the model; the formula says {want[0]:,} and {want[1]:,}",
    )


def _faster(bench: Bench) -> Outcome:
    prompt, output = (512, 24) if bench.quick else (1400, 150)
    totals = {}
    for kv in ("auto", "none"):
        with bench.opened(kv) as runner:
            bench.generate(runner, prompt, 2)
            totals[kv] = sum(bench.generate(runner, prompt, output))
    ratio = totals["none"] / totals["auto"]
    return Outcome(
        f"{prompt:,} + {output} tokens: {totals['none']:.1f} s without, {totals['auto']:.1f} s with: {ratio:.1f} times",
        "reproduced" if 3 <= ratio <= 5 else "contradicted",
        "one machine, one small model, one run; the ratio depends on both lengths and on what else a step costs",
        (("generation with a cache (3 to 5 claimed)", 5, ratio),),
    )


def _step(bench: Bench) -> Outcome:
    """Per step: rows that are projected, bytes of cache that attention reads, and seconds."""
    lengths = (256, 1792)
    seconds, rows_of, read = [], [], []
    for n in lengths:
        with bench.opened("auto") as runner, bench.counting() as rows:
            seconds.append(statistics.median(bench.generate(runner, n, 12)[1:]))
            rows_of.append(max(rows[-11:]))
            table = runner.open()
            table.append(n)
            read.append(table.used_bytes())
            table.release()
    growth = read[1] / read[0]
    return Outcome(
        f"behind {lengths[0]} and {lengths[1]:,} tokens a step projects {rows_of[0]} and {rows_of[1]} row, and reads "
        f"{read[0]:,} and {read[1]:,} bytes of cache; it took {1e3 * seconds[0]:.1f} and {1e3 * seconds[1]:.1f} ms",
        "reproduced" if rows_of == [1, 1] and growth == lengths[1] / lengths[0] else "contradicted",
        "judged by the counts; in so small a model other costs hide the time of attention",
    )


_RECIPES = {"bf16": 1.0, "int8": 2.0, "int4": 4.0, "kivi:bits=2": 8.0}


def _bytes(bench: Bench) -> Outcome:
    from quire.engine.runner import Item

    n = 1024
    held = {}
    for kv in _RECIPES:
        with bench.opened(kv) as runner:
            table = runner.open()
            table.append(n)
            runner.forward([Item(table, bench.ids[:n], 0, n, 0)])
            table.commit()
            held[kv] = runner.usage().held_bytes
            table.release()
    ratios = {kv: held["bf16"] / b for kv, b in held.items()}
    said = ", ".join(f"{kv} {ratios[kv]:.2f} times" for kv in _RECIPES if kv != "bf16")
    short = [kv for kv in ratios if ratios[kv] < 0.99 * _RECIPES[kv]]
    return Outcome(
        f"{said} less than 16 bits",
        "contradicted" if short else "reproduced",
        f"bytes held by {n:,} tokens of 64 channels per head, scales and raw windows included: nominal ratios leave "
        "them out",
        tuple(
            (f"{kv}, 64 channels, {n:,} tokens", _RECIPES[kv], ratios[kv])
            for kv in list(_RECIPES)[1:]
        ),
    )


def _forks(bench: Bench) -> Outcome:
    from quire.engine.runner import Item

    common, own, n = 520, 24, 4
    with bench.opened("auto") as runner:
        trunk = runner.open()
        trunk.append(common)
        runner.forward([Item(trunk, bench.ids[:common], 0, common, 0)])
        trunk.commit()
        one = runner.usage().held_bytes
        tables = [trunk.fork() for _ in range(n)]
        for i, table in enumerate(tables):
            ids = bench.ids[:common] + bench.ids[1000 + i * own : 1000 + (i + 1) * own]
            table.append(own)
            runner.forward([Item(table, ids, common, common + own, 0)])
            table.commit()
        trunk.release()
        shared = runner.usage().held_bytes
        alone = n * tables[0].held_bytes()
        for table in tables:
            table.release()
    return Outcome(
        f"{n} texts of {common} common and {own} own tokens hold {shared / one:.2f} times what one beginning does, "
        f"{alone / shared:.1f} times less than without sharing",
        "reproduced" if shared < 1.5 * one else "contradicted",
        "full blocks are shared, the last one is copied; bytes as the pool counts them",
    )


def _continuous(bench: Bench) -> Outcome:
    """Steps, not seconds: the same requests in waves of four, and joining as others leave."""
    from quire.engine import Engine, SamplingParams
    from quire.engine.schedule import SchedulerConfig

    outputs = [8, 60, 12, 20, 48, 6, 16, 30, 10, 40, 8, 24]
    at_once = 4

    def steps(requests: Sequence[int]) -> int:
        with bench.opened("auto") as runner:
            engine = Engine(
                runner, bench.loaded.tokenizer, config=SchedulerConfig(max_running=at_once)
            )
            for i, n in enumerate(requests):
                ids = bench.ids[32 * i : 32 * i + 32]
                engine.add_request(ids, SamplingParams(max_tokens=n, ignore_eos=True))
            count = 0
            while engine.has_work:
                engine.step()
                count += 1
            return count

    static = sum(steps(outputs[i : i + at_once]) for i in range(0, len(outputs), at_once))
    continuous = steps(outputs)
    return Outcome(
        f"{len(outputs)} requests, {at_once} at a time: {static} steps in waves, {continuous} when each joins as "
        f"another leaves: {static / continuous:.2f} times fewer",
        "reproduced" if continuous < static else "contradicted",
        "counted in steps; outputs of 6 to 60 tokens, as uneven as they are here",
    )


def _stale(bench: Bench) -> Outcome:
    """A request behind the forgotten tokens of another one."""
    import torch

    from quire.engine.runner import Item

    before, asked = bench.ids[:96], bench.ids[600:664]
    n, logits = len(asked), []
    with bench.opened("auto") as runner:
        for ids in (asked, before + asked):
            table = runner.open()
            table.append(len(ids))
            logits.append(runner.forward([Item(table, ids, 0, len(ids), n)])[-n:].float())
            table.release()
    clean, stale = (torch.log_softmax(x, -1) for x in logits)
    kl = float((clean.exp() * (clean - stale)).sum(-1).mean())
    other = int((clean.argmax(-1) != stale.argmax(-1)).sum())
    return Outcome(
        f"{other} of {n} likeliest tokens are others, the predictions {kl:.2f} nats apart on average",
        "reproduced" if other else "contradicted",
        f"{len(before)} tokens of another request in front of {n}; a new table is empty by construction",
    )


CLAIMS = (
    Claim(
        "projections-run",
        "The same count, in a model that runs",
        "common knowledge",
        _projections,
    ),
    Claim(
        "speed-up",
        "A cache makes generation 3 to 5 times as fast end to end (2,000 + 500 tokens)",
        "tutorials",
        _faster,
    ),
    Claim(
        "step",
        "With a cache a step's projections stay constant and its attention grows with the context",
        "common knowledge",
        _step,
    ),
    Claim(
        "codec-bytes",
        "INT8 halves the cache, INT4 quarters it, 2 bits take an eighth of 16",
        "tutorials",
        _bytes,
    ),
    Claim(
        "copy-on-write",
        "Sequences that begin alike share memory until they differ",
        "vLLM, arXiv 2309.06180",
        _forks,
    ),
    Claim(
        "continuous",
        "Continuous batching wastes fewer steps than static batches",
        "Orca, OSDI 2022",
        _continuous,
    ),
    Claim(
        "stale",
        "Forgetting to clear a cache between requests changes the answers",
        "tutorials",
        _stale,
    ),
)
