"""Law 7: spans agree with an independent dense mask, in what is visible and in what is needed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from laws.dense import mask, may_read, spans
from quire.spans import Span

LENGTH = 40


@given(span=spans)
def test_visible_is_the_dense_mask(span: Span) -> None:
    dense = mask(span, LENGTH)
    q, k = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    assert np.array_equal(span.visible(q, k), dense)
    assert np.array_equal(span.visible(torch.from_numpy(q), torch.from_numpy(k)).numpy(), dense)


@given(span=spans, q=st.integers(0, 10**6), back=st.integers(-3, 60))
def test_visible_far_from_the_start_for_plain_integers(span: Span, q: int, back: int) -> None:
    k = max(0, q - back)
    assert bool(span.visible(q, k)) == may_read(span, q, k)


@given(span=spans)
def test_needs_is_what_later_queries_see_of_what_is_cached(span: Span) -> None:
    # A chunk or block boundary repeats within 80 positions for the spans drawn here.
    dense = mask(span, 3 * LENGTH)
    for b in range(LENGTH):
        wanted = np.flatnonzero(dense[b:, :b].any(0)).tolist()
        intervals = span.needs(b)
        assert [p for lo, hi in intervals for p in range(lo, hi)] == wanted
        assert all(lo < hi for lo, hi in intervals)
        assert all(a[1] < b[0] for a, b in pairwise(intervals))


@given(span=spans, n=st.integers(0, 60))
def test_reach_bounds_every_interval_of_needs(span: Span, n: int) -> None:
    reach = span.reach(n)
    most = [0] * len(reach)
    for b in range(n + 1):
        sizes = [hi - lo for lo, hi in span.needs(b)]
        assert sum(sizes) <= sum(reach)
        if len(sizes) == len(reach):
            most = [max(a, s) for a, s in zip(most, sizes, strict=True)]
    assert all(a <= r for a, r in zip(most, reach, strict=True))


@given(span=spans)
def test_what_is_needed_never_comes_back(span: Span) -> None:
    """A position that no query at b or later reads is not needed at b + 1 either: freeing is final."""
    for b in range(LENGTH):
        now = {p for lo, hi in span.needs(b) for p in range(lo, hi)}
        then = {p for lo, hi in span.needs(b + 1) for p in range(lo, hi)}
        assert then <= now | {b}
