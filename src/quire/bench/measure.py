"""Several configurations on one model: each verified against the reference, then all timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from quire.bench.cases import Case, Run, check_fits, run, step_bytes
from quire.bench.machine import STREAM_BYTES, Spread, Stream, commit, hardware
from quire.bench.product import Product, prompt_work
from quire.errors import InvariantError

__all__ = ["Side", "measure", "verify"]

VERIFIED_TOKENS = 8
"""Output tokens of each text that are compared with the reference; a prompt is at most VERIFIED_CTX tokens then."""

VERIFIED_CTX = 96

REFERENCE = "reference"
"""The attention that every side is held to, eager."""

NEAR_TIES = 0.9
"""Share of first tokens that must agree in 16 bits, where two ways of adding may decide a near-tie differently."""


@dataclass
class Side:
    """One configuration under measurement.

    Args:
        kv: its recipe.
        open: `open(attention)` makes a runner over the model, or over a twin of it: two are open at a time.
        without: of a shared prefix: the same without sharing, which takes turns with it.
    """

    kv: str
    open: Callable[[str], Any]
    without: Side | None = None
    runner: Any = None
    runs: list[Run] = field(default_factory=list)
    products: list[float] = field(default_factory=list)
    """Of a prefill: how fast matrices were multiplied beside each run, in GFLOP/s; the better of before and after."""


def verify(case: Case, side: Side, dtype: str) -> float:
    """A short run of the case on the side's open runner beside one on the reference backend.

    Returns:
        The share of equal tokens.

    Raises:
        InvariantError: they differ by more than the dtype allows.
    """
    out = case.out if case.name == "prefill" else min(case.out, VERIFIED_TOKENS)
    short = replace(case, ctx=min(case.ctx, VERIFIED_CTX), out=out, batch=min(case.batch, 4))
    got = run(short, side.runner, timed=False).texts
    reference = (side.without or side).open(REFERENCE)
    try:
        want = run(short, reference, timed=False).texts
    finally:
        reference.close()
    pairs = [(a, b) for w, g in zip(want, got, strict=True) for a, b in zip(w, g, strict=True)]
    share = sum(a == b for a, b in pairs) / len(pairs)
    first = sum(w[0] == g[0] for w, g in zip(want, got, strict=True)) / len(want)
    exact = dtype in ("float32", "float64")
    if (exact and share < 1) or first < NEAR_TIES:
        raise InvariantError(
            f"kv={side.kv}: {share:.0%} of the tokens are the reference's ({first:.0%} of the first ones); nothing was "
            "timed"
        )
    return share


def measure(
    case: Case,
    sides: Sequence[Side],
    *,
    keep: str,
    attention: str,
    dtype: str,
    repeats: int,
    say: Callable[[str], object],
    stream_bytes: int = STREAM_BYTES,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Verifies every side, then runs all of them in turns, with a streaming read before and after each turn.

    Args:
        say: told what goes on, a line at a time.
        compiled: the sides' decode steps are; said in the documents.

    Returns:
        A document for each side, with the keys of `quire bench --json`.

    Raises:
        ConfigError, CapacityError: a side cannot run the case.
        InvariantError: a side is wrong.
    """
    shares = []
    all_sides = [s for side in sides for s in (side, side.without) if s is not None]
    try:
        for side in all_sides:
            side.runner = side.open(attention)
            check_fits(case, side.runner)
        for side in all_sides:
            say(f"verifying kv={side.kv} against the reference")
            shares.append(verify(case, side, dtype))
            warm = replace(case, out=min(case.out, 2 + (case.name == "decode")))
            if case.shared:
                warm = replace(warm, ctx=min(case.ctx, VERIFIED_CTX))
            run(warm, side.runner, timed=False)
        stream = Stream(stream_bytes)
        reads = [stream.gb_per_s()]
        product = Product(getattr(torch, dtype)) if case.name == "prefill" else None
        for turn in range(repeats):
            for side in all_sides:
                say(f"turn {turn + 1} of {repeats}, kv={side.kv}")
                before = None if product is None else product.gflop_per_s()
                side.runs.append(run(case, side.runner))
                if product is not None and before is not None:
                    side.products.append(max(before, product.gflop_per_s()))
            reads.append(stream.gb_per_s())
        verified = dict(zip(map(id, all_sides), shares, strict=True))
        return [
            _document(case, side, keep, verified[id(side)], Spread.of(reads))
            | {"compiled": compiled}
            | ({} if product is None else _by_product(case, side, product.form))
            | (_beside(case, side) if side.without is not None else {})
            for side in sides
        ]
    finally:
        for side in all_sides:
            if side.runner is not None:
                side.runner.close()


def _by_product(case: Case, side: Side, form: str) -> dict[str, Any]:
    """What prompts compute, beside a product of two matrices in the same minute."""
    work = prompt_work(side.runner, case.ctx)
    share = None
    if work is not None:
        rates = (case.batch * work / r.seconds / 1e9 for r in side.runs)
        share = Spread.of(a / b for a, b in zip(rates, side.products, strict=True)).json(digits=3)
    return {
        "product_gflop_per_s": Spread.of(side.products).json(digits=1),
        "product_form": form,
        "share_of_product": share,
    }


def _beside(case: Case, side: Side) -> dict[str, Any]:
    """With and without sharing, side by side.

    Raises:
        InvariantError: the shared prefix was computed more than once.
    """
    assert side.without is not None
    sharing = side.runner.sharing
    spare = (case.batch - 1) * (case.ctx % sharing.grain)  # behind the last whole block
    computed = max(r.computed for r in side.runs)
    if computed > case.least_computed + spare:
        raise InvariantError(
            f"kv={side.kv}: {computed} positions were computed and {case.least_computed + spare} suffice"
        )
    other = side.without.runs
    return {
        "own": case.own,
        "share": "prefix",
        "computed_tokens": computed,
        "least_computed_tokens": case.least_computed,
        "without_sharing": {
            "tokens_per_s": Spread.of(r.tokens / r.seconds for r in other).median,
            "seconds": Spread.of(r.seconds for r in other).median,
            "computed_tokens": max(r.computed for r in other),
        },
        "times_faster": Spread.of(
            b.seconds / a.seconds for a, b in zip(side.runs, other, strict=True)
        ).json(digits=2),
    }


def _document(case: Case, side: Side, keep: str, share: float, reads: Spread) -> dict[str, Any]:
    rates = Spread.of(r.tokens / r.seconds for r in side.runs)
    weights, cache = step_bytes(case, side.runner)
    floor = None
    if case.name != "prefill" and not case.shared:  # they compute: memory says nothing of that
        floor = case.batch * reads.median * 1e9 / (weights + cache)
    return {
        "case": case.name,
        "ctx": case.ctx,
        "batch": case.batch,
        "out": case.outputs,
        "kv": side.kv,
        "keep": keep,
        "tokens_per_s": rates.median,
        "tokens_per_s_spread": rates.json(digits=3),
        "seconds": Spread.of(r.seconds for r in side.runs).median,
        "kv_bytes_per_token": side.runner.bytes_per_token,
        "weight_bytes_per_step": weights,
        "stream_gb_per_s": round(reads.median, 2),
        "stream_spread": reads.json(digits=2),
        "floor_tokens_per_s": floor,
        "verified": share,
        "weights": "plain" if side.runner.weights is None else side.runner.weights.form,
        "hardware": hardware(),
        "commit": commit(),
    }
