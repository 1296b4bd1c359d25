"""`sinks`: the first tokens and a sliding window (StreamingLLM), for streams without end.

Idea: softmax must put its mass somewhere, and many models learn to rest on the first tokens; a window that drops them
falls apart, one that keeps a few of them does not.
Source: StreamingLLM (Xiao et al., arXiv 2309.17453).
Differs: keys stay after RoPE at their true positions, so a block is never rewritten. Where the paper numbers positions
    within the cache, the sinks' segment is attended with the query turned back by max(0, i - (S + W - 1)): no distance
    is ever longer than the cache, as in the paper, and the window's distances are the true ones in both.
Cost: bytes per token times (S + W), rounded up to blocks; one more segment to attend to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from quire.errors import ConfigError
from quire.retention.contract import check_tokens
from quire.spec import Full, Span, Streaming


@dataclass(frozen=True)
class Policy:
    """Parameters `sinks`: how many first tokens; `window`: of how many last ones, the query's own among them."""

    sinks: int = 4
    window: int = 0
    name: ClassVar[str] = "sinks"

    def __post_init__(self) -> None:
        check_tokens(self.name, "sinks", self.sinks, 1)
        check_tokens(self.name, "window", self.window, 0)

    def span(self, layer: int, head: int, inner: Span) -> Span:
        return Streaming(self.sinks, self.window) if type(inner) is Full else inner

    def join(self, other: Any) -> Any:
        """`sinks:4+window:1024`."""
        if other.name != "window" or self.window:
            return None
        return Policy(self.sinks, other.tokens)

    def check(self, text: str) -> None:
        """Refuses sinks without a window."""
        if not self.window:
            raise ConfigError(
                f"keep={text!r} keeps {self.sinks} tokens and nothing else; add a window: sinks:4+window:1024"
            )
