"""The plan of one forward: where each new token's K and V go, which blocks get sealed, what every query reads.

    token t of the forward ── write ──> (block, row) of its plain chain
    whole accepted blocks  ── seal ───> encoded once, into the body's block
    query rows             ── read ───> batches of blocks with the logical position of every slot

One plan serves all layers: tables are looked at once, and what differs between layers is only the view of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from quire.plan.layout import Layout
from quire.spec import CacheGroup, Residual, Span
from quire.store.chain import GONE, Chain, Extent
from quire.store.store import BlockStore
from quire.store.table import BlockTable

PAD_RATIO = 1.25
"""Decode rows are read together while the longest has at most this many times the blocks of the shortest."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's share of a forward: tokens [start, stop) are new, those before are cached."""

    table: BlockTable
    start: int
    stop: int


@dataclass(slots=True)
class Places:
    """Index tensors into a view, int64: `at` in units of 64 bytes, `row` for single tokens.

    `flat` keeps what follows from them for all layers alike: indices by field, and by number of heads.
    """

    at: torch.Tensor
    row: torch.Tensor | None = None
    flat: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Read:
    """A batch of R rows with T queries each over n blocks each, read from slot `slots[0]` to `slots[1]` (N of them).

    tokens: `[R, T]` index of each query in the forward; qpos: `[R, T]`; kpos: `[R, N]`, -1 where a slot is not valid;
    limit: set on a lossy body, where query i reads positions below s(i) only;
    mode: what is read of a lossy group: "raw" rows, "body" codes, or "through" (raw rows encoded and decoded on the
    way, for whole blocks that are not accepted yet).
    empty: (row, slot) of those among them that are not valid; pos: `[R, n, block_tokens]`, for what is read "through".
    """

    group: CacheGroup
    source: CacheGroup
    tokens: torch.Tensor
    qpos: torch.Tensor
    kpos: torch.Tensor
    blocks: Places
    limit: Residual | None = None
    mode: str = "raw"
    contiguous: bool = False
    slots: tuple[int, int] = (0, 0)
    empty: tuple[torch.Tensor, torch.Tensor] | None = None
    pos: torch.Tensor | None = None
    _masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)
    _biases: dict[tuple[int | None, torch.dtype], torch.Tensor | None] = field(default_factory=dict)

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

    def _make_mask(self, window: int | None) -> torch.Tensor | None:
        q, k = self.qpos.unsqueeze(-1), self.kpos.unsqueeze(-2)
        span: Span = self.group.span
        ok: torch.Tensor = span.visible(q, k) & (k >= 0)
        if self.limit is not None:
            ok = ok & (k < self.limit.start(q))
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
    tokens: torch.Tensor | None
    places: Places


