"""The cold blocks of a live sequence: in host memory or on a disk, and streamed back layer by layer to be read.

    chain       |~~~~ run 0 ~~~~|~~~~ run 1 ~~~~|####|####|##..|       `chain.cold` entries are away, the others here
    a run       layer 0 |####|####|####|   layer 1 |####|####|####|    each layer's share of its blocks side by side
    staging     |#### layer l of run 0|   |#### layer l of run 1|      two frames of the arena, filled in turn

What is away was sealed: it never changes, so nothing is ever written back. A run is as long as one layer's share of it
fits a frame; a step copies each share into a frame, reads it there and forgets it, so memory stays bounded however
long the sequence is. Runs that host memory has no room for lie in the first tier behind it, a share by itself under a
random name, verified when it comes back; the next ones are on their way while one is read, and the very next is put
into the other frame by a thread of its own.

Where the arena lies in host memory itself, a run there keeps its blocks whole, as they lay in the arena, and a kernel
that goes by addresses reads them where they are: nothing is staged for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from secrets import token_bytes
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from quire.errors import CapacityError
from quire.spec import ALIGN_BYTES, CacheGroup, Residual
from quire.store.chain import GONE, Chain
from quire.store.compact import companion
from quire.store.pool import BlockPool
from quire.store.tiers.contract import Block, Outcome
from quire.store.tiers.slots import buffer_of

if TYPE_CHECKING:
    from quire.store.below import Below
    from quire.store.store import BlockStore
    from quire.store.table import BlockTable

__all__ = ["Cold", "Run", "Staging", "Stream", "cold_limit", "fits", "full_chains", "goes_away"]

HOT_BLOCKS = 2
"""Of each chain at its end, that stay."""
AHEAD = 3
"""Shares that are read from a tier before they are asked for."""
LOAD_S = 30.0
FRAMES = 3
"""Slabs that staging may take: two frames, and the arena's first, which is none."""


@dataclass(eq=False)
class Run:
    """Entries [first, first + count) of one chain, away.

    Args:
        rows: `[count, block_bytes] uint8`: its blocks, in host memory beside an arena that lies there, too.
        shares: by layer: `[count, heads * tile_bytes] uint8`: in host memory otherwise.
        names: by layer: under which they lie in a tier.
    """

    group: CacheGroup
    first: int
    count: int
    rows: np.ndarray | None = None
    shares: list[np.ndarray] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """Of all layers."""
        return self.count * self.group.block_bytes

    def share(self, layer: int) -> np.ndarray | None:
        """`[count, heads * tile_bytes]`, of one layer; None where it lies in a tier."""
        if self.rows is not None:
            return _part(self.group, layer, self.rows)
        return self.shares[self.group.layers.index(layer)] if self.shares else None


def _part(group: CacheGroup, layer: int, rows: np.ndarray) -> np.ndarray:
    """One layer's share of whole blocks."""
    first = group.tile_index(layer) * group.tile_bytes
    return rows[:, first : first + share_bytes(group, layer)]


def share_bytes(group: CacheGroup, layer: int) -> int:
    """One layer's share of a block."""
    return len(group.heads(layer)) * group.tile_bytes


def full_chains(table: BlockTable) -> list[Chain]:
    """Chains of which everything is read for ever, and so of which the beginning may go away."""
    raws = {c.group.raw for c in table.chains}
    return [c for c in table.chains if c.kept is None and goes_away(c.group, raws)]


