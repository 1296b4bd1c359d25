"""`window`: the last `tokens` positions, the query's own among them.

Idea: what a model with sliding-window attention of that width would read; blocks that have left the window go back. A
model that was not trained so loses what lies behind, and where its heads rest on the first token it falls apart when
that leaves (`sinks` keeps it).
Source: sliding-window attention as in Longformer (arXiv 2004.05150) and Mistral 7B (arXiv 2310.06825).
Cost: bytes per token times the window, rounded up to blocks; time per token no longer grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from quire.retention.contract import check_tokens
from quire.spec import Full, Span, Window


@dataclass(frozen=True)
class Policy:
    """Parameter `tokens`: how wide."""

    tokens: int = 1024
    name: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        check_tokens(self.name, "tokens", self.tokens, 1)

    def span(self, layer: int, head: int, inner: Span) -> Span:
        return Window(self.tokens) if type(inner) is Full else inner

    def join(self, other: Any) -> Any:
        """`window:1024+sinks:4`."""
        return None if other.name != "sinks" else other.join(self)
