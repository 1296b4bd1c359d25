"""When to say "later": limits of the server and of each tenant, before a request takes any memory.

What was let in is queued by the engine's scheduler and finishes: it never meets a memory error. So what the gate bounds
is how much waits, and for whom. Lives in the event loop; no lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from quire.serve.config import ServeConfig
from quire.serve.errors import ApiError
from quire.serve.keys import Caller, Limits

__all__ = ["Bucket", "Gate", "Pass"]

MINUTE_S = 60.0
FORGET_S = 600.0
"""A tenant without requests for so long has a full bucket; its record is dropped."""


@dataclass(slots=True)
class Bucket:
    """So much per minute on average, and at most a minute's worth at once. May go into debt, which time pays."""

    per_minute: int
    level: float = 0.0
    at_s: float = 0.0

    def refill(self, now_s: float) -> None:
        """Up to now."""
        gained = (now_s - self.at_s) * self.per_minute / MINUTE_S
        self.level = min(self.per_minute, self.level + max(0.0, gained))
        self.at_s = now_s

    def wait_s(self, amount: float) -> float:
        """Seconds until so much is there; 0: it is."""
        return max(0.0, (amount - self.level) * MINUTE_S / self.per_minute)


@dataclass(slots=True)
class Tenant:
    """What the gate remembers of one."""

    live: int = 0
    requests: Bucket | None = None
    tokens: Bucket | None = None
    seen_s: float = 0.0


@dataclass(slots=True)
class Pass:
    """One admitted request."""

    gate: Gate
    tenant: Tenant
    charged_tokens: int
    open: bool = True

    def leave(self, used_tokens: int) -> None:
        """It has ended and used so many of the tokens that it was charged. Idempotent."""
        if not self.open:
            return
        self.open = False
        self.gate.live -= 1
        self.tenant.live -= 1
        self.gate.ended()
        if self.tenant.tokens is not None:
            bucket = self.tenant.tokens
            bucket.level = min(bucket.per_minute, bucket.level + self.charged_tokens - used_tokens)


@dataclass
class Gate:
    """Counts who is inside.

    Args:
        config: the limits.
        clock: seconds.
    """

    config: ServeConfig
    clock: Callable[[], float] = time.monotonic
    live: int = 0
    refused: int = 0
    draining: bool = False
    tenants: dict[str, Tenant] = field(default_factory=dict)
    _ended_s: float | None = None
    _interval_s: float = 1.0

    def enter(self, caller: Caller, n_tokens: int) -> Pass:
        """Let a request in.

        Args:
            caller: whose limits count.
            n_tokens: that it may use at most: prompt and output.

        Raises:
            ApiError: 429 with Retry-After; 400 when its tokens exceed what a minute allows; 503 while draining.
        """
        if self.draining:
            raise self._no(503, "the server is shutting down", "draining", self.config.drain_s)
        if self.live >= self.config.max_requests:
            wait_s = self._interval_s * (self.live - self.config.max_requests + 1)
            raise self._no(
                429, f"{self.live} requests are running or waiting; come back", "overloaded", wait_s
            )
        now = self.clock()
        limits = caller.limits or self.config.limits
        tenant = self._tenant(caller.name, limits, now)
        if limits.concurrent is not None and tenant.live >= limits.concurrent:
            raise self._no(
                429,
                f"this key may have {limits.concurrent} requests at a time",
                "concurrency",
                self._interval_s,
            )
        if limits.tokens_per_minute is not None and n_tokens > limits.tokens_per_minute:
            raise ApiError(
                400,
                f"the request may use {n_tokens} tokens and this key {limits.tokens_per_minute} a minute; "
                "shorten the prompt, or lower max_tokens",
                code="tokens_per_minute",
            )
        for bucket, amount, code in (
            (tenant.requests, 1, "requests_per_minute"),
            (tenant.tokens, n_tokens, "tokens_per_minute"),
        ):
            if bucket is not None and (wait_s := bucket.wait_s(amount)) > 0:
                raise self._no(
                    429, f"this key's limit of {code} {bucket.per_minute} is used up", code, wait_s
                )
        if tenant.requests is not None:
            tenant.requests.level -= 1
        if tenant.tokens is not None:
            tenant.tokens.level -= n_tokens
        self.live += 1
        tenant.live += 1
        return Pass(self, tenant, n_tokens)

    def ended(self) -> None:
        """A request has left: how often that happens says when to come back."""
        now = self.clock()
        if self._ended_s is not None:
            self._interval_s += 0.2 * (min(60.0, now - self._ended_s) - self._interval_s)
        self._ended_s = now

    def _tenant(self, name: str, limits: Limits, now: float) -> Tenant:
        found = self.tenants.get(name)
        if found is None:
            self._forget(now)
            found = self.tenants[name] = Tenant()
            if limits.requests_per_minute is not None:
                n = limits.requests_per_minute
                found.requests = Bucket(n, n, now)
            if limits.tokens_per_minute is not None:
                n = limits.tokens_per_minute
                found.tokens = Bucket(n, n, now)
        found.seen_s = now
        for bucket in (found.requests, found.tokens):
            if bucket is not None:
                bucket.refill(now)
        return found

    def _forget(self, now: float) -> None:
        old = [n for n, t in self.tenants.items() if not t.live and now - t.seen_s > FORGET_S]
        for name in old:
            del self.tenants[name]

    def _no(self, status: int, message: str, code: str, wait_s: float) -> ApiError:
        self.refused += 1
        return ApiError(status, message, code=code, retry_after_s=min(60.0, max(1.0, wait_s)))
