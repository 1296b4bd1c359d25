"""`tune`: from a model, a text, a budget of bytes and a floor of quality to the best configuration, with the evidence.

    text   |== layers ==|== choosing ==|===== held out =====|
            each layer's  whole          the choice beside the best uniform recipe, paired, on tokens that chose nothing
            keys, values  configurations
            alone

Losses of layers add up well enough to rank mixes and not to promise anything: what is promised is measured, as a whole,
through the cache, on text that had no part in the choice. A 16-bit model is judged on a copy in float32, whose own
rounding moves no likely token: bytes are those of the model as it is served, and so is one more figure of the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from quire.errors import CapacityError, ConfigError
from quire.evaluate.candidates import candidates, heads_alone
from quire.evaluate.cells import open_cells
from quire.evaluate.choice import Candidate, Goal, Tuned
from quire.evaluate.journal import Journal
from quire.evaluate.metrics import Estimate, paired_bootstrap, runs
from quire.evaluate.report import Layer, Row
from quire.evaluate.search import codecs_to_try
from quire.evaluate.trial import Trial
from quire.models.load import Loaded
from quire.spec import DEFAULT_BLOCK_TOKENS

__all__ = ["answered", "tune"]

SHARES = 1000
"""Into which a policy's budget is divided."""
POLICIES = ("keydiff", "kvzip")
"""Tried with the share of tokens that the budget leaves; both choose without knowing the question."""


