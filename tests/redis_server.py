"""A real Redis or Valkey server, of Debian's package, for one test or many; a test that wants one skips without."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

BINARY = shutil.which("redis-server") or shutil.which("valkey-server")
try:
    import redis
except ImportError:
    redis = None  # type: ignore[assignment]

ABSENT = (
    "needs a Redis server: apt-get install redis-server"
    if BINARY is None
    else "needs the package redis: pip install 'quire[redis]'"
    if redis is None
    else ""
)
needs_redis = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)


class RedisServer:
    """A process at a free port of loopback, which keeps nothing but what `SAVE` writes.

    Args:
        options: of the server, as `requirepass="secret"`.
    """

    def __init__(self, **options: str) -> None:
        if ABSENT:
            pytest.skip(ABSENT)
        self.folder = Path(tempfile.mkdtemp(prefix="quire-redis-"))
        self.options = options
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    def client(self, **options: Any) -> Any:
        return redis.Redis(port=self.port, password=self.options.get("requirepass"), **options)

    def start(self) -> None:
        given = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.folder), "save": ""}
        words = [w for k, v in {**given, **self.options}.items() for w in (f"--{k}", v)]
        self.process = subprocess.Popen([str(BINARY), *words], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                with self.client() as client:
                    client.ping()
                    return
            except redis.exceptions.ConnectionError:
                assert time.monotonic() < deadline, "the server does not come up"
                assert self.process.poll() is None, "the server ended"
                time.sleep(0.01)

    def stop(self) -> None:
        """SIGSTOP: it takes connections and says nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def redis_server(**options: str) -> Iterator[RedisServer]:
    server = RedisServer(**options)
    try:
        yield server
    finally:
        server.close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody has signed, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl, for a certificate")
    cert, key = folder / "cert.pem", folder / "key.pem"
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [openssl, *words.split(), "-out", cert, "-keyout", key], check=True, capture_output=True
    )
    return cert, key


class Spoiling:
    """A line to a server that turns a bit of what the server says now and then; within one event loop.

    Args:
        every_bytes: of answers, about, one bit.
    """

    def __init__(self, port: int, every_bytes: int) -> None:
        self.port, self.every_bytes, self.spoilt = port, every_bytes, 0
        self.draw = random.Random(3)
        self.server: asyncio.Server | None = None

    async def open(self) -> int:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        return int(self.server.sockets[0].getsockname()[1])

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self.port)

        async def pump(source: Any, target: Any, *, spoils: bool) -> None:
            with suppress(OSError):
                while data := await source.read(1 << 16):
                    if spoils and self.draw.random() < len(data) / self.every_bytes:
                        at = self.draw.randrange(8 * len(data))
                        changed = bytearray(data)
                        changed[at // 8] ^= 1 << at % 8
                        data, self.spoilt = bytes(changed), self.spoilt + 1
                    target.write(data)
                    await target.drain()
            target.close()

        await asyncio.gather(
            pump(reader, inner_writer, spoils=False), pump(inner_reader, writer, spoils=True)
        )

    async def close(self) -> None:
        assert self.server is not None
        self.server.close()


def ours(server: RedisServer) -> Any:
    """(name, key, value) of everything that lies in the server's segments."""
    with server.client() as client:
        for name in client.scan_iter(b"quire:1:*:s:*"):
            for key, value in client.hgetall(name).items():
                yield name, key, value
