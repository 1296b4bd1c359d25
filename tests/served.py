"""A server in a thread of the test, or as a process, at a free port of loopback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import httpx
import openai

from quire.engine import Engine, SchedulerConfig
from quire.serve.config import ServeConfig
from quire.serve.house import House
from quire.serve.server import QuireServer, bind, make_server
from quire.serve.service import Service

PATIENCE_S = 30.0


@dataclass
class Served:
    """A server in a thread, and how to reach it."""

    url: str
    service: Service
    server: QuireServer
    keys: dict[str, str] = field(default_factory=dict)
    clients: dict[str | None, openai.OpenAI] = field(default_factory=dict)

    @property
    def engine(self) -> Engine:
        return self.service.engine

    def client(self, who: str | None = None) -> openai.OpenAI:
        if who not in self.clients:
            key = "none" if who is None else self.keys[who]
            self.clients[who] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)
        return self.clients[who]

    def http(self, who: str | None = None) -> httpx.Client:
        headers = {} if who is None else {"authorization": f"Bearer {self.keys[who]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE_S)

    def stop(self) -> None:
        """What SIGTERM does to a process of its own."""
        self.server.handle_exit(signal.SIGTERM, None)

    def wait_idle(self) -> None:
        """Until nothing runs; what was held must have come back."""
        engines = [service.engine for service in self.server.house.services]
        wait_for(lambda: not any(e.stats().live_requests for e in engines))
        wait_for(lambda: not self.service.gate.live)
        assert not any(e.stats().usage.held_bytes for e in engines)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@contextmanager
def serving(
    source: str | None,
    config: ServeConfig,
    *,
    keys: dict[str, str] | None = None,
    name: str = "model",
    tracing: Any = None,
    memory: str = "64MiB",
    tiers: str = "",
    **scheduler: int,
) -> Iterator[Served]:
    """Serves a model folder, or the packaged model, at a free port."""
    from quire.models.load import check_source, load_model
    from quire.models.open import open_runner

    loaded = load_model(check_source(source, dtype="float32"))
    runner = open_runner(
        loaded.model,
        kv="fp32",
        share="prefix:explain=on",
        memory=memory,
        block_tokens=16,
        tiers=tiers,
    )
    engine = Engine(
        runner,
        loaded.tokenizer,
        config=SchedulerConfig(**({"step_tokens": 256} | scheduler)),
        eos_token_ids=loaded.eos_token_ids,
    )
    service = Service(engine, config, name, kv="fp32", tracing=tracing)
    with serving_house(House([service]), keys=keys) as served:
        yield served
    runner.close()


@contextmanager
def serving_house(house: House, *, keys: dict[str, str] | None = None) -> Iterator[Served]:
    """Serves what is given at a free port; its runners are the caller's to close."""
    ready = threading.Event()
    server = make_server(house, ready.set)
    listening = bind(house.config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        assert ready.wait(PATIENCE_S)
        host, port = listening.getsockname()[:2]
        served = Served(f"http://{host}:{port}", house.first, server, keys or {})
        yield served
        for client in served.clients.values():
            client.close()
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        listening.close()
        assert not thread.is_alive()


API_KEY = "k" * 32


class Command:
    """`quire serve` as a process of its own."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quire.cli", "serve", "--port", "0", *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "QUIRE_API_KEY": API_KEY, "NO_COLOR": "1", "COLUMNS": "300"},
        )
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:
            said += line
            if found := re.search(r"at (https?://\S+)/v1", line):
                self.url = found[1]
                return
        raise AssertionError(said)

    def end(self) -> tuple[int, str]:
        with self.process:
            _, rest = self.process.communicate(timeout=60)
        return self.process.returncode, rest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever happened: no process and no pipe is left to the tests behind this one."""
        if self.process.returncode is None:
            self.process.kill()
            self.end()
