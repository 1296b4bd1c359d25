"""Configurations at work: each one its own cache over the same weights, and what the texts so far have shown of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.errors import RequestError
from quire.evaluate.decode import Reading, Scorer, twin
from quire.evaluate.inject import Injection
from quire.evaluate.metrics import Estimate
from quire.evaluate.report import Row
from quire.models.memory import arena_bytes
from quire.models.open import open_runner
from quire.models.prepack import prepack

__all__ = ["Cell", "Config", "Progress", "check_read", "open_cells"]

Config = tuple[str, str]
"""(kv, keep)"""


@dataclass
class Cell:
    """One configuration at work.

    Args:
        values: name to an array per text: a value per token or answer.
        reading: of all texts so far.
    """

    config: Config
    scorer: Scorer
    values: dict[str, list[npt.NDArray[Any]]] = field(default_factory=dict)
    reading: Reading = field(default_factory=Reading)

    def begin(self) -> None:
        """A new task: figures begin at zero."""
        self.reading = self.scorer.reading = Reading()
        self.values = {}

    def add(self, name: str, values: Any) -> None:
        """Per-token values of one more chunk."""
        self.values.setdefault(name, []).append(np.asarray(values))

    def all(self, name: str) -> npt.NDArray[np.float64]:
        """The values of all chunks."""
        return np.concatenate(self.values[name]).astype(np.float64)

    def row(self, template: Row, metric: str, e: Estimate, **changes: Any) -> Row:
        """A row of this configuration."""
        return replace(
            template,
            kv=self.config[0],
            keep=self.config[1],
            metric=metric,
            value=e.value,
            low=e.low,
            high=e.high,
            bytes_per_token=self.reading.bytes_per_token,
            decoded=self.reading.decoded_queries / self.reading.queries,
            **changes,
        )

    # -- a text's share, to be kept by a journal -----------------------------------------------------------------

    def begin_text(self) -> dict[str, int]:
        """Marks where a text begins; what it returns goes to `text`."""
        self.scorer.reading = Reading()
        return {name: len(chunks) for name, chunks in self.values.items()}

    def text(self, began: dict[str, int]) -> tuple[dict[str, npt.NDArray[Any]], Reading]:
        """What the text that has just ended added; its chunks become one array each."""
        found = {}
        for name, chunks in self.values.items():
            at = began.get(name, 0)
            if len(chunks) > at:
                chunks[at:] = [np.concatenate(chunks[at:])]
                found[name] = chunks[at]
        self.reading += self.scorer.reading
        return found, self.scorer.reading

    def take(self, values: dict[str, npt.NDArray[Any]], reading: Reading) -> None:
        """A text that was measured before."""
        for name, chunk in values.items():
            self.values.setdefault(name, []).append(chunk)
        self.reading += reading


@contextmanager
def open_cells(
    model: Any,
    configs: Sequence[Config],
    outliers: Injection | None,
    *,
    memory: int | float | str,
    block_tokens: int,
    attention: str,
    chunk_tokens: int | None,
) -> Iterator[list[Cell]]:
    """Cells of all configurations, which share `memory` evenly. Raises ConfigError, CapacityError.

    The model's weights are packed meanwhile where that pays (`prepack`), as they are when it is served.
    """
    with ExitStack() as stack:
        packed = prepack(model)
        if packed is not None:
            stack.callback(packed.restore)
        share = arena_bytes(memory, model.device) // len(configs)
        options = {"memory": share, "block_tokens": block_tokens, "attention": attention}
        yield [
            stack.enter_context(_cell(model, c, outliers, options, chunk_tokens)) for c in configs
        ]


@contextmanager
def _cell(
    model: Any,
    config: Config,
    outliers: Injection | None,
    options: dict[str, Any],
    chunk_tokens: int | None,
) -> Iterator[Cell]:
    options = {"weights": "plain"} | options  # the twin shares them with the model
    runner = open_runner(twin(model), kv=config[0], keep=config[1], **options)
    try:
        scorer = Scorer(runner, chunk_tokens=chunk_tokens)
        if outliers is not None:
            outliers.bind(runner)
        yield Cell(config, scorer)
    finally:
        bridge = getattr(runner, "bridge", None)
        if bridge is not None:
            bridge.close()


def check_read(cell: Cell, length: int) -> None:
    """Refuses a length at which a lossy configuration would never be read decoded, before anything is scored."""
    spec = cell.scorer.runner.bridge.layout.spec
    spans = [raw.span for raw in spec if any(g.raw == raw.name for g in spec.groups)]
    if spans and not any(s.start(length - 2) > s.sinks for s in spans):
        raise RequestError(
            f"kv={cell.config[0]!r}: in {length} tokens no query would read a decoded position; take a length above "
            "one block, the residual window and the sinks"
        )


@dataclass
class Progress:
    """Says how far a task is."""

    call: Callable[[str, int, int], None] | None
    task: str
    total: int
    done: int = 0

    def step(self) -> None:
        """One more text."""
        self.done += 1
        if self.call is not None:
            self.call(self.task, self.done, self.total)
