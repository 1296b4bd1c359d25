"""The real command in a process of its own: streams, signals, pipes. Few, because each costs an import of torch."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "quire.cli", *(str(a) for a in arguments)]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("QUIRE_", "COV"))}
    paths = [str(ROOT / "src"), kept.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "COLUMNS": "80"} | more


def test_a_batch_s_document_is_all_that_a_process_prints(tiny: Path, greedy) -> None:
    done = subprocess.run(
        command("run", "abc", "--model", tiny, "--max-tokens", 5, "--json"),
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert (done.returncode, done.stderr) == (0, ""), "no progress bar, no library's remarks"
    assert json.loads(done.stdout)["requests"][0]["token_ids"] == greedy("abc", 5)


def test_a_reader_that_leaves_is_no_error(tiny: Path) -> None:
    """As in `quire run … | head -1`."""
    running = subprocess.Popen(
        command("run", "abc", "--model", tiny, "--max-tokens", 250, "--ignore-eos", "--quiet"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert running.stdout is not None
    assert running.stdout.read(1)
    running.stdout.close()
    assert running.stderr is not None
    assert running.stderr.read() == b""
    running.stderr.close()
    assert running.wait(60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("arguments", [["run", "abc", "--max-tokens", 3, "--json"], ["run", "-h"]])
def test_a_full_disk_is_one_line(tiny: Path, arguments: list[object]) -> None:
    if arguments[-1] != "-h":
        arguments = [*arguments, "--model", tiny]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command(*arguments),
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            env=environment(),
        )
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_ctrl_c_keeps_what_was_written(tiny: Path) -> None:
    """On a busy machine a short run may end before the signal comes: then it is tried again."""
    for _ in range(6):
        running = subprocess.Popen(
            command(
                *("run", "abc", "--model", tiny, "--kv", "none"),
                *("--max-tokens", 250, "--ignore-eos"),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(PYTHONUNBUFFERED="1"),
        )
        try:
            assert running.stdout is not None
            first = running.stdout.read(1)
            running.send_signal(signal.SIGINT)
            rest, err = running.communicate(timeout=60)
        finally:
            running.kill()
        if running.returncode:
            break
    assert running.returncode == 130
    text = (first + rest).decode()
    assert text.endswith("\n")
    assert len(text) > 1
    assert err.decode().startswith("quire: interrupted after ")
    assert err.decode().count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("colour", [True, False])
def test_help_in_a_terminal_keeps_to_its_width(colour: bool) -> None:
    """No torch here, so this is cheap."""
    import pty

    ours, theirs = pty.openpty()
    env = environment(TERM="xterm-256color", COLUMNS="80", **({} if colour else {"NO_COLOR": "1"}))
    running = subprocess.Popen(command("run", "--help"), stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    assert running.wait(10) == 0
    os.close(ours)
    text = re.sub(r"\x1b\[[\d;]*m", "", shown.decode()).replace("\r\n", "\n")
    assert "--max-tokens" in text
    assert max(len(line) for line in text.split("\n")) == 80
    assert bool(re.search(rb"\x1b\[(\d+;)*3[0-7]m", shown)) is colour
