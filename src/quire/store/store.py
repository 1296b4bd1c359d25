"""The store: one arena, a pool for every size of block, and the tables over them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING
from weakref import WeakSet

import numpy as np

from quire.errors import CapacityError
from quire.spec import ALIGN_BYTES, DTYPE_BYTES, CacheGroup, CacheSpec, Field, Usage
from quire.store.arena import Arena, fit_slab_bytes
from quire.store.pool import BlockPool
from quire.store.recent import Recent
from quire.store.table import BlockTable, Copy

if TYPE_CHECKING:
    import torch


class BlockStore:
    """Memory for the sequences of one model under one `CacheSpec`.

    Args:
        spec: the groups.
        total_bytes: size of the arena. On a CPU pages are touched only when written.
        device: torch device name; None to count without memory (planning, simulation).
        slab_bytes: chosen to fit the block sizes when None.

    Raises:
        CapacityError: the arena is smaller than one slab per size of block.
    """

    def __init__(
        self,
        spec: CacheSpec,
        total_bytes: int,
        *,
        device: str | None = None,
        slab_bytes: int | None = None,
    ) -> None:
        self.spec = spec
        sizes = {g.block_bytes for g in spec.groups}
        slab = slab_bytes or _slab_for(sizes, int(total_bytes))
        if int(total_bytes) < slab * len(sizes):
            raise CapacityError(
                f"a cache of {int(total_bytes):,} bytes is too small for one request: blocks of "
                f"{', '.join(f'{s:,}' for s in sorted(sizes))} bytes need at least {slab * len(sizes):,}"
            )
        self.arena = Arena(int(total_bytes), slab, device=device)
        self.tables: WeakSet[BlockTable] = WeakSet()
        self._pools: dict[int, BlockPool] = {}
        self._views: Recent[tuple[CacheGroup, int, str], torch.Tensor] = Recent()
        self._slots: Recent[tuple[CacheGroup, int, str], torch.Tensor] = Recent()
        self._scratch: dict[torch.dtype, torch.Tensor] = {}
        self._rows: Recent[tuple[CacheGroup, int, str], tuple[torch.Tensor, torch.Tensor]] = (
            Recent()
        )
        for size in sorted(sizes):
            self._pools[size] = BlockPool(self.arena, size)

    # -- sequences -----------------------------------------------------------------------------------------------

    def open(self) -> BlockTable:
        """An empty sequence; it takes blocks only when tokens are appended."""
        return BlockTable(self)

    def pool_for(self, group: CacheGroup) -> BlockPool:
        """The pool of the group's size of block, made when first asked for."""
        pool = self._pools.get(group.block_bytes)
        if pool is None:
            pool = self._pools[group.block_bytes] = BlockPool(self.arena, group.block_bytes)
        return pool

    @property
    def pools(self) -> Mapping[int, BlockPool]:
        """The pools by their size of block in bytes."""
        return self._pools

    def usage(self) -> Usage:
        """Held, cached and free bytes over all sequences."""
        return self.arena.usage()

    def fits(
        self,
        n_tokens: int,
        *,
        chunk_tokens: int = 1,
        groups: tuple[CacheGroup, ...] | None = None,
    ) -> bool:
        """Whether one sequence of `n_tokens`, computed `chunk_tokens` at a time, fits an otherwise empty arena.

        `groups` are what it would hold, the spec's own when None.
        """
        spec = self.spec if groups is None else CacheSpec(groups)
        blocks = spec.blocks_for(n_tokens, chunk_tokens=chunk_tokens)
        by_size: dict[int, int] = {}
        for g in spec.groups:
            by_size[g.block_bytes] = by_size.get(g.block_bytes, 0) + blocks[g.name]
        per_slab = {s: self.arena.slab_bytes // s for s in by_size}
        return sum(-(-n // per_slab[s]) for s, n in by_size.items() if n) <= self.arena.slabs

    # -- bytes ---------------------------------------------------------------------------------------------------

    def view(self, group: CacheGroup, layer: int, field: str) -> torch.Tensor:
        """One field of one layer over the whole arena, as strided memory without a copy.

        Returns:
            `[units, heads, block_tokens, *shape]`, or without `block_tokens` for a field stored per block. The first
            dimension counts units of 64 bytes, at which blocks begin (`units`); other rows overlap and mean nothing.
        """
        key = (group, layer, field)
        found = self._views.get(key)
        if found is None:
            _, shape, width = self._field(group, field)
            inner = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
            sizes = (len(group.heads(layer)), *shape)
            found = self._views[key] = self._strided(
                group, layer, field, sizes, (group.tile_bytes // width, *inner)
            )
        return found

    def rows(self, group: CacheGroup, layer: int, field: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The same memory as whole rows, for gathering at the speed of a copy.

        Returns:
            `[units, n]` with the n elements of one (block, head) side by side, and the units to add for each head, so
            that row `units(block) + head_units[h]` is that head's.
        """
        key = (group, layer, field)
        found = self._rows.get(key)
        if found is None:
            import torch

            _, shape, _ = self._field(group, field)
            flat = self._strided(group, layer, field, (math.prod(shape),), (1,))
            heads = torch.arange(len(group.heads(layer)), device=flat.device)
            found = self._rows[key] = (flat, heads * (group.tile_bytes // ALIGN_BYTES))
        return found

    def slots(self, group: CacheGroup, layer: int, field: str) -> torch.Tensor:
        """The same memory as token rows, for scattering at the speed of a copy.

        Returns:
            `[elements, n]`: row e is the n elements that one token has, from element e of the layer's first tile on;
            `slot_index` says which rows are tokens, the others overlap them and mean nothing.
        """
        key = (group, layer, field)
        found = self._slots.get(key)
        if found is None:
            import torch

            f, _, width = self._field(group, field)
            flat, n = self.arena.typed(getattr(torch, f.dtype)), math.prod(f.shape)
            start = (
                group.tile_index(layer) * group.tile_bytes + group.field_offsets[field]
            ) // width
            sizes = (flat.numel() - start - n + 1, n)
            found = self._slots[key] = flat.as_strided(sizes, (1, 1), start)
        return found

    def slot_index(
        self, group: CacheGroup, field: str, n_heads: int, units: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Rows of `slots` for tokens at (block, row within it): `[T * n_heads]`, a token's heads side by side.

        Args:
            units: `[T]` where each token's block begins (`units`).
            rows: `[T]`.
        """
        import torch

        f, _, width = self._field(group, field)
        heads = torch.arange(n_heads, device=units.device) * (group.tile_bytes // width)
        first = units * (ALIGN_BYTES // width) + rows * math.prod(f.shape)
        return (first.unsqueeze(1) + heads).reshape(-1)

    def scratch(self, like: torch.Tensor, n_rows: int) -> torch.Tensor:
        """`[n_rows, n]` of memory for rows as `like` has them, good until the next call.

        Memory that is allocated anew for every gather is handed out by the system page by page, which takes longer than
        the copy.
        """
        import torch

        n = n_rows * like.shape[1]
        found = self._scratch.get(like.dtype)
        if found is None or len(found) < n:
            with torch.inference_mode(
                mode=False
            ):  # what is made within could not be written without
                found = torch.empty(n + n // 4, dtype=like.dtype, device=like.device)
            self._scratch[like.dtype] = found
        return found[:n].view(n_rows, like.shape[1])

    def _field(self, group: CacheGroup, field: str) -> tuple[Field, tuple[int, ...], int]:
        f = next(x for x in group.fields if x.name == field)
        return (
            f,
            (group.block_tokens, *f.shape) if f.per == "token" else f.shape,
            DTYPE_BYTES[f.dtype],
        )

    def _strided(
        self,
        group: CacheGroup,
        layer: int,
        field: str,
        sizes: tuple[int, ...],
        strides: tuple[int, ...],
    ) -> torch.Tensor:
        """A view of `sizes` at every unit of the arena where it still fits."""
        import torch

        f, _, width = self._field(group, field)
        flat = self.arena.typed(getattr(torch, f.dtype))
        start = (group.tile_index(layer) * group.tile_bytes + group.field_offsets[field]) // width
        reach = 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        unit = ALIGN_BYTES // width
        return flat.as_strided(
            ((flat.numel() - start - reach) // unit + 1, *sizes), (unit, *strides), start
        )

    def units(self, group: CacheGroup, blocks: np.ndarray) -> np.ndarray:
        """Where blocks begin, in units of 64 bytes, for `view` and `rows`. GONE gives some block's place."""
        pool = self.pool_for(group)
        where = np.frombuffer(pool.locations, np.int32)[np.maximum(blocks, 0)]
        slab = where // pool.per_slab
        step = pool.block_bytes // ALIGN_BYTES
        base = slab.astype(np.int64) * (self.arena.slab_bytes // ALIGN_BYTES)
        out: np.ndarray = base + (where - slab * pool.per_slab) * step
        return out

    def copy_blocks(self, copies: list[Copy]) -> None:
        """Copies whole blocks and gives the sources' references back."""
        for pool, src, dst in copies:
            self.arena.copy(pool.byte_offset(src), pool.byte_offset(dst), pool.block_bytes)
            pool.release(src)

    def copy_rows(
        self, group: CacheGroup, blocks: np.ndarray, rows: np.ndarray, into: np.ndarray
    ) -> None:
        """Copies token rows, as stored, one after the other into the blocks `into`."""
        if self.arena.device is None or not len(rows):
            return
        import torch

        at = np.arange(len(rows))
        src, row, dst, into_row = (
            torch.from_numpy(np.ascontiguousarray(x)).long().to(self.arena.device)
            for x in (
                self.units(group, blocks),
                rows,
                self.units(group, into[at // group.block_tokens]),
                at % group.block_tokens,
            )
        )
        for layer in group.layers:
            for f in group.fields:
                v = self.view(group, layer, f.name)
                v[dst, :, into_row] = v[src, :, row]

    def copy_tiles(
        self, group: CacheGroup, blocks: np.ndarray, into_group: CacheGroup, into: np.ndarray
    ) -> None:
        """Copies the tiles of `into_group`'s coordinates from blocks of `group` into blocks of `into_group`."""
        if self.arena.device is None:
            return
        buffer, width = self.arena.buffer, group.tile_bytes
        source, target = self.pool_for(group), self.pool_for(into_group)
        for old, new in zip(blocks, into, strict=True):
            a, b = source.byte_offset(int(old)), target.byte_offset(int(new))
            for at, coord in enumerate(into_group.coords):
                start = a + group.coords.index(coord) * width
                buffer[b + at * width : b + (at + 1) * width] = buffer[start : start + width]


def _slab_for(sizes: set[int], total_bytes: int) -> int:
    """About 2 MiB, smaller for a small arena: at least eight slabs per size of block where that is possible."""
    target = min(2 << 20, max(*sizes, total_bytes // (8 * len(sizes))))
    return fit_slab_bytes(sizes, target, total_bytes)