def cold_limit(table: BlockTable, chain: Chain) -> int:
    """Entries from the first on that are whole, sealed, and that nobody reads raw any more; the last ones stay."""
    raw, size = companion(table, chain), chain.group.block_tokens
    if raw is None:
        return max(0, table.committed // size - HOT_BLOCKS)
    assert isinstance(raw.group.span, Residual)
    settled = raw.group.span.start(table.committed) // size
    return max(0, int(min(settled, chain.encoded)) - HOT_BLOCKS)


def run_blocks(group: CacheGroup, store: BlockStore) -> int:
    """Blocks of a run: one layer's share of them fills a frame at most, and all of it an eighth of the arena."""
    fill = store.arena.slab_bytes // max(share_bytes(group, x) for x in group.layers)
    return max(1, min(fill, store.arena.total_bytes // 8 // group.block_bytes))


def fits(store: BlockStore, n_tokens: int, room_bytes: int, *, chunk_tokens: int = 1) -> bool:
    """Whether one sequence, its cold blocks away, is served by an otherwise empty arena and so much room below."""
    blocks = store.spec.blocks_for(n_tokens, chunk_tokens=chunk_tokens)
    raws, slabs, away = {g.raw for g in store.spec}, FRAMES, 0
    by_size: dict[int, int] = {}
    for g in store.spec:
        n = blocks[g.name]
        if goes_away(g, raws):
            here = min(n, run_blocks(g, store) + HOT_BLOCKS + 2)
            away += (n - here) * g.block_bytes
            n = here
        by_size[g.block_bytes] = by_size.get(g.block_bytes, 0) + n
    slabs += sum(-(-n // (store.arena.slab_bytes // size)) for size, n in by_size.items() if n)
    return 0 < away <= room_bytes and slabs <= store.arena.slabs


def goes_away(group: CacheGroup, raws: set[str | None]) -> bool:
    """Whether all of a group is read for ever, and so its beginning may be kept elsewhere. `raws`: raw companions."""
    far = 1 << 40
    plain = not group.recurrent and group.name not in raws
    return plain and group.span.needs(far) == ((0, far),)


class Staging:
    """Two frames of one arena, each a slab, while some sequence has cold blocks.

    Raises CapacityError where the arena has none to give.
    """

    def __init__(self, store: BlockStore) -> None:
        self.store, self.users = store, 0
        self.pool: BlockPool | None = None
        self.frames: list[int] = []
        self._filler: ThreadPoolExecutor | None = None

    @property
    def frame_bytes(self) -> int:
        """Of one frame."""
        return self.store.arena.slab_bytes

    def enter(self) -> None:
        """One more sequence. Raises CapacityError."""
        if not self.users:
            self._take()
        self.users += 1

    def leave(self) -> None:
        """One sequence less; the last gives the frames back."""
        self.users -= 1
        if not self.users and self._filler is not None:
            self._filler.shutdown()
            self._filler = None
        if not self.users and self.pool is not None:
            for frame in self.frames:
                self.pool.release(frame)
            self.frames = []

    def begin(self, work: Callable[[], Any]) -> Future[Any]:
        """Runs it in the thread that fills frames; its result, later. Ended with the last sequence that takes part."""
        if self._filler is None:
            self._filler = ThreadPoolExecutor(1, "quire-frames")
        return self._filler.submit(work)

    def _take(self) -> None:
        # A layer's share lies as if the whole block lay around it, which must begin within the arena: not in slab 0.
        pool = self.pool = self.pool or BlockPool(self.store.arena, self.frame_bytes)
        taken: list[int] = []
        try:
            while sum(pool.location(x)[0] > 0 for x in taken) < 2:
                taken.append(pool.take())
        except CapacityError:
            for x in taken:
                pool.release(x)
            raise
        self.frames = [x for x in taken if pool.location(x)[0] > 0]
        for x in taken:
            if x not in self.frames:
                pool.release(x)

    def put(self, at: int, group: CacheGroup, layer: int, share: np.ndarray) -> np.ndarray:
        """Copies a share into a frame.

        Returns:
            `[count]` units, as `BlockStore.units` gives them: where the blocks would begin.
        """
        import torch

        assert self.pool is not None
        start = self.pool.byte_offset(self.frames[at])
        frame = self.store.arena.buffer[start : start + share.nbytes].view(share.shape)
        with torch.inference_mode():
            frame.copy_(torch.from_numpy(share), non_blocking=True)
        before = group.tile_index(layer) * group.tile_bytes
        step = share_bytes(group, layer) // ALIGN_BYTES
        units: np.ndarray = (start - before) // ALIGN_BYTES + np.arange(len(share)) * step
        return units


class Cold:
    """What one sequence has away, made when its first blocks go.

    Args:
        table: whose chains keep everything.
        below: where to.
    """

    def __init__(self, table: BlockTable, below: Below) -> None:
        self.table, self.below = table, below
        self.runs: dict[int, list[Run]] = {}  # by the chain's place
        self.host_bytes = self.tier_bytes = 0
        self.lost = False
        """A share did not come back: the sequence must be computed anew."""
        self._staged = False

    def grow(self, want_bytes: int) -> int:
        """Lets the oldest blocks go, until so many bytes of the arena are free or none may.

        Returns:
            The bytes that are free now. What neither host nor tier takes stays.
        """
        freed, more = 0, True
        while freed < want_bytes and more:
            more = False
            for at, chain in enumerate(self.table.chains):
                if not any(chain is c for c in full_chains(self.table)):
                    continue
                count = run_blocks(chain.group, self.table.store)
                if chain.cold + count > cold_limit(self.table, chain):
                    continue
                n_bytes = self._send(at, chain, count)
                freed, more = freed + n_bytes, more or n_bytes > 0
        return freed

    def stage(self) -> bool:
        """Takes part in the staging; False where the arena has no frames to give yet."""
        if not self._staged:
            try:
                self.below.staging(self.table.store).enter()
            except CapacityError:
                return False
            self._staged = True
        return True

    def unstage(self) -> None:
        """It does not run for a while."""
        if self._staged:
            self.below.staging(self.table.store).leave()
            self._staged = False

    def drop(self) -> None:
        """The sequence is over, or begins anew."""
        names = [n for runs in self.runs.values() for r in runs for n in r.names]
        if names:
            self.below.forget(names)
        self.below.give_back(self.host_bytes)
        self.host_bytes = self.tier_bytes = 0
        self.runs = {}
        self.unstage()

    def _send(self, at: int, chain: Chain, count: int) -> int:
        """One run goes; its bytes, 0 where nobody takes them."""
        run = Run(chain.group, chain.cold, count)
        blocks = chain.ids[chain.cold : chain.cold + count]
        on_host = self.below.borrow(run.n_bytes)
        if not on_host and self.below.level is None:
            return 0
        mover, group = self.below.mover, chain.group
        rows = mover.space(count, group.block_bytes)
        for row, block in zip(rows, blocks, strict=True):
            mover.read_into(chain.pool, int(block), row)
        if on_host and mover.in_place:
            run.rows = rows
        else:
            for layer in group.layers:
                part = _part(group, layer, rows)
                run.shares.append(mover.space(*part.shape))
                np.copyto(run.shares[-1], part)
        if on_host:
            self.host_bytes += run.n_bytes
        else:
            names = [token_bytes(32) for _ in run.shares]
            if not self.below.keep(names, [s.reshape(-1) for s in run.shares]):
                return 0
            run.names, run.shares = names, []
            self.tier_bytes += run.n_bytes
        for entry in range(chain.cold + count - 1, chain.cold - 1, -1):
            chain.pool.release(int(chain.ids[entry]))
            chain.ids[entry] = GONE
        chain.held -= count
        chain.cold += count
        self.runs.setdefault(at, []).append(run)
        return run.n_bytes


class Stream:
    """The cold runs of one step, staged one after the other.

    Those in a tier are asked for a few ahead, and the next is staged while one is read; from host memory each is copied
    when it is its turn, for with two cores a second thread made that slower. On a GPU, where a copy is queued behind
    what is computed, nothing is staged ahead.

    Args:
        wanted: (cold, run) of everything that the step reads.
    """

    def __init__(self, wanted: Sequence[tuple[Cold, Run]]) -> None:
        layers = sorted({x for _, run in wanted for x in run.group.layers})
        self._todo = deque(
            (cold, run, run.group.layers.index(layer))
            for layer in layers
            for cold, run in wanted
            if run.names and layer in run.group.layers
        )
        order = [
            (cold, run, layer)
            for layer in layers
            for cold, run in wanted
            if layer in run.group.layers
        ]
        self._after = {(id(r), x): then for (_, r, x), then in pairwise(order)}
        self._ahead: tuple[tuple[int, int], Future[np.ndarray | None]] | None = None
        self._coming: dict[tuple[int, int], tuple[Future[Any], Block]] = {}
        self._frame = 0
        self.staged_bytes = 0

    def share(self, cold: Cold, run: Run, layer: int) -> np.ndarray | None:
        """`[count, heads * tile_bytes]`: in host memory; None where it is lost."""
        here, at = run.share(layer), run.group.layers.index(layer)
        if here is not None:
            return here
        self._ask(cold, run, at)
        while len(self._coming) < AHEAD and self._todo:
            self._ask(*self._todo.popleft())
        future, block = self._coming.pop((id(run), at))
        for attempt in range(2):
            if future.result(LOAD_S + 5.0) == [Outcome.HIT]:
                return block.data.reshape(run.count, -1)
            if not attempt:
                future = cold.below.fetch(block, monotonic() + LOAD_S)
        cold.lost = True
        return None

    def units(self, cold: Cold, run: Run, layer: int) -> np.ndarray | None:
        """Stages a share, or waits until it is; where its blocks seem to begin, until this is called again.

        None where it is lost.
        """
        at, (ahead, self._ahead) = (id(run), layer), (self._ahead, None)
        found = None if ahead is None else ahead[1].result()
        if ahead is None or ahead[0] != at:
            found = self._stage(cold, run, layer)
        then = self._after.get(at)
        if then is not None and self._worth(*then[:2]):
            staging = then[0].below.staging(then[0].table.store)
            self._ahead = (id(then[1]), then[2]), staging.begin(partial(self._stage, *then))
        return found

    def settle(self) -> None:
        """Waits for what is being staged; afterwards the frames may be somebody else's."""
        if self._ahead is not None:
            self._ahead[1].result()
            self._ahead = None

    @staticmethod
    def _worth(cold: Cold, run: Run) -> bool:
        """Whether a share is staged ahead: one that must be waited for; a copy from host memory is over sooner."""
        return bool(run.names) and cold.table.store.arena.buffer.device.type == "cpu"

    def _stage(self, cold: Cold, run: Run, layer: int) -> np.ndarray | None:
        share = None if cold.lost else self.share(cold, run, layer)
        if share is None:
            return None
        self._frame ^= 1
        self.staged_bytes += share.nbytes
        staging = cold.below.staging(cold.table.store)
        return staging.put(self._frame, run.group, layer, share)

    def _ask(self, cold: Cold, run: Run, at: int) -> None:
        if (id(run), at) not in self._coming:
            size = run.count * share_bytes(run.group, run.group.layers[at])
            block = Block(run.names[at], run.names[at], b"", buffer_of(size))
            self._coming[id(run), at] = cold.below.fetch(block, monotonic() + LOAD_S), block
