"""How a server is run: one frozen value, checked when it is made."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from quire.errors import ConfigError
from quire.serve.keys import Keys, Limits

__all__ = ["ServeConfig", "is_loopback"]


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What the operator decides.

    Args:
        host, port: where it listens; port 0: any that is free.
        keys: who may come in; none: everybody who reaches the socket, as one tenant.
        insecure: listen elsewhere than on loopback without keys.
        tls_cert, tls_key: PEM files.
        cors_origins: web pages that may call from a browser; none by default.
        max_body_bytes: of a request.
        max_requests: at a time, running and waiting; more are told to come back (429).
        limits: of each tenant whose key names none.
        max_samples: n, and prompts of one request, together.
        max_output_tokens: of one sample; None: what context and cache allow.
        max_cache_priority: highest `cache.priority` of a request.
        max_keep_s: longest `cache.keep_for_s`, and time-to-live of a breakpoint.
        fixed_keep: refuse requests that ask for another policy than the server's.
        queue_timeout_s: a request that has no first token after this is refused (503).
        request_timeout_s: a request that is not done after this is ended (504).
        drain_s: how long SIGTERM waits for running requests.
        dashboard: a page at `/`; its figures are at `/v1/kv/stats` in any case.

    Raises:
        ConfigError: a value out of range, or an address that needs keys.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Keys = field(default_factory=Keys)
    insecure: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    max_requests: int = 256
    limits: Limits = field(default_factory=Limits)
    max_samples: int = 32
    max_output_tokens: int | None = None
    max_cache_priority: int = 1
    max_keep_s: float = 3600.0
    fixed_keep: bool = False
    queue_timeout_s: float = 120.0
    request_timeout_s: float = 900.0
    drain_s: float = 30.0
    dashboard: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} must lie within 0..65535")
        for name in ("max_body_bytes", "max_requests", "max_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("queue_timeout_s", "request_timeout_s", "drain_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(
                    f"{name}={getattr(self, name)} must be a number of seconds above 0"
                )
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            raise ConfigError(f"max_output_tokens={self.max_output_tokens} must be at least 1")
        if self.max_cache_priority not in range(-3, 4) or not 0 <= self.max_keep_s < float("inf"):
            raise ConfigError("max_cache_priority lies within -3..3, and max_keep_s is 0 or more")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key go together: give both, or none")
        for path in (self.tls_cert, self.tls_key):
            if path is not None and not path.is_file():
                raise ConfigError(f"{path} is no file; TLS needs a certificate and its key as PEM")
        if "*" in self.cors_origins and not self.keys:
            raise ConfigError(
                "--cors '*' without keys lets every web page use this server; name the origins"
            )
        if not is_loopback(self.host) and not self.keys and not self.insecure:
            raise ConfigError(
                f"--host {self.host} can be reached from elsewhere and no key is asked for; make one with "
                "--keys FILE --new-key NAME, or add --insecure"
            )

    @property
    def guards_host(self) -> bool:
        """Whether only requests to a loopback name are answered: a web page must not reach it by a name of its own."""
        return is_loopback(self.host) and not self.keys


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
