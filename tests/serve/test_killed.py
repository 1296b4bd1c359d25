"""`kill -9` of a server under load: clients are told, the disk's cache comes back, and no answer has a wrong token."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from served import API_KEY, Command

TURNS, CLIENTS, WORDS = 3, 6, 24
BEGINNINGS = 2 * 8
"""Blocks that hold the first 128 tokens of both beginnings."""
ANSWER: dict[str, Any] = {
    "model": "packaged",
    "max_tokens": WORDS,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}
BROKEN = (openai.APIConnectionError, openai.APIError, httpx.HTTPError)
"""What a client may be told by a server that is gone."""


def prompts() -> list[str]:
    """Two beginnings of some 200 tokens, four ends each."""
    common = ("The road goes along the river. " * 24, "A cart stands before the mill. " * 24)
    ends = ("In the morning", "By noon", "At night", "Nobody")
    return [begin + end for begin in common for end in ends]


class Client(threading.Thread):
    """Asks one prompt after another, in streams, until the server is gone."""

    def __init__(self, command: Command, number: int, done: list[int]) -> None:
        super().__init__()
        self.command, self.number, self.done = command, number, done
        self.answers: list[tuple[str, str, bool]] = []
        """(prompt, text so far, whether it came to its end)."""
        self.error: Exception | None = None

    def run(self) -> None:
        asked = prompts()
        with openai.OpenAI(
            base_url=f"{self.command.url}/v1", api_key=API_KEY, max_retries=0, timeout=60
        ) as client:
            for n in range(1 << 20):
                prompt = asked[(self.number + n) % len(asked)]
                self.answers.append((prompt, "", False))
                try:
                    text, ended = "", False
                    for chunk in client.completions.create(prompt=prompt, stream=True, **ANSWER):
                        for choice in chunk.choices:
                            text += choice.text
                            ended = ended or choice.finish_reason == "length"
                        self.answers[-1] = (prompt, text, ended)
                except BROKEN as e:
                    self.error = e
                    return
                self.done.append(self.number)


def ask(client: openai.OpenAI, prompt: str) -> tuple[str, int]:
    found = client.completions.create(prompt=prompt, **ANSWER)
    assert found.usage is not None
    details = found.usage.prompt_tokens_details
    assert details is not None
    return found.choices[0].text, details.cached_tokens or 0


def written(command: Command) -> tuple[float, ...]:
    """(blocks that the disk holds, blocks owed to it, bytes on their way to it)."""
    said = httpx.get(f"{command.url}/metrics", headers={"Authorization": f"Bearer {API_KEY}"})
    names = "blocks", "owed_blocks", "queued_bytes"
    found = [re.search(rf"^quire_tier_{n}{{.*}} (\S+)$", said.text, re.MULTILINE) for n in names]
    assert None not in found, said.text
    return tuple(float(figure[1]) for figure in found if figure is not None)


@pytest.mark.slow
def test_a_server_killed_under_load(tmp_path: Path) -> None:
    plain = ["--name", "packaged", "--dtype", "float32"]
    with Command(*plain, "--memory", "64MiB") as fresh:
        with openai.OpenAI(base_url=f"{fresh.url}/v1", api_key=API_KEY) as client:
            want = {p: ask(client, p)[0] for p in prompts()}
        fresh.process.send_signal(signal.SIGTERM)
        fresh.end()
    folder = tmp_path / "tier"
    tiers = ["--memory", "12MiB", "--tiers", f"disk:64MiB@{folder};deadline=10"]
    for _ in range(TURNS):
        with Command(*plain, *tiers) as command:
            kill_under_load(command, want)
        with Command(*plain, *tiers) as again:
            with openai.OpenAI(base_url=f"{again.url}/v1", api_key=API_KEY) as client:
                found = {p: ask(client, p) for p in prompts()}
                said = httpx.get(
                    f"{again.url}/metrics", headers={"Authorization": f"Bearer {API_KEY}"}
                )
            assert {p: text for p, (text, _) in found.items()} == want
            first = [found[prompts()[n]][1] for n in (0, 4)]
            assert min(first) >= 128, f"each beginning comes back from the disk\n{said.text}"
            again.process.send_signal(signal.SIGTERM)
            assert again.end()[0] == 0


def kill_under_load(command: Command, want: dict[str, str]) -> None:
    """Ends it once the disk has both beginnings, and looks at what its clients were told."""
    done: list[int] = []
    clients = [Client(command, n, done) for n in range(CLIENTS)]
    for c in clients:
        c.start()
    # Every beginning was found often enough to be written back; what is owed, and what is on its way, is there.
    end = time.monotonic() + 120
    while len(done) < 3 * CLIENTS or written(command)[0] < BEGINNINGS or any(written(command)[1:]):
        for c in clients:
            c.join(0.02)
            assert c.error is None, "before it was killed"
        assert time.monotonic() < end, "the disk is not written"
    os.kill(command.process.pid, signal.SIGKILL)
    for c in clients:
        c.join(60)
        assert not c.is_alive(), "it hangs"
        assert isinstance(c.error, BROKEN)
        assert len(c.answers) > 1
        for prompt, text, ended in c.answers:
            assert want[prompt].startswith(text)
            assert not ended or text == want[prompt]
    assert command.end()[0] == -signal.SIGKILL
