"""What a planned forward writes, seals and reads, as values. Index tensors are made when first asked for.

A backend in torch wants every slot's position and a mask; a kernel wants a block table and the slots to read.
Both follow from the same extents, and only what is used is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from quire.spec import CacheGroup, Residual, Streaming
from quire.store.chain import GONE, Chain, Extent
from quire.store.table import BlockTable


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's share of a forward: tokens [start, stop) are new, those before are cached."""

    table: BlockTable
    start: int
    stop: int


class Places:
    """Where blocks begin in a view of memory, and for single tokens the row within.

    Args:
        units: in units of 64 bytes, int64.
        rows: of single tokens, int64.
        device: of the tensors `at` and `row`.

    `flat` keeps what follows from them for all layers alike: indices by field, and by number of heads.
    """

    def __init__(
        self, units: np.ndarray, device: torch.device, rows: np.ndarray | None = None
    ) -> None:
        self.units, self.rows, self.device = units, rows, device
        self.flat: dict[tuple[str, int], torch.Tensor] = {}

    @cached_property
    def at(self) -> torch.Tensor:
        """`units` as a tensor."""
        return index(self.units, self.device)

    @cached_property
    def row(self) -> torch.Tensor:
        """`rows` as a tensor."""
        assert self.rows is not None
        return index(self.rows, self.device)


