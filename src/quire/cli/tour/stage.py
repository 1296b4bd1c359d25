"""What every panel is given: the model, a text, the page to write on, and how much time to take."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

from quire.cli.console import spinner
from quire.cli.options import TourOptions
from quire.cli.prompts import Ask
from quire.cli.tour.page import Page
from quire.engine.params import SamplingParams
from quire.models.load import PACKAGED, Loaded

__all__ = ["PROMPT", "Pace", "Stage", "tour_text"]

PROMPT = "A cache is a log."

_TEXT = "spec.py"
"""A file of Quire's own: every installation has it, its licence is ours, and no model here was trained on it."""


def tour_text() -> str:
    """The text that the panels measure on: Quire's own source."""
    return files("quire").joinpath(_TEXT).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Pace:
    """How much is measured. Times end a panel early on a slow machine or with a large model; what is left out is said.

    Args:
        steps: output tokens of the step table.
        same_tokens: that are written with the cache and without.
        points, longest_tokens, point_tokens: of the curve, and the tokens written at each point.
        curve_s: no further point without a cache after so long.
        sequences, common_tokens, room_tokens: of the memory panel.
        window_tokens: of the text that techniques are scored on.
        speed_tokens, speed_steps: context and steps behind a technique's tokens per second.
        speed_s, techniques_s: no further round of steps, and no further technique, after so long.
        total_s: what all panels together should not exceed: what is measured in turn ends early for its sake.
    """

    steps: int = 8
    same_tokens: int = 64
    points: int = 8
    longest_tokens: int = 1536
    point_tokens: int = 4
    curve_s: float = 10.0
    sequences: int = 6
    common_tokens: int = 200
    room_tokens: int = 2048
    window_tokens: int = 1024
    speed_tokens: int = 512
    speed_steps: int = 12
    speed_s: float = 8.0
    techniques_s: float = 25.0
    total_s: float = 50.0


@dataclass(frozen=True)
class Stage:
    """`page` is None when only the document is wanted. `began` is by `time.monotonic`."""

    loaded: Loaded
    options: TourOptions
    pace: Pace
    page: Page | None
    began: float

    def limit_s(self, own_s: float) -> float:
        """Seconds for one thing that may end early: its own, or what is left of all."""
        return max(0.0, min(own_s, self.began + self.pace.total_s - time.monotonic()))

    # -- the text ------------------------------------------------------------------------------------------------

    @cached_property
    def text_ids(self) -> list[int]:
        """The text's tokens."""
        return self.encode(tour_text())

    @cached_property
    def ids(self) -> list[int]:
        """The text's tokens after what begins a text for this model."""
        begin = self.loaded.tokenizer.encode("a")[: -len(self.encode("a"))]
        return [*(int(t) for t in begin), *self.text_ids]

    def encode(self, text: str) -> list[int]:
        """A piece of text, without what begins one."""
        return [int(t) for t in self.loaded.tokenizer.encode(text, add_special_tokens=False)]

    @cached_property
    def room(self) -> int:
        """The longest sequence that the model takes and the text can fill."""
        from quire.models.rope import Regimes
        from quire.models.runner import context_tokens

        model = self.loaded.model
        config = model.config.get_text_config(decoder=True)
        return min(context_tokens(config, Regimes(model).stretch), len(self.ids))

    def ask(self, prompt: str | list[int], n_tokens: int) -> Ask:
        """A greedy request for exactly `n_tokens`."""
        ids = self.loaded.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        params = SamplingParams(max_tokens=n_tokens, ignore_eos=True)
        return Ask(prompt, params, token_ids=tuple(int(t) for t in ids))

    # -- the model -----------------------------------------------------------------------------------------------

    @contextmanager
    def opened(self, **changes: Any) -> Iterator[Any]:
        """A runner over a store of its own; the model has its own attention back afterwards."""
        from quire.models.open import open_runner

        o = self.options
        chosen = {
            "memory": o.memory,
            "block_tokens": o.block_tokens,
            "attention": o.attention,
        } | changes
        runner: Any = open_runner(self.loaded.model, **chosen)
        try:
            yield runner
        finally:
            runner.bridge.close()

    @property
    def dtype(self) -> str:
        """What the model computes in."""
        return str(self.loaded.model.dtype).removeprefix("torch.")

    # -- words ---------------------------------------------------------------------------------------------------

    def working(self, message: str) -> AbstractContextManager[Any]:
        """A moving line while something takes long."""
        return spinner(message, shown=self.page is not None)

    def command(self, verb: str, *words: object) -> str:
        """A command line that does more of the same with the same model."""
        o = self.options
        named = [] if o.model is None else [str(o.model)]
        model = named if verb == "eval" else [w for n in named for w in ("--model", n)]
        flags = [
            part
            for name, value in (("dtype", o.dtype), ("device", o.device))
            if value is not None
            for part in (f"--{name}", value)
        ]
        return shlex.join(["quire", verb, *model, *(str(w) for w in words), *flags])

    def about(self) -> dict[str, Any]:
        """What everything is measured on."""
        import torch

        from quire import __version__

        model = self.loaded.model
        found: dict[str, Any] = {
            "version": __version__,
            "model": self.loaded.name,
            "architecture": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "dtype": self.dtype,
            "device": str(model.device),
            "threads": torch.get_num_threads(),
            "block_tokens": self.options.block_tokens,
            "digest": self.loaded.digest,
        }
        if self.loaded.name == PACKAGED:
            from quire import packaged

            found["packaged_sha256"] = packaged.digest()
        return found
