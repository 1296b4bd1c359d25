"""Real servers, each shared by a worker's tests: the packaged model without keys, and a tiny one with keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from quire.serve.config import ServeConfig
from quire.serve.keys import Caller, Keys, Limits, new_key
from served import Served, serving
from tiny_model import CHAT_TEMPLATE, make_model


@pytest.fixture(scope="session")
def packaged() -> Iterator[Served]:
    config = ServeConfig(port=0, max_samples=8, max_cache_priority=1, drain_s=5)
    with serving(None, config, name="packaged") as served:
        yield served
        served.wait_idle()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("served"), template=CHAT_TEMPLATE, context=2048)


@pytest.fixture(scope="session")
def keyed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """alice and bob, limited as the server says; carol with limits of her own; root, an operator."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = {name: new_key(path, name, operator=name == "root") for name in ("alice", "bob", "root")}
    known = Keys.read(path)
    keys["carol"] = "carols-own-long-secret-0123"
    limits = Limits(requests_per_minute=4, tokens_per_minute=100, concurrent=1)
    known.by_digest |= Keys.of([(keys["carol"], Caller("carol", limits=limits))]).by_digest
    config = ServeConfig(port=0, keys=known, max_body_bytes=1 << 20, max_requests=16, drain_s=5)
    with serving(str(tiny_folder), config, keys=keys, name="tiny") as served:
        yield served
        served.wait_idle()
