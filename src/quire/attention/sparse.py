"""Reading fewer blocks than there are: which ones a single query reads, by bounds that lie beside each whole block.

    block      k.bounds [2, D]: the smallest and largest of its keys, channel by channel, as they are read
    bound      sum over channels of max(q * low, q * high), at least q . k of every key in it
    chosen     the best of the whole blocks, the same for all query heads of a KV head, and all that is not whole

How many are read follows from the query's position alone, and which ones from the query and the blocks: the same alone,
in a batch and after a prefix hit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quire.attention.read import Read, Row
from quire.attention.step import Step
from quire.ops.attend import Partial, attend
from quire.spec import BOUNDS, CacheGroup

__all__ = [
    "Choice",
    "Picks",
    "attend_chosen",
    "bounds",
    "choice_of",
    "choose",
    "chosen_slots",
    "few_segments",
    "indexed",
    "picked",
]


def indexed(group: CacheGroup) -> bool:
    """Whether bounds lie beside its blocks."""
    return any(f.name == BOUNDS for f in group.fields)


@dataclass(frozen=True)
class Choice:
    """Of a batch of R rows with n blocks each.

    Args:
        whole: `[R]`, how many blocks are whole and may be passed over.
        count: `[R]`, how many of them are read.
        skip: `[R]`, first layers that read all.
        sparse: `[R]`, which rows pass over any.
        most: blocks that any of them reads.
        beyond: `[R, 1, 1, n]`, which blocks are not whole; None where none of the first `n` is.
        n: so many blocks are looked at.
    """

    whole: np.ndarray
    count: np.ndarray
    skip: np.ndarray
    sparse: np.ndarray
    most: int
    beyond: torch.Tensor | None
    n: int

    def active(self, layer: int) -> np.ndarray:
        """Indices of the rows that pass over blocks in a layer."""
        return np.flatnonzero(self.sparse & (layer >= self.skip))


def choice_of(step: Step, read: Read, layer: int) -> Choice | None:
    """How many blocks each row of a batch reads in a layer; None where all read everything."""
    key = ("choice", id(read))
    if key not in step.prepared:
        step.prepared[key] = _plan(read)
    found: Choice | None = step.prepared[key]
    return None if found is None or not len(found.active(layer)) else found


def _plan(read: Read) -> Choice | None:
    if read.queries != 1 or read.mode == "through" or not indexed(read.source):
        return None
    if read.source is not read.group:
        return None
    size = read.group.block_tokens
    whole, count, skip = (np.zeros(len(read.rows), np.int64) for _ in range(3))
    for i, row in enumerate(read.rows):
        at = row.start
        whole[i] = (at if read.limit is None else read.limit.start(at)) // size
        policy = reader(row)
        if policy is None or read.extents[i].positions is not None:
            count[i] = whole[i]
        else:
            count[i], skip[i] = policy.blocks(at + 1, int(whole[i]), size), policy.skip
    sparse = count < whole
    if not sparse.any():
        return None
    n, beyond = int(whole.max()), None
    if n > whole.min():
        beyond = torch.from_numpy(np.arange(n) >= whole[:, None])[:, None, None].to(read.device)
    return Choice(whole, count, skip, sparse, int(count[sparse].max()), beyond, n)


def reader(row: Row) -> Any:
    """The policy by which a row's query reads fewer blocks; None: it reads all."""
    keeper = row.table.keeper
    return None if keeper is None else keeper.reads_by(row.start)


def bounds(step: Step, layer: int, read: Read, q: torch.Tensor, n: int) -> torch.Tensor:
    """`[R, H_kv, share, n]` float32: at least what each query head of `q: [R, H_q, D]` scores any key of a block."""
    heads, d = len(read.group.heads(layer)), q.shape[2]
    both = step.bounds_of(layer, read, n).float()
    grouped = q.view(q.shape[0], heads, -1, d).float()
    signs = torch.cat([grouped.clamp_max(0), grouped.clamp_min(0)], -1)
    return signs @ both.transpose(2, 3)


def choose(
    step: Step, layer: int, read: Read, q: torch.Tensor, scale: float, choice: Choice
) -> torch.Tensor:
    """`[R, H_kv, K]` entries of the whole blocks that each row's query reads, by their worth; K is the most of any row.

    Row r reads the first `count[r]` of its list, as far as the layer is beyond its `skip`.
    """
    score = bounds(step, layer, read, q, choice.n).mul_(scale)
    if choice.beyond is not None:
        score.masked_fill_(choice.beyond, float("-inf"))
    return score.log_softmax(-1).amax(2).topk(choice.most, -1).indices


