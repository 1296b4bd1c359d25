"""What `tune` is asked for, what it looks at, and what it answers with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quire.evaluate.cells import Config
from quire.evaluate.metrics import Estimate
from quire.evaluate.report import Layer

__all__ = ["Candidate", "Goal", "Tuned"]


@dataclass(frozen=True)
class Goal:
    """What is wanted.

    Args:
        memory: bytes for all users' caches at their peak, prompts included, or a share of what the exact cache takes
            as a float in (0, 1].
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
    """A configuration and what is known of it; `map` is the text of its map file, where it has one.

    Args:
        n_bytes: of all users at the context, at most, when their prompts are done.
        peak_bytes: while one of them computes its prompt; what the budget is for.
        recipes: of layers ("3") and of KV heads ("3.1") that have one of their own.
    """

    kv: str
    keep: str
    kind: str
    n_bytes: int
    peak_bytes: int
    map: str = ""
    recipes: Mapping[str, str] = field(default_factory=dict)
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
    def loss(self) -> float:
        """KL where it is known, else no end of it."""
        return self.kl.value if self.kl is not None else float("inf")

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
        floor: agreement and KL of the exact cache with itself in another order of sums, as the model is served: there
            no codec can beat it.
        held_tokens: predicted tokens of the held-out text.
        judged_in: the dtype that all but `floor` and `served` is computed in.
        served: agreement and KL of the choice as the model is served, on the same text; None where that is `judged_in`.
        step_bytes: the choice's peak where prompts find room for large steps; None for a policy's.
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
    step_bytes: int | None = None
    judged_in: str = ""
    served: tuple[Estimate, Estimate] | None = None

    @property
    def meets(self) -> bool:
        """Whether the choice has the quality that was asked for, on held-out text, as it was judged."""
        return (
            self.chosen.agreement is not None and self.chosen.agreement.value >= self.goal.quality
        )
