"""Keys at rest are hashes; what an operator may not do by accident is refused before a model is read."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from quire.errors import ConfigError
from quire.serve.config import ServeConfig, is_loopback
from quire.serve.keys import Caller, Keys, Limits, new_key


def test_a_key_is_shown_once_and_kept_as_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first, second = new_key(path, "alice"), new_key(path, "bob", operator=True)
    assert first != second
    assert len(first) > 40
    text = path.read_text()
    assert first not in text
    assert second not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys = Keys.read(path)
    assert keys.find(first) == Caller("alice")
    assert keys.find(second) == Caller("bob", operator=True)
    assert keys.find(first + "x") is None
    assert keys.find("") is None


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("{", "not JSON"),
        ("[]", "must be"),
        ('{"keys": [1]}', "object"),
        ('{"keys": [{"name": "a b", "sha256": ""}]}', "no name"),
        ('{"keys": [{"name": "a", "sha256": "plain-text-key"}]}', "hexadecimal"),
        (json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "rate": 1}]}), "unknown 'rate'"),
        (json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "concurrent": 0}]}), "at least 1"),
        (json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "operator": 1}]}), "true or false"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, document: str, said: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(document)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=said):
        Keys.read(path)


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    new_key(path, "alice")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Keys.read(path)


def test_limits_of_a_key_are_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    new_key(path, "alice")
    document = json.loads(path.read_text())
    document["keys"][0] |= {"requests_per_minute": 5, "concurrent": 2}
    path.write_text(json.dumps(document))
    (caller,) = Keys.read(path).by_digest.values()
    assert caller.limits == Limits(requests_per_minute=5, concurrent=2)


def test_a_key_that_could_be_guessed_is_refused() -> None:
    with pytest.raises(ConfigError, match="can be guessed"):
        Keys.of([("hunter2", Caller("me"))])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    assert ServeConfig(host=host).guards_host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org", ""])
def test_another_address_needs_one(host: str) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        ServeConfig(host=host)
    assert not ServeConfig(host=host, insecure=True).guards_host
    keys = Keys.of([("k" * 24, Caller("me"))])
    assert ServeConfig(host=host, keys=keys).keys


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"port": -1}, "port"),
        ({"max_requests": 0}, "max_requests"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"drain_s": 0.0}, "drain_s"),
        ({"request_timeout_s": float("inf")}, "request_timeout_s"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_cache_priority": 9}, "max_cache_priority"),
        ({"tls_cert": Path("a")}, "go together"),
        ({"tls_cert": Path("a"), "tls_key": Path("b")}, "no file"),
        ({"cors_origins": ("*",)}, "every web page"),
    ],
)
def test_a_wrong_configuration_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ServeConfig(**wrong)