class Read:
    """A batch of R rows with T queries each over n blocks each, read from slot `slots[0]` to `slots[1]` (N of them).

    Args:
        group: whose span says what is visible.
        source: whose blocks are read: the group, or the raw companion of a lossy body.
        mode: what is read of a lossy group: "raw" rows, "body" codes, or "through" (raw rows encoded and decoded on
            the way, for whole blocks that are not accepted yet).
        limit: set on a lossy body, where query i reads positions from the raw sinks on and below s(i) only.
        rows: of the forward, with the index of each one's first token: `firsts`.
        extents: what each row of the batch reads.
        units: where the blocks of each extent begin.
        device: of the tensors.
    """

    def __init__(
        self,
        group: CacheGroup,
        source: CacheGroup,
        mode: str,
        limit: Residual | None,
        rows: Sequence[Row],
        firsts: Sequence[int],
        extents: Sequence[Extent],
        units: np.ndarray,
        device: torch.device,
    ) -> None:
        self.group, self.source, self.mode, self.limit = group, source, mode, limit
        self.rows, self.firsts, self.extents, self.device = rows, firsts, extents, device
        self.blocks = Places(units, device)
        self.queries = rows[0].stop - rows[0].start
        self.sinks = extents[0].sinks
        """Whether its keys are read with the queries turned back, see `spans.Streaming`."""
        self.pieces: dict[object, Any] = {}
        """What `attention.fused` makes of the read once for all layers."""
        self._masks: dict[int | None, torch.Tensor | None] = {}
        self._true: dict[int, torch.Tensor] = {}
        self._biases: dict[tuple[int | None, torch.dtype], torch.Tensor | None] = {}

    def placed(self, units: np.ndarray) -> Read:
        """The same read of blocks that begin elsewhere, `units: [R, n]`; what follows from positions is shared."""
        twin = copy(self)
        twin.blocks = Places(units, self.device)
        return twin

    @cached_property
    def contiguous(self) -> bool:
        """Whether the batch holds all tokens up to its last in order (the caller knows whether that is all of them)."""
        return list(self.firsts) == list(range(0, len(self.rows) * self.queries, self.queries))

    @cached_property
    def tokens(self) -> torch.Tensor:
        """`[R, T]` index of each query in the forward."""
        return index(np.asarray(self.firsts)[:, None] + np.arange(self.queries), self.device)

    @cached_property
    def qpos(self) -> torch.Tensor:
        """`[R, T]` position of each query."""
        starts = np.array([r.start for r in self.rows])
        return index(starts[:, None] + np.arange(self.queries), self.device)

    @cached_property
    def turned(self) -> torch.Tensor:
        """`[R, T]` by how many positions each query is turned back."""
        span = self.group.span.inner if isinstance(self.group.span, Residual) else self.group.span
        assert isinstance(span, Streaming)
        back: torch.Tensor = span.turned(self.qpos).clamp_min(0)
        return back

    @cached_property
    def _positions(self) -> tuple[np.ndarray, tuple[int, int]]:
        """`[R, N]`: positions of the slots that are read, -1 where there is none; and the slots that they are."""
        n_slots = self.blocks.units.shape[1] * self.source.block_tokens
        kpos = np.full((len(self.extents), n_slots), -1, np.int64)
        for i, e in enumerate(self.extents):
            at = e.slot_positions(self.source.block_tokens)
            kpos[i, : len(at)] = at
        # Slots before the first and after the last valid one of all rows are neither read nor masked.
        some = np.flatnonzero((kpos >= 0).any(axis=0))
        low, high = (int(some[0]), int(some[-1]) + 1) if len(some) else (0, n_slots)
        return kpos[:, low:high], (low, high)

    @property
    def slots(self) -> tuple[int, int]:
        """The slots from the first to the last that any row reads, half-open."""
        return self._positions[1]

    @cached_property
    def kpos(self) -> torch.Tensor:
        """`[R, N]` position of each slot, -1 where a slot is not valid."""
        return index(self._positions[0], self.device)

    @cached_property
    def empty(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(row, slot) of those slots that are not valid, None where all are."""
        row, slot = (self._positions[0] < 0).nonzero()
        if not len(row):
            return None
        return index(row, self.device), index(slot + self.slots[0], self.device)

    @cached_property
    def _pos(self) -> torch.Tensor:
        """`[R, 1, n, block_tokens]` position of every slot by its place."""
        n, size = self.blocks.units.shape[1], self.source.block_tokens
        first = np.array([e.first for e in self.extents])
        return index(first[:, None, None, None] + np.arange(n * size).reshape(n, size), self.device)

    def pos_in(self, layer: int) -> torch.Tensor:
        """`[R, heads or 1, n, block_tokens]` true position of every slot, for what is decoded in a layer.

        Where tokens were dropped these are what each head kept; slots of none count from the extent's first.
        """
        if all(e.positions is None for e in self.extents):
            return self._pos
        found = self._true.get(layer)
        if found is None:
            n, size = self.blocks.units.shape[1], self.source.block_tokens
            first, heads = self.group.tile_index(layer), len(self.group.heads(layer))
            at = np.empty((len(self.extents), heads, n * size), np.int64)
            for i, e in enumerate(self.extents):
                at[i] = e.first + np.arange(n * size)
                if e.positions is not None:
                    at[i, :, : len(e.positions)] = e.positions
                if e.own is not None:
                    at[i, :, : e.own.shape[1]] = e.own[first : first + heads]
            found = self._true[layer] = index(at.reshape(*at.shape[:2], n, size), self.device)
        return found

    def mask(self, window: int | None = None) -> torch.Tensor | None:
        """`[R, T, N]`: which slots each query reads, None for all. `window` narrows the span further."""
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """The mask as what is added to scores: `[R, 1, T, N]`, 0 or -inf."""
        key = (window, dtype)
        if key not in self._biases:
            mask = self.mask(window)
            if mask is not None:
                mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
                    ~mask, float("-inf")
                )
                mask = mask.unsqueeze(1)
            self._biases[key] = mask
        return self._biases[key]

    def runs(self, at: int) -> list[tuple[int, int]]:
        """Runs of slots `[lo, hi)` that row `at`'s single query reads, ascending: what its mask says, as intervals."""
        e, query = self.extents[at], self.rows[at].start
        if e.positions is None and GONE not in e.blocks:
            # an extent is what the span needs at its first query; a single query reads all of that
            lo, hi = e.start, e.stop
            if self.limit is not None:
                lo, hi = max(lo, self.limit.sinks), min(hi, self.limit.start(query))
            return [(lo - e.first, hi - e.first)] if lo < hi else []
        pos = e.slot_positions(self.source.block_tokens)
        seen = (pos >= 0) & self.group.span.visible(query, pos)
        if self.limit is not None:
            seen &= self.limit.coded(query, pos)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], seen, [False]])))
        return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]

    def _make_mask(self, window: int | None) -> torch.Tensor | None:
        q, k = self.qpos.unsqueeze(-1), self.kpos.unsqueeze(-2)
        ok: torch.Tensor = self.group.span.visible(q, k) & (k >= 0)
        if self.limit is not None:
            ok = ok & self.limit.coded(q, k)
        if window is not None:
            ok = ok & (k > q - window)
        return None if bool(ok.all()) else ok


@dataclass(slots=True)
class Seal:
    """Blocks to encode: places of the raw blocks, places of the body blocks, `pos: [n, block_tokens]`.

    chains: with the number of entries that are encoded once every layer in `todo` is.
    """

    body: CacheGroup
    raw: CacheGroup
    source: Places
    target: Places
    pos: torch.Tensor
    chains: list[tuple[Chain, int]]
    todo: set[int]


@dataclass(slots=True)
class Write:
    """Where the new tokens go in one group: `tokens` selects them, None for all in order."""

    group: CacheGroup
    tokens: np.ndarray | None
    places: Places
    _chosen: torch.Tensor | None = field(default=None, init=False)

    def choose(self, x: torch.Tensor) -> torch.Tensor:
        """The group's tokens of `x: [n_tokens, ...]`."""
        if self.tokens is None:
            return x
        if self._chosen is None:
            self._chosen = index(self.tokens, self.places.device)
        return x[self._chosen]


def index(a: np.ndarray, device: torch.device) -> torch.Tensor:
    """An int64 tensor."""
    return torch.from_numpy(np.ascontiguousarray(a, np.int64)).to(device, non_blocking=True)
