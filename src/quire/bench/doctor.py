"""What moving a block costs on this machine, beside computing it: which tiers pay.

compute     one prefill of `tokens`, per block
host        a copy in memory and a checksum
disk        the disk tier itself, in a folder of its own: written and synced, read back cold and verified
device      copies between host and GPU, where there is one
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quire.bench.machine import Spread, timed
from quire.errors import ConfigError
from quire.store.tiers.contract import Block, Outcome
from quire.store.tiers.disk import DiskTier
from quire.store.tiers.envelope import ALGORITHM, checksum
from quire.store.tiers.slots import buffer_of

__all__ = ["Verdict", "compute_tokens_per_s", "device_rates", "disk_rates", "judge", "memory_rates"]

NS, FAR = b"d" * 32, 1e18
BATCH = 16
PAYS = 1.25
"""Loading must be so many times as fast as computing: it also costs a look-up and a wait."""


@dataclass(frozen=True)
class Verdict:
    """One tier.

    Args:
        load_s, compute_s: of one block of the model.
        pays: whether loading is clearly less.
    """

    tier: str
    load_s: float
    compute_s: float
    pays: bool

    @property
    def times(self) -> float:
        """How many times as fast as computing."""
        return self.compute_s / self.load_s

    def text(self) -> str:
        """One line."""
        what = f"a block in {1e3 * self.load_s:.3g} ms, computed in {1e3 * self.compute_s:.3g} ms"
        if self.pays:
            return f"{self.tier} pays: {what}, {self.times:,.{1 if self.times < 10 else 0}f} times as fast"
        return f"{self.tier} does not pay: {what}"


def judge(tier: str, bytes_per_s: float, block_bytes: int, compute_s: float) -> Verdict:
    """Whether bringing a block up is worth it."""
    load_s = block_bytes / bytes_per_s
    return Verdict(tier, load_s, compute_s, compute_s / load_s >= PAYS)


def memory_rates(n_bytes: int, repeats: int) -> dict[str, Any]:
    """Copy and checksum of host memory, GB/s."""
    source, target = np.ones(n_bytes, np.uint8), np.empty(n_bytes, np.uint8)
    return {
        "copy_gb_per_s": _rates(lambda: np.copyto(target, source), n_bytes, repeats),
        "checksum_gb_per_s": _rates(lambda: checksum(source.data), n_bytes, repeats),
        "checksum": {1: "sha256", 2: "xxh3"}[ALGORITHM],
    }


def disk_rates(folder: Path, block_bytes: int, n_blocks: int, repeats: int) -> dict[str, Any]:
    """The disk tier in a new folder below this one: put and synced, and cold get, GB/s.

    Raises:
        ConfigError: nothing can be written there, or it has no room.
    """
    try:
        own = Path(tempfile.mkdtemp(prefix="quire-doctor-", dir=folder))
    except OSError as e:
        raise ConfigError(
            f"--folder {folder}: {e.strerror or e}; name one on the disk that is meant"
        ) from e
    try:
        need = 2 * n_blocks * (block_bytes + 8192)
        if shutil.disk_usage(own).free < 2 * need:
            raise ConfigError(f"--folder {folder}: has no {2 * need:,} bytes free; name another")
        return asyncio.run(_disk(own / "tier", block_bytes, n_blocks, repeats, 8 * need))
    finally:
        shutil.rmtree(own, ignore_errors=True)


async def _disk(
    folder: Path, block_bytes: int, n_blocks: int, repeats: int, capacity_bytes: int
) -> dict[str, Any]:
    tier = DiskTier(folder, capacity_bytes, sync="batch", segment_bytes=n_blocks * block_bytes)
    draw = np.random.Generator(np.random.PCG64(0))
    rates: dict[str, list[float]] = {"put": [], "get": []}
    total = n_blocks * block_bytes
    try:
        for turn in range(repeats + 1):
            blocks = []
            for i in range(n_blocks):
                data = buffer_of(block_bytes)
                data[:] = draw.integers(0, 256, block_bytes, np.uint8)
                blocks.append(Block(f"{turn:016d}{i:016d}".encode(), NS, b"", data))
            wanted = [Block(b.key, NS, b"", buffer_of(block_bytes)) for b in blocks]
            put = await _all(
                lambda part: tier.store(NS, part, deadline=FAR), blocks, Outcome.STORED
            )
            get = await _all(lambda part: tier.load(NS, part, deadline=FAR), wanted, Outcome.HIT)
            if turn:  # the first allocates
                rates["put"].append(total / put / 1e9)
                rates["get"].append(total / get / 1e9)
            await tier.drop(NS, [b.key for b in blocks])
        direct = all(s.direct for s in tier.files.segments.values())
    finally:
        await tier.close()
    found = {f"{name}_gb_per_s": Spread.of(r).json(digits=3) for name, r in rates.items()}
    return {**found, "direct": direct, "block_bytes": block_bytes}


async def _all(call: Callable[[Sequence[Block]], Any], blocks: list[Block], want: Outcome) -> float:
    """Seconds for all of them, in batches as the engine's."""
    from time import perf_counter

    began = perf_counter()
    for at in range(0, len(blocks), BATCH):
        out = await call(blocks[at : at + BATCH])
        if set(out) != {want}:
            raise ConfigError(f"the disk gave {', '.join(o.value for o in out if o is not want)}")
    return perf_counter() - began


def device_rates(n_bytes: int, repeats: int) -> dict[str, Any] | None:
    """Pinned copies to the GPU and back, GB/s; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(n_bytes, dtype=torch.uint8, device="cuda")

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return {
        "up_gb_per_s": _rates(lambda: copy(device, host), n_bytes, repeats),
        "down_gb_per_s": _rates(lambda: copy(host, device), n_bytes, repeats),
    }


def compute_tokens_per_s(runner: Any, tokens: int, repeats: int) -> dict[str, Any]:
    """Prompt tokens a second through the model, one prompt at a time."""
    from quire.engine import Engine, SamplingParams

    rates = []
    with Engine(runner) as engine:
        for turn in range(repeats + 1):
            prompt = [(7 * i + turn) % runner.vocab_size for i in range(tokens)]
            (out,) = engine.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
            if turn:
                rates.append(tokens / (out.figures.ttft_s or 1e-9))
    return Spread.of(rates).json(digits=0)


def _rates(work: Callable[[], object], n_bytes: int, repeats: int) -> dict[str, Any]:
    work()
    return Spread.of(n_bytes / timed(work) / 1e9 for _ in range(repeats)).json(digits=2)
