"""Law 6: merge is associative and commutative, with an identity; a partition of the keys gives the whole."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.ops import Partial, attend, empty_partial, merge, sink_partial

TIGHT = {"rtol": 1e-13, "atol": 1e-13}
SHAPE = (3, 4)  # heads, queries
WIDTH = 5


def close(a: Partial, b: Partial) -> None:
    torch.testing.assert_close(a.out, b.out, **TIGHT)
    torch.testing.assert_close(a.lse, b.lse, **TIGHT)


def draw_partial(seed: int, spread: float, empty_share: float) -> Partial:
    g = torch.Generator().manual_seed(seed)
    lse = torch.randn(SHAPE, generator=g, dtype=torch.float64) * spread
    gone = torch.rand(SHAPE, generator=g) < empty_share
    out = torch.randn(*SHAPE, WIDTH, generator=g, dtype=torch.float64)
    return Partial(torch.where(gone.unsqueeze(-1), 0.0, out), torch.where(gone, float("-inf"), lse))


partials = st.builds(
    draw_partial,
    st.integers(0, 10**6),
    st.sampled_from([0.1, 5.0, 300.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
)


@given(a=partials, b=partials, c=partials)
def test_merge_is_associative(a: Partial, b: Partial, c: Partial) -> None:
    close(merge(merge(a, b), c), merge(a, merge(b, c)))


@given(a=partials, b=partials)
def test_merge_is_commutative(a: Partial, b: Partial) -> None:
    close(merge(a, b), merge(b, a))


@given(a=partials)
def test_the_empty_segment_is_the_identity(a: Partial) -> None:
    none = empty_partial(SHAPE, WIDTH, torch.float64, torch.device("cpu"))
    for both in (merge(a, none), merge(none, a)):
        assert torch.equal(both.lse, a.lse)
        assert torch.equal(both.out, a.out)


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 24),
    cuts=st.lists(st.integers(0, 24), max_size=4),
    order=st.randoms(use_true_random=False),
    scale=st.sampled_from([0.125, 1.0, 40.0]),
    softcap=st.sampled_from([None, 7.0]),
    sink=st.booleans(),
)
def test_any_partition_in_any_order_gives_the_whole(
    seed, n, cuts, order, scale, softcap, sink
) -> None:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(4, 3, 8, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, n, 8, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(3, n, generator=g) < 0.7
    logits = torch.randn(4, generator=g, dtype=torch.float64)
    options = {"scale": scale, "softcap": softcap}
    whole = attend(q, k, v, mask=mask, **options)
    at = sorted({0, n, *(c for c in cuts if c < n)})
    parts = [attend(q, k[:, a:b], v[:, a:b], mask=mask[:, a:b], **options) for a, b in pairwise(at)]
    if sink:
        whole = merge(whole, sink_partial(logits, whole))
        parts.append(sink_partial(logits, parts[0]))
    order.shuffle(parts)
    total = parts[0]
    for part in parts[1:]:
        total = merge(total, part)
    close(total, whole)
