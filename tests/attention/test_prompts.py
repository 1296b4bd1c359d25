"""A prompt's attention by the kernel: every mask, shape and level against float64, the same bits whoever is beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zoo
from models.driving import engine_texts, runner_for
from quire.attention import prompts
from quire.attention.cpu import CpuBackend
from quire.attention.prompts import attend_prompt, serves
from quire.kernels import native

LIBRARY = native.load()
LEVELS = [
    x for x in range(1, 6) if LIBRARY is not None and (x == LIBRARY.isa or 1 < x < LIBRARY.isa)
]
pytestmark = pytest.mark.skipif(
    LIBRARY is None, reason="the CPU kernels were not built here (no C++ compiler)"
)


class Masked:
    """As much of a `Read` as knows its mask."""

    def __init__(self, mask: torch.Tensor | None) -> None:
        self._mask, self.pieces = mask, {}  # type: ignore[var-annotated]
        self.tokens = self.kpos = torch.zeros(1, 1)

    def mask(self, window: int | None) -> torch.Tensor | None:
        return self._mask


def attended(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    isa: int = 0,
) -> torch.Tensor:
    """`mask: [R, T, N]`."""
    assert LIBRARY is not None
    read: Any = Masked(mask)
    if mask is not None:
        read.tokens, read.kpos = mask[:, :, 0], mask[:, 0]
    return attend_prompt(LIBRARY, q, k, v, [read], None, q.shape[3] ** -0.5, isa)


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    share = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(share, 1) for x in (k, v))
    s = q.double() @ k.transpose(-1, -2) * q.shape[3] ** -0.5
    if mask is None:
        return s.softmax(-1) @ v
    s = s.masked_fill(~mask[:, None], float("-inf"))
    return s.softmax(-1).nan_to_num() @ v


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@given(
    rows=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    share=st.sampled_from([1, 2, 3, 7, 70]),
    t=st.one_of(st.integers(1, 60), st.integers(250, 270)),
    n=st.one_of(st.integers(1, 80), st.integers(250, 600)),
    d=st.sampled_from([16, 64, 80, 128]),
    dv=st.sampled_from([16, 64, 80, 144]),
    kind=st.sampled_from(["all", "causal", "window", "random", "none"]),
    isa=st.sampled_from(LEVELS or [0]),
    seed=st.integers(0, 99),
)
def test_against_float64(
    rows: int,
    kv_heads: int,
    share: int,
    t: int,
    n: int,
    d: int,
    dv: int,
    kind: str,
    isa: int,
    seed: int,
) -> None:
    q = numbers(seed, rows, t, kv_heads * share, d).transpose(1, 2)
    k, v = numbers(seed + 1, rows, kv_heads, n, d), numbers(seed + 2, rows, kv_heads, n, dv)
    at, key = torch.arange(t)[:, None] + n - t, torch.arange(n)
    random = torch.rand(t, n, generator=torch.Generator().manual_seed(seed)) < 0.2
    of: dict[str, torch.Tensor | None] = {
        "all": None,
        "causal": key <= at,
        "window": (key <= at) & (key > at - 33),
        "random": random,
        "none": random & (torch.arange(t) % 3 == 0)[:, None],
    }
    one = of[kind]
    mask = None if one is None else one.expand(rows, t, n)
    want = exact(q, k, v, mask)
    if mask is not None:  # what nobody reads may be anything
        unread = ~mask.any(1)[:, None, :, None]
        k, v = k.masked_fill(unread, float("nan")), v.masked_fill(unread, float("inf"))
    got = attended(q, k, v, mask, isa)
    assert got.shape == want.shape
    # queries, keys and values are what they are; weights and the result are rounded to 8 bits
    most = exact(q, k.nan_to_num(0, 0, 0), v.nan_to_num(0, 0, 0).abs(), mask)
    assert ((got.double() - want).abs() <= 2**-8 * want.abs() + 2**-7.5 * most + 1e-9).all()


@given(
    t=st.integers(2, 90),
    before=st.integers(0, 300),
    share=st.sampled_from([1, 4]),
    isa=st.sampled_from(LEVELS or [0]),
    data=st.data(),
)
def test_a_query_does_not_see_who_asks_beside_it(
    t: int, before: int, share: int, isa: int, data: st.DataObject
) -> None:
    """Chunks, other threads and other requests give the same bits: the order of a query's sums is its own."""
    n = before + t
    q = numbers(1, 1, t, 2 * share, 64).transpose(1, 2)
    k, v = numbers(2, 1, 2, n, 64), numbers(3, 1, 2, n, 64)
    mask = (torch.arange(n) <= torch.arange(t)[:, None] + before)[None]
    whole = attended(q, k, v, mask, isa)
    cut = data.draw(st.integers(1, t - 1))
    parts = [
        attended(q[:, :, a:b], k[:, :, : before + b], v[:, :, : before + b], mask[:, a:b], isa)
        if data.draw(st.booleans())
        else attended(q[:, :, a:b], k, v, mask[:, a:b], isa)
        for a, b in ((0, cut), (cut, t))
    ]
    assert torch.equal(torch.cat(parts, 2), whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(attended(q, k, v, mask, isa), whole)
    finally:
        torch.set_num_threads(threads)


def test_large_scores_and_one_reader_of_nothing() -> None:
    q, k, v = (100 * numbers(i, 1, 2, 70, 64) for i in range(3))
    mask = (torch.arange(70) <= torch.arange(70)[:, None])[None].clone()
    mask[0, 5] = False
    got = attended(q, k, v, mask)
    assert got.isfinite().all()
    assert (got[0, :, 5] == 0).all()
    near = (got.double() - exact(q, k, v, mask)).abs() <= 2**-6 * v.double().abs().amax()
    assert near.all()


def test_what_is_served() -> None:
    assert LIBRARY is not None
    q, k, v = numbers(1, 1, 4, 9, 64), numbers(2, 1, 2, 9, 64), numbers(3, 1, 2, 9, 32)
    isa = min(LIBRARY.isa, 5)
    assert serves(LIBRARY, isa, q, k, v)
    assert not serves(LIBRARY, 6, q, k, v), "torch has a matrix unit there"
    assert not serves(LIBRARY, isa, q.float(), k, v)
    assert not serves(LIBRARY, isa, q[..., :56], k[..., :56], v)
    assert not serves(LIBRARY, isa, q, k[:, :, :0], v[:, :, :0])
    assert not serves(LIBRARY, isa, q.transpose(2, 3), k, v)


@pytest.mark.skipif(LIBRARY is not None and LIBRARY.isa > 5, reason="torch's matrix unit attends")
@pytest.mark.parametrize("kv", ["auto", "int8", "kivi:bits=4"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_prompts_of_a_model_go_through_it(
    name: str, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts as by torch's fused attention, in bfloat16, where rounding leaves the choice."""
    asked: list[int] = []
    run = prompts.attend_prompt

    def counted(*args: Any) -> torch.Tensor:
        asked.append(args[1].shape[2])
        return run(*args)

    monkeypatch.setattr(prompts, "attend_prompt", counted)
    texts = [p * 3 for p in zoo.prompts()[:2]]
    model = zoo.build(name).bfloat16()
    runner = runner_for(model, kv=kv, block_tokens=32)
    assert isinstance(runner.bridge.backend, CpuBackend)
    got = engine_texts(runner, texts)
    assert asked
    runner.close()
    monkeypatch.setattr(prompts, "serves", lambda *args: False)
    want = engine_texts(runner_for(model, kv=kv, block_tokens=32), texts)
    same = sum(a == b for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))
    assert same >= 0.5 * sum(len(x) for x in got)
