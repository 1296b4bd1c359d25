"""The CPU backend: single queries read their blocks in place, by the compiled kernel; chunks go through torch.

    a step's reads of single queries ── once per step ──> segments (block table, slots)        } one call per layer
    a group's tiles of a layer       ── once per layer ─> forms (where its keys and values lie)}

What the kernel does not serve (latents, float64, head dimensions that are no multiple of 16, drafts of a lossy group)
takes the torch backend's way, layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from quire.attention.read import Read, Write
from quire.attention.reference import TorchBackend
from quire.attention.step import Step
from quire.errors import ConfigError
from quire.kernels import native
from quire.kernels.native import DecodeArgs, Form, Library, WriteArgs
from quire.spec import CacheGroup

_DTYPES = {getattr(torch, name): code for name, code in native.DTYPES.items()}


@dataclass(slots=True)
class _Segments:
    """What the single queries of a step read in the layers that share these reads."""

    args: DecodeArgs
    groups: tuple[CacheGroup, ...]
    chunks: list[Read]
    tokens: int
    """How many tokens of the step are single queries."""
    alive: list[Any]
    """What the addresses in `args` point at."""


@dataclass(slots=True)
class _Tiles:
    """The forms of a layer's groups, and its KV heads."""

    forms: Any
    kv_heads: int
    alive: list[Any] = field(default_factory=list)


class CpuBackend(TorchBackend):
    """Decode attention by the compiled kernel. Raises ConfigError where the library was not built."""

    name = "cpu"

    def __init__(self, library: Library | None = None, isa: int = 0) -> None:
        found = library or native.load()
        if found is None:
            raise ConfigError(
                "attention='cpu' needs the compiled kernels, and this installation has none: "
                "`python -m quire.kernels.build` builds them with any C++17 compiler; 'torch' works without"
            )
        self.library = found
        self.isa = isa
        self._tiles: dict[tuple[tuple[CacheGroup, ...], int, str, str], _Tiles | None] = {}

    # -- writing -------------------------------------------------------------------------------------------------

    def write(self, step: Step, layer: int, values: dict[str, torch.Tensor]) -> None:
        writes = step.of_layer(layer)[0]
        tensors = list(values.values())
        plain = len(tensors) == 2 and all(
            x.dtype in _DTYPES and x.device.type == "cpu" and x.stride(-1) == 1 and x.ndim == 3
            for x in tensors
        )
        if not plain or tensors[0].dtype != tensors[1].dtype:
            super().write(step, layer, values)
            return
        calls = [self._write_args(step, w, layer, tuple(values)) for w in writes]
        if None in calls:
            super().write(step, layer, values)
            return
        for args in calls:
            assert args is not None
            for i, x in enumerate(tensors):
                args.source[i] = x.data_ptr()
                args.source_row[i], args.source_head[i], _ = x.stride()
            args.source_dtype = _DTYPES[tensors[0].dtype]
            self.library.write(args)
        step.seal(layer)

    def _write_args(
        self, step: Step, w: Write, layer: int, names: tuple[str, ...]
    ) -> WriteArgs | None:
        """The step's arguments for a group, made for its first layer and turned to `layer`."""
        key = ("write", id(w))
        group, found = w.group, step.prepared.get(key)
        if found is None:
            found = step.prepared[key] = self._first_write(step, w, names)
        args, alive = found
        if args is None:
            return None
        first = group.tile_index(layer) * group.tile_bytes
        for i, name in enumerate(names):
            args.offset[i] = first + group.field_offsets[name]
        heads = group.heads(layer)
        if alive.get("heads") != heads:
            alive["heads"], alive["which"] = heads, np.array(heads, np.int32)
            args.heads, args.n_heads = alive["which"].ctypes.data, len(heads)
        return args

    def _first_write(
        self, step: Step, w: Write, names: tuple[str, ...]
    ) -> tuple[WriteArgs | None, dict[str, Any]]:
        fields = [next((f for f in w.group.fields if f.name == n), None) for n in names]
        dtypes = {f.dtype for f in fields if f is not None}
        if None in fields or len(dtypes) != 1 or not dtypes <= set(native.DTYPES):
            return None, {}
        rows = np.ascontiguousarray(w.places.rows, np.int32)
        alive: dict[str, Any] = {"rows": rows, "units": w.places.units}
        args = WriteArgs(
            arena=step.store.arena.buffer.data_ptr(),
            units=w.places.units.ctypes.data,
            rows=rows.ctypes.data,
            tile_bytes=w.group.tile_bytes,
            n_tokens=len(rows),
            dtype=native.DTYPES[dtypes.pop()],
        )
        if w.tokens is not None:
            alive["tokens"] = np.ascontiguousarray(w.tokens, np.int32)
            args.tokens = alive["tokens"].ctypes.data
        for i, f in enumerate(fields):
            assert f is not None
            args.width[i] = int(np.prod(f.shape))
        return args, alive

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
    ) -> torch.Tensor:
        options: dict[str, Any] = {"scale": scale, "keys": keys, "value": value}
        options |= {"softcap": softcap, "sinks": sinks, "window": window}
        reads = step.of_layer(layer)[2]
        plan = None
        if len(keys) == 1 and window is None and q.dtype in _DTYPES and q.device.type == "cpu":
            plan = self._segments(step, reads)
        tiles = None if plan is None else self._forms(plan.groups, layer, keys[0], value, q)
        if plan is None or tiles is None:
            return super().run(step, layer, q, **options)
        out = torch.empty(q.shape, dtype=q.dtype)
        if plan.chunks:
            out = super().run_reads(step, layer, q, plan.chunks, **options)
        if q.stride(-1) != 1:
            q = q.contiguous()
        args, logits = plan.args, None
        if sinks is not None:
            logits = sinks.detach().to(torch.float32).contiguous()
        args.forms = tiles.forms
        args.q, args.out = q.data_ptr(), out.data_ptr()
        args.q_row, args.q_head, _ = q.stride()
        args.out_row, args.out_head, args.d = out.stride(0), out.stride(1), q.shape[2]
        args.sinks = None if logits is None else logits.data_ptr()
        args.kv_heads, args.share = tiles.kv_heads, q.shape[1] // tiles.kv_heads
        args.dtype, args.scale, args.softcap = _DTYPES[q.dtype], scale, softcap or 0.0
        args.threads, args.isa = torch.get_num_threads(), self.isa
        self.library.decode(args)
        return out

    def _segments(self, step: Step, reads: list[Read]) -> _Segments | None:
        key = ("reads", *map(id, reads))
        if key not in step.prepared:
            step.prepared[key] = _plan_segments(step, reads)
        found: _Segments | None = step.prepared[key]
        return found

    def _forms(
        self, groups: tuple[CacheGroup, ...], layer: int, k: str, v: str, q: torch.Tensor
    ) -> _Tiles | None:
        key = (groups, layer, k, v)
        if key not in self._tiles:
            self._tiles[key] = _lay_out(groups, layer, k, v)
        tiles = self._tiles[key]
        if tiles is None or q.shape[2] not in native.HEAD_DIMS or q.shape[1] % tiles.kv_heads:
            return None
        return tiles if all(g.fields[0].shape == (q.shape[2],) for g in groups) else None


