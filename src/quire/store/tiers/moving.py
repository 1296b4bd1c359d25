"""A block's bytes between the device's arena and host memory."""

from __future__ import annotations

import numpy as np

from quire.errors import InvariantError
from quire.spec import ALIGN_BYTES, CacheGroup
from quire.store.arena import Arena
from quire.store.pool import BlockPool
from quire.store.tiers.slots import buffer_of

__all__ = ["Mover", "unmeant"]


def unmeant(group: CacheGroup, n_tokens: int) -> list[slice]:
    """The parts of each tile that the first `n_tokens` rows do not fill: they may hold what was somebody else's."""
    holes, at = [], 0
    for f in group.fields:
        start = group.field_offsets[f.name]
        if start > at:
            holes.append(slice(at, start))
        there = f.per == "token" or n_tokens == group.block_tokens  # per block: with the whole
        at = start + (f.bytes_in(n_tokens) if there else 0)
    if at < group.tile_bytes:
        holes.append(slice(at, group.tile_bytes))
    return holes


class Mover:
    """Copies blocks out of and into one arena. An arena that only counts has no bytes: nothing is moved then.

    Copies begin at pages, so that a disk takes them as they are.

    Cost: one copy of the block each way; on a GPU it waits for what the device is computing.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._memory: np.ndarray | None = None
        self._holes: dict[tuple[CacheGroup, int], list[slice]] = {}

    @property
    def there(self) -> bool:
        """Whether there are bytes to move."""
        return self.arena.device is not None

    def read(self, group: CacheGroup, pool: BlockPool, block: int, n_tokens: int) -> np.ndarray:
        """`[block_bytes] uint8`: a copy, zeros where none of its `n_tokens` tokens is."""
        start, size = pool.byte_offset(block), pool.block_bytes
        memory = self._host_memory()
        if memory is not None:
            out = buffer_of(size)
            np.copyto(out, memory[start : start + size])
        else:
            out = self.arena.buffer[start : start + size].cpu().numpy()
        key = group, n_tokens
        holes = self._holes.get(key)
        if holes is None:
            holes = self._holes[key] = unmeant(group, n_tokens)
        if holes:
            tiles = out.reshape(len(group.coords), group.tile_bytes)
            for hole in holes:
                tiles[:, hole] = 0
        return out

    @property
    def in_place(self) -> bool:
        """Whether the arena lies in host memory itself, so that what is beside it is read as well as what is in it."""
        return self.there and self.arena.buffer.device.type == "cpu"

    def units(self, rows: np.ndarray) -> np.ndarray:
        """`[n]` int64: where `rows: [n, n_bytes]` of `space` begin, in units of 64 bytes from the arena's begin.

        Only for who reads memory by its address: they lie outside of the arena.
        """
        first = rows.ctypes.data - self.arena.buffer.data_ptr()
        if first % ALIGN_BYTES or rows.strides[0] % ALIGN_BYTES:
            raise InvariantError("blocks beside the arena do not begin at its units")
        units: np.ndarray = first // ALIGN_BYTES + np.arange(len(rows)) * (
            rows.strides[0] // ALIGN_BYTES
        )
        return units

    def space(self, n: int, n_bytes: int) -> np.ndarray:
        """`[n, n_bytes] uint8` of host memory, pinned where the arena lies on a GPU."""
        if self.arena.device is not None and self.arena.buffer.device.type == "cuda":
            import torch

            pinned: np.ndarray = torch.empty(n, n_bytes, dtype=torch.uint8, pin_memory=True).numpy()
            return pinned
        return buffer_of(n * n_bytes).reshape(n, n_bytes)

    def read_into(self, pool: BlockPool, block: int, out: np.ndarray) -> None:
        """Copies a block as it is, all of its bytes."""
        start, size = pool.byte_offset(block), pool.block_bytes
        memory = self._host_memory()
        if memory is not None:
            np.copyto(out, memory[start : start + size])
            return
        import torch

        torch.from_numpy(out).copy_(self.arena.buffer[start : start + size])

    def write(self, pool: BlockPool, block: int, data: np.ndarray) -> None:
        """Puts `[block_bytes] uint8` into a block."""
        start, size = pool.byte_offset(block), pool.block_bytes
        memory = self._host_memory()
        if memory is not None:
            np.copyto(memory[start : start + size], data)
            return
        import torch

        with torch.inference_mode():  # where the arena may have been made
            self.arena.buffer[start : start + size] = torch.from_numpy(data).to(
                self.arena.buffer.device
            )

    def _host_memory(self) -> np.ndarray | None:
        """The arena itself, where it lies in host memory."""
        if self._memory is None and self.arena.buffer.device.type == "cpu":
            self._memory = self.arena.buffer.numpy()
        return self._memory
