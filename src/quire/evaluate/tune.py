"""`tune`: from a model, a text, a budget of bytes and a floor of quality to the best configuration, with the evidence.

    text   |== layers ==|== choosing ==|===== held out =====|
            each layer's  whole          the choice beside the best uniform recipe, paired, on tokens that chose nothing
            keys, values  configurations
            alone

Losses of layers add up well enough to rank mixes and not to promise anything: what is promised is measured, as a whole,
through the cache, on text that had no part in the choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from quire.errors import CapacityError, ConfigError, RequestError
from quire.evaluate.cells import Config, Progress, open_cells
from quire.evaluate.decode import twin
from quire.evaluate.inject import inject
from quire.evaluate.journal import Journal, digest_of
from quire.evaluate.metrics import Estimate, paired_bootstrap, runs
from quire.evaluate.report import Layer, Row
from quire.evaluate.rows import text_rows
from quire.evaluate.search import (
    best_mix,
    bytes_of,
    codecs_to_try,
    forms_of,
    map_text,
)
from quire.evaluate.sensitivity import AT_ONCE, sensitivity
from quire.evaluate.texts import windows
from quire.models.load import Loaded, weights_digest
from quire.models.open import open_runner
from quire.plan.layout import KVLayer
from quire.spec import DEFAULT_BLOCK_TOKENS

__all__ = ["Candidate", "Goal", "Tuned", "answered", "tune"]

WINDOWS = ("", "sinks=4", "sinks=4;window=64")
"""Raw tokens beside a codec's own that are tried with every recipe."""
POLICIES = ("keydiff", "kvzip")
"""Tried with the share of tokens that the budget leaves; both choose without knowing the question."""
SPARE_BYTES = 64 << 20
"""Of an arena, for slabs of groups that hold little."""
MAX_UNIFORM = 12
"""Uniform recipes that are measured: those of most bytes within the budget."""


@dataclass(frozen=True)
class Goal:
    """What is wanted.

    Args:
        memory: bytes for all users' caches, or a share of what the exact cache takes as a float in (0, 1].
        quality: the least top-1 agreement with the exact cache.
        context: tokens of one sequence.
        users: sequences at a time.
        length: tokens of a window that is scored.
        layer_tokens, choose_tokens, held_tokens: of the three parts of the text, at most.
        minutes: after which no further candidate is taken up; what was begun is finished.
    """

    memory: int | float = 0.5
    quality: float = 0.99
    context: int = 1024
    users: int = 1
    length: int = 1024
    layer_tokens: int = 2048
    choose_tokens: int = 8192
    held_tokens: int = 65_536
    minutes: float = 30.0


@dataclass
class Candidate:
    """A configuration and what is known of it; `map` is the text of its map file, where it has one."""

    kv: str
    keep: str
    kind: str
    n_bytes: int
    map: str = ""
    recipes: Mapping[int, str] = field(default_factory=dict)
    kl: Estimate | None = None
    agreement: Estimate | None = None
    why: str = ""
    """It was not chosen."""
    options: str = ""
    """Raw tokens that a map's recipes have."""
    number: int = 0
    """Of a map among the candidates."""

    @property
    def config(self) -> Config:
        """As `evaluate` takes it."""
        return self.kv, self.keep

    @property
    def label(self) -> str:
        """In a word."""
        name = f"map {self.number}" if self.map else self.kv
        if self.map and self.options:
            name += f";{self.options}"
        return name if self.keep == "full" else f"{name} {self.keep}"


@dataclass(frozen=True)
class Tuned:
    """The choice with its evidence.

    Args:
        chosen: with its figures on held-out text.
        uniform: the best uniform recipe within the budget, on the same text; None where none fits.
        gain: KL of the uniform recipe less the choice's, paired by token.
        floor: agreement and KL of the exact cache with itself in another order of sums: what no codec can beat.
        held_tokens: predicted tokens of the held-out text.
    """

    goal: Goal
    budget: int
    exact_bytes: int
    chosen: Candidate
    uniform: Candidate | None
    gain: Estimate | None
    floor: tuple[float, float]
    candidates: tuple[Candidate, ...]
    rejected: tuple[tuple[str, str], ...]
    layers: tuple[Layer, ...]
    held_tokens: int
    digest: str
    injected: bool
    seed: int

    @property
    def meets(self) -> bool:
        """Whether the choice has the quality that was asked for, on held-out text."""
        return (
            self.chosen.agreement is not None and self.chosen.agreement.value >= self.goal.quality
        )


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
    work = _Tuning(
        model, tokenizer, goal, folder, injected, block_tokens, memory, seed, journal, progress
    )
    parts = work.parts(text)
    budget, exact = work.budget()
    recipes, refused = codecs_to_try(work.layers, work.dtype, block_tokens)
    if codecs:
        recipes, refused = list(codecs), []
    rejected = [(name, why) for name, why in refused]
    floor = work.floor(parts[0])
    layers = work.sensitivity(recipes, parts[0])
    found = work.candidates(recipes, layers, floor[1], budget, rejected)
    if not found:
        least = min(work.bytes(r) for r in ["auto", *recipes])
        raise CapacityError(
            f"{budget:,} bytes hold no form of {goal.users} x {goal.context:,} tokens: the smallest takes {least:,}; "
            "give more memory, or fewer tokens or users"
        )
    work.choose(found, parts[1], rejected)
    measured = [c for c in found if c.kl is not None]
    found += work.policies(policies, exact, budget, min(measured, key=_kl), parts[1], rejected)
    return work.finish(found, layers, floor, parts[2], (budget, exact), rejected)


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