def _plan_segments(step: Step, reads: list[Read]) -> _Segments | None:
    """The single queries' segments, sorted by query; None where there are none, or drafts of a lossy group are read."""
    single = [r for r in reads if r.queries == 1]
    if not single or any(r.mode != "raw" for r in single):
        return None
    groups = tuple(dict.fromkeys(r.source for r in single))
    rows = []
    for r in single:
        address, width = r.blocks.units.ctypes.data, r.blocks.units.strides[0]
        form = groups.index(r.source)
        for i, first in enumerate(r.firsts):
            rows += [(address + i * width, form, first, lo, hi) for lo, hi in r.runs(i)]
    rows.sort(key=lambda x: x[2])
    segments = np.array(rows, native.SEGMENT)
    args = DecodeArgs(
        arena=step.store.arena.buffer.data_ptr(),
        segments=segments.ctypes.data,
        n_segments=len(segments),
    )
    tokens = len({first for r in single for first in r.firsts})
    return _Segments(args, groups, [r for r in reads if r.queries > 1], tokens, [segments, single])


def _lay_out(groups: tuple[CacheGroup, ...], layer: int, k: str, v: str) -> _Tiles | None:
    """The forms of a layer; None where a group stores what no kernel reads."""
    every = sorted({h for g in groups for h in g.heads(layer)})
    if every != list(range(len(every))):
        return None
    forms = (Form * len(groups))()
    tiles = _Tiles(0, len(every))
    for form, group in zip(forms, groups, strict=True):
        fields = {f.name: f for f in group.fields}
        if set(fields) != {k, v} or fields[k].shape != fields[v].shape:
            return None
        if fields[k].dtype != fields[v].dtype or fields[k].dtype not in native.ROWS:
            return None
        heads = np.full(len(every), -1, np.int32)
        heads[list(group.heads(layer))] = np.arange(len(group.heads(layer)))
        form.first = group.tile_index(layer) * group.tile_bytes if layer in group.layers else 0
        form.tile_bytes = group.tile_bytes
        form.k, form.v = group.field_offsets[k], group.field_offsets[v]
        form.heads, form.codec = heads.ctypes.data, native.ROWS[fields[k].dtype]
        form.block_tokens = group.block_tokens
        tiles.alive.append(heads)
    tiles.alive.append(forms)
    import ctypes

    tiles.forms = ctypes.addressof(forms)
    return tiles
