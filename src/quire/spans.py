"""Spans: which cached positions a query may read, as values.

A span answers two questions about one attention layer. `visible(q, k)`: may the query at position `q` read the key at
position `k`?  `needs(b)`: once every query before `b` has been answered, which cached positions `[start, stop)` may a
query at `b` or later still read?  The second is what the store acts on: positions outside `needs(committed)` are freed,
and a prefix can be resumed at `b` only where all of `needs(b)` is present.

    Full            |################|q         needs(b) = [0, b)
    Window(w)       |........########|q         needs(b) = [b-w+1, b)      w positions, the query's own among them
    Chunked(c)      |........|#######|q         needs(b) = [c*(b//c), b)
    Sinks(n, w)     |####....########|q         needs(b) = [0, n) + [b-w+1, b)
    Residual(B, R)  |.......[#raw####|q         needs(b) = [s(b), b),  s(i) = max(0, B*(i//B) - R)
    State()         |...............[x|         needs(b) = [b-1, b)        the state after the last token

`visible` takes integers, NumPy arrays or torch tensors that broadcast; nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quire.errors import ConfigError

Interval = tuple[int, int]
"""Half-open `[start, stop)` in logical positions."""


def _interval(start: int, stop: int) -> tuple[Interval, ...]:
    start = max(0, start)
    return ((start, stop),) if start < stop else ()


def _positive(what: str, tokens: int) -> None:
    if tokens < 1:
        raise ConfigError(f"{what} is at least 1 token, not {tokens}")


@dataclass(frozen=True)
class Span:
    """Causal attention to everything before, and the base of every other span."""

    def needs(self, b: int) -> tuple[Interval, ...]:
        """Cached positions that a query at `b` or later may read, as disjoint ascending intervals."""
        return _interval(0, b)

    def visible(self, q: Any, k: Any) -> Any:
        """Whether the query at position `q` reads the key at position `k` (broadcasting)."""
        return k <= q

    def reach(self, n: int) -> tuple[int, ...]:
        """At most how many positions `needs(b)` holds for b up to n, one number per interval."""
        return (n,)


@dataclass(frozen=True)
class Full(Span):
    """Every position up to the query's own."""


@dataclass(frozen=True)
class Window(Span):
    """The last `tokens` positions, the query's own among them (`k > q - tokens`)."""

    tokens: int

    def __post_init__(self) -> None:
        _positive("a window", self.tokens)

    def needs(self, b: int) -> tuple[Interval, ...]:
        return _interval(b - self.tokens + 1, b)

    def visible(self, q: Any, k: Any) -> Any:
        return (k <= q) & (k > q - self.tokens)

    def reach(self, n: int) -> tuple[int, ...]:
        return (min(n, self.tokens - 1),)


@dataclass(frozen=True)
class Chunked(Span):
    """Positions of the query's own chunk of `tokens` (Llama-4): `k // tokens == q // tokens`."""

    tokens: int

    def __post_init__(self) -> None:
        _positive("a chunk", self.tokens)

    def needs(self, b: int) -> tuple[Interval, ...]:
        return _interval(b // self.tokens * self.tokens, b)

    def visible(self, q: Any, k: Any) -> Any:
        return (k <= q) & (k // self.tokens == q // self.tokens)

    def reach(self, n: int) -> tuple[int, ...]:
        return (min(n, self.tokens - 1),)


@dataclass(frozen=True)
class Sinks(Span):
    """The first `sinks` positions and the last `tokens` ones (StreamingLLM, arXiv 2309.17453)."""

    sinks: int
    tokens: int

    def __post_init__(self) -> None:
        _positive("a window", self.tokens)
        _positive("the number of sinks", self.sinks)

    def needs(self, b: int) -> tuple[Interval, ...]:
        start = max(0, b - self.tokens + 1)
        if start <= self.sinks:
            return _interval(0, b)
        return _interval(0, self.sinks) + _interval(start, b)

    def visible(self, q: Any, k: Any) -> Any:
        return (k <= q) & ((k < self.sinks) | (k > q - self.tokens))

    def reach(self, n: int) -> tuple[int, ...]:
        return min(n, self.sinks), min(n, self.tokens - 1)


@dataclass(frozen=True)
class Streaming(Sinks):
    """`Sinks` whose first positions are attended with the query turned back: never farther than the cache is long."""

    def turned(self, q: Any) -> Any:
        """By how many positions the query at `q` is turned back for the sinks (before clamping at zero for arrays)."""
        back = q - (self.sinks + self.tokens - 1)
        return max(0, back) if isinstance(back, int) else back


@dataclass(frozen=True)
class Residual(Span):
    """The raw window over a lossy body: positions from `s(i) = max(0, B*(i//B) - R)` on, within `inner`.

    With blocks of B tokens and a residual window of R tokens, query i reads raw values for `k >= s(i)` and for the
    first `sinks` positions, and decoded ones between. `s` is a function of i alone, which is what makes chunking,
    batching and prefix hits invisible.

    |raw sinks|---- decoded ----|[s(i) raw ####|i
    """

    block_tokens: int
    residual_tokens: int
    inner: Span = field(default_factory=Full)
    sinks: int = 0

    def __post_init__(self) -> None:
        _positive("a block", self.block_tokens)
        if self.residual_tokens < 0:
            raise ConfigError(
                f"a residual window holds 0 tokens or more, not {self.residual_tokens}"
            )
        if self.sinks < 0:
            raise ConfigError(f"the number of raw sinks is 0 or more, not {self.sinks}")

    def start(self, i: Any) -> Any:
        """`s(i)`: the first position that query i reads raw (not clamped at zero when `i` is an array)."""
        s = i // self.block_tokens * self.block_tokens - self.residual_tokens
        return max(0, s) if isinstance(s, int) else s

    def coded(self, q: Any, k: Any) -> Any:
        """Whether the query at `q` reads the position `k` decoded, if `inner` lets it read it at all."""
        return (k >= self.sinks) & (k < self.start(q))

    def needs(self, b: int) -> tuple[Interval, ...]:
        s = self.start(b)
        if s <= self.sinks:
            return self.inner.needs(b)
        out: tuple[Interval, ...] = ()
        for lo, hi in self.inner.needs(b):
            out += _interval(lo, min(hi, self.sinks)) + _interval(max(lo, s), hi)
        return out

    def visible(self, q: Any, k: Any) -> Any:
        return self.inner.visible(q, k) & ((k < self.sinks) | (k >= self.start(q)))

    def reach(self, n: int) -> tuple[int, ...]:
        whole = min(n, self.residual_tokens + self.block_tokens - 1)
        inner = self.inner.reach(n)
        if not self.sinks:
            if whole < inner[-1]:
                return (whole,)  # all of it lies in the inner span's last interval
            return tuple(min(r, whole) for r in inner)
        sinks = min(n, self.sinks)
        if len(inner) > 1:  # its intervals may begin among the sinks and end in the window
            return min(n, max(sinks, inner[0])), min(sum(inner), n, whole + sinks)
        return sinks, min(inner[0], whole)


@dataclass(frozen=True)
class State(Span):
    """Recurrent state: the query at `b` needs the state after `b` tokens, that is the newest one."""

    def needs(self, b: int) -> tuple[Interval, ...]:
        return _interval(b - 1, b)

    def visible(self, q: Any, k: Any) -> Any:
        return k == q - 1

    def reach(self, n: int) -> tuple[int, ...]:
        return (min(n, 1),)
