"""A claim: what is said, by whom, under which conditions, and a function that finds out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quire.errors import QuireError

VERDICTS = ("reproduced", "contradicted", "not here", "arithmetic")
"""Arithmetic: nothing to run, and the sum comes out. A sum that does not contradicts the claim."""


@dataclass(frozen=True)
class Outcome:
    """What we found.

    Args:
        ours: our figure, in words.
        verdict: one of `VERDICTS`.
        why: what the verdict rests on, or what is missing.
        ratios: where it is a number of times: a label, what is claimed, and ours; for the drawing.
    """

    ours: str
    verdict: str
    why: str = ""
    ratios: tuple[tuple[str, float, float], ...] = ()

    def __post_init__(self) -> None:
        assert self.verdict in VERDICTS, self.verdict


@dataclass(frozen=True)
class Claim:
    """One statement.

    Args:
        name: short, unique; what `--only` takes.
        claim: what is said.
        source: by whom.
        run: finds out. Given the bench, which makes the packaged model when it is first asked for.
        quick: whether it is part of `--quick`.
    """

    name: str
    claim: str
    source: str
    run: Callable[[Any], Outcome]
    quick: bool = True


def run_claims(
    claims: Sequence[Claim], bench: Any, *, tell: Callable[[str], Any] = lambda _: None
) -> list[dict[str, Any]]:
    """Runs claims one after the other.

    Args:
        bench: see `measured.Bench`.
        tell: is told each claim's name before it runs.

    Returns:
        The rows of `quire claims --json`. A claim that fails to run says so and spoils no other.
    """
    rows = []
    for claim in claims:
        tell(claim.name)
        began = time.monotonic()
        try:
            found = claim.run(bench)
        except QuireError as e:
            found = Outcome("", "not here", f"could not be run: {' '.join(str(e).split())}")
        rows.append(
            {
                "name": claim.name,
                "claim": claim.claim,
                "source": claim.source,
                "ours": found.ours,
                "verdict": found.verdict,
                "why": found.why,
                "ratios": [list(r) for r in found.ratios],
                "seconds": round(time.monotonic() - began, 2),
            }
        )
    return rows
