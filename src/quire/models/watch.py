"""What the policies of one forward's rows want to know of it: asked layer by layer, booked when the forward is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from quire.attention.observe import Attended
from quire.attention.read import Row
from quire.attention.step import Step
from quire.models.keeper import Keeper
from quire.models.outside import Piece
from quire.spec import CacheGroup
from quire.store.chain import Chain
from quire.store.compact import companion, families
from quire.store.table import BlockTable

__all__ = ["Watch"]


class Watch:
    """What the policies of one forward's rows want to know of it, noted layer by layer and booked when it is done."""

    def __init__(self, step: Step, keepers: Mapping[Row, Keeper]) -> None:
        self.step, self.keepers = step, keepers
        self.firsts: dict[Row, int] = {}
        at = 0
        for r in step.rows:
            self.firsts[r] = at
            at += r.stop - r.start
        self._asked: dict[tuple[Any, ...], dict[Row, int]] = {}
        for row, keeper in keepers.items():
            n, policy = keeper.asked(row), keeper.rules.policy
            if n:
                self._asked.setdefault((policy.fold, policy.over, policy.top), {})[row] = n
        self._places: dict[tuple[int, int, int], Any] = {}
        self._found: list[tuple[Keeper, Chain, slice, Any, torch.Tensor]] = []
        self._notes: list[tuple[Keeper, Chain, slice, slice, torch.Tensor]] = []
        self._pieces: list[tuple[Keeper, int, Piece]] = []
        self._taken: set[int] = set()
        self._queries: list[tuple[Keeper, int, torch.Tensor, float, int]] = []

    @classmethod
    def over(cls, step: Step) -> Watch | None:
        """Of a step in which somebody wants to know something."""
        keepers = {r: r.table.keeper for r in step.rows if isinstance(r.table.keeper, Keeper)}
        return cls(step, keepers) if keepers else None

    def ask(self, layer: int) -> list[Attended]:
        """Questions about one layer."""
        out = []
        for (fold, over, top), rows in self._asked.items():
            if any(layer in k.rules.layers for k in (self.keepers[r] for r in rows)):
                out.append(Attended(fold, over=over, top=top, rows=rows))
        return out

    def note(self, layer: int, hidden: torch.Tensor, positions: Callable[[], Any]) -> None:
        """Hidden states `[n_tokens, width]` that enter the layer's attention, and their position embeddings."""
        turned = None
        for row, keeper in self.keepers.items():
            policy = keeper.rules.policy
            if layer not in keeper.rules.layers:
                continue
            first = self.firsts[row]
            if keeper.records(row):
                turned = positions() if turned is None else turned
                stop = first + row.stop - row.start
                piece = Piece(
                    hidden[first:stop].clone(),
                    None if turned is None else tuple(x[first:stop] for x in turned),
                )
                self._pieces.append((keeper, layer, piece))
            if not policy.notes:
                continue
            x = policy.note(layer, hidden[first : first + row.stop - row.start]).T.float()
            for chain in _chains_of(row.table, layer):
                tile = chain.group.tile_index(layer)
                heads = chain.group.heads(layer)
                slots = slice(chain.slot(row.start), chain.slot(row.stop))
                self._notes.append(
                    (keeper, chain, slice(tile, tile + len(heads)), slots, x[list(heads)])
                )

    def take(self, layer: int, q: torch.Tensor, scale: float, answers: Sequence[Attended]) -> None:
        """Answers about a layer, its queries `[n_tokens, H_q, D]`, and what their scores are multiplied by."""
        # Layers that read this one's cache (shared KV) come after it; their queries are not kept.
        again = layer in self._taken
        self._taken.add(layer)
        for row, keeper in self.keepers.items():
            if keeper.rules.policy.last_queries and layer in keeper.rules.layers and not again:
                first = self.firsts[row]
                stop = first + row.stop - row.start
                last = keeper.rules.policy.last_queries
                self._queries.append(
                    (keeper, layer, q[max(first, stop - last) : stop].clone(), scale, row.stop)
                )
        for attended in answers:
            assert attended.rows is not None
            for m in attended.parts:
                for i, row in enumerate(m.rows):
                    if row in attended.rows:
                        self._book(layer, row, m, i)

    def _book(self, layer: int, row: Row, m: Any, i: int) -> None:
        chain = next(
            (c for c in _chains_of(row.table, layer) if m.group in (c.group, _raw(row.table, c))),
            None,
        )
        if chain is None:
            return  # a window's, from which nothing is dropped
        key = (id(m.positions), i, id(chain))
        found = self._places.get(key)
        if found is None:
            found = self._places[key] = _slots(m.positions[i], chain)
        valid, slots = found
        tile = chain.group.tile_index(layer)
        self._found.append(
            (
                self.keepers[row],
                chain,
                slice(tile, tile + len(m.heads)),
                slots,
                m.mass[i][:, valid].float(),
            )
        )

    def finish(self) -> None:
        """After the whole forward: everything is booked."""
        for keeper, chain, tiles, slots, mass in _joined(self._found):
            keeper.add(chain, tiles, slots, mass)
        for keeper, chain, tiles, at, notes in self._notes:
            keeper.write(chain, tiles, at, notes)
        for keeper, layer, piece in self._pieces:
            keeper.pieces.setdefault(layer, []).append(piece)
        for keeper, layer, q, scale, stop in self._queries:
            keeper.remember(layer, q, scale, stop)


def _chains_of(table: BlockTable, layer: int) -> list[Chain]:
    return [c for chains in families(table).values() for c in chains if c.group.holds(layer)]


def _raw(table: BlockTable, chain: Chain) -> CacheGroup | None:
    found = companion(table, chain)
    return None if found is None else found.group


def _slots(positions: torch.Tensor, chain: Chain) -> tuple[Any, Any]:
    """Which places of a read count, and the slots that they are; slices where they follow one another."""
    there = positions >= 0
    p = positions[there]
    if chain.kept is not None:
        n = len(chain.kept)
        p = torch.where(p < n, p, p - chain.cut + n)
    count = len(p)
    if not count:
        return there, p
    low = int(p[0])
    if int(p[-1]) - low == count - 1 and bool((p[1:] > p[:-1]).all()):
        first = int(there.nonzero()[0])
        if bool(there[first : first + count].all()):
            return slice(first, first + count), slice(low, low + count)
        return there, slice(low, low + count)
    return there, p


def _joined(found: list[Any]) -> list[Any]:
    """Layers of one chain that follow one another in one piece: one addition instead of one per layer."""
    out: list[Any] = []
    runs: dict[tuple[int, int, int], list[Any]] = {}
    for item in found:
        keeper, chain, _, slots, _ = item
        runs.setdefault((id(keeper), id(chain), id(slots)), []).append(item)
    for items in runs.values():
        items.sort(key=lambda x: x[2].start)
        keeper, chain, first, slots, _ = items[0]
        follow = all(a[2].stop == b[2].start for a, b in pairwise(items))
        if len(items) > 1 and follow:
            out.append(
                (
                    keeper,
                    chain,
                    slice(first.start, items[-1][2].stop),
                    slots,
                    torch.cat([x[4] for x in items]),
                )
            )
        else:
            out += items
    return out
