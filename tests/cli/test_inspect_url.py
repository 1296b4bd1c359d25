"""`quire inspect URL`: a server in the terminal, once, as a document, and again every second."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire.cli.live import spark, squeezed
from quire.serve.config import ServeConfig
from quire.serve.keys import Caller, Keys
from served import serving

SECRET = "a-long-key-of-an-operator-0"


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Any]:
    keys = Keys.of([(SECRET, Caller("root", operator=True)), (f"{SECRET}-bob", Caller("bob"))])
    config = ServeConfig(port=0, keys=keys, drain_s=5)
    named = {"root": SECRET, "bob": f"{SECRET}-bob"}
    with serving(str(tiny), config, keys=named, name="tiny") as made:
        made.client("bob").completions.create(
            model="tiny", prompt="words of bob \x1b[2J" * 8, max_tokens=2
        )
        made.wait_idle()
        yield made


def test_once_and_as_a_document(quire: Any, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    document = quire("inspect", served.url, "--key", SECRET, "--json").json
    assert document["object"] == "kv.stats"
    assert document["you"]["operator"]
    monkeypatch.setenv("QUIRE_API_KEY", SECRET)
    done = quire("inspect", f"{served.url}/v1")
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 80
    for words in ("tiny", "Memory, 63", "░ cached", "fp32", "bob", "Prefixes"):
        assert words in done.out
    assert "words of" not in done.out, "an operator sees figures, not a tenant's words"
    mine = quire("inspect", served.url, "--key", served.keys["bob"])
    assert "words of bob" in mine.out
    assert "\x1b" not in mine.out
    assert "Memory" not in mine.out
    assert "root" not in mine.out


def test_again_every_second_until_ctrl_c(served: Any) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "quire.cli", "inspect", served.url]
    environment = {**os.environ, "QUIRE_API_KEY": SECRET, "TERM": "xterm", "COLUMNS": "90"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    seen = b""
    deadline = time.monotonic() + 30
    looks = served.service.watch.looks

    def read() -> bytes:
        """What there is within a while; b"" at the end."""
        if not select.select([ours], [], [], 0.2)[0]:
            return b" "
        try:
            return os.read(ours, 1 << 16)
        except OSError:  # Linux says so when the other end is closed
            return b""

    try:
        while served.service.watch.looks < looks + 3 or b"tokens/s" not in seen:
            assert time.monotonic() < deadline, seen[-2000:]
            seen += read()
        process.send_signal(signal.SIGINT)
        while more := read():
            assert time.monotonic() < deadline + 10, seen[-2000:]
            seen += more
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", seen).decode()
    assert text.count("between tokens") >= 2
    assert "Traceback" not in text


def test_bad_input_is_one_line(quire: Any, served: Any, tmp_path: Path) -> None:
    for arguments, words in (
        ([served.url], "--key KEY, or QUIRE_API_KEY"),
        ([served.url, "--key", "wrong"], "--key KEY, or QUIRE_API_KEY"),
        (["http://127.0.0.1:9"], "cannot be reached"),
        (["127.0.0.1:8000"], "is no server's address"),
        (["file:///etc/passwd"], "is no server's address"),
        ([f"{served.url}/elsewhere", "--key", SECRET], "there is nothing at"),
        ([served.url, "--attention", "x"], "or a prompt's attention"),
        ([served.url, "--html", tmp_path / "x.html"], "or a prompt's attention"),
        (["--attention", "x y", "--once"], "about a server"),
        (["--attention", "x y", "--key", "k"], "about a server"),
        ([], "or the URL of a server"),
    ):
        done = quire("inspect", *arguments)
        assert done.code == 2, (arguments, done.err)
        assert done.out == ""
        assert done.err.count("\n") == 1
        assert words in done.err, (arguments, done.err)


def test_a_cell_shows_what_fills_most_of_it() -> None:
    runs = [[3, [1, 0, 0, 0, 0]], [1, [0, 1, 0, 0, 0]], [2, [0, 0, 0, 0, 1]], [2, [1, 0, 0, 0, 0]]]
    assert squeezed(runs, 100) == [0, 0, 0, 1, 4, 4, 0, 0]
    assert squeezed(runs, 4) == [0, 1, 4, 0]
    assert squeezed([[1, [5, 2, 3, 0, 0]]], 4) == [2]
    assert spark([0, 1, 50, 100]) == " ▁▄█"