def chosen_slots(
    step: Step, layer: int, r: Read, q: torch.Tensor, scale: float, choice: Choice
) -> torch.Tensor:
    """`[R, H_kv, N]`: which slots each row's query reads, for `q: [R, H_q, D]`."""
    best = choose(step, layer, r, q, scale, choice)
    n, size = r.blocks.units.shape[1], r.source.block_tokens
    whole = torch.from_numpy(choice.whole).to(q.device).view(-1, 1, 1)
    dense = torch.from_numpy(~choice.sparse | (layer < choice.skip)).to(q.device).view(-1, 1, 1)
    count = torch.from_numpy(choice.count).to(q.device).view(-1, 1, 1)
    counts = torch.arange(best.shape[2], device=q.device) < count
    taken = torch.zeros(*best.shape[:2], n, dtype=torch.bool, device=q.device)
    taken.scatter_(2, best, counts.expand(best.shape))
    taken |= dense | (torch.arange(n, device=q.device) >= whole)
    return taken.repeat_interleave(size, 2)[:, :, slice(*r.slots)]


def attend_chosen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Attention of single queries `q: [R, 1, H_q, D]` under a mask for each KV head, `[R, H_kv, N]`."""
    if mask is not None:
        chosen = chosen & mask  # [R, 1, N]
    grouped = q.transpose(1, 2).unflatten(1, (k.shape[1], -1))
    part = attend(
        grouped,
        k.unsqueeze(2),
        v.unsqueeze(2),
        scale=scale,
        mask=chosen.unsqueeze(2),
        softcap=softcap,
    )
    return Partial(part.out.flatten(1, 2), part.lse.flatten(1, 2))


Picks = list[tuple[Read, Choice]]


def picked(step: Step, layer: int, reads: Sequence[Read]) -> Picks:
    """Those of a layer's reads of single queries in which rows pass over blocks."""
    found = ((r, choice_of(step, r, layer)) for r in reads)
    return [(r, choice) for r, choice in found if choice is not None]


@dataclass
class _Part:
    """A row that passes over blocks: where the units of its choice go, and which segments, one a head, are its."""

    row: int
    count: int
    units: np.ndarray
    table: np.ndarray
    own: np.ndarray
    """Indices of its segments."""


@dataclass
class Fewer:
    """Segments for the kernel where some rows read few blocks, other ones for each KV head; one for alike layers."""

    segments: np.ndarray
    parts: list[list[_Part]]
    """For each pick."""


def few_segments(
    step: Step,
    layer: int,
    q: torch.Tensor,
    picks: Picks,
    groups: Sequence[CacheGroup],
    every: np.ndarray,
    scale: float,
) -> np.ndarray:
    """A layer's segments where some rows read few blocks; good until the next call.

    Args:
        q: `[n_tokens, H_q, D]`.
        picks: of `picked`.
        groups: by form; the form of head h in group g is `len(groups) + g * H_kv + h`.
        every: the segments that read everything (`native.SEGMENT`), which those rows' are taken from.
    """
    key = ("fewer", id(every), *(choice.active(layer).tobytes() for _, choice in picks))
    found: Fewer | None = step.prepared.get(key)
    if found is None:
        found = step.prepared[key] = _plan_segments(layer, picks, groups, every)
    for (r, choice), parts in zip(picks, found.parts, strict=True):
        size, raw = r.source.block_tokens, 0 if r.limit is None else r.limit.sinks
        mine = q if len(r.rows) == len(q) and r.contiguous else q[r.tokens.view(-1)]
        best = choose(step, layer, r, mine, scale, choice).numpy()
        for part in parts:
            chosen = best[part.row, :, : part.count]
            if raw:  # of a block that is raw to its end nothing is left, and such blocks come first
                chosen = np.sort(chosen, 1)
                found.segments["lo"][part.own] = np.clip(raw - chosen * size, 0, size).sum(1)
            part.table[:, : part.count] = part.units[chosen]
    return found.segments


def _plan_segments(
    layer: int, picks: Picks, groups: Sequence[CacheGroup], every: np.ndarray
) -> Fewer:
    keep, found, n = np.ones(len(every), bool), [], 0
    more: list[np.ndarray] = []
    for r, choice in picks:
        form, heads = groups.index(r.source), len(r.source.heads(layer))
        size, active, firsts = r.source.block_tokens, choice.active(layer), np.asarray(r.firsts)
        keep &= ~((every["form"] == form) & np.isin(every["query"], firsts[active]))
        parts = []
        for i in active:
            whole, count, at = int(choice.whole[i]), int(choice.count[i]), r.rows[i].start
            rest = (at + 1 if r.limit is None else r.limit.start(at)) - whole * size
            units = r.blocks.units[i]
            table = np.empty((heads, count + (rest > 0)), np.int64)
            table[:, count:] = units[whole : whole + (rest > 0)]
            some = np.zeros(heads, every.dtype)
            some["table"] = table.ctypes.data + np.arange(heads) * table.strides[0]
            some["form"] = len(groups) + form * heads + np.arange(heads)
            some["query"], some["hi"] = firsts[i], count * size + rest
            own = np.arange(n, n + heads)
            n += heads
            more.append(some)
            parts.append(_Part(int(i), count, units, table, own))
        found.append(parts)
    segments = np.concatenate([every[keep], *more])
    order = np.argsort(segments["query"], kind="stable")
    place = np.argsort(order)[int(keep.sum()) :]
    for part in (x for parts in found for x in parts):
        part.own = place[part.own]
    return Fewer(segments[order], found)
