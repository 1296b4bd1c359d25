"""Which machine, which commit, how fast memory reads, and medians with their spread: what any measurement needs."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CLOCKS", "STREAM_BYTES", "Spread", "Stream", "commit", "hardware", "timed"]

ROOT = Path(__file__).resolve().parents[3]
STREAM_BYTES = 256 << 20
_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "asimddp",
    "bf16",
)

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def hardware(*, with_torch: bool = True) -> str:
    """Processor, cores, instruction sets, memory, and torch where it takes part, in one line."""
    import psutil

    text = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.*)$", text, flags=re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, flags=re.MULTILINE)
    has = [f for f in _FLAGS if flags and f in flags[1].split()]
    parts = [
        model[1].strip() if model else platform.processor() or platform.machine(),
        f"{os.cpu_count()} cores",
        "+".join(has) or platform.machine(),
        f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        f"python {platform.python_version()}",
    ]
    if with_torch:
        import torch

        parts.append(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    return ", ".join(parts)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def commit() -> str:
    """The short commit, with +dirty where src/ or benchmarks/ differ from it; unknown outside a checkout of Quire."""
    found = _git("rev-parse", "--short=12", "HEAD")
    if not found or _git("rev-parse", "--show-toplevel") != str(ROOT):
        return "unknown"
    return f"{found}+dirty" if _git("status", "--porcelain", "--", "src", "benchmarks") else found


def _git(*words: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - words of our own
            ["git", *words],  # noqa: S607 - whichever git the user has
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class Stream:
    """A streaming read of memory, for the bandwidth of the moment."""

    def __init__(self, n_bytes: int = STREAM_BYTES) -> None:
        import torch

        self._x = torch.ones(n_bytes // 4, dtype=torch.float32)

    @property
    def n_bytes(self) -> int:
        """Of the buffer."""
        return self._x.numel() * 4

    def read(self) -> object:
        """One pass over the buffer."""
        return self._x.sum()

    def gb_per_s(self, clock: str = "wall") -> float:
        """The better of two passes over the buffer, in 10^9 bytes a second."""
        return self.n_bytes / min(timed(self.read, clock) for _ in range(2)) / 1e9


def timed(work: Callable[[], object], clock: str = "wall") -> float:
    """Seconds that one call takes."""
    now = CLOCKS[clock]
    begin = now()
    work()
    return now() - begin


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of repeats."""

    median: float
    least: float
    greatest: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        x = list(values)
        return cls(statistics.median(x), min(x), max(x), len(x))

    def json(self, scale: float = 1.0, digits: int = 6) -> dict[str, float]:
        """`{"median", "min", "max", "n"}`, each figure times `scale`."""
        figures = {"median": self.median, "min": self.least, "max": self.greatest}
        return {k: round(v * scale, digits) for k, v in figures.items()} | {"n": self.n}
