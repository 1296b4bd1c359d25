"""One device's memory for blocks, in slabs of one size that pools draw and give back.

    arena   |slab 0|slab 1|slab 2|slab 3|slab 4|...      a slab belongs to one pool, or to nobody
    pool A   ^^^^^^        ^^^^^^                        blocks of 98,304 bytes
    pool B          ^^^^^^                               blocks of 24,576 bytes

No memory is partitioned by guess: what no pool holds is free for all of them. An arena without a device counts only,
which is all that planning and simulation need.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING

from quire.errors import CapacityError, ConfigError
from quire.spec import ALIGN_BYTES, Usage

if TYPE_CHECKING:
    import torch

    from quire.store.pool import BlockPool

SLAB_BYTES = 2 << 20
"""The usual slab: one huge page."""

HUGE_PAGE_BYTES = 2 << 20
MADV_HUGEPAGE = 14
"""Linux's number, on all processors that this runs on."""


def fit_slab_bytes(
    block_bytes: Iterable[int], target_bytes: int = SLAB_BYTES, total_bytes: int = 0
) -> int:
    """The slab size in which blocks of all these sizes leave the least unused.

    Multiples of each block size are tried, up to twice the target (or the largest block), and in a large arena up to a
    64th of it. What counts is the mean remainder of a slab plus half a slab of the arena, which the last slab of a pool
    leaves empty on average; of equals the one nearest to the target wins.
    """
    sizes = sorted(set(block_bytes))
    if not sizes or sizes[0] <= 0:
        raise ConfigError("a slab needs at least one block size, in bytes above zero")
    low = max(target_bytes, sizes[-1])
    high = max(2 * low, min(total_bytes // 64, 16 * low))
    tries = {n * size for size in sizes for n in range(max(1, low // size // 2), high // size + 1)}

    def cost(slab: int) -> tuple[float, int, int]:
        rest = sum((slab % s) / slab for s in sizes) / len(sizes)
        partial = slab / (2 * total_bytes) if total_bytes else 0.0
        return round(rest + partial, 4), abs(slab - low), slab

    return min((slab for slab in tries if slab >= sizes[-1]), key=cost)


def _ask_for_huge_pages(address: int, n_bytes: int) -> None:
    """Asks Linux to back memory with pages of 2 MiB: blocks lie apart, and small pages cost a walk each.

    A wish, not a need: where the system knows no such pages nothing changes.
    """
    if sys.platform != "linux":
        return
    import ctypes

    begin = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    whole = (address + n_bytes - begin) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if whole > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(whole), MADV_HUGEPAGE)


class Arena:
    """Slabs, and on a device the bytes behind them.

    Args:
        total_bytes: at most this much is used; whole slabs only.
        slab_bytes: see `fit_slab_bytes`.
        device: a torch device name; None for an arena that only counts.

    Raises:
        CapacityError: not even one slab fits.
    """

    def __init__(
        self, total_bytes: int, slab_bytes: int = SLAB_BYTES, *, device: str | None = None
    ) -> None:
        if slab_bytes % ALIGN_BYTES:
            raise ConfigError(f"slab_bytes must be a multiple of {ALIGN_BYTES}, not {slab_bytes}")
        self.slab_bytes = slab_bytes
        self.slabs = int(total_bytes) // slab_bytes
        if self.slabs < 1:
            raise CapacityError(
                f"the arena of {int(total_bytes):,} bytes is smaller than one slab of {slab_bytes:,} "
                "bytes; give it more"
            )
        self.device = device
        self.pools: list[BlockPool] = []
        self.clock = 0
        """Counts the times that a block became idle, over all pools."""
        self._free = array("i", range(self.slabs - 1, -1, -1))
        self._free_count = self.slabs
        self._buffer: torch.Tensor | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all slabs."""
        return self.slabs * self.slab_bytes

    @property
    def free_slabs(self) -> int:
        """Slabs that no pool has."""
        return self._free_count

    @property
    def buffer(self) -> torch.Tensor:
        """The bytes, `[slabs * slab_bytes] uint8`, allocated when first asked for.

        Raises:
            ConfigError: the arena has no device.
        """
        if self._buffer is None:
            if self.device is None:
                raise ConfigError(
                    "this arena counts only; give it a device to have memory behind it"
                )
            import torch

            with torch.inference_mode(
                mode=False
            ):  # whoever asks first must not decide who may write
                self._buffer = torch.empty(self.total_bytes, dtype=torch.uint8, device=self.device)
            if self._buffer.device.type == "cpu":
                _ask_for_huge_pages(self._buffer.data_ptr(), self.total_bytes)
        return self._buffer

    def typed(self, dtype: torch.dtype) -> torch.Tensor:
        """The same bytes as elements of `dtype`: `[total_bytes / width]`."""
        import torch

        with torch.inference_mode(mode=False):
            return self.buffer.view(dtype)

    def take(self, pool: BlockPool) -> int:
        """A free slab, or -1; when none is free, the slab of another pool that is worth least is cleared."""
        if not self._free_count:
            self._reclaim(pool)
        if not self._free_count:
            return -1
        self._free_count -= 1
        return self._free[self._free_count]

    def give(self, slab: int) -> None:
        """Takes an empty slab back."""
        self._free[self._free_count] = slab
        self._free_count += 1

    def usage(self) -> Usage:
        """Held, cached and free bytes over all pools; what is lost in slab remainders counts as free."""
        held = sum(p.held * p.block_bytes for p in self.pools)
        cached = sum(p.cached * p.block_bytes for p in self.pools)
        return Usage(self.total_bytes, held, cached, self.total_bytes - held - cached)

    def copy(self, src_byte: int, dst_byte: int, n_bytes: int) -> None:
        """Moves bytes within the arena; nothing to do where it only counts or was never written."""
        if self._buffer is not None:
            self._buffer[dst_byte : dst_byte + n_bytes].copy_(
                self._buffer[src_byte : src_byte + n_bytes]
            )

    def cheaper(self, wanting: BlockPool, worth: float) -> bool:
        """Whether another pool has a slab without held blocks whose cached ones are worth less than that."""
        best = self._cheapest(wanting)
        return best is not None and best[0] < (0, worth)

    def _reclaim(self, wanting: BlockPool) -> None:
        """Empties the slab of another pool whose cached blocks are worth least, moving what is held in it."""
        best = self._cheapest(wanting)
        if best is not None:
            best[1].clear(best[2])

    def _cheapest(self, wanting: BlockPool) -> tuple[tuple[int, float], BlockPool, int] | None:
        """(worth, pool, slab) of the slab of another pool that is cheapest to clear."""
        best: tuple[tuple[int, float], BlockPool, int] | None = None
        for pool in self.pools:
            if pool is wanting:
                continue
            for slab in pool.clearable():
                key = pool.worth(slab)
                if best is None or key < best[0]:
                    best = (key, pool, slab)
        return best
