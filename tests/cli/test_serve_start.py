"""What `quire serve` does between loading and serving."""

from __future__ import annotations

import gc
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from quire.cli import serve

if TYPE_CHECKING:
    import pytest


def test_what_a_server_holds_is_not_looked_through_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection of a loaded model's objects takes as long as tens of steps, in which every stream waits."""
    frozen: list[int] = []

    def make_server(house: Any, started: Any) -> Any:
        def run(sockets: Any) -> None:
            assert gc.get_freeze_count() == 0
            started()
            frozen.append(gc.get_freeze_count())

        return SimpleNamespace(run=run)

    monkeypatch.setattr("quire.serve.server.make_server", make_server)
    house = SimpleNamespace(
        config=SimpleNamespace(tls_cert=None, keys=SimpleNamespace(by_digest={}), dashboard=False),
        services=[],
        models=[],
    )
    try:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            serve._serve_house(SimpleNamespace(quiet=True), house, listening)  # type: ignore[arg-type]
        assert frozen[0] > 10_000
    finally:
        gc.unfreeze()
