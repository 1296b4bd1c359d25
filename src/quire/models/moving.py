"""Token rows as they are stored: read, and moved between blocks without being encoded twice.

fields per token         copied row by row
packed codes             unpacked, chosen and packed again: the same numbers in other places
scales of whole groups   such blocks are kept or dropped whole
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quire.plan.kept import unit_tokens
from quire.plan.layout import Layout
from quire.spec import BOUNDS, Field, Site
from quire.store.chain import Chain
from quire.store.compact import Move, move_rows
from quire.store.store import BlockStore

__all__ = ["read_field", "read_raw", "row_mover"]


def read_field(
    store: BlockStore, layout: Layout, chain: Chain, layer: int, name: str, n_slots: int
) -> torch.Tensor:
    """`[heads, n_slots, *shape]` float32: the first slots of one field, decoded."""
    group = chain.group
    site = next(s for s in layout.sites_of(group, layer) if s.name == name)
    codec = layout.codecs_of(group)[name]
    n_blocks = -(-n_slots // group.block_tokens)
    at = torch.from_numpy(store.units(group, chain.ids[:n_blocks])).to(store.arena.device)
    if codec.plain:
        x = store.view(group, layer, name)[at].float()
    else:
        parts = {
            f.name.partition(".")[2]: store.view(group, layer, f.name)[at]
            for f in codec.stored(site)
        }
        pos = _positions(chain, layer, n_blocks).to(at.device)
        x = layout.decode(group, site, parts, pos, torch.float32)
    return x.transpose(0, 1).flatten(1, 2)[:, :n_slots]


def _positions(chain: Chain, layer: int, n_blocks: int) -> torch.Tensor:
    """`[n_blocks, heads, block_tokens]`: true positions in the first blocks of a lossy body, which are whole."""
    group = chain.group
    first, size = group.tile_index(layer), group.block_tokens
    at = chain.true_positions(0)[first : first + len(group.heads(layer)), : n_blocks * size]
    every: torch.Tensor = torch.from_numpy(np.ascontiguousarray(at)).unflatten(1, (n_blocks, size))
    return every.transpose(0, 1)


def read_raw(
    store: BlockStore, chain: Chain, layer: int, name: str, start: int, stop: int
) -> torch.Tensor:
    """`[heads, stop - start, *shape]` float32: positions of one plain field, from a block's first one on."""
    size = chain.group.block_tokens
    blocks = chain.ids[start // size : -(-stop // size)]
    at = torch.from_numpy(store.units(chain.group, blocks)).to(store.arena.device)
    x = store.view(chain.group, layer, name)[at].float()
    return x.transpose(0, 1).flatten(1, 2)[:, : stop - start]


def row_mover(layout: Layout) -> Move:
    """Copies rows of groups of this layout, as stored."""

    def move(
        store: BlockStore,
        old: Chain,
        new: Chain,
        layer: int,
        tiles: np.ndarray,
        into: np.ndarray,
        slots: np.ndarray,
    ) -> None:
        group = old.group
        if all(f.per == "token" or f.name == BOUNDS for f in group.fields):
            move_rows(store, old, new, layer, tiles, into, slots)
        elif unit_tokens(layout, group) == 1:
            _move_codes(layout, store, old, new, layer, tiles, into, slots)
        else:
            _move_blocks(store, old, new, layer, tiles, into, slots)

    return move


def _move_blocks(
    store: BlockStore,
    old: Chain,
    new: Chain,
    layer: int,
    tiles: np.ndarray,
    into: np.ndarray,
    slots: np.ndarray,
) -> None:
    size = old.group.block_tokens
    entries = slots[:, ::size] // size  # [h, n]
    source = _index(store, store.units(old.group, old.ids[entries])), _index(store, tiles)[:, None]
    target = (
        _index(store, store.units(new.group, new.ids[: entries.shape[1]]))[None],
        _index(store, into)[:, None],
    )
    for f in old.group.fields:
        store.view(new.group, layer, f.name)[target] = store.view(old.group, layer, f.name)[source]


def _move_codes(
    layout: Layout,
    store: BlockStore,
    old: Chain,
    new: Chain,
    layer: int,
    tiles: np.ndarray,
    into: np.ndarray,
    slots: np.ndarray,
) -> None:
    """Codes that lie packed: a block's are unpacked, those of the chosen tokens packed again."""
    size, codecs = old.group.block_tokens, layout.codecs_of(old.group)
    n_blocks = slots.shape[1] // size
    have = -(-int(slots.max() + 1) // size)
    source = (
        _index(store, store.units(old.group, old.ids[:have]))[:, None],
        _index(store, tiles)[None],
    )
    target = (
        _index(store, store.units(new.group, new.ids[:n_blocks]))[:, None],
        _index(store, into)[None],
    )
    chosen = _index(store, slots)
    for site in layout.sites_of(old.group):
        codec = codecs[site.name]
        for f in codec.stored(site):
            x = store.view(old.group, layer, f.name)[source]  # [blocks, h, *shape]
            rows = _take(codec, site, f, x, chosen, n_blocks)
            store.view(new.group, layer, f.name)[target] = rows


def _take(
    codec: Any, site: Site, f: Field, x: torch.Tensor, chosen: torch.Tensor, n_blocks: int
) -> torch.Tensor:
    """One stored field `[blocks, h, *shape]` of the tokens `chosen: [h, n]`, as blocks again."""
    size, packing = site.block_tokens, codec.packing(site)
    packed = f.name.endswith(".codes") and f.per == "block"
    if packed:
        x = codec.unpack(site, x, packing.bits)  # [blocks, heads, size, D]
    elif f.per == "block":
        x = x.transpose(-1, -2)  # scales lie [D / group][token]
    lines = x.transpose(0, 1).flatten(1, 2)  # [h, tokens, ...]
    index = chosen.view(*chosen.shape, *[1] * (lines.ndim - 2)).expand(-1, -1, *lines.shape[2:])
    rows = lines.gather(1, index).unflatten(1, (n_blocks, size)).transpose(0, 1)
    if packed:
        return torch.as_tensor(codec.pack(site, rows, packing.bits))
    out: torch.Tensor = rows.transpose(-1, -2) if f.per == "block" else rows
    return out


def _index(store: BlockStore, a: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(a)).long().to(store.arena.device)
