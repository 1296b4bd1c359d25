"""What a query may read, one position at a time, written from the definitions and from nothing in the library."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from quire.spans import Chunked, Full, Residual, Sinks, Span, State, Window


def may_read(span: Span, q: int, k: int) -> bool:
    """Whether the query at position q reads the key at position k."""
    if isinstance(span, State):
        return k == q - 1
    if k > q:
        return False
    match span:
        case Residual():
            begin = q - q % span.block_tokens - span.residual_tokens
            return (k >= begin or k < span.sinks) and may_read(span.inner, q, k)
        case Window():
            return q - k < span.tokens
        case Chunked():
            return q - q % span.tokens <= k
        case Sinks():
            return k < span.sinks or q - k < span.tokens
        case _:
            return True


def mask(span: Span, n: int) -> np.ndarray:
    """`[n, n]`: row q, column k."""
    return np.array([[may_read(span, q, k) for k in range(n)] for q in range(n)], bool).reshape(
        n, n
    )


def first_raw(q: int, block_tokens: int, residual_tokens: int) -> int:
    """s(q) of the design."""
    return max(0, block_tokens * (q // block_tokens) - residual_tokens)


plain_spans = st.one_of(
    st.just(Full()),
    st.builds(Window, st.integers(1, 12)),
    st.builds(Chunked, st.integers(1, 10)),
    st.builds(Sinks, st.integers(1, 6), st.integers(1, 8)),
)
spans = st.one_of(
    plain_spans,
    st.just(State()),
    st.builds(Residual, st.integers(1, 8), st.integers(0, 20), plain_spans, st.integers(0, 9)),
)
