"""What attention paid to each cached token, for whoever asks: softmax probabilities, and the logarithm of their sum.

    run(step, layer, q, ..., attended=Attended("mean"))
                                   │
      lse [n_tokens, H_q]  <───────┤      natural logarithm, over everything that a query read, its sink logit included
      parts: Mass per read <───────┘      p = exp(score - lse), folded over the query heads of a KV head,
                                          added up over a row's queries; or their largest; or, of the latest
                                          query that paid a token one of its k largest, the position and 1

The output does not change, and nothing is paid when nobody asks. The compiled kernel gives the same for single queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from quire.attention.read import Read, Row
from quire.errors import ConfigError
from quire.spec import CacheGroup

Fold = Literal["each", "mean", "max"]
FOLDS: tuple[Fold, ...] = ("each", "mean", "max")
Over = Literal["sum", "max", "latest"]
SCORE_BYTES = 64 << 20
"""Scores materialised at once."""


@dataclass(frozen=True, slots=True)
class Mass:
    """What the rows of one read paid to the slots that they read.

    Args:
        group: whose tokens they are.
        rows: R rows of the forward.
        heads: the KV heads.
        positions: `[R, N]` int64, logical position of each slot; -1 where there is none.
        mass: `[R, heads, N]`, or `[R, heads * share, N]` under "each"; 0 where there is none.
    """

    group: CacheGroup
    rows: Sequence[Row]
    heads: tuple[int, ...]
    positions: torch.Tensor
    mass: torch.Tensor


@dataclass
class Attended:
    """A question to `run`, answered in `lse` and `parts`.

    Args:
        fold: over the query heads of a KV head: their "mean", their "max", or "each" by itself.
        last: of how many of a row's queries, from its last one back; None for all.
        over: a row's queries: their "sum", their "max", or "latest": one more than the position of the last query of
            which the token was among the `top` that it paid most, over all that it reads; 0 where there is none.
        top: for "latest"; where several are equal, all of them count.
        rows: of these rows only, and of each so many of its last queries; None for all rows alike. What else is
            answered means nothing.

    Cost: by the kernel one pass over the scores of single queries; else two products of the asked queries and the keys.
    """

    fold: Fold = "mean"
    last: int | None = None
    over: Over = "sum"
    top: int = 0
    rows: Mapping[Row, int] | None = None
    lse: torch.Tensor = field(init=False, default_factory=lambda: torch.empty(0))
    """`[n_tokens, H_q]`; no number for queries that were not asked about."""
    parts: list[Mass] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.fold not in FOLDS or (self.last is not None and self.last < 1):
            raise ConfigError(
                f"attended: fold is one of {', '.join(FOLDS)} and last at least 1, not {self.fold!r} and {self.last}"
            )
        if (self.over == "latest") != (self.top > 0):
            raise ConfigError(
                f"attended: over='latest' goes with top of 1 or more, not {self.over!r} with {self.top}"
            )

    def begin(self, q: torch.Tensor) -> None:
        """Forgets what an earlier call left, and makes room for `q: [n_tokens, H_q, D]`."""
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.lse = torch.full(q.shape[:2], float("nan"), dtype=dtype, device=q.device)
        self.parts = []

    def asks(self, read: Read) -> int:
        """How many of each row's queries are asked about in a read."""
        if self.rows is not None:
            return min(read.queries, max(self.rows.get(r, 0) for r in read.rows))
        return read.queries if self.last is None else min(self.last, read.queries)

    def total(self, row: Row) -> torch.Tensor:
        """`[heads, row.stop]`: a row's mass by position; KV heads, or query heads under "each"."""
        mine = [(m, i) for m in self.parts for i, r in enumerate(m.rows) if r is row]
        n_heads = 1 + max((h for m, _ in mine for h in m.heads), default=-1)
        each = mine[0][0].mass.shape[1] // len(mine[0][0].heads) if mine else 1
        out = self.lse.new_zeros(n_heads, each, row.stop)
        for m, i in mine:
            there = m.positions[i] >= 0
            x = m.mass[i].view(len(m.heads), each, -1)[..., there]
            heads = torch.tensor(m.heads, device=out.device)
            out[heads] = out[heads].index_add_(2, m.positions[i, there], x.to(out.dtype))
        return out.view(n_heads * each, row.stop)


Keys = Callable[[Read], torch.Tensor]
Turned = Callable[[Read, torch.Tensor, slice], torch.Tensor]


