"""The socket, TLS, and a shutdown that lets running answers end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from quire.errors import ConfigError
from quire.serve.app import build_app
from quire.serve.config import ServeConfig
from quire.serve.house import House

__all__ = ["QuireServer", "bind", "make_server"]

BACKLOG = 2048
LAST_WORDS_S = 2
"""After the drain: for telling those that are not done."""


class QuireServer(uvicorn.Server):
    """uvicorn, which on SIGTERM takes nothing new, lets what runs end, and tells the rest after `drain_s`.

    Args:
        started: called once requests are answered.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        house: House,
        started: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self.house = house
        self.when_started = started

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or Ctrl-C; a second Ctrl-C waits for nobody. `run` returns, and the exit code is the caller's."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to answer."""
        await super().startup(sockets)
        self.when_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drains."""
        self.house.drain()
        drain_s = self.house.config.drain_s
        timer = asyncio.get_running_loop().call_later(drain_s, self.house.abort)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def bind(config: ServeConfig) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the address is taken, or is none.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((config.host, config.port))
        made.listen(BACKLOG)
    except (OSError, UnicodeError) as e:
        made.close()
        why = getattr(e, "strerror", None) or e
        raise ConfigError(f"cannot listen at {config.host} port {config.port}: {why}") from e
    return made


def make_server(house: House, started: Callable[[], None] = lambda: None) -> QuireServer:
    """A server over what is served; `run(sockets=[bind(config)])` serves until SIGTERM.

    Args:
        started: called once requests are answered.
    """
    config = house.config
    options = uvicorn.Config(
        build_app(house),
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=round(config.drain_s) + LAST_WORDS_S,
        ssl_certfile=config.tls_cert,
        ssl_keyfile=config.tls_key,
    )
    return QuireServer(options, house, started)
