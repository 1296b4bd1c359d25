"""`full`: every token stays.

Idea: the baseline that all others are measured against; what it gives is the model's own output.
Cost: bytes per token times tokens, without bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quire.spec import Span


@dataclass(frozen=True)
class Policy:
    """No parameters."""

    name: ClassVar[str] = "full"

    def span(self, layer: int, head: int, inner: Span) -> Span:
        return inner
