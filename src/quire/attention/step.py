"""The plan of one forward: where each new token's K and V go, which blocks get sealed, what every query reads.

    token t of the forward ── write ──> (slab, block, row) of its plain chain
    whole accepted blocks  ── seal ───> encoded once, into the body's block
    query rows             ── read ───> batches of blocks with the logical position of every slot

One `Step` serves all layers: tables are looked at once, and what differs between layers is only the view of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from quire.plan.layout import Layout
from quire.spec import ALIGN_BYTES, CacheGroup, Field, Residual, Span
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


class Step:
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

    # -- running -------------------------------------------------------------------------------------------------

    def write(self, layer: int, values: dict[str, torch.Tensor]) -> None:
        """Stores the new tokens' fields of one layer, then seals what became whole.

        Args:
            values: field name to `[n_tokens, heads, *shape]`.
        """
        writes, seals, _ = self.of_layer(layer)
        for w in writes:
            heads = w.group.heads(layer)
            for name, every in values.items():
                x = every if len(heads) == every.shape[1] else every[:, list(heads)]
                x = x if w.tokens is None else x[w.tokens]
                at = w.places.flat.get((name, len(heads)))
                if at is None:
                    assert w.places.row is not None
                    at = self.store.slot_index(w.group, name, len(heads), w.places.at, w.places.row)
                    w.places.flat[name, len(heads)] = at
                slots = self.store.slots(w.group, layer, name)
                slots.index_copy_(0, at, x.reshape(-1, slots.shape[1]).to(slots.dtype))
        for s in seals:
            self._seal(layer, s)

    def _seal(self, layer: int, s: Seal) -> None:
        codecs = self.layout.codecs_of(s.body)
        dtype = getattr(torch, self.layout.dtype)
        for f in self.layout.fields_of(s.body):
            x = self.store.view(s.raw, layer, f.name)[s.source.at].to(dtype)
            for part, stored in codecs[f.name].encode(x, s.pos.unsqueeze(1)).items():
                view = self.store.view(s.body, layer, f"{f.name}.{part}" if part else f.name)
                view[s.target.at] = stored.to(view.dtype)
        s.todo.discard(layer)
        if not s.todo:
            for chain, entries in s.chains:
                chain.encoded = max(chain.encoded, entries)

    def gather(self, layer: int, read: Read, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One field of what a batch reads: `[R, heads, N, *shape]` in `dtype`, decoded where it is coded."""
        source, at, flat = read.source, read.blocks.at, read.blocks.flat

        def fetch(stored: str) -> torch.Tensor:
            rows, heads = self.store.rows(source, layer, stored)
            index = flat.get(("", len(heads)))
            if index is None:
                index = (at.unsqueeze(1) + heads.view(1, -1, 1)).reshape(-1)
                flat["", len(heads)] = index
            f = next(x for x in source.fields if x.name == stored)
            shape = (source.block_tokens, *f.shape) if f.per == "token" else f.shape
            return rows.index_select(0, index).view(at.shape[0], len(heads), at.shape[1], *shape)

        return self._decode(read, name, dtype, fetch)

    def gather_both(
        self, layer: int, read: Read, names: tuple[str, str], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two fields as `gather` gives them; in one copy where they are stored plainly and alike, as k and v are."""
        source = read.source
        first, ahead = _alike(source, names)
        if read.mode != "raw" or ahead <= 0:
            one, two = (self.gather(layer, read, n, dtype) for n in names)
            return one, two
        rows, heads = self.store.rows(source, layer, names[0])
        n_rows, n_blocks = read.blocks.at.shape
        flat, at = read.blocks.flat, (names[0] + "+" + names[1], len(heads))
        index = flat.get(at)
        if index is None:
            step = torch.tensor([0, ahead // ALIGN_BYTES], device=heads.device)
            units = heads.view(1, -1, 1) + read.blocks.at.unsqueeze(1)
            index = flat[at] = (step.view(2, 1, 1, 1) + units).reshape(-1)
        both = rows.index_select(0, index)
        if read.empty is not None:  # see _decode
            both.view(2 * n_rows * len(heads) * n_blocks * source.block_tokens, -1).index_fill_(
                0, self._empty_rows(read, 2, len(heads), n_blocks * source.block_tokens), 0
            )
        both = both.view(2, n_rows, len(heads), n_blocks * source.block_tokens, *first.shape)
        low, high = read.slots
        if high - low < both.shape[3]:
            both = both[:, :, :, low:high]
        if both.dtype != dtype:
            both = both.to(dtype)
        one, two = both.unbind(0)
        return one, two

    def _decode(
        self, read: Read, name: str, dtype: torch.dtype, fetch: Callable[[str], torch.Tensor]
    ) -> torch.Tensor:
        if read.mode == "raw":
            x = fetch(name).to(dtype)
        else:
            codec = self.layout.codecs_of(read.group)[name]
            f = next(f for f in self.layout.fields_of(read.group) if f.name == name)
            stored = codec.stored(f, read.group.block_tokens)
            if read.mode == "body":
                parts = {s.name.partition(".")[2]: fetch(s.name) for s in stored}
            else:
                model = getattr(torch, self.layout.dtype)
                assert read.pos is not None
                parts = codec.encode(fetch(name).to(model), read.pos.unsqueeze(1))
                kept = {s.name.partition(".")[2]: getattr(torch, s.dtype) for s in stored}
                parts = {part: y.to(kept[part]) for part, y in parts.items()}
            x = codec.decode(parts, dtype)
        r, heads, n, size, *shape = x.shape
        if read.empty is not None:  # what was never written may be no number, and 0 x NaN is NaN
            x = x.reshape(r * heads * n * size, -1)
            x.index_fill_(0, self._empty_rows(read, 1, heads, n * size), 0)
        return x.reshape(r, heads, n * size, *shape)[:, :, slice(*read.slots)]

    @staticmethod
    def _empty_rows(read: Read, fields: int, heads: int, n_slots: int) -> torch.Tensor:
        """The slots that are not valid, as rows of `[fields * R * heads * n_slots]`."""
        assert read.empty is not None
        flat, key = read.blocks.flat, (f"empty in {fields}", heads)
        found = flat.get(key)
        if found is None:
            row, slot = read.empty
            first = (row * heads * n_slots + slot).view(-1, 1, 1)
            every = torch.arange(fields, device=row.device) * (
                read.blocks.at.shape[0] * heads * n_slots
            )
            head = torch.arange(heads, device=row.device) * n_slots
            found = flat[key] = (first + every.view(1, -1, 1) + head).reshape(-1)
        return found


def _alike(group: CacheGroup, names: tuple[str, str]) -> tuple[Field, int]:
    """The first of two fields, and the bytes from it to the second; 0 unless both hold equally many of one dtype."""
    fields = {f.name: f for f in group.fields}
    first, second = (fields.get(n, group.fields[0]) for n in names)
    a, b = ((f.shape, f.dtype, f.per) for f in (first, second))
    ahead = group.field_offsets[second.name] - group.field_offsets[first.name]
    return first, ahead if a == b and first.per == "token" else 0
