"""What a read says in two ways, as a mask for torch and as runs of slots for kernels, is the same."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from laws.dense import plain_spans
from quire.attention import Row
from quire.attention.read import Read
from quire.spans import Residual, Span
from quire.spec import CacheGroup, Field
from quire.store.chain import GONE, Extent, joined


@given(
    span=plain_spans,
    query=st.integers(0, 60),
    size=st.sampled_from([1, 4, 16]),
    limit=st.one_of(st.none(), st.tuples(st.integers(0, 20), st.integers(0, 9))),
    gone=st.sets(st.integers(0, 20), max_size=3),
    kept=st.one_of(st.none(), st.sets(st.integers(0, 59))),
)
def test_runs_are_what_the_mask_says(
    span: Span,
    query: int,
    size: int,
    limit: tuple[int, int] | None,
    gone: set[int],
    kept: set[int] | None,
) -> None:
    """Also where blocks are gone from what a lossy body reads, which no table does today."""
    group = CacheGroup("full0", ((0, 0),), (Field("k", (4,), "float32"),), span, block_tokens=size)
    bound = None if limit is None else Residual(size, limit[0], span, limit[1])
    for extent in _extents(span, query, size, kept):
        blocks = extent.blocks.copy()
        blocks[[i for i in gone if i < len(blocks)]] = GONE
        extent.blocks = blocks
        read = Read(
            group,
            group,
            "body" if bound else "raw",
            bound,
            [Row(None, query, query + 1)],  # type: ignore[arg-type]
            [0],
            [extent],
            np.zeros((1, len(blocks)), np.int64),
            torch.device("cpu"),
        )
        mask, (low, high) = read.mask(), read.slots
        seen = np.ones(high - low, bool) if mask is None else mask[0, 0].numpy()
        got = [slot for lo, hi in read.runs(0) for slot in range(lo, hi)]
        assert got == (np.flatnonzero(seen) + low).tolist()


def _extents(span: Span, query: int, size: int, kept: set[int] | None) -> list[Extent]:
    if kept is not None:
        at = np.array([*sorted(k for k in kept if k < query), query])
        return [Extent(np.arange(-(-len(at) // size)), 0, 0, query + 1, at)]
    return [
        Extent(np.arange(lo // size, -(-hi // size)), lo // size * size, lo, hi)
        for lo, hi in joined(span.needs(query), query, query + 1)
    ]
