"""The CPU backend: single queries read blocks in place, by the compiled kernel; another attends for chunks of them.

    a step's reads of single queries ── once per step ──> segments (block table, slots)        } one call per layer
    a group's tiles of a layer       ── once per layer ─> forms (where its keys and values lie)}

What the kernels do not serve (float64, head dimensions that are no multiple of 16, drafts of a lossy group) takes the
torch backend's way, layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from quire.attention import prompts
from quire.attention.forms import place, plan_sealing
from quire.attention.latents import Latents, lay_out_latents, run_latents
from quire.attention.observe import Attended
from quire.attention.read import Read, Seal, Write
from quire.attention.reference import ALL, TorchBackend
from quire.attention.segments import Segments, Tiles, each_head, lay_out, plan_segments
from quire.attention.sparse import Picks, few_segments, indexed, picked
from quire.attention.step import Step
from quire.errors import ConfigError, InvariantError
from quire.kernels import native
from quire.kernels.native import DecodeArgs, EncodeArgs, GatherArgs, Library, WriteArgs
from quire.ops.attend import Partial, empty_partial, merge
from quire.spec import CacheGroup
from quire.store.recent import Recent

_UNKNOWN: Any = object()
_DTYPES = {getattr(torch, name): code for name, code in native.DTYPES.items()}


@dataclass(slots=True)
class _Spot:
    """Where a layer's two fields begin in its blocks, and which heads of the source its tiles are."""

    offsets: tuple[int, int]
    heads: np.ndarray
    address: int
    """Of the heads; asking NumPy for it each time takes longer than writing a token."""


