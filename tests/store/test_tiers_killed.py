"""`kill -9` in the middle of writes: what is found afterwards is what was stored, or nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quire.store.tiers import Outcome
from quire.store.tiers.conformance import ROOM_BYTES, TierConformance, chain
from quire.store.tiers.disk import DiskTier
from quire.store.tiers.fsck import fsck

WRITER = """
import asyncio, sys
from quire.store.tiers.conformance import NS, ROOM_BYTES, chain, soon
from quire.store.tiers.disk import DiskTier

async def main():
    tier = DiskTier(sys.argv[1], ROOM_BYTES)
    at = int(sys.argv[2])
    ready = [chain(100 * i, 8) for i in range(at, at + 10)]
    print("ready", flush=True)
    while True:
        for blocks in ready:
            await tier.store(NS, blocks, deadline=soon())
            await tier.drop(NS, [blocks[0].key])

asyncio.run(main())
"""


def kill_while_writing(folder: Path, at: int, after_s: float) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(at)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(after_s)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()


def killed(folder: Path, times: int) -> int:
    """Kills so often over one folder; returns how many blocks were found at the end."""
    everything = [b for i in range(14) for b in chain(100 * i, 8)]
    n = 0
    for turn in range(times):
        kill_while_writing(folder, turn % 4, 0.01 + 0.013 * (turn % 7))

        async def look() -> list[Outcome]:
            tier: Any = DiskTier(folder, ROOM_BYTES)
            try:
                assert tier.used_bytes <= tier.files.file_bytes <= ROOM_BYTES
                return await TierConformance.hits(tier, everything)  # a wrong answer raises
            finally:
                await tier.close()

        n = asyncio.run(look()).count(Outcome.HIT)
        found = fsck(folder)
        assert found.good + found.empty + len(found.bad) == found.slots
    return n


def test_killed_while_writing(tmp_path: Path) -> None:
    assert killed(tmp_path / "t", 2) > 0


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path) -> None:
    assert killed(tmp_path / "t", 20) > 0
