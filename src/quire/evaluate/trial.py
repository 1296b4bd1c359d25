"""A model on trial: the bytes of its configurations, parts of a text, and figures of caches beside the exact one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from quire.errors import RequestError
from quire.evaluate.cells import Config, Progress, open_cells
from quire.evaluate.choice import Goal
from quire.evaluate.decode import in_float32, twin
from quire.evaluate.inject import inject
from quire.evaluate.journal import Journal, digest_of
from quire.evaluate.report import Layer, Row
from quire.evaluate.rows import text_rows
from quire.evaluate.search import bytes_of, policy_bytes, step_bytes
from quire.evaluate.sensitivity import AT_ONCE, sensitivity
from quire.evaluate.texts import windows
from quire.models.load import weights_digest
from quire.models.open import open_runner
from quire.plan.layout import KVLayer

__all__ = ["Trial"]

SPARE_BYTES = 64 << 20
"""Of an arena, for slabs of groups that hold little."""


class Trial:
    """A search under way: the model, what is wanted of it, and the time that is left."""

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
        """What the model is served in, and its exact cache kept in."""
        self.judge = in_float32(model)
        """What measures: the model, or a copy whose own sums round next to nothing."""
        self.judge_dtype = str(self.judge.dtype).removeprefix("torch.")
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

    def held(self, keep: str) -> tuple[int, int]:
        """Bytes of all users' exact caches under a policy: when prompts are done, and while one computes its own."""
        steady, peak = policy_bytes(
            self.layers,
            keep,
            dtype=self.dtype,
            block_tokens=self.block_tokens,
            context=self.goal.context,
        )
        return steady * self.goal.users, steady * (self.goal.users - 1) + max(steady, peak)

    def step_bytes(self, kv: str) -> int:
        """Peak of all users' sequences, one of which computes its prompt in large steps."""
        size = step_bytes(
            self.layers,
            kv,
            dtype=self.dtype,
            block_tokens=self.block_tokens,
            context=self.goal.context,
        )
        return self.bytes(kv) // self.goal.users * (self.goal.users - 1) + size

    def map_file(self, text: str) -> str:
        """A map in the folder under a name that says what is in it, as a recipe."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{digest_of(text)}.toml"
        file.write_text(text, encoding="utf-8")
        return f"map:{file}"

    def budget(self) -> tuple[int, int]:
        """The bytes that there are, and those of the exact cache."""
        exact = self.bytes("auto")
        memory = self.goal.memory
        return (int(memory * exact) if isinstance(memory, float) else memory), exact

    def bytes_of_window(self) -> int:
        """Of one window under the exact cache."""
        return bytes_of(
            self.layers,
            "auto",
            dtype=self.judge_dtype,
            block_tokens=self.block_tokens,
            context=self.goal.length,
        )

    # -- measuring -----------------------------------------------------------------------------------------------

    def rows(
        self,
        configs: Sequence[Config],
        texts: list[Any],
        part: str,
        attention: Sequence[str] = ("auto",),
        *,
        served: bool = False,
    ) -> tuple[list[Row], list[Any]]:
        """Rows of configurations, and per-token values of each: nll, kl, agreement.

        Args:
            served: computed in the dtype that the model is served in, not as it is judged.
        """
        model = self.model if served else self.judge
        tag = digest_of([part, [list(c) for c in configs], list(attention), str(model.dtype)])
        with ExitStack() as stack:
            outliers = stack.enter_context(inject(model, seed=self.seed)) if self.injected else None
            cells = []
            for some, backend in zip(
                ([("auto", "full")], configs), (attention[0], attention[-1]), strict=True
            ):
                cells += stack.enter_context(
                    open_cells(
                        model,
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

    def floor(self, texts: list[Any], *, served: bool = False) -> tuple[float, float]:
        """Agreement and KL of the exact cache with itself where another backend adds up in another order."""
        order = ("auto", "reference")
        rows, _ = self.rows([("auto", "full")], texts, "rounding", order, served=served)
        by = {r.metric: r.value for r in rows}
        return by["agreement"], by["kl"]

    def sensitivity(self, recipes: Sequence[str], texts: list[Any]) -> list[Layer]:
        """Every layer's keys and values alone, under every recipe, as far as a half of the time goes."""
        ids = [int(t) for e in texts for t in e.tokens]
        return sensitivity(
            self.judge,
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
