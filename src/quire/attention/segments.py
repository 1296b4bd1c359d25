"""What the CPU kernel is handed for a step's single queries: segments of blocks, and how a layer's tiles lie in them.

segment    (table of blocks, form, query, lo, hi): slots [lo, hi) that one query reads
form       where a group's keys and values lie in a block of one layer, and which tile each KV head is
"""

from __future__ import annotations

from ctypes import addressof
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from quire.attention.forms import place
from quire.attention.latents import Latents
from quire.attention.paid import Paid, plan_paid
from quire.attention.read import Read
from quire.attention.sparse import indexed
from quire.attention.step import Step
from quire.kernels import native
from quire.kernels.native import DecodeArgs, Form
from quire.plan.layout import Layout
from quire.spec import CacheGroup

__all__ = ["Segments", "Tiles", "each_head", "lay_out", "plan_segments"]


@dataclass(slots=True)
class Tiles:
    """The forms of a layer's groups, and the shape that they serve."""

    address: int
    kv_heads: int
    d: int
    alive: list[Any]
    """The forms, and what addresses in them point at."""


@dataclass(slots=True)
class Segments:
    """What the single queries of a step read in the layers that share these reads."""

    args: DecodeArgs
    tiles: dict[tuple[Any, ...], Tiles | None]
    """Of every layer, kept from step to step."""
    groups: tuple[CacheGroup, ...]
    single: list[Read]
    chunks: list[Read]
    turned: tuple[torch.Tensor, torch.Tensor] | None
    """Tokens that read sinks turned back, and by how much; their segments belong to rows behind all tokens."""
    alive: list[Any]
    """What the addresses in `args` point at."""
    indexed: bool = False
    """Whether queries may read fewer blocks."""
    paid: dict[int, Paid] = field(default_factory=dict)
    latents: dict[int, Latents | None] = field(default_factory=dict)

    def paid_to(self, n_rows: int) -> Paid:
        """Places for probabilities, made once a step."""
        if n_rows not in self.paid:
            self.paid[n_rows] = plan_paid(self.single, n_rows)
        return self.paid[n_rows]


def plan_segments(step: Step, reads: list[Read]) -> Segments | None:
    """The single queries' segments, sorted by query; None where there are none, or drafts of a lossy group are read."""
    single = [r for r in reads if r.queries == 1]
    if not single or any(r.mode == "through" for r in single):
        return None
    back = _turned_rows(single)
    groups = tuple(dict.fromkeys(r.source for r in single))
    rows = []
    for r in single:
        address, width = r.blocks.units.ctypes.data, r.blocks.units.strides[0]
        form = groups.index(r.source)
        for i, first in enumerate(r.firsts):
            query = back[first][0] + step.n_tokens if r.sinks and first in back else first
            rows += [(address + i * width, form, query, lo, hi) for lo, hi in r.runs(i)]
    rows.sort(key=lambda x: x[2])
    segments = np.array(rows, native.SEGMENT)
    args = DecodeArgs(
        arena=step.store.arena.buffer.data_ptr(),
        segments=segments.ctypes.data,
        n_segments=len(segments),
    )
    chunks = [r for r in reads if r.queries > 1]
    turned = None
    if back:
        by = torch.tensor([[-n] for _, n in back.values()])
        turned = torch.tensor(list(back)), by
    fewer = any(indexed(g) for g in groups)
    return Segments(args, {}, groups, single, chunks, turned, [segments], fewer)


def _turned_rows(single: list[Read]) -> dict[int, tuple[int, int]]:
    """Tokens that read sinks turned back, ascending: which of them it is, and by how many positions."""
    found: dict[int, int] = {}
    for r in single:
        if r.sinks:
            found |= {f: n for f, n in zip(r.firsts, r.turned.view(-1).tolist(), strict=True) if n}
    return {first: (at, found[first]) for at, first in enumerate(sorted(found))}


def lay_out(
    layout: Layout, groups: tuple[CacheGroup, ...], layer: int, k: str, v: str
) -> Tiles | None:
    """The forms of a layer; None where a group stores what no kernel reads."""
    every = sorted({h for g in groups for h in g.heads(layer)})
    shape = layout.fields_of(groups[0])[0].shape
    whole = {h for g in layout.spec for h in g.heads(layer)}
    if every != list(range(len(whole))) or len(shape) != 1 or shape[0] not in native.HEAD_DIMS:
        return None
    forms = (Form * len(groups))()
    tiles = Tiles(addressof(forms), len(every), shape[0], [forms])
    for form, group in zip(forms, groups, strict=True):
        sites = {site.name: site for site in layout.sites_of(group)}
        if set(sites) != {k, v} or any(site.field.shape != shape for site in sites.values()):
            return None
        for part, name in ((form.k, k), (form.v, v)):
            if not place(part, group, layout.codecs_of(group)[name], sites[name]):
                return None
        heads = np.full(len(every), -1, np.int32)
        heads[list(group.heads(layer))] = np.arange(len(group.heads(layer)))
        form.first = group.tile_index(layer) * group.tile_bytes if group.holds(layer) else 0
        form.tile_bytes, form.block_tokens = group.tile_bytes, group.block_tokens
        form.heads = heads.ctypes.data
        tiles.alive.append(heads)
    return tiles


def each_head(tiles: Tiles, n_groups: int) -> Tiles:
    """Forms `[groups]`, then `[groups][heads]` of one head each, for segments that differ by head."""
    plain, heads = tiles.alive[0], tiles.kv_heads
    forms = (Form * (n_groups * (1 + heads)))()
    out = Tiles(addressof(forms), heads, tiles.d, [forms, tiles])
    for g in range(n_groups):
        forms[g] = plain[g]
        for h in range(heads):
            forms[n_groups + g * heads + h] = plain[g]
            mine = np.full(heads, -1, np.int32)
            mine[h] = tiles.alive[1 + g][h]
            forms[n_groups + g * heads + h].heads = mine.ctypes.data
            out.alive.append(mine)
    return out