class Plan:
    """The plan of one forward over `rows`, whose tables already have room for their new tokens.

    Args:
        store, layout: of the model.
        rows: in the order in which their tokens are concatenated.
        device: of the model's tensors.
    """

    def __init__(
        self,
        store: BlockStore,
        layout: Layout,
        rows: Sequence[Row],
        device: torch.device | str = "cpu",
    ) -> None:
        self.store, self.layout, self.rows, self.device = (
            store,
            layout,
            list(rows),
            torch.device(device),
        )
        self.n_tokens = sum(r.stop - r.start for r in rows)
        self.writes: list[Write] = []
        self.seals: list[Seal] = []
        self.reads: list[Read] = []
        self._by_layer: dict[int, tuple[list[Write], list[Seal], list[Read]]] = {}
        firsts = np.cumsum([0] + [r.stop - r.start for r in rows])
        members: dict[CacheGroup, list[tuple[int, Chain]]] = {}
        for at, row in enumerate(rows):
            for chain in row.table.chains:
                members.setdefault(chain.group, []).append((at, chain))
        for group, chains in members.items():
            if group.recurrent:
                continue
            raw = next((g for g in members if g.name == group.raw), None)
            if raw is None:
                self._plan_writes(group, chains, firsts)
            else:
                self._plan_seals(group, raw, chains, dict(members[raw]))
            self._plan_reads(group, raw, chains, firsts, members)

    def of_layer(self, layer: int) -> tuple[list[Write], list[Seal], list[Read]]:
        """What concerns one layer."""
        found = self._by_layer.get(layer)
        if found is None:
            found = self._by_layer[layer] = (
                [w for w in self.writes if layer in w.group.layers],
                [s for s in self.seals if layer in s.body.layers],
                [r for r in self.reads if layer in r.group.layers],
            )
        return found

    def positions(self) -> torch.Tensor:
        """`[n_tokens]` logical position of every new token."""
        return self._tensor(np.concatenate([np.arange(r.start, r.stop) for r in self.rows]))

    # -- planning ------------------------------------------------------------------------------------------------

    def _plan_writes(
        self, group: CacheGroup, chains: list[tuple[int, Chain]], firsts: np.ndarray
    ) -> None:
        blocks, rows, tokens = [], [], []
        for at, chain in chains:
            row = self.rows[at]
            b, r = chain.places(row.start, row.stop)
            blocks.append(b)
            rows.append(r)
            tokens.append(np.arange(firsts[at], firsts[at + 1]))
        places = self._places(group, np.concatenate(blocks))
        places.row = self._tensor(np.concatenate(rows))
        chosen = None if len(chains) == len(self.rows) else self._tensor(np.concatenate(tokens))
        self.writes.append(Write(group, chosen, places))

    def _plan_seals(
        self,
        body: CacheGroup,
        raw: CacheGroup,
        chains: list[tuple[int, Chain]],
        raws: dict[int, Chain],
    ) -> None:
        size = body.block_tokens
        source, target, pos, done = [], [], [], []
        for at, chain in chains:
            row = self.rows[at]
            last = min(chain.count, min(row.table.accepted, row.stop) // size)
            entries = np.arange(chain.encoded, last)
            entries = entries[chain.ids[entries] != GONE]  # a window may have passed over some
            if len(entries):
                source.append(raws[at].ids[entries])
                target.append(chain.ids[entries])
                pos.append(entries[:, None] * size + np.arange(size))
            if last > chain.encoded:
                done.append((chain, last))
        if source:
            self.seals.append(
                Seal(
                    body,
                    raw,
                    self._places(raw, np.concatenate(source)),
                    self._places(body, np.concatenate(target)),
                    self._tensor(np.concatenate(pos)),
                    done,
                    set(body.layers),
                )
            )

    def _plan_reads(
        self,
        group: CacheGroup,
        raw: CacheGroup | None,
        chains: list[tuple[int, Chain]],
        firsts: np.ndarray,
        members: dict[CacheGroup, list[tuple[int, Chain]]],
    ) -> None:
        # The raw companion's own span says k >= s(q); the body reads what lies below.
        limit = raw.span if raw is not None and isinstance(raw.span, Residual) else None
        found: list[tuple[int, Extent]] = []
        for at, chain in chains:
            row = self.rows[at]
            found += [(at, e) for e in chain.extents(row.start, row.stop) if len(e.blocks)]
        mode = "raw" if raw is None else "body"
        self._batch(group, group, mode, limit, found, firsts)
        if raw is not None:
            self._batch(
                group, raw, "through", limit, self._unsealed(chains, dict(members[raw])), firsts
            )

    def _unsealed(
        self, chains: list[tuple[int, Chain]], raws: dict[int, Chain]
    ) -> list[tuple[int, Extent]]:
        """Whole blocks of drafts that a later draft reads decoded although they are not sealed."""
        out = []
        for at, chain in chains:
            row, raw = self.rows[at], raws[at]
            assert isinstance(raw.group.span, Residual)
            size = chain.group.block_tokens
            low, high = chain.count * size, raw.group.span.start(row.stop - 1)
            if low < high:
                out.append((at, Extent(raw.ids[low // size : -(-high // size)], low, low, high)))
        return out

    def _batch(
        self,
        group: CacheGroup,
        source: CacheGroup,
        mode: str,
        limit: Residual | None,
        found: list[tuple[int, Extent]],
        firsts: np.ndarray,
    ) -> None:
        """Reads of single queries together while their lengths are alike; chunks one by one."""
        single = [(at, e) for at, e in found if self.rows[at].stop - self.rows[at].start == 1]
        for at, e in found:
            if self.rows[at].stop - self.rows[at].start > 1:
                self._read(group, source, mode, limit, [(at, e)], firsts)
        single.sort(key=lambda x: len(x[1].blocks))
        batch: list[tuple[int, Extent]] = []
        for at, e in single:
            if batch and (
                len(e.blocks)
                > max(PAD_RATIO * len(batch[0][1].blocks), len(batch[0][1].blocks) + 2)
                or any(at == other for other, _ in batch)  # a row's extents are merged, not joined
            ):
                self._read(group, source, mode, limit, batch, firsts)
                batch = []
            batch.append((at, e))
        if batch:
            self._read(group, source, mode, limit, batch, firsts)

    def _read(
        self,
        group: CacheGroup,
        source: CacheGroup,
        mode: str,
        limit: Residual | None,
        batch: list[tuple[int, Extent]],
        firsts: np.ndarray,
    ) -> None:
        size = source.block_tokens
        n = max(len(e.blocks) for _, e in batch)
        blocks = np.zeros((len(batch), n), np.int32)
        kpos = np.full((len(batch), n * size), -1, np.int64)
        for i, (_, e) in enumerate(batch):
            blocks[i, : len(e.blocks)] = e.blocks
            at = (
                np.arange(e.first, e.first + len(e.blocks) * size)
                if e.positions is None
                else e.positions
            )
            kpos[i, : len(at)] = np.where((at >= e.start) & (at < e.stop), at, -1)
            kpos[i, : len(e.blocks) * size][np.repeat(e.blocks < 0, size)] = -1
        # Slots before the first and after the last valid one of all rows are neither read nor masked.
        there = kpos >= 0
        some = np.flatnonzero(there.any(axis=0))
        low, high = (int(some[0]), int(some[-1]) + 1) if len(some) else (0, n * size)
        row, slot = (~there[:, low:high]).nonzero()
        kpos = kpos[:, low:high]
        pos = None
        if mode == "through":
            firsts_of = np.array([e.first for _, e in batch])
            pos = self._tensor(firsts_of[:, None, None] + np.arange(n * size).reshape(n, size))
        rows = [self.rows[at] for at, _ in batch]
        tokens = np.stack([np.arange(firsts[at], firsts[at + 1]) for at, _ in batch])
        qpos = np.stack([np.arange(r.start, r.stop) for r in rows])
        self.reads.append(
            Read(
                group,
                source,
                self._tensor(tokens),
                self._tensor(qpos),
                self._tensor(kpos),
                self._places(source, blocks),
                limit,
                mode,
                contiguous=tokens.size == self.n_tokens
                and bool((tokens.ravel() == np.arange(tokens.size)).all()),
                slots=(low, high),
                empty=(self._tensor(row), self._tensor(slot + low)) if len(row) else None,
                pos=pos,
            )
        )

    def _places(self, group: CacheGroup, blocks: np.ndarray) -> Places:
        return Places(self._tensor(self.store.units(group, blocks)))

    def _tensor(self, a: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(a, np.int64)).to(
            self.device, non_blocking=True
        )
