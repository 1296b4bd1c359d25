"""What every test may rely on: seeds, one torch thread per worker, hypothesis profiles, the shared material."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings

ROOT = Path(__file__).resolve().parents[1]
WORKER = "PYTEST_XDIST_WORKER" in os.environ

# Before torch loads its OpenMP: threads that spin while they wait starve each other where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if WORKER:  # workers share the cores; a pool of threads in each of them only fights over these
    os.environ["OMP_NUM_THREADS"] = "1"

# What a shell starts in the background ignores Ctrl-C, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Deadlines are off everywhere: on a shared machine they test the neighbours.
# `dev` searches anew each time and remembers what failed; `ci` draws the same examples each time, so that a red run can
# be run again; `long` draws more of them, the same each time; `search` looks for what the others miss, anew each time.
_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "dev", deadline=None, max_examples=50, suppress_health_check=_SLOW_IS_FINE
)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, database=None)
settings.register_profile(
    "long",
    settings.get_profile("ci"),
    max_examples=250,
    stateful_step_count=60,
)
settings.register_profile(
    "search",
    settings.get_profile("dev"),
    max_examples=1000,
    stateful_step_count=100,
    print_blob=True,
    phases=tuple(Phase),
)
settings.load_profile("dev")  # another one: pytest --hypothesis-profile=ci


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the laws, and skip by name what needs a GPU where there is none, so that the summary shows it."""
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "laws"):
            item.add_marker(pytest.mark.law)
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: none here"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Start every test from the same random state, whichever tests ran before it in this worker."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from the legacy generator
    torch = sys.modules.get("torch")
    if torch is not None:  # seeding must not be what imports it
        torch.manual_seed(0)
        if WORKER:
            torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared reference material: data, models and traces kept beside the repository.

    It lies at `../shared` next to the repository root, or where QUIRE_SHARED says. It is no part of the repository, so
    a test that uses it skips where it is absent.
    """
    named = os.environ.get("QUIRE_SHARED")
    folder = Path(named) if named else ROOT.parent / "shared"
    if folder.is_dir():
        return folder
    if named:
        pytest.fail(f"QUIRE_SHARED names {named}, which is not a folder")
    pytest.skip(
        "needs the shared reference material: no folder ../shared and QUIRE_SHARED is unset"
    )
