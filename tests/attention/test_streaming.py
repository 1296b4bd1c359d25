"""A streaming span: the sinks are attended as if the query stood where the cache ends, as the paper numbers it."""

from __future__ import annotations

import pytest
import torch

from quire.attention import ReferenceBackend, Row, Step
from quire.attention.cpu import CpuBackend
from quire.attention.read import Read
from quire.attention.reference import TorchBackend
from quire.errors import InvariantError
from quire.kernels import native
from quire.models.turn import Rope
from quire.plan import KVLayer, build_layout
from quire.spec import Field, KVConfig, Residual, Streaming
from quire.store import BlockStore

SINKS, WINDOW, HEADS, SHARE, WIDTH = 3, 9, 2, 2, 16
ROPE = Rope(1.0 / 10000 ** (torch.arange(0, WIDTH, 2) / WIDTH), halves=True)


def paper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i: int) -> torch.Tensor:
    """Query i over the sinks and the window, positions counted within the cache (StreamingLLM, section 3.2)."""
    kept = [*range(min(SINKS, i + 1)), *range(max(SINKS, i - WINDOW + 1), i + 1)]
    kept = sorted(set(kept))
    places = torch.arange(len(kept))
    if i < SINKS + WINDOW:
        assert kept == list(range(i + 1))
    out = []
    for head in range(HEADS * SHARE):
        keys = ROPE.turn(k[kept, head // SHARE], places)
        query = ROPE.turn(q[i, head], places[-1])
        p = torch.softmax(keys @ query * 0.3, 0)
        out.append(p @ v[kept, head // SHARE])
    return torch.stack(out)


BACKENDS = [ReferenceBackend, TorchBackend, *([CpuBackend] if native.load() else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [(1,) * 40, (40,), (7, 20, 1, 1, 11), (2, 3, 35)])
def test_it_is_the_papers_numbering(backend: type, chunks: tuple[int, ...]) -> None:
    n = sum(chunks)
    g = torch.Generator().manual_seed(1)
    q = torch.randn(n, HEADS * SHARE, WIDTH, generator=g)
    k, v = (torch.randn(n, HEADS, WIDTH, generator=g) for _ in range(2))
    at = torch.arange(n)[:, None]
    turned_q, turned_k = ROPE.turn(q, at), ROPE.turn(k, at)
    fields = (Field("k", (WIDTH,), "float32"), Field("v", (WIDTH,), "float32"))
    layer = KVLayer(0, HEADS, fields, Streaming(SINKS, WINDOW))
    layout = build_layout([layer], KVConfig(block_tokens=4), dtype="float32")
    store = BlockStore(layout.spec, 1 << 18, device="cpu")
    table, start, most = store.open(), 0, 0
    tool = backend()
    for size in chunks:
        stop = start + size
        table.append(size)
        step = Step(store, layout, [Row(table, start, stop)])
        step.turn = lambda _, x, by: ROPE.turn(x, by)
        tool.write(step, 0, {"k": turned_k[start:stop], "v": v[start:stop]})
        got = tool.run(step, 0, turned_q[start:stop], scale=0.3)
        for i in range(start, stop):
            assert torch.allclose(got[i - start], paper(q, k, v, i), atol=2e-5), i
        table.commit()
        most = max(most, table.chains[0].held)
        start = stop
    if max(chunks) == 1:
        assert most <= 1 + -(-WINDOW // 4) + 1


def test_without_a_way_to_turn_it_is_said() -> None:
    fields = (Field("k", (WIDTH,), "float32"), Field("v", (WIDTH,), "float32"))
    layout = build_layout(
        [KVLayer(0, HEADS, fields, Streaming(1, 2))], KVConfig(block_tokens=4), dtype="float32"
    )
    store = BlockStore(layout.spec, 1 << 18, device="cpu")
    table = store.open()
    table.append(8)
    step = Step(store, layout, [Row(table, 0, 8)])
    x = torch.randn(8, HEADS, WIDTH)
    step.write(0, {"k": x, "v": x})
    with pytest.raises(InvariantError, match="turned back"):
        ReferenceBackend().run(step, 0, torch.randn(8, HEADS * SHARE, WIDTH), scale=1.0)


def test_a_residual_window_over_it_splits_at_the_sinks_too() -> None:
    config = KVConfig("int8;window=8", block_tokens=16, keep="sinks:3+window:40")
    fields = (Field("k", (WIDTH,), "float32"), Field("v", (WIDTH,), "float32"))
    layout = build_layout([KVLayer(0, HEADS, fields)], config, dtype="float32")
    body, raw = layout.spec.groups
    assert body.span == Streaming(3, 40)
    assert raw.span == Residual(16, 8, Streaming(3, 40))
    store = BlockStore(layout.spec, 1 << 20, device="cpu")
    table = store.open()
    for start in range(0, 96, 32):
        table.append(32)
        step = Step(store, layout, [Row(table, start, start + 32)])
        step.write(0, {n: torch.randn(32, HEADS, WIDTH) for n in ("k", "v")})
        table.commit()
    table.append(1)
    step = Step(store, layout, [Row(table, 96, 97)])
    reads = step.of_layer(0)[2]
    sinks = [r for r in reads if r.sinks]
    assert [(r.mode, r.kpos.tolist()) for r in sinks] == [("body", [[0, 1, 2]])]
    others = sorted(p for r in reads if not r.sinks for p in seen(r))
    assert others == list(range(57, 97))


def seen(read: Read) -> list[int]:
    mask = read.mask()
    return (read.kpos[0] if mask is None else read.kpos[0][mask[0, 0]]).tolist()
