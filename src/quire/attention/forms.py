"""Where a group's fields lie, as the kernels are told it, and which of them they serve.

A codec describes its parts (`spec.Packing`); what no kernel reads or makes from that description stays with the codec.
"""

from __future__ import annotations

from typing import Any

from quire.attention.step import Step
from quire.kernels import native
from quire.kernels.native import EncodeArgs
from quire.spec import CacheGroup, KVCodec, Packing, Site


def place(part: Any, group: CacheGroup, codec: KVCodec, site: Site) -> bool:
    """Says in `part` where a codec's parts lie within a tile; False where no kernel reads them."""
    at, dtypes = group.field_offsets, {f.name: f.dtype for f in group.fields}
    packing = Packing() if codec.plain else codec.packing(site)
    codes = site.name if codec.plain else f"{site.name}.codes"
    scale, least = (dtypes.get(f"{site.name}.{x}") for x in ("scale", "min"))
    if packing is None or codes not in at or not _served(packing, site, scale, least):
        return False
    kind = native.TILES.get(packing.bits) if packing.bits else native.ROWS.get(dtypes[codes])
    if kind is None:
        return False
    part.kind, part.scaled = kind, native.SCALED[packing.scaled]
    part.group, part.turned = packing.group, packing.turned
    part.codes = at[codes]
    part.scale, part.min = (at.get(f"{site.name}.{x}", -1) for x in ("scale", "min"))
    return True


def _served(packing: Packing, site: Site, scale: str | None, least: str | None) -> bool:
    """Whether a kernel reads codes with such scales and minima, given by their dtypes; codecs come from outside."""
    if not packing.scaled:
        return not packing.bits and scale is None and least is None
    if scale != "float16" or least not in ("float16", None):
        return False
    if not packing.bits:
        return packing.scaled == "token" and packing.group == site.width and least is None
    if packing.bits < 8 and least is None:
        return False  # (code - 128) * scale is for eight bits
    return not site.block_tokens % 16 and (packing.scaled == "tile" or not packing.group % 16)


def plan_sealing(
    step: Step, body: CacheGroup, raw: CacheGroup
) -> list[tuple[int, EncodeArgs]] | None:
    """For each field its place in the raw tile, and the arguments that all layers share; None: the codecs do it."""
    out = []
    fields = {f.name: f for f in raw.fields}
    for site in step.layout.sites_of(body):
        codec, args = step.layout.codecs_of(body)[site.name], EncodeArgs()
        dtype = native.DTYPES.get(fields[site.name].dtype)
        if dtype is None or site.width not in native.WIDTHS or len(site.field.shape) != 1:
            return None
        if not (codec.plain or _nearest(codec, site)) or not place(args.field, body, codec, site):
            return None
        if args.field.turned % 16:
            return None
        args.block_tokens, args.d, args.values = body.block_tokens, site.width, site.values
        args.source_tile, args.target_tile, args.dtype = raw.tile_bytes, body.tile_bytes, dtype
        out.append((raw.field_offsets[site.name], args))
    return out


def _nearest(codec: KVCodec, site: Site) -> bool:
    """Whether a kernel may encode for the codec: it says so itself, not a class that it changes the encoding of."""
    packing = codec.packing(site)
    encoder, speaker = (
        next((c for c in type(codec).__mro__ if name in vars(c)), None)
        for name in ("encode", "packing")
    )
    return packing is not None and packing.nearest and encoder is speaker
