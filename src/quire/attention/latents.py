"""Single queries over latents (MLA, absorbed): forms for the compiled kernel, and its call.

A form's `k` is the latent, which is key and value at once, its `v` the rotary part of keys; one tile serves all heads.
"""

from __future__ import annotations

from ctypes import addressof
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quire.attention.forms import place
from quire.kernels import native
from quire.kernels.native import DecodeArgs, Form, LatentArgs, Library
from quire.plan.layout import Layout
from quire.spec import CacheGroup


@dataclass(slots=True)
class Latents:
    """The forms of a layer's groups, and the widths of latent and rotary part."""

    address: int
    d: int
    d_rope: int
    alive: list[Any]
    """What `address`, and addresses in the forms, point at."""


def lay_out_latents(
    layout: Layout, groups: tuple[CacheGroup, ...], layer: int, latent: str, rotary: str
) -> Latents | None:
    """The forms of a layer; None where a group stores what the kernel does not read."""
    forms, head = (Form * len(groups))(), np.zeros(1, np.int32)
    widths: set[tuple[int, int]] = set()
    for form, group in zip(forms, groups, strict=True):
        sites = {site.name: site for site in layout.sites_of(group)}
        if set(sites) != {latent, rotary} or group.heads(layer) != (0,):
            return None
        if any(len(site.field.shape) != 1 for site in sites.values()):
            return None
        for part, name in ((form.k, latent), (form.v, rotary)):
            if not place(part, group, layout.codecs_of(group)[name], sites[name]):
                return None
        form.first = group.tile_index(layer) * group.tile_bytes
        form.tile_bytes, form.block_tokens = group.tile_bytes, group.block_tokens
        form.heads = head.ctypes.data
        widths.add((sites[latent].width, sites[rotary].width))
    d, d_rope = widths.pop()
    if widths or d not in native.WIDTHS or d_rope not in native.ROTARY:
        return None
    return Latents(addressof(forms), d, d_rope, [forms, head])


def run_latents(
    library: Library,
    segments: DecodeArgs,
    tiles: Latents,
    q: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    isa: int,
) -> None:
    """Attends the single queries among `q: [n_tokens, H, d + d_rope]` into `out: [n_tokens, H, d]`.

    Args:
        segments: what they read.
    """
    if q.stride(2) != 1:
        q = q.contiguous()
    args = LatentArgs(
        arena=segments.arena,
        forms=tiles.address,
        segments=segments.segments,
        q=q.data_ptr(),
        out=out.data_ptr(),
        n_segments=segments.n_segments,
        heads=q.shape[1],
        d=tiles.d,
        d_rope=tiles.d_rope,
        dtype=native.DTYPES[str(q.dtype).removeprefix("torch.")],
        threads=torch.get_num_threads(),
        isa=isa,
        scale=scale,
    )
    args.q_row, args.q_head, _ = q.stride()
    args.out_row, args.out_head, _ = out.stride()
    library.latent(args)
