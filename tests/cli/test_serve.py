"""`quire serve` on the command line: what cannot be served is refused before a model is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quire.serve.keys import Caller, Keys


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--insecure"),
        (["--new-key", "alice"], "--keys FILE"),
        (["--keys", "nowhere.json"], "nowhere.json"),
        (["--share", "prefix", "--kv", "none"], "--kv none"),
        (["--step-tokens", "0"], "step_tokens"),
        (["--beside-tokens", "0"], "beside_tokens"),
        (["--tls-cert", "x"], "go together"),
        (["--concurrent", "0"], "concurrent"),
        (["--kv", "int5"], "int5"),
        (["no-such-folder/here"], "no-such-folder"),
    ],
)
def test_the_command_refuses_what_cannot_be_served(
    quire: Callable[..., Any], arguments: list[str], said: str
) -> None:
    done = quire("serve", "--port", "0", *arguments)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def test_sampling_options_are_no_options_of_a_server(
    quire: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "quire.toml"
    path.write_text("[serve]\ntemperature = 0.5\n")
    done = quire("serve", "--config", path)
    assert done.code == 2
    assert "belongs to each request" in done.err


def test_the_command_makes_keys(quire: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    done = quire("serve", "--keys", path, "--new-key", "alice", "--operator")
    assert done.code == 0
    assert Keys.read(path).find(done.out.strip()) == Caller("alice", operator=True)


@pytest.mark.parametrize(
    ("flags", "explained"),
    [
        ([], True),
        (["--tiers", "host:8MiB"], True),
        (["--share", "prefix"], False),
        (["--share", "off"], False),
    ],
)
def test_misses_are_explained_unless_asked_otherwise(
    tiny_chat: Path,
    monkeypatch: pytest.MonkeyPatch,
    quire: Callable[..., Any],
    flags: list[str],
    explained: bool,
) -> None:
    served: list[Any] = []

    class Silent:
        def __init__(self, service: Any, *_: Any) -> None:
            served.append(service)

        def run(self, **_: Any) -> None:
            served[0].close()

    monkeypatch.setattr("quire.serve.server.make_server", Silent)
    done = quire("serve", tiny_chat, "--port", "0", "--memory", "8MiB", *flags)
    assert done.code == 0, done.err
    sharing = served[0].engine.opener.sharing
    assert (sharing is not None and sharing.explainer is not None) == explained
