"""A step as data: how steps are filled, what is in one, and what was counted. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from quire.engine.request import Sample
from quire.engine.runner import Item
from quire.errors import ConfigError

__all__ = ["Plan", "SchedulerConfig", "SchedulerStats"]


@dataclass(frozen=True)
class SchedulerConfig:
    """How steps are filled.

    Args:
        step_tokens: most tokens computed in one step; a whole-prompt runner may exceed it with one prompt.
        beside_tokens: most prompt tokens computed in a step in which others decode, which wait for it; None: as many
            as are left of `step_tokens`.
        max_running: most samples in a step; the runner's `max_rows` and `step_tokens` may lower it.
        priority_step_s: seconds of waiting that are worth one level of priority.
        watermark: share of the pool that an admission must leave free while others run.
        logits_tokens: longest chunk of a prompt whose log-probabilities are wanted: its logits are
            [logits_tokens, vocab] float32.
    """

    step_tokens: int = 2048
    beside_tokens: int | None = None
    max_running: int = 256
    priority_step_s: float = 10.0
    watermark: float = 0.01
    logits_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("step_tokens", "max_running", "logits_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.beside_tokens is not None and self.beside_tokens < 1:
            raise ConfigError(
                f"beside_tokens={self.beside_tokens} must be at least 1, or prompts would starve"
            )
        if not 0 < self.priority_step_s < float("inf"):
            raise ConfigError(
                f"priority_step_s={self.priority_step_s} must be positive and finite, or the low would starve"
            )
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark={self.watermark} must be a share of the pool in [0, 1)")


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start, and the queues now.

    Args:
        prefill_tokens: computed in chunks, recomputation included.
        decode_tokens: computed one per sample and step.
        recomputed_tokens: computed a second time after a preemption (or where a fork found no room).
        stalls: times that a running sample sat out a step for want of room.
        loading: samples whose prefix is coming from a tier.
    """

    admissions: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    stalls: int = 0
    forks: int = 0
    running: int = 0
    waiting: int = 0
    loading: int = 0


@dataclass(slots=True)
class Plan:
    """One step: every sample in it carries its share as `sample.item`.

    Args:
        budget: tokens left of the step.
        samples: in the order in which they were placed, decoding ones first.
        failed: samples that even an empty pool cannot serve although it said so; nothing else could run.
        prefills: chunks of prompts among them.
    """

    budget: int
    samples: list[Sample] = field(default_factory=list)
    failed: list[Sample] = field(default_factory=list)
    prefills: int = 0

    def place(self, sample: Sample, n_tokens: int) -> None:
        """The next `n_tokens` of a sample are computed in this step; its table has room for them."""
        start = sample.computed
        stop = start + n_tokens
        logits = 1 if stop == len(sample.tokens) else 0
        first = sample.unscored
        if first:
            first = max(start, first - 1)
            if first < min(stop, sample.prompt_tokens - 1):
                logits = stop - first
        assert sample.table is not None
        sample.item = Item(sample.table, sample.tokens, start, stop, logits)
        self.samples.append(sample)
        self.budget -= n_tokens
        self.prefills += n_tokens > 1 or start == 0

    def take_back(self, sample: Sample) -> None:
        """A sample, if it was placed, is not computed after all: others have its share."""
        item = sample.item
        if item is None:
            return
        self.samples.remove(sample)
        self.budget += item.stop - item.start
        self.prefills -= item.stop - item.start > 1 or item.start == 0
        sample.item = None

    def batches(self) -> Iterator[tuple[str | None, list[Sample]]]:
        """The forwards of this step, in order of first appearance.

        One per adapter, and one more for its samples whose cold blocks are streamed: policies of others are told of
        their queries as they would be without those.
        """
        groups: dict[tuple[str | None, bool], list[Sample]] = {}
        for sample in self.samples:
            streamed = getattr(sample.table, "cold", None) is not None
            groups.setdefault((sample.request.adapter, streamed), []).append(sample)
        for (adapter, _), samples in groups.items():
            yield adapter, samples