def _kl(c: Candidate) -> float:
    return c.kl.value if c.kl is not None else float("inf")


class _Tuning:
    """A search under way."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        goal: Goal,
        folder: Path,
        injected: bool,  # noqa: FBT001 - made in one place
        block_tokens: int,
        memory: int | float | str | None,
        seed: int,
        journal: Journal | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self.model, self.tokenizer, self.goal, self.folder = model, tokenizer, goal, folder
        self.injected, self.block_tokens, self.memory, self.seed = (
            injected,
            block_tokens,
            memory,
            seed,
        )
        self.journal, self.progress = journal, progress
        self.until = time.monotonic() + 60 * goal.minutes
        self.window_s = 0.0
        """Longest that a cache took for a window, on average over a part."""
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.digest = weights_digest(model)
        runner = open_runner(twin(model), memory=1 << 26, weights="plain")
        self.layers = list(runner.bridge.shape.layers)  # type: ignore[union-attr]
        runner.bridge.close()  # type: ignore[union-attr]
        self.kv_layers = [x for x in self.layers if isinstance(x, KVLayer)]

    def left(self) -> float:
        """Share of the time that is left."""
        return max(0.0, (self.until - time.monotonic()) / (60 * self.goal.minutes))

    def arena(self, cells: int) -> int | float | str:
        """Memory for so many caches: a window in each, its copy where a policy drops tokens, and slabs to spare."""
        if self.memory is not None:
            return self.memory
        return cells * (4 * self.bytes_of_window() + SPARE_BYTES)

    # -- what there is -------------------------------------------------------------------------------------------

    def parts(self, text: str | Sequence[int]) -> list[list[Any]]:
        """Windows for layers, for choosing and held out: at most as many tokens as the goal says, in that order."""
        from quire.evaluate.tasks import Words
        from quire.evaluate.texts import encode

        goal = self.goal
        begin = Words(self.tokenizer).begin if self.tokenizer is not None else []
        ids = encode(self.tokenizer, text)
        every = windows(ids, begin, goal.length, len(ids) + 1)
        if len(every) < 3:
            raise RequestError(
                f"the text has {len(ids)} tokens, fewer than three windows of {goal.length} (for layers, for choosing "
                "and held out); give a longer text or a smaller length"
            )
        wanted = [max(1, n // goal.length) for n in (goal.layer_tokens, goal.choose_tokens)]
        first = max(1, min(wanted[0], len(every) // 6))
        second = max(1, min(wanted[1], len(every) // 3))
        last = max(1, goal.held_tokens // goal.length)
        rest = every[first + second :]
        return [every[:first], every[first : first + second], rest[:last]]

    def bytes(self, kv: str) -> int:
        """Of all users' sequences. Raises ConfigError."""
        size = bytes_of(
            self.layers,
            kv,
            dtype=self.dtype,
            block_tokens=self.block_tokens,
            context=self.goal.context,
        )
        return size * self.goal.users

    def budget(self) -> tuple[int, int]:
        """The bytes that there are, and those of the exact cache."""
        exact = self.bytes("auto")
        memory = self.goal.memory
        return (int(memory * exact) if isinstance(memory, float) else memory), exact

    # -- measuring -----------------------------------------------------------------------------------------------

    def rows(
        self,
        configs: Sequence[Config],
        texts: list[Any],
        part: str,
        attention: Sequence[str] = ("auto",),
    ) -> tuple[list[Row], list[Any]]:
        """Rows of configurations, and per-token values of each: nll, kl, agreement."""
        tag = digest_of([part, [list(c) for c in configs], list(attention)])
        with ExitStack() as stack:
            outliers = (
                stack.enter_context(inject(self.model, seed=self.seed)) if self.injected else None
            )
            cells = []
            for some, backend in zip(
                ([("auto", "full")], configs), (attention[0], attention[-1]), strict=True
            ):
                cells += stack.enter_context(
                    open_cells(
                        self.model,
                        list(some),
                        outliers,
                        memory=self.arena(len(some)),
                        block_tokens=self.block_tokens,
                        attention=backend,
                        chunk_tokens=None,
                    )
                )
            for cell in cells:
                cell.begin()
            note = Progress(self.progress, part, len(texts))
            began = time.monotonic()
            rows, _ = text_rows(
                cells, texts, self.goal.length, self.seed, note, self.journal, f"{part}/{tag}"
            )
            took = (time.monotonic() - began) / (len(texts) * len(cells))
            self.window_s = max(self.window_s, took)
            return rows, [
                {n: c.all(n) for n in ("kl", "agreement", "nll") if n in c.values} for c in cells
            ]

    def floor(self, texts: list[Any]) -> tuple[float, float]:
        """Agreement and KL of the exact cache with itself where another backend adds up in another order."""
        rows, _ = self.rows([("auto", "full")], texts, "rounding", ("auto", "reference"))
        by = {r.metric: r.value for r in rows}
        return by["agreement"], by["kl"]

    def sensitivity(self, recipes: Sequence[str], texts: list[Any]) -> list[Layer]:
        """Every layer's keys and values alone, under every recipe, as far as a half of the time goes."""
        ids = [int(t) for e in texts for t in e.tokens]
        return sensitivity(
            self.model,
            None,
            recipes,
            ids,
            fields={x.layer: tuple(f.name for f in x.fields) for x in self.kv_layers},
            journal=self.journal,
            progress=self.progress,
            until=lambda: self.left() < 0.5,
            length_tokens=self.goal.length,
            max_tokens=len(ids),
            seed=self.seed,
            injected=self.injected,
            block_tokens=self.block_tokens,
            memory=self.arena(1 + AT_ONCE),
        )

    # -- candidates ----------------------------------------------------------------------------------------------

    def candidates(
        self,
        recipes: Sequence[str],
        layers: Sequence[Layer],
        rounding: float,
        budget: int,
        rejected: list[tuple[str, str]],
    ) -> list[Candidate]:
        """Uniform recipes and mixes that fit the budget, no two alike."""
        uniform: list[Candidate] = []
        for recipe in ["auto", *recipes]:
            for options in WINDOWS if recipe != "auto" else ("",):
                kv = f"{recipe};{options}" if options else recipe
                try:
                    size = self.bytes(kv)
                except ConfigError as e:
                    rejected.append((kv, str(e)))
                    continue
                if size > budget:
                    rejected.append(
                        (kv, f"takes {size:,} bytes, {size / budget - 1:+.1%} of the budget")
                    )
                else:
                    uniform.append(Candidate(kv, "full", "uniform", size))
        uniform.sort(key=lambda c: -c.n_bytes)
        why = f"not measured: {MAX_UNIFORM} others use more of the budget"
        rejected += [(c.kv, why) for c in uniform[MAX_UNIFORM:]]
        found = uniform[:MAX_UNIFORM]
        known = {c.kv for c in found}
        for options in WINDOWS:
            # what any change of the arithmetic costs is no layer's own, so one search goes without it
            for taken_off in (rounding, 0.0):
                mixed = self.mix(recipes, layers, taken_off, options, budget)
                if mixed is not None and mixed.kv not in known:
                    known.add(mixed.kv)
                    mixed.number = 1 + sum(c.kind == "map" for c in found)
                    found.append(mixed)
        return found

    def mix(
        self,
        recipes: Sequence[str],
        layers: Sequence[Layer],
        taken_off: float,
        options: str,
        budget: int,
    ) -> Candidate | None:
        """The best mix by the losses of layers alone, as a map."""
        loss = {
            (x.kv, x.layer, x.field): max(0.0, x.kl - taken_off) + 1e-3 * max(0.0, x.kl)
            for x in layers
        }
        forms = [
            forms_of(
                x,
                recipes,
                loss,
                options,
                dtype=self.dtype,
                block_tokens=self.block_tokens,
                context=self.goal.context,
            )
            for x in self.kv_layers
        ]
        states = self.bytes("auto") // self.goal.users - sum(
            bytes_of(
                [x],
                "auto",
                dtype=self.dtype,
                block_tokens=self.block_tokens,
                context=self.goal.context,
            )
            for x in self.kv_layers
        )  # of recurrent layers, which no recipe changes
        found = best_mix(forms, budget // self.goal.users - max(0, states))
        if found is None:
            return None
        by_layer = {x.layer: r for x, r in zip(self.kv_layers, found.recipes, strict=True)}
        if len(set(found.recipes)) == 1:
            kv = found.recipes[0]
            return Candidate(kv, "full", "uniform", self.bytes(kv))
        text = map_text(self.layers, by_layer, self.digest)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{digest_of(text)}.toml"
        # injected weights have another digest, so what is measured names none
        file.write_text(map_text(self.layers, by_layer, ""), encoding="utf-8")
        kv = f"map:{file}"
        size = self.bytes(kv)
        if size > budget:
            return None
        return Candidate(kv, "full", "map", size, text, by_layer, options=options)

    def choose(
        self, found: Sequence[Candidate], texts: list[Any], rejected: list[tuple[str, str]]
    ) -> None:
        """Measures candidates as wholes, a few at a time, as long as a quarter of the time is left."""
        at_once = 6
        order = sorted(found, key=lambda c: (c.kind != "map", -c.n_bytes))
        wide = [c for c in order if c.kind == "uniform"][: at_once // 2]
        order = [*wide, *(c for c in order if c not in wide)]
        for at in range(0, len(order), at_once):
            some = order[at : at + at_once]
            if at and self.left() < 0.25:
                rejected.extend((c.label, "not measured: the time was over") for c in some)
                continue
            rows, _ = self.rows([c.config for c in some], texts, f"choosing {at // at_once + 1}")
            _note(some, rows)

    def policies(
        self,
        names: Sequence[str],
        exact: int,
        budget: int,
        best: Candidate,
        texts: list[Any],
        rejected: list[tuple[str, str]],
    ) -> list[Candidate]:
        """Policies with the share of tokens that the budget leaves; only one that beats the best comes back.

        Both are measured on the second half of every window, the first being the prompt.
        """
        share = budget / exact
        if not names or share >= 1 or self.left() < 0.2:
            rejected.extend(
                (name, "not measured: the time was over") for name in names if share < 1
            )
            return []
        kept = []
        for name in names:
            c = Candidate("auto", f"{name}:budget={share:.4f}", "policy", budget)
            pair = Candidate(best.kv, best.keep, best.kind, best.n_bytes)
            try:
                rows, _ = self.rows([pair.config, c.config], texts, f"policy {name}")
            except ConfigError as e:
                rejected.append((c.keep, str(e)))
                continue
            _note([pair, c], rows)
            per_token = next(r.bytes_per_token for r in rows if r.keep == c.keep)
            held = per_token * self.goal.length / self.bytes_of_window()
            if _kl(c) >= _kl(pair):
                rejected.append(
                    (
                        c.label,
                        f"KL {_kl(c):.2e} where {best.label} has {_kl(pair):.2e} on the same tokens",
                    )
                )
            elif held > share * 1.02:
                rejected.append(
                    (c.label, f"held {held:.1%} of the exact bytes, which is over the budget")
                )
            else:
                kept.append(c)
        return kept

    def bytes_of_window(self) -> int:
        """Of one window under the exact cache."""
        return bytes_of(
            self.layers,
            "auto",
            dtype=self.dtype,
            block_tokens=self.block_tokens,
            context=self.goal.length,
        )

    # -- the end -------------------------------------------------------------------------------------------------

    def finish(
        self,
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
        chosen = min(policies or measured, key=_kl)
        uniform = min((c for c in measured if c.kind == "uniform"), key=_kl, default=None)
        for c in measured:
            if c is not chosen:
                assert c.kl is not None
                c.why = f"KL {c.kl.value:.2e} where the choice has {_kl(chosen):.2e}"
        pair = [chosen] if uniform is None or uniform is chosen else [chosen, uniform]
        front = tuple(replace(c) for c in measured)  # with their figures on the text that chose
        fit = self.left() * 60 * self.goal.minutes / max(1e-9, self.window_s * (1 + len(pair)))
        texts = texts[: max(2, int(fit))]
        rows, values = self.rows([c.config for c in pair], texts, "held out")
        _note(pair, rows)
        gain = None
        if len(pair) == 2:
            n = len(values[1]["kl"]) // len(texts)
            gain = paired_bootstrap(
                values[2]["kl"] - values[1]["kl"], runs([n] * len(texts)), seed=self.seed
            )
            if uniform is not None and gain.high is not None and gain.high < 0:
                rejected.append(
                    (chosen.label, "worse than the best uniform recipe on held-out text")
                )
                chosen, gain = uniform, None
        return Tuned(
            self.goal,
            *sizes,
            chosen,
            uniform,
            gain,
            floor,
            front,
            tuple(rejected),
            tuple(layers),
            int(np.size(values[1]["kl"])),
            Loaded(self.model, self.tokenizer, "").digest,
            self.injected,
            self.seed,
        )


def _note(some: Sequence[Candidate], rows: Sequence[Row]) -> None:
    by = {(r.kv, r.keep, r.metric): Estimate(r.value, r.low, r.high) for r in rows}
    for c in some:
        c.kl, c.agreement = by[*c.config, "kl"], by[*c.config, "agreement"]