def observe(
    attended: Attended,
    q: torch.Tensor,
    reads: Sequence[Read],
    keys: Keys,
    *,
    layer: int,
    share: int,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    window: int | None,
    turn: Turned | None = None,
) -> None:
    """Answers for these reads in plain torch, which must be all of their queries' reads.

    Args:
        q: `[n_tokens, H_q, D]`.
        keys: a read's keys, `[R, heads, N, D]`.
        layer: whose KV heads they are.
        share: query heads of a KV head.
        scale, softcap, sinks, window: as in `run`.
        turn: some of a read's queries as it wants them, for the sinks of a streaming span.
    """
    dtype = attended.lse.dtype
    q_heads = {
        r: torch.tensor(
            [h * share + g for h in r.group.heads(layer) for g in range(share)], device=q.device
        )
        for r in reads
    }
    reads = [r for r in reads if attended.asks(r)]
    for r in reads:
        asked = r.tokens[:, r.queries - attended.asks(r) :]
        attended.lse[asked] = (
            float("-inf") if sinks is None else sinks.detach().to(dtype).expand(*asked.shape, -1)
        )
    for r in reads:
        heads = q_heads[r]
        for part, s in _scores(attended, q, r, keys(r), heads, scale, softcap, window, turn):
            at = r.tokens[:, part].unsqueeze(-1), heads
            attended.lse[at] = torch.logaddexp(
                attended.lse[at], torch.logsumexp(s, -1).transpose(1, 2)
            )

    def paid(r: Read, k: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some of a read's queries and their probabilities `[R, heads, T, N]`, folded."""
        heads = q_heads[r]
        for part, s in _scores(attended, q, r, k, heads, scale, softcap, window, turn):
            lse = attended.lse[r.tokens[:, part].unsqueeze(-1), heads].transpose(1, 2).unsqueeze(-1)
            p = torch.exp(s - torch.where(torch.isinf(lse), 0.0, lse))
            if attended.fold != "each":
                p = p.unflatten(1, (-1, share))
                p = p.mean(2) if attended.fold == "mean" else p.amax(2)
            yield part, p

    owners = (
        q_heads
        if attended.fold == "each"
        else {r: torch.tensor(r.group.heads(layer), device=q.device) for r in reads}
    )
    best = attended.lse.new_zeros(*q.shape[:2], attended.top)
    if attended.over == "latest":
        for r in reads:
            for part, p in paid(r, keys(r)):
                _better(best, (r.tokens[:, part].unsqueeze(-1), owners[r]), p.transpose(1, 2))
    for r in reads:
        k = keys(r)
        mass = torch.zeros(k.shape[0], len(owners[r]), k.shape[2], dtype=dtype, device=q.device)
        for part, p in paid(r, k):
            if attended.over == "sum":
                mass += p.sum(2)
            elif attended.over == "latest":
                least = best[r.tokens[:, part].unsqueeze(-1), owners[r]][..., -1].transpose(1, 2)
                mass = torch.maximum(mass, _stamped(p, least, r.qpos[:, None, part]).amax(2))
            else:
                mass = torch.maximum(mass, p.amax(2))
        attended.parts.append(Mass(r.group, r.rows, r.group.heads(layer), r.kpos, mass))


def latest(parts: Sequence[Mass], top: int) -> list[Mass]:
    """What single queries paid, as the answer to "latest", over all parts of a row together."""
    rows = {r: i for i, r in enumerate(dict.fromkeys(r for m in parts for r in m.rows))}
    each = [m.mass.shape[1] // len(m.heads) for m in parts]
    n_heads = 1 + max((h for m in parts for h in m.heads), default=-1)
    places = []
    for m, share in zip(parts, each, strict=True):
        device = m.mass.device
        heads = torch.tensor([h * share + g for h in m.heads for g in range(share)], device=device)
        places.append((torch.tensor([rows[r] for r in m.rows], device=device)[:, None], heads))
    if not parts:
        return []
    best = parts[0].mass.new_zeros(len(rows), n_heads * max(each), top)
    for m, at in zip(parts, places, strict=True):
        _better(best, at, m.mass)
    out = []
    for m, at in zip(parts, places, strict=True):
        stops = torch.tensor([r.stop - 1 for r in m.rows], device=m.mass.device)
        out.append(replace(m, mass=_stamped(m.mass, best[at][..., -1], stops[:, None])))
    return out


def _better(best: torch.Tensor, at: tuple[torch.Tensor, ...], p: torch.Tensor) -> None:
    """The `top` largest of what is there and of `p: [..., N]`."""
    best[at] = torch.cat([best[at], p], -1).topk(best.shape[-1]).values


def _stamped(p: torch.Tensor, least: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`p: [..., N]` to position + 1 of its query where it is not below `least: [...]`, to 0 elsewhere."""
    hit = (p >= least.unsqueeze(-1)) & (p > 0)
    return hit * (positions + 1).to(p.dtype).unsqueeze(-1)


def _scores(
    attended: Attended,
    q: torch.Tensor,
    r: Read,
    k: torch.Tensor,
    heads: torch.Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    turn: Turned | None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some of a row's queries at a time, and their scores `[R, heads, T, N]`."""
    mask, first = r.mask(window), r.queries - attended.asks(r)
    k = k.to(attended.lse.dtype).transpose(-1, -2)
    rows = max(1, SCORE_BYTES // (8 * k.shape[0] * len(heads) * max(1, k.shape[3])))
    for at in range(first, r.queries, rows):
        part = slice(at, min(r.queries, at + rows))
        mine = q[r.tokens[:, part]][:, :, heads]
        if r.sinks and turn is not None:
            mine = turn(r, mine, part)
        mine = mine.to(k.dtype).transpose(1, 2)  # [R, heads, T, D]
        grouped = mine.reshape(mine.shape[0], k.shape[1], -1, mine.shape[3])
        s = (torch.matmul(grouped, k) * scale).view(*mine.shape[:3], -1)
        if softcap is not None:
            s = torch.tanh(s / softcap) * softcap
        if mask is not None:
            s = s.masked_fill(~mask[:, part].unsqueeze(1), float("-inf"))
        yield part, s
