"""A planned forward at work: new keys and values into blocks, blocks into codes, and what the queries read back out.

k, v of a layer ── write ──> rows of plain blocks ── seal ──> codes of the body's blocks
what queries read <── gather ── rows, or codes decoded
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from quire.attention.plan import Plan
from quire.attention.read import Read, Seal
from quire.spec import ALIGN_BYTES, BOUNDS, CacheGroup, Field
from quire.store.cold import Stream

Encode = Callable[[int, Seal], bool]


class Step(Plan):
    """The plan of one forward, and the store's memory moved as it says."""

    _stream: Stream | None = None

    def near(self, layer: int) -> tuple[list[Read], bool]:
        """What a layer reads in the arena and of blocks away in host memory beside it; whether that is everything.

        For a backend that goes by addresses: those blocks are no part of the arena, see `store.cold`.
        """
        here = self.of_layer(layer)[2]
        key = "near", id(here)
        if key not in self.prepared:
            away = [(cold, run, r) for cold, run, r in self.away if run.group.holds(layer)]
            beside = [
                r.placed(cold.below.mover.units(run.rows)[None])
                for cold, run, r in away
                if run.rows is not None
            ]
            self.prepared[key] = [*here, *beside], len(beside) == len(away)
        found: tuple[list[Read], bool] = self.prepared[key]
        return found

    def staged(self, layer: int, *, far: bool = False) -> Iterator[Read]:
        """What the layer reads of blocks that are away: run after run, each good until the next is asked for.

        Args:
            far: without those that `near` gives.
        """
        wanted = [x for x in self.away if not far or x[1].rows is None]
        if self._stream is None:
            self._stream = Stream([(cold, run) for cold, run, _ in wanted])
        for cold, run, read in wanted:
            if run.group.holds(layer):
                units = self._stream.units(cold, run, layer)
                if units is not None:
                    yield read.placed(units[None])

    def settle(self) -> None:
        """Nothing more is read: what is still being staged comes to its end."""
        if self._stream is not None:
            self._stream.settle()

    def write(
        self, layer: int, values: dict[str, torch.Tensor], encode: Encode | None = None
    ) -> None:
        """Stores the new tokens' fields of one layer, then seals what became whole.

        Args:
            values: field name to `[n_tokens, heads, *shape]`.
            encode: as `seal` takes it.
        """
        for w in self.of_layer(layer)[0]:
            heads = w.group.heads(layer)
            for name, every in values.items():
                x = w.choose(every if len(heads) == every.shape[1] else every[:, list(heads)])
                at = w.places.flat.get((name, len(heads)))
                if at is None:
                    at = self.store.slot_index(w.group, name, len(heads), w.places.at, w.places.row)
                    w.places.flat[name, len(heads)] = at
                slots = self.store.slots(w.group, layer, name)
                slots.index_copy_(0, at, x.reshape(-1, slots.shape[1]).to(slots.dtype))
        self.seal(layer, encode)

    def seal(self, layer: int, encode: Encode | None = None) -> None:
        """Encodes the layer's share of the blocks that became whole and accepted.

        Args:
            encode: does it faster, or returns False and leaves it to the codecs.
        """
        for group, places in self.bounds:
            if group.holds(layer):
                self._bound(layer, group, places.at, self.store.view(group, layer, "k")[places.at])
        for s in self.of_layer(layer)[1]:
            if encode is None or not encode(layer, s):
                self.encode(layer, s)
            if any(f.name == BOUNDS for f in s.body.fields):
                self._bound_codes(layer, s)
            s.todo.discard(layer)
            if not s.todo:
                for chain, entries in s.chains:
                    chain.encoded = max(chain.encoded, entries)

    def _bound(self, layer: int, group: CacheGroup, at: torch.Tensor, keys: torch.Tensor) -> None:
        """Notes the smallest and largest of `keys: [n, heads, block_tokens, D]` beside their blocks."""
        view = self.store.view(group, layer, BOUNDS)
        view[at] = torch.stack([keys.amin(2), keys.amax(2)], 2).to(view.dtype)

    def _bound_codes(self, layer: int, s: Seal) -> None:
        """Of keys as they are read: decoded."""
        site = next(x for x in self.layout.sites_of(s.body, layer) if x.name == "k")
        parts = {
            f.name.partition(".")[2]: self.store.view(s.body, layer, f.name)[s.target.at]
            for f in self.layout.codecs_of(s.body)["k"].stored(site)
        }
        dtype = getattr(torch, self.layout.dtype)
        keys = self.layout.decode(s.body, site, parts, s.pos.unsqueeze(1), dtype)
        self._bound(layer, s.body, s.target.at, keys)

    def bounds_of(self, layer: int, read: Read, n: int) -> torch.Tensor:
        """The bounds of the first `n` blocks that each row of a batch reads, `[R, heads, n, 2 * D]`."""
        rows, heads = self.store.rows(read.source, layer, BOUNDS)
        at, flat = read.blocks.at, read.blocks.flat
        index = flat.get((BOUNDS, len(heads)))
        if index is None:
            index = (at[:, None, :n] + heads.view(1, -1, 1)).reshape(-1)
            flat[BOUNDS, len(heads)] = index
        return rows.index_select(0, index).view(at.shape[0], len(heads), n, -1)

    def encode(self, layer: int, s: Seal) -> None:
        """Encodes blocks of one layer by their codecs."""
        dtype = getattr(torch, self.layout.dtype)
        for site in self.layout.sites_of(s.body, layer):
            x = self.store.view(s.raw, layer, site.name)[s.source.at].to(dtype)
            parts = self.layout.encode(s.body, site, x, s.pos.unsqueeze(1))
            for part, stored in parts.items():
                view = self.store.view(s.body, layer, f"{site.name}.{part}" if part else site.name)
                view[s.target.at] = stored.to(view.dtype)

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

        return self._decode(layer, read, name, dtype, fetch)

    def gather_both(
        self, layer: int, read: Read, names: tuple[str, str], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two fields as `gather` gives them; in one copy where they are stored plainly and alike, as k and v are.

        The copy lies in the store's scratch memory: it is good until the next call.
        """
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
        both = self.store.scratch(rows, len(index))
        torch.index_select(rows, 0, index, out=both)
        if read.empty is not None:  # see `valid`
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
        self,
        layer: int,
        read: Read,
        name: str,
        dtype: torch.dtype,
        fetch: Callable[[str], torch.Tensor],
    ) -> torch.Tensor:
        if read.mode == "raw":
            x = fetch(name).to(dtype)
        else:
            site = next(x for x in self.layout.sites_of(read.group, layer) if x.name == name)
            pos, stored = read.pos_in(layer), self.layout.codecs_of(read.group)[name].stored(site)
            if read.mode == "body":
                parts = {s.name.partition(".")[2]: fetch(s.name) for s in stored}
            else:
                model = getattr(torch, self.layout.dtype)
                parts = self.layout.encode(read.group, site, fetch(name).to(model), pos)
                kept = {s.name.partition(".")[2]: getattr(torch, s.dtype) for s in stored}
                parts = {part: y.to(kept[part]) for part, y in parts.items()}
            x = self.layout.decode(read.group, site, parts, pos, dtype)
        return self.valid(read, x)

    def valid(self, read: Read, x: torch.Tensor) -> torch.Tensor:
        """The slots that a batch reads, `[R, heads, N, *shape]`, of whole blocks `[R, heads, n, block_tokens, *shape]`.

        Slots that no row reads are zero: what was never written may be no number, and 0 x NaN is NaN.
        """
        r, heads, n, size, *shape = x.shape
        if read.empty is not None:
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
