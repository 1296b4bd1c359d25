"""`quire serve` on the command line: what cannot be served is refused before a model is read."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from lora import make_adapter
from quire.serve.keys import Caller, Keys
from served import API_KEY, Command
from tiny_model import CHAT_TEMPLATE, make_model


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
        (["a=no-such-folder/here"], "no-such-folder"),
        (["a=x/y", "a=x/z"], "two models are called 'a'"),
        (["x/y", "x/y"], "two models are called 'x/y'"),
        (["packaged", "packaged"], "two models are called 'packaged'"),
        (["=x"], "neither MODEL nor NAME=MODEL"),
        (["a=x/y", "b=x/z", "--name", "c"], "--name is for one model"),
        (["--adapter", "ada"], "write NAME=DIR"),
        (["--adapter", "packaged=x"], "something else is called 'packaged'"),
        (["--adapter", "a=x", "--adapter", "a=y"], "something else is called 'a'"),
        (["--adapter", "a=x,base=y"], "there is no model 'y' here; there is 'packaged'"),
        (["a=x/y", "b=x/z", "--adapter", "c=d"], "of which model? write c=d,base=a"),
        (["--adapter", "a=no-such-folder"], "no readable adapter_config.json"),
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
        def __init__(self, house: Any, *_: Any) -> None:
            served.append(house)

        def run(self, **_: Any) -> None:
            served[0].close()

    monkeypatch.setattr("quire.serve.server.make_server", Silent)
    done = quire("serve", tiny_chat, "--port", "0", "--memory", "8MiB", *flags)
    assert done.code == 0, done.err
    sharing = served[0].first.engine.opener.sharing
    assert (sharing is not None and sharing.explainer is not None) == explained


@pytest.mark.slow
def test_several_models_and_an_adapter_by_name(
    tiny_chat: Path, tmp_path: Path, quire: Callable[..., Any]
) -> None:
    """Started as a process, killed softly, started again: each finds its own blocks on the disk."""
    second = make_model(tmp_path / "second", seed=3, template=CHAT_TEMPLATE)
    ada = make_adapter(tiny_chat, tmp_path / "ada", seed=1)
    tiers = f"host:2MiB,disk:8MiB@{tmp_path / 'tiers'}"
    words = (f"one={tiny_chat}", f"two={second}", "--adapter", f"ada={ada},base=one")
    texts: list[dict[str, tuple[str, int]]] = []
    for _ in range(2):
        command = Command(*words, "--memory", "16MiB", "--tiers", tiers, "--dtype", "float32")
        with openai.OpenAI(base_url=f"{command.url}/v1", api_key=API_KEY) as client:
            assert [m.id for m in client.models.list()] == ["one", "ada", "two"]
            found = {}
            for name in ("one", "two", "ada"):
                out = client.completions.create(
                    model=name, prompt=[3 + i % 90 for i in range(100)], max_tokens=4, temperature=0
                )
                assert out.usage is not None
                assert out.usage.prompt_tokens_details is not None
                cached = out.usage.prompt_tokens_details.cached_tokens or 0
                found[name] = (out.choices[0].text, cached)
            texts.append(found)
        command.process.send_signal(signal.SIGTERM)
        code, said = command.end()
        assert code == 0
        assert "all requests have ended" in said
    first, again = texts
    assert {n: t for n, (t, _) in first.items()} == {n: t for n, (t, _) in again.items()}
    assert {n: c for n, (_, c) in first.items()} == {"one": 0, "two": 0, "ada": 0}
    assert min(c for _, c in again.values()) >= 96
    assert sorted(p.name for p in (tmp_path / "tiers").iterdir()) == ["one", "two"]


def test_memory_is_divided(
    tiny_chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quire: Callable[..., Any]
) -> None:
    config = tmp_path / "quire.toml"
    config.write_text(f'[serve]\nmodels = ["a={tiny_chat}", "b={tiny_chat}"]\nmemory = "32MiB"\n')
    totals: list[int] = []

    class Silent:
        def __init__(self, house: Any, *_: Any) -> None:
            self.house = house

        def run(self, **_: Any) -> None:
            totals.extend(s.engine.stats().usage.total_bytes for s in self.house.services)
            self.house.close()

    monkeypatch.setattr("quire.serve.server.make_server", Silent)
    done = quire("serve", "--port", "0", "--config", config)
    assert done.code == 0, done.err
    assert totals[0] == totals[1] == 16 << 20
