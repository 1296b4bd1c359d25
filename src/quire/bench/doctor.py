"""What moving a block costs on this machine, beside computing it: which tiers pay.

compute     one prefill of `tokens`, per block
host        a copy in memory and a checksum
disk        the disk tier itself, in a folder of its own: written and synced, read back cold and verified
network     TCP over loopback, which a server on this machine could give at most; and what links say of themselves
redis       the redis tier itself, under names of its own, where a server is named
device      copies between host and GPU, where there is one
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from quire.bench.machine import Spread, timed
from quire.errors import ConfigError
from quire.store.tiers.address import RedisAddress
from quire.store.tiers.contract import Block, Outcome, Tier
from quire.store.tiers.disk import DiskTier
from quire.store.tiers.envelope import ALGORITHM, checksum
from quire.store.tiers.redis import RedisTier
from quire.store.tiers.slots import buffer_of

__all__ = [
    "Verdict",
    "compute_tokens_per_s",
    "device_rates",
    "disk_rates",
    "judge",
    "memory_rates",
    "network_rates",
    "redis_rates",
]

NS, FAR = b"d" * 32, 1e18
BATCH = 16
PROBES = 50
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


def judge(
    tier: str, bytes_per_s: float, block_bytes: int, compute_s: float, wait_s: float = 0.0
) -> Verdict:
    """Whether bringing a block up is worth it; `wait_s`: its share of the question where the prefix lies."""
    load_s = block_bytes / bytes_per_s + wait_s
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
    try:
        rates = await _rates_of(tier, NS, block_bytes, n_blocks, repeats)
        direct = all(s.direct for s in tier.files.segments.values())
    finally:
        await tier.close()
    return {**rates, "direct": direct, "block_bytes": block_bytes}


def redis_rates(
    address: RedisAddress, block_bytes: int, n_blocks: int, repeats: int
) -> dict[str, Any]:
    """The redis tier at this server, under names that nobody else has: put, get, GB/s, and a look-up, seconds.

    Nothing of others' makes room for it. Raises ConfigError: the server refuses us, is full, or does not answer.
    """
    return asyncio.run(_redis(address, block_bytes, n_blocks, repeats))


async def _redis(
    address: RedisAddress, block_bytes: int, n_blocks: int, repeats: int
) -> dict[str, Any]:
    tier, ns = RedisTier(address, 1 << 60, needed=True), secrets.token_bytes(32)
    try:
        waits = []
        for _ in range(PROBES):
            began = perf_counter()
            await tier.lookup(ns, [NS])
            waits.append(perf_counter() - began)
        rates = await _rates_of(tier, ns, block_bytes, n_blocks, repeats)
    finally:
        await tier.close()
    return {
        "address": str(address),
        **rates,
        "lookup_s": Spread.of(waits).json(digits=6),
        "block_bytes": block_bytes,
    }


async def _rates_of(
    tier: Tier, ns: bytes, block_bytes: int, n_blocks: int, repeats: int
) -> dict[str, Any]:
    """Random blocks put, got and dropped in turns, GB/s."""
    draw = np.random.Generator(np.random.PCG64(0))
    rates: dict[str, list[float]] = {"put": [], "get": []}
    total = n_blocks * block_bytes
    for turn in range(repeats + 1):
        blocks = []
        for i in range(n_blocks):
            data = buffer_of(block_bytes)
            data[:] = draw.integers(0, 256, block_bytes, np.uint8)
            blocks.append(Block(f"{turn:016d}{i:016d}".encode(), NS, b"", data))
        wanted = [Block(b.key, NS, b"", buffer_of(block_bytes)) for b in blocks]
        try:
            put = await _all(
                tier.name, lambda part: tier.store(ns, part, deadline=FAR), blocks, Outcome.STORED
            )
            get = await _all(
                tier.name, lambda part: tier.load(ns, part, deadline=FAR), wanted, Outcome.HIT
            )
        finally:
            await tier.drop(ns, [b.key for b in blocks])
        if turn:  # the first allocates
            rates["put"].append(total / put / 1e9)
            rates["get"].append(total / get / 1e9)
    return {f"{name}_gb_per_s": Spread.of(r).json(digits=3) for name, r in rates.items()}


async def _all(
    name: str, call: Callable[[Sequence[Block]], Any], blocks: list[Block], want: Outcome
) -> float:
    """Seconds for all of them, in batches as the engine's."""
    began = perf_counter()
    for at in range(0, len(blocks), BATCH):
        out = await call(blocks[at : at + BATCH])
        if set(out) != {want}:
            odd = ", ".join(sorted({o.value for o in out if o is not want}))
            raise ConfigError(f"the {name} tier did not give back what it was given: {odd}")
    return perf_counter() - began


def network_rates(n_bytes: int, repeats: int) -> dict[str, Any]:
    """TCP over loopback, GB/s and seconds of a round trip; and the speeds that links say they have, Mbit/s."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=_echo, args=(listening,), daemon=True)
        thread.start()
        with socket.create_connection(listening.getsockname()) as line:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            trips = [timed(lambda: _exchange(line, 0)) for _ in range(PROBES)]
            rates = [
                n_bytes / timed(lambda: _exchange(line, n_bytes)) / 1e9 for _ in range(repeats)
            ]
        thread.join(5.0)
    return {
        "loopback_gb_per_s": Spread.of(rates).json(digits=2),
        "loopback_round_trip_s": Spread.of(trips).json(digits=6),
        "links_mbit_per_s": _links(),
    }


def _exchange(line: socket.socket, n_bytes: int) -> None:
    """Asks for so many bytes and takes them."""
    line.sendall(n_bytes.to_bytes(8, "little"))
    left, buffer = n_bytes + 1, memoryview(bytearray(1 << 20))
    while left:
        n = line.recv_into(buffer[: min(left, len(buffer))])
        if not n:
            raise ConfigError("loopback closed the line")
        left -= n


def _echo(listening: socket.socket) -> None:
    line, _ = listening.accept()
    chunk = memoryview(bytes(1 << 20))
    with line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while len(asked := line.recv(8, socket.MSG_WAITALL)) == 8:
            left = int.from_bytes(asked, "little") + 1
            while left:
                left -= line.send(chunk[: min(left, len(chunk))])


def _links() -> dict[str, int]:
    """Of this machine's interfaces that are up and know their speed."""
    found = {}
    for path in sorted(Path("/sys/class/net").glob("*/speed")):
        with suppress(OSError, ValueError):
            speed = int(path.read_text())
            if speed > 0:
                found[path.parent.name] = speed
    return found


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