class CpuBackend(TorchBackend):
    """Decode attention by the compiled kernel. Raises ConfigError where the library was not built."""

    name = "cpu"
    by_head = True

    def __init__(self, library: Library | None = None, isa: int = 0) -> None:
        found = library or native.load()
        if found is None:
            raise ConfigError(
                "attention='cpu' needs the compiled kernels, and this installation has none: "
                "`python -m quire.kernels.build` builds them with any C++17 compiler; 'torch' works without"
            )
        self.library = found
        self.isa = isa
        self._spots: Recent[tuple[CacheGroup, int, tuple[str, ...]], _Spot] = Recent()
        self._sealing: Recent[
            tuple[CacheGroup, CacheGroup], list[tuple[int, EncodeArgs]] | None
        ] = Recent()
        self._latents: Recent[tuple[CacheGroup, ...], dict[int, Latents | None]] = Recent()
        self._tiles: Recent[tuple[CacheGroup, ...], dict[tuple[Any, ...], Tiles | None]] = Recent()

    # -- writing -------------------------------------------------------------------------------------------------

    def write(self, step: Step, layer: int, values: dict[str, torch.Tensor]) -> None:
        if not self._written(step, layer, values):
            step.write(layer, values, partial(self.encode, step))
        elif step.seals or step.bounds:  # most steps of single tokens make no block whole
            step.seal(layer, partial(self.encode, step))

    def _written(self, step: Step, layer: int, values: dict[str, torch.Tensor]) -> bool:
        """Writes by the kernel; False, and nothing written, where it does not serve these tensors or groups."""
        if len(values) != 2:
            return False
        names, (k, v) = tuple(values), values.values()
        dtype = _DTYPES.get(k.dtype)
        k_strides, v_strides = k.stride(), v.stride()
        if dtype is None or v.dtype != k.dtype or k_strides[2:] != (1,) or v_strides[2:] != (1,):
            return False
        writes = step.of_layer(layer)[0]
        prepared = step.prepared.get("write")
        if prepared is None:
            prepared = step.prepared["write"] = {}
        for w in writes:
            if id(w) not in prepared:
                prepared[id(w)] = _plan_write(step, w, names)
            if prepared[id(w)] is None:
                return False
        for w in writes:
            args: WriteArgs = prepared[id(w)][0]
            spot = self._spot(w.group, layer, names)
            args.offset[0], args.offset[1] = spot.offsets
            args.heads, args.n_heads = spot.address, len(spot.heads)
            args.source[0], args.source[1] = k.data_ptr(), v.data_ptr()
            args.source_row[0], args.source_head[0] = k_strides[:2]
            args.source_row[1], args.source_head[1] = v_strides[:2]
            args.source_dtype = dtype
            self.library.write(args)
        return True

    def _spot(self, group: CacheGroup, layer: int, names: tuple[str, ...]) -> _Spot:
        found = self._spots.get((group, layer, names))
        if found is None:
            first = group.tile_index(layer) * group.tile_bytes
            k, v = (first + group.field_offsets[n] for n in names)
            heads = np.array(group.heads(layer), np.int32)
            found = _Spot((k, v), heads, heads.ctypes.data)
            self._spots[group, layer, names] = found
        return found

    def encode(self, step: Step, layer: int, s: Seal) -> bool:
        """Encodes blocks by the kernel; False, and nothing written, where it does not serve their codecs."""
        key = (s.body, s.raw)
        made = self._sealing.get(key, _UNKNOWN)
        if made is _UNKNOWN:
            made = self._sealing[key] = plan_sealing(step, s.body, s.raw)
        if made is None:
            return False
        body, raw = s.body, s.raw
        arena, heads = step.store.arena.buffer.data_ptr(), len(body.heads(layer))
        first, source = (g.tile_index(layer) * g.tile_bytes for g in (body, raw))
        for offset, args in made:
            args.arena, args.n_heads = arena, heads
            args.source, args.target = s.source.units.ctypes.data, s.target.units.ctypes.data
            args.n_blocks = len(s.source.units)
            args.source_first, args.target_first = source + offset, first
            args.threads, args.isa = torch.get_num_threads(), self.isa
            self.library.encode(args)
        return True

    # -- reading -------------------------------------------------------------------------------------------------

    def run(
        self,
        step: Step,
        layer: int,
        q: torch.Tensor,
        *,
        scale: float,
        keys: tuple[str, ...] = ("k",),
        value: str = "v",
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        window: int | None = None,
        attended: Attended | None = None,
    ) -> torch.Tensor:
        reads = step.of_layer(layer)[2]
        if step.away:
            reads, whole, near = self._near(step, layer, q, keys, value, window, attended)
            if not whole:
                rest = scale, keys, value, softcap, sinks, window
                return self._streamed(step, layer, q, *rest, near=near)
        plain = window is None and softcap is None and sinks is None and attended is None
        if plain and len(keys) == 2 and keys[0] == value:
            answer = self._absorbed(step, layer, q, keys, scale, reads)
            if answer is not None:
                return answer
        plan, tiles = self._served(step, layer, q, keys, value, reads, window)
        picks = picked(step, layer, plan.single) if plan is not None and plan.indexed else []
        if plan is None or tiles is None or _unfit(plan, picks, attended, sinks):
            return super().run(
                step,
                layer,
                q,
                scale=scale,
                keys=keys,
                value=value,
                softcap=softcap,
                sinks=sinks,
                window=window,
                attended=attended,
            )
        if attended is not None:
            attended.begin(q)
        if plan.chunks:
            if attended is not None:
                self.observe(
                    step, layer, q, plan.chunks, attended, keys, scale, softcap, sinks, window
                )
            out = self.run_reads(
                step,
                layer,
                q,
                plan.chunks,
                scale=scale,
                keys=keys,
                value=value,
                softcap=softcap,
                sinks=sinks,
                window=window,
            )
        else:
            out = q.new_empty(q.shape)
        if q.stride(2) != 1:
            q = q.contiguous()
        if plan.turned is not None:
            return self._with_sinks(step, layer, q, out, plan, tiles, scale, softcap or 0.0)
        args, logits = plan.args, None
        if sinks is not None:
            logits = sinks.detach().to(torch.float32).contiguous()
        if picks:
            fewer = few_segments(step, layer, q, picks, plan.groups, plan.alive[0], scale)
            tiles = self._by_head(plan, tiles, (layer, keys[0], value))
            args = DecodeArgs.from_buffer_copy(args)
            args.segments, args.n_segments = fewer.ctypes.data, len(fewer)
            args.lse = args.probs = None
            self._decode(args, tiles, q, out, scale, softcap or 0.0, logits)
            return out
        if attended is None:
            args.lse = args.probs = None
            self._decode(args, tiles, q, out, scale, softcap or 0.0, logits)
            return out
        paid = plan.paid_to(q.shape[1] if attended.fold == "each" else tiles.kv_heads)
        flat = paid.ask(args, attended)
        self._decode(args, tiles, q, out, scale, softcap or 0.0, logits)
        paid.answer(layer, tiles.kv_heads, flat, attended)
        return out

    def _near(
        self,
        step: Step,
        layer: int,
        q: torch.Tensor,
        keys: tuple[str, ...],
        value: str,
        window: int | None,
        attended: Attended | None,
    ) -> tuple[list[Read], bool, bool]:
        """What `Step.near` gives; whether one call reads all of it, or else `_partials`, and the rest is staged."""
        reads, everything = step.near(layer)
        if attended is not None or any(r.queries > 1 or indexed(r.source) for r in reads):
            return reads, False, False
        if everything:
            return reads, True, True
        plan, tiles = self._served(step, layer, q, keys, value, reads, window)
        return reads, False, plan is not None and tiles is not None

    def _partials(
        self,
        step: Step,
        layer: int,
        q: torch.Tensor,
        reads: list[Read],
        total: Partial | None,
        share: int,
        scale: float,
        keys: tuple[str, ...],
        value: str,
        softcap: float | None,
        window: int | None,
    ) -> Partial:
        """Single queries of streamed sequences by the kernel, which gives their log-sum-exp as well."""
        rest = share, scale, keys, value, softcap, window
        if not step.away:
            return super()._partials(step, layer, q, reads, total, *rest)
        single = [r for r in reads if r.queries == 1 and not r.sinks]
        fits = q.dtype in _DTYPES and len(keys) == 1 and step.device.type == "cpu"
        plan = plan_segments(step, single) if fits and window is None else None
        tiles = None if plan is None else self._tiles_of(step, plan, layer, keys[0], value)
        if (
            plan is None
            or tiles is None
            or tiles.d != q.shape[2]
            or tiles.kv_heads * share != q.shape[1]
        ):
            if len(reads) > len(step.of_layer(layer)[2]):
                raise InvariantError("torch cannot read blocks beside the arena")  # see `_near`
            return super()._partials(step, layer, q, reads, total, *rest)
        others = [r for r in reads if r.queries > 1 or r.sinks]
        if others:
            total = super()._partials(step, layer, q, others, total, *rest)
        q = q if q.stride(2) == 1 else q.contiguous()
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
        plan.args.lse, plan.args.probs = lse.data_ptr(), None
        self._decode(plan.args, tiles, q, out, scale, softcap or 0.0, None)
        if total is None:
            total = empty_partial(q.shape[:2], q.shape[2], torch.float32, q.device)
        at = single[0].tokens.view(-1)
        if len(single) > 1:
            at = torch.cat([r.tokens.view(-1) for r in single]).unique()
        both = merge(Partial(total.out[at], total.lse[at]), Partial(out[at].float(), lse[at]))
        total.out[at], total.lse[at] = both.out, both.lse
        return total

    def _tiles_of(
        self, step: Step, plan: Segments, layer: int, key: str, value: str
    ) -> Tiles | None:
        """How a layer's tiles lie in the groups of a plan; None where the kernel does not read them."""
        known = self._tiles.setdefault(plan.groups, {})
        at = layer, key, value
        if at not in known:
            known[at] = lay_out(step.layout, plan.groups, layer, key, value)
        return known[at]

    def _served(
        self,
        step: Step,
        layer: int,
        q: torch.Tensor,
        keys: tuple[str, ...],
        value: str,
        reads: list[Read],
        window: int | None,
    ) -> tuple[Segments | None, Tiles | None]:
        """What the kernel reads, and how it lies; one of them None where it does not serve these queries."""
        fits = q.dtype in _DTYPES and len(keys) == 1 and window is None
        if not fits or step.device.type != "cpu":
            return None, None
        plan = self._segments(step, reads)
        if plan is None:
            return None, None
        tiles = plan.tiles.get((layer, keys[0], value), _UNKNOWN)
        if tiles is _UNKNOWN:
            tiles = lay_out(step.layout, plan.groups, layer, keys[0], value)
            plan.tiles[layer, keys[0], value] = tiles
        if tiles is None or tiles.d != q.shape[2] or q.shape[1] % tiles.kv_heads:
            return plan, None
        return plan, tiles

    def _by_head(self, plan: Segments, tiles: Tiles, key: tuple[int, str, str]) -> Tiles:
        """A layer's forms, and behind them each once more for every KV head by itself."""
        found = plan.tiles.get((*key, "by head"))
        if found is None:
            found = plan.tiles[(*key, "by head")] = each_head(tiles, len(plan.groups))
        return found

    def _with_sinks(
        self,
        step: Step,
        layer: int,
        q: torch.Tensor,
        out: torch.Tensor,
        plan: Segments,
        tiles: Tiles,
        scale: float,
        softcap: float,
    ) -> torch.Tensor:
        """Single queries that read sinks turned back: as further rows of one call, merged with their own."""
        assert plan.turned is not None
        rows, back = plan.turned
        n = len(q)
        if step.turn is None:
            raise InvariantError("a streaming span needs a model whose RoPE can be turned back")
        both = torch.cat([q, step.turn(layer, q[rows], back)])
        wide, lse = torch.empty_like(both), torch.empty(both.shape[:2])
        plan.args.lse, plan.args.probs = lse.data_ptr(), None
        self._decode(plan.args, tiles, both, wide, scale, softcap, None)
        share = torch.sigmoid(lse[n:] - lse[rows]).unsqueeze(-1)
        mine = torch.lerp(wide[rows].float(), wide[n:].float(), share).to(out.dtype)
        if len(rows) == n:
            return mine
        for r in plan.single:
            out[r.tokens.view(-1)] = wide[r.tokens.view(-1)]
        out[rows] = mine
        return out

    def _decode(
        self,
        args: DecodeArgs,
        tiles: Tiles,
        q: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> None:
        """One call of the kernel, for queries that lie like `q: [n, H_q, D]`."""
        args.forms = tiles.address
        args.q, args.out = q.data_ptr(), out.data_ptr()
        args.q_row, args.q_head, _ = q.stride()
        args.out_row, args.out_head, _ = out.stride()
        args.sinks = None if sinks is None else sinks.data_ptr()
        args.kv_heads, args.share, args.d = tiles.kv_heads, q.shape[1] // tiles.kv_heads, tiles.d
        args.dtype, args.scale, args.softcap = _DTYPES[q.dtype], scale, softcap
        args.threads, args.isa = torch.get_num_threads(), self.isa
        self.library.decode(args)

    def _absorbed(
        self,
        step: Step,
        layer: int,
        q: torch.Tensor,
        keys: tuple[str, ...],
        scale: float,
        reads: list[Read],
    ) -> torch.Tensor | None:
        """`run` over latents; None where the kernel does not serve them, or there is nothing for it to do."""
        if q.dtype not in _DTYPES or step.device.type != "cpu":
            return None
        plan = self._segments(step, reads)
        if plan is None:
            return None
        tiles = plan.latents.get(layer, _UNKNOWN)
        if tiles is _UNKNOWN:
            tiles = plan.latents[layer] = lay_out_latents(step.layout, plan.groups, layer, *keys)
        if tiles is None or tiles.d + tiles.d_rope != q.shape[2]:
            return None
        if plan.chunks:
            out = self.run_reads(
                step,
                layer,
                q,
                plan.chunks,
                scale=scale,
                keys=keys,
                value=keys[0],
                softcap=None,
                sinks=None,
                window=None,
            )
        else:
            out = q.new_empty(*q.shape[:2], tiles.d)
        run_latents(self.library, plan.args, tiles, q, out, scale=scale, isa=self.isa)
        return out

    def _many(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        parts: list[Read],
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        if not prompts.serves(self.library, self.isa, q, k, v):
            return super()._many(q, k, v, parts, window, scale)
        return prompts.attend_prompt(self.library, q, k, v, parts, window, scale, self.isa)

    def _gather(
        self,
        step: Step,
        layer: int,
        r: Read,
        name: str,
        dtype: torch.dtype,
        heads: slice = ALL,
    ) -> torch.Tensor:
        """Codes decoded by the kernel, where it serves the codec."""
        group, code = r.source, _DTYPES.get(dtype)
        site = next((s for s in step.layout.sites_of(group) if s.name == name), None)
        if r.mode != "body" or code is None or site is None or len(site.field.shape) != 1:
            return super()._gather(step, layer, r, name, dtype, heads)
        rows, blocks = r.blocks.units.shape
        first, stop, _ = heads.indices(len(group.heads(layer)))
        args = GatherArgs(
            arena=step.store.arena.buffer.data_ptr(),
            units=r.blocks.units.ctypes.data,
            first=(group.tile_index(layer) + first) * group.tile_bytes,
            tile_bytes=group.tile_bytes,
            n_rows=rows,
            n_heads=stop - first,
            n_blocks=blocks,
            block_tokens=group.block_tokens,
            d=site.width,
            values=site.values,
            dtype=code,
            threads=torch.get_num_threads(),
        )
        codec = step.layout.codecs_of(group)[name]
        if site.width not in native.HEAD_DIMS or not place(args.field, group, codec, site):
            return super()._gather(step, layer, r, name, dtype, heads)
        out = torch.empty(rows, stop - first, blocks, group.block_tokens, site.width, dtype=dtype)
        args.out = out.data_ptr()
        self.library.gather(args)
        return step.valid(r, out)

    def _segments(self, step: Step, reads: list[Read]) -> Segments | None:
        key = id(reads)  # the layers of the same groups have the same list
        if key not in step.prepared:
            found = plan_segments(step, reads)
            if found is not None:
                found.tiles = self._tiles.setdefault(found.groups, found.tiles)
                found.latents = self._latents.setdefault(found.groups, found.latents)
            step.prepared[key] = found
        made: Segments | None = step.prepared[key]
        return made


def _unfit(plan: Segments, picks: Picks, attended: Attended | None, sinks: Any) -> bool:
    """Whether a step asks for two things at once that the kernel's callers do one at a time."""
    if plan.turned is not None:
        return bool(picks) or attended is not None or sinks is not None
    return bool(picks) and attended is not None


def _plan_write(
    step: Step, w: Write, names: tuple[str, ...]
) -> tuple[WriteArgs, list[np.ndarray]] | None:
    """A group's arguments for all layers of a step, and what their addresses point at."""
    fields = {f.name: f for f in w.group.fields}
    if not set(names) <= set(fields):
        return None
    pair = [fields[n] for n in names]
    dtype = native.DTYPES.get(pair[0].dtype)
    if dtype is None or pair[1].dtype != pair[0].dtype or any(len(f.shape) != 1 for f in pair):
        return None
    assert w.places.rows is not None
    alive = [w.places.units, np.ascontiguousarray(w.places.rows, np.int32)]
    args = WriteArgs(
        arena=step.store.arena.buffer.data_ptr(),
        units=alive[0].ctypes.data,
        rows=alive[1].ctypes.data,
        tile_bytes=w.group.tile_bytes,
        n_tokens=len(alive[1]),
        dtype=dtype,
    )
    args.width[0], args.width[1] = pair[0].shape[0], pair[1].shape[0]
    if w.tokens is not None:
        alive.append(np.ascontiguousarray(w.tokens, np.int32))
        args.tokens = alive[2].ctypes.data
    return args, alive
