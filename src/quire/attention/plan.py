"""The plan of one forward: where each new token's K and V go, which blocks get sealed, what every query reads.

    token t of the forward ── write ──> (block, row) of its plain chain
    whole accepted blocks  ── seal ───> encoded once, into the body's block
    query rows             ── read ───> batches of blocks with the logical position of every slot

One plan serves all layers: tables are looked at once, and what differs between layers is only the view of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from quire.attention.read import Places, Read, Row, Seal, Write, index
from quire.plan.layout import Layout, Turn
from quire.spec import BOUNDS, CacheGroup, Residual
from quire.store.chain import GONE, Chain, Extent
from quire.store.cold import Cold, Run
from quire.store.store import BlockStore

PAD_RATIO = 1.25
"""Decode rows are read together while the longest has at most this many times the blocks of the shortest."""


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
        self.bounds: list[tuple[CacheGroup, Places]] = []
        """Blocks of plain groups that become whole and have bounds beside them, see `attention.sparse`."""
        self.reads: list[Read] = []
        self.away: list[tuple[Cold, Run, Read]] = []
        """What queries read of blocks that are not in the arena, see `store.cold`."""
        self.prepared: dict[object, Any] = {}
        """What a backend makes of the plan once for all layers."""
        self.turn: Turn | None = None
        """Turns a layer's queries back, where a streaming span asks for it."""
        self._by_layer: dict[int, tuple[list[Write], list[Seal], list[Read]]] = {}
        self._by_groups: dict[tuple[int, ...], tuple[list[Write], list[Seal], list[Read]]] = {}
        firsts = np.cumsum([0] + [r.stop - r.start for r in rows])
        members: dict[CacheGroup, list[tuple[int, Chain]]] = {}
        for at, row in enumerate(rows):
            for chain in row.table.chains:
                members.setdefault(chain.group, []).append((at, chain))
        self._groups = list(members)
        for group, chains in members.items():
            if group.recurrent:
                continue
            raw = next((g for g in members if group.reads(g)), None)
            if raw is None:
                self._plan_writes(group, chains, firsts)
            else:
                self._plan_seals(group, raw, chains, dict(members[raw]))
            self._plan_reads(group, raw, chains, firsts, members)

    def of_layer(self, layer: int) -> tuple[list[Write], list[Seal], list[Read]]:
        """What concerns one layer; layers of the same groups get the same lists."""
        found = self._by_layer.get(layer)
        if found is None:
            groups = tuple(i for i, g in enumerate(self._groups) if g.holds(layer))
            found = self._by_groups.get(groups)
            if found is None:
                found = self._by_groups[groups] = (
                    [w for w in self.writes if w.group.holds(layer)],
                    [s for s in self.seals if s.body.holds(layer)],
                    [r for r in self.reads if r.group.holds(layer)],
                )
            self._by_layer[layer] = found
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
        if any(f.name == BOUNDS for f in group.fields):
            self._plan_bounds(group, chains)
        units = self.store.units(group, np.concatenate(blocks))
        chosen = None if len(chains) == len(self.rows) else np.concatenate(tokens)
        places = Places(units, self.device, np.concatenate(rows))
        self.writes.append(Write(group, chosen, places))

    def _plan_bounds(self, group: CacheGroup, chains: list[tuple[int, Chain]]) -> None:
        size, whole = group.block_tokens, []
        for at, chain in chains:
            first, last = (chain.slot(x) // size for x in (self.rows[at].start, self.rows[at].stop))
            whole.append(chain.ids[first:last])
        blocks = np.concatenate(whole)
        if len(blocks):
            self.bounds.append((group, self._places(group, blocks)))

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
            last = min(chain.count, chain.slot(min(row.table.accepted, row.stop)) // size)
            entries = np.arange(chain.encoded, last)
            entries = entries[chain.ids[entries] != GONE]  # a window may have passed over some
            if len(entries):
                blocks = entries + (chain.logical(chain.encoded) // size - chain.encoded)
                source.append(raws[at].ids[blocks])
                target.append(chain.ids[entries])
                pos.append(blocks[:, None] * size + np.arange(size))
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
        # The raw companion's own span says which positions are read raw; the body reads the others.
        limit = raw.span if raw is not None and isinstance(raw.span, Residual) else None
        found: list[tuple[int, Extent]] = []
        for at, chain in chains:
            row = self.rows[at]
            found += [(at, e) for e in chain.extents(row.start, row.stop) if len(e.blocks)]
        mode = "raw" if raw is None else "body"
        for at, chain in chains:
            if chain.cold:
                self._plan_away(group, mode, limit, at, chain, int(firsts[at]))
        for sinks in (True, False):
            some = [(at, e) for at, e in found if e.sinks is sinks]
            self._batch(group, group, mode, limit, some, firsts)
        if raw is not None:
            self._batch(
                group, raw, "through", limit, self._unsealed(chains, dict(members[raw])), firsts
            )

    def _plan_away(
        self,
        group: CacheGroup,
        mode: str,
        limit: Residual | None,
        at: int,
        chain: Chain,
        first: int,
    ) -> None:
        """A read per run of a chain's blocks that are away; where they lie is known when one is staged."""
        row, size = self.rows[at], group.block_tokens
        cold = row.table.cold
        assert cold is not None
        place = next(i for i, c in enumerate(row.table.chains) if c is chain)
        for run in cold.runs[place]:
            begin = run.first * size
            blocks = np.zeros(run.count, np.int32)
            extent = Extent(blocks, begin, begin, begin + run.count * size)
            units = np.zeros((1, run.count), np.int64)
            read = Read(group, group, mode, limit, [row], [first], [extent], units, self.device)
            self.away.append((cold, run, read))

    def _unsealed(
        self, chains: list[tuple[int, Chain]], raws: dict[int, Chain]
    ) -> list[tuple[int, Extent]]:
        """Whole blocks of drafts that a later draft reads decoded although they are not sealed."""
        out = []
        for at, chain in chains:
            row, raw = self.rows[at], raws[at]
            assert isinstance(raw.group.span, Residual)
            size = chain.group.block_tokens
            low, high = chain.logical(chain.count), raw.group.span.start(row.stop - 1)
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
        n = max(len(e.blocks) for _, e in batch)
        blocks = np.zeros((len(batch), n), np.int32)
        for i, (_, e) in enumerate(batch):
            blocks[i, : len(e.blocks)] = e.blocks
        self.reads.append(
            Read(
                group,
                source,
                mode,
                limit,
                [self.rows[at] for at, _ in batch],
                [int(firsts[at]) for at, _ in batch],
                [e for _, e in batch],
                self.store.units(source, blocks),
                self.device,
            )
        )

    def _places(self, group: CacheGroup, blocks: np.ndarray) -> Places:
        return Places(self.store.units(group, blocks), self.device)

    def _tensor(self, a: np.ndarray) -> torch.Tensor:
        return index(a, self.device)
