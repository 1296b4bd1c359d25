"""Small layouts and stores for tests that count."""

from __future__ import annotations

from quire.plan import KVLayer, Layout, StateLayer, build_layout
from quire.spans import Span
from quire.spec import Field, KVCodec, KVConfig
from quire.store import BlockStore, BlockTable

KV = (Field("k", (4,), "float32"), Field("v", (4,), "float32"))


def layout_of(
    *spans: Span,
    size: int = 4,
    codec: KVCodec | None = None,
    state: bool = False,
    heads: int = 2,
    sinks: int = 0,
) -> Layout:
    layers: list[KVLayer | StateLayer] = [KVLayer(i, heads, KV, s) for i, s in enumerate(spans)]
    if state:
        layers.append(StateLayer(len(layers), (Field("s", (50,), "float32", "block"),)))
    codecs = None if codec is None else {"": codec}
    config = KVConfig(f"auto;sinks={sinks}", block_tokens=size)
    return build_layout(layers, config, dtype="float32", codecs=codecs)


def store_of(layout: Layout, slabs: int = 64, device: str | None = None) -> BlockStore:
    slab = max(g.block_bytes for g in layout.spec.groups)
    return BlockStore(layout.spec, slab * slabs, device=device, slab_bytes=slab)


def grown(store: BlockStore, n: int) -> BlockTable:
    table = store.open()
    table.append(n)
    table.commit()
    return table
