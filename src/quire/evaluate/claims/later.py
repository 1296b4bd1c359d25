"""Claims that are not looked at yet, and why: a part that is not built, a run that takes long, another machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quire.evaluate.claims.claim import Claim, Outcome

__all__ = ["CLAIMS"]


def _no(why: str) -> Callable[[Any], Outcome]:
    return lambda _: Outcome("", "not here", why)


CLAIMS = (
    Claim(
        "split",
        "Splitting prefill from decode gives 1.5 to 2 times the throughput",
        "Splitwise, DistServe",
        _no("needs more than one machine and the cluster, which is not built"),
    ),
    Claim(
        "mla-speed",
        "MLA generates 5.76 times as fast as DeepSeek 67B",
        "DeepSeek-V2, arXiv 2405.04434",
        _no("compares two models of hundreds of gigabytes on eight accelerators"),
    ),
)