def tune(
    model: Any,
    tokenizer: Any,
    text: str | Sequence[int],
    goal: Goal,
    *,
    folder: Path,
    codecs: Sequence[str] = (),
    policies: Sequence[str] = POLICIES,
    injected: bool = False,
    block_tokens: int = DEFAULT_BLOCK_TOKENS,
    memory: int | float | str | None = None,
    seed: int = 0,
    journal: Journal | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Tuned:
    """Measures layers, searches, measures candidates, and compares the choice on held-out text.

    Args:
        model, tokenizer: as `evaluate` takes them.
        text: of three windows at least; it is cut into three parts in order.
        folder: for map files of candidates, which must keep their names for a run that goes on.
        codecs: recipes to mix; by default what every codec shows of itself, as far as it serves the model.
        policies: without a budget, which follows from the memory.
        memory: of the arenas that measure, not the goal's; None: what their windows need.

    Raises:
        RequestError: too short a text.
        CapacityError: a budget that no candidate fits.
        ConfigError: a model that cannot be served or injected.
    """
    trial = Trial(
        model, tokenizer, goal, folder, injected, block_tokens, memory, seed, journal, progress
    )
    parts = trial.parts(text)
    budget, exact = trial.budget()
    recipes, refused = codecs_to_try(trial.layers, trial.dtype, block_tokens)
    if codecs:
        recipes, refused = list(codecs), []
    rejected = [(name, why) for name, why in refused]
    floor = trial.floor(parts[0], served=True)
    rounding = floor if trial.judge is model else trial.floor(parts[0])
    layers = trial.sensitivity(recipes, parts[0])
    heads = heads_alone(trial, recipes, layers, rounding[1], budget, parts[0])
    found = candidates(trial, recipes, layers, rounding[1], budget, rejected, heads)
    if not found:
        least = min(trial.bytes(r) for r in ["auto", *recipes])
        raise CapacityError(
            f"{budget:,} bytes hold no form of {goal.users} x {goal.context:,} tokens: the smallest takes {least:,}; "
            "give more memory, or fewer tokens or users"
        )
    _choose(trial, found, parts[1], rejected)
    measured = [c for c in found if c.kl is not None]
    best = min(measured, key=attrgetter("loss"))
    found += _policies(trial, policies, (budget, exact), best, parts[1], rejected)
    return _finish(trial, found, [*layers, *heads], floor, parts[2], (budget, exact), rejected)


def answered(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answer_tokens: int,
    end: Sequence[int],
    journal: Journal | None = None,
) -> list[int]:
    """Prompts with what the model itself answers, one after another: the text of users who gave no other."""
    out: list[int] = []
    with open_cells(
        model,
        [("auto", "full")],
        None,
        memory=0.5,
        block_tokens=DEFAULT_BLOCK_TOKENS,
        attention="auto",
        chunk_tokens=None,
    ) as (cell,):
        for i, prompt in enumerate(prompts):
            known = None if journal is None else journal.get(f"answer/{i}")
            answer = cell.scorer.answer(prompt, answer_tokens, end=end) if known is None else known
            if journal is not None and known is None:
                journal.put(f"answer/{i}", answer)
            out += [*prompt, *answer]
    return out


def _choose(
    trial: Trial, found: Sequence[Candidate], texts: list[Any], rejected: list[tuple[str, str]]
) -> None:
    """Measures candidates as wholes, a few at a time, as long as a quarter of the time is left."""
    at_once = 6
    order = sorted(found, key=lambda c: (c.kind != "map", -c.n_bytes))
    wide = [c for c in order if c.kind == "uniform"][: at_once // 2]
    order = [*wide, *(c for c in order if c not in wide)]
    for at in range(0, len(order), at_once):
        some = order[at : at + at_once]
        if at and trial.left() < 0.25:
            rejected.extend((c.label, "not measured: the time was over") for c in some)
            continue
        rows, _ = trial.rows([c.config for c in some], texts, f"choosing {at // at_once + 1}")
        _note(some, rows)


def _policies(
    trial: Trial,
    names: Sequence[str],
    sizes: tuple[int, int],
    best: Candidate,
    texts: list[Any],
    rejected: list[tuple[str, str]],
) -> list[Candidate]:
    """Policies with the share of tokens that the budget leaves; only one that beats the best comes back.

    Both are measured on the second half of every window, the first being the prompt.

    Args:
        sizes: the budget, and the bytes of the exact cache.
    """
    budget, exact = sizes
    if not names or budget >= exact:
        return []
    kept = []
    for name in names:
        c, why = _policy(trial, name, budget)
        if c is None or trial.left() < 0.2:
            rejected.append((name, why if c is None else "not measured: the time was over"))
            continue
        pair = Candidate(best.kv, best.keep, best.kind, best.n_bytes, best.peak_bytes)
        try:
            rows, _ = trial.rows([pair.config, c.config], texts, f"policy {name}")
        except ConfigError as e:
            rejected.append((c.keep, str(e)))
            continue
        _note([pair, c], rows)
        if c.loss >= pair.loss:
            rejected.append(
                (
                    c.label,
                    f"KL {c.loss:.2e} where {best.label} has {pair.loss:.2e} on the same tokens",
                )
            )
        else:
            kept.append(c)
    return kept


def _policy(trial: Trial, name: str, budget: int) -> tuple[Candidate | None, str]:
    """A policy with the greatest share whose peak fits: all of one prompt, what stays of it, and the other users.

    Returns:
        None, and why, where no share does.
    """
    low, high = 0, SHARES
    found: Candidate | None = None
    least = 0
    while high - low > 1 or not least:
        share = max(1, (low + high) // 2)
        keep = f"{name}:budget={share / SHARES:g}"
        try:
            steady, peak = trial.held(keep)
        except ConfigError as e:
            return None, str(e)
        if peak <= budget:
            low, found = share, Candidate("auto", keep, "policy", steady, peak)
        else:
            high = share
        least = peak
    if found is not None:
        return found, ""
    over = f"{least / budget - 1:+.1%} of the budget"
    return None, f"holds a prompt whole until tokens go: at its peak {least:,} bytes, {over}"


def _finish(
    trial: Trial,
    found: list[Candidate],
    layers: Sequence[Layer],
    floor: tuple[float, float],
    texts: list[Any],
    sizes: tuple[int, int],
    rejected: list[tuple[str, str]],
) -> Tuned:
    """The best beside the best uniform recipe on held-out text, as much of it as the time allows."""
    measured = [c for c in found if c.kl is not None]
    policies = [c for c in measured if c.kind == "policy"]
    chosen = min(policies or measured, key=attrgetter("loss"))
    uniform = min(
        (c for c in measured if c.kind == "uniform"), key=attrgetter("loss"), default=None
    )
    for c in measured:
        if c is not chosen:
            assert c.kl is not None
            c.why = f"KL {c.kl.value:.2e} where the choice has {chosen.loss:.2e}"
    pair = [chosen] if uniform is None or uniform is chosen else [chosen, uniform]
    front = tuple(replace(c) for c in measured)  # with their figures on the text that chose
    passes = 1 + len(pair) + (0 if trial.judge is trial.model else 2)
    fit = trial.left() * 60 * trial.goal.minutes / max(1e-9, trial.window_s * passes)
    texts = texts[: max(2, int(fit))]
    rows, values = trial.rows([c.config for c in pair], texts, "held out")
    _note(pair, rows)
    gain = None
    if len(pair) == 2:
        n = len(values[1]["kl"]) // len(texts)
        gain = paired_bootstrap(
            values[2]["kl"] - values[1]["kl"], runs([n] * len(texts)), seed=trial.seed
        )
        if uniform is not None and gain.high is not None and gain.high < 0:
            rejected.append((chosen.label, "worse than the best uniform recipe on held-out text"))
            chosen, gain = uniform, None
    served = None
    if trial.judge is not trial.model:
        own, _ = trial.rows([chosen.config], texts, "as served", served=True)
        by = {r.metric: Estimate(r.value, r.low, r.high) for r in own}
        served = by["agreement"], by["kl"]
    return Tuned(
        trial.goal,
        *sizes,
        chosen,
        uniform,
        gain,
        floor,
        front,
        tuple(rejected),
        tuple(layers),
        int(np.size(values[1]["kl"])),
        Loaded(trial.model, trial.tokenizer, "").digest,
        trial.injected,
        trial.seed,
        trial.step_bytes(chosen.kv) if chosen.keep == "full" else None,
        trial.judge_dtype,
        served,
    )


def _note(some: Sequence[Candidate], rows: Sequence[Row]) -> None:
    by = {(r.kv, r.keep, r.metric): Estimate(r.value, r.low, r.high) for r in rows}
    for c in some:
        c.kl, c.agreement = by[*c.config, "kl"], by[*c.config, "agreement"]
