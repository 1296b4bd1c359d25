"""Load on a server that speaks OpenAI's completions: open loop, so that a slow server does not slow its own clients.

Requests leave at times that are drawn before (Poisson) or read from a trace, whether or not others have been answered.
What is counted is what a client sees: from sending a request to its first token, and between its tokens. HTTP is spoken
here with asyncio alone, so that the client costs little beside the server.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from quire.errors import ConfigError

__all__ = ["Ask", "Seen", "Target", "percentiles", "poisson", "read_asks", "run", "summary"]

FIRST_ID, LAST_ID = 10, 1000
"""Prompts are tokens drawn from this range, which every vocabulary has."""

TRACE_BLOCK = 512
"""Tokens that one hash of a trace stands for."""


@dataclass(frozen=True)
class Ask:
    """One request: when it leaves, in seconds from the start; its prompt; how many tokens it wants."""

    at_s: float
    prompt: tuple[int, ...]
    out_tokens: int


@dataclass
class Seen:
    """What a client saw of one request; times are seconds from its sending.

    Args:
        status: of HTTP; 0: no answer.
        error: why it failed.
        token_s: when each piece of text came.
    """

    ask: Ask
    status: int = 0
    error: str | None = None
    token_s: list[float] = field(default_factory=list)
    done_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def ok(self) -> bool:
        """Answered to the end."""
        return self.error is None and self.done_s is not None

    @property
    def gaps_s(self) -> list[float]:
        """Between its tokens."""
        return [b - a for a, b in pairwise(self.token_s)]


@dataclass(frozen=True)
class Target:
    """A server.

    Args:
        url: with or without /v1.
        model: as it names it.
        key: sent as a bearer token.
        timeout_s: of one request.
    """

    url: str
    model: str
    key: str | None = None
    timeout_s: float = 600.0


def poisson(
    rate_per_s: float,
    n: int,
    prompt_tokens: int,
    out_tokens: int,
    *,
    shared: int = 0,
    seed: int = 0,
) -> list[Ask]:
    """Requests at random times.

    Args:
        rate_per_s: on average.
        n: requests.
        prompt_tokens: of each; its first `shared` are the same in all.
        out_tokens: of each.

    Raises:
        ConfigError: a number out of range.
    """
    if rate_per_s <= 0 or n < 1 or prompt_tokens < 1 or out_tokens < 1:
        raise ConfigError("rate, requests, prompt and output tokens must be above 0")
    if not 0 <= shared <= prompt_tokens:
        raise ConfigError(f"a shared prefix of {shared} does not fit a prompt of {prompt_tokens}")
    draw = random.Random(seed)
    common, at_s, asks = _tokens(draw, shared), 0.0, []
    for _ in range(n):
        at_s += draw.expovariate(rate_per_s)
        asks.append(Ask(at_s, common + _tokens(draw, prompt_tokens - shared), out_tokens))
    return asks


def read_asks(
    path: Path, *, most: int | None = None, shrink: float = 1.0, speed: float = 1.0, seed: int = 0
) -> list[Ask]:
    """Requests of a trace in Mooncake's format: timestamp in ms, input_length, output_length, hash_ids.

    Args:
        most: only the first ones.
        shrink: lengths are divided by it, blocks alike, so that what was shared stays shared.
        speed: times are divided by it.

    Raises:
        ConfigError: it cannot be read.
    """
    if shrink < 1 or speed <= 0:
        raise ConfigError(f"shrink={shrink:g} is at least 1 and speed={speed:g} above 0")
    asks: list[Ask] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if most is not None and len(asks) == most:
                    break
                row = json.loads(line)
                block = max(1, round(TRACE_BLOCK / shrink))
                ids: tuple[int, ...] = ()
                for name in row["hash_ids"]:
                    ids += _tokens(random.Random(f"{seed} {name}"), block)
                n_prompt = max(1, round(row["input_length"] / shrink))
                n_out = max(1, round(row["output_length"] / shrink))
                asks.append(Ask(row["timestamp"] / 1000 / speed, ids[:n_prompt], n_out))
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path}: line {len(asks) + 1} is no request of a trace ({e})") from e
    if not asks:
        raise ConfigError(f"{path} holds no request")
    return asks


def _tokens(draw: random.Random, n: int) -> tuple[int, ...]:
    return tuple(draw.randrange(FIRST_ID, LAST_ID) for _ in range(n))


# -- sending -----------------------------------------------------------------------------------------------------


async def run(target: Target, asks: Sequence[Ask]) -> list[Seen]:
    """Sends all of them at their times; what came of each, in order."""
    began = time.monotonic()

    async def one(ask: Ask) -> Seen:
        await asyncio.sleep(max(0.0, began + ask.at_s - time.monotonic()))
        seen = Seen(ask)
        try:
            async with asyncio.timeout(target.timeout_s):
                await _ask(target, seen)
        except TimeoutError:
            seen.error = "timeout"
        except (OSError, ValueError, asyncio.IncompleteReadError) as e:
            seen.error = type(e).__name__
        return seen

    return await asyncio.gather(*(one(ask) for ask in asks))


async def _ask(target: Target, seen: Seen) -> None:
    """One request, streamed."""
    where = urlsplit(target.url if "//" in target.url else f"http://{target.url}")
    secure = where.scheme == "https"
    port = where.port or (443 if secure else 80)
    body = json.dumps(
        {
            "model": target.model,
            "prompt": list(seen.ask.prompt),
            "max_tokens": seen.ask.out_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    path = where.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
    head = [f"POST {path} HTTP/1.1", f"Host: {where.netloc}", "Connection: close"]
    head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    if target.key:
        head.append(f"Authorization: Bearer {target.key}")
    began = time.monotonic()
    reader, writer = await asyncio.open_connection(
        where.hostname, port, ssl=ssl.create_default_context() if secure else None
    )
    try:
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        await writer.drain()
        status = (await reader.readline()).split()
        if len(status) < 2:
            raise ConnectionResetError("closed without an answer")
        seen.status = int(status[1])
        headers = (await reader.readuntil(b"\r\n\r\n")).lower()
        pieces = _pieces(reader, chunked=b"transfer-encoding: chunked" in headers)
        if seen.status != 200:
            text = b"".join([piece async for piece in pieces])
            seen.error = f"HTTP {seen.status}"
            if seen.status == 400:
                seen.error += f": {text[:300].decode(errors='replace')}"
            return
        async for line in _lines(pieces):
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                _take(json.loads(line[6:]), seen, time.monotonic() - began)
        if seen.error is None:
            seen.done_s = time.monotonic() - began
    finally:
        writer.close()


def _take(chunk: dict[str, Any], seen: Seen, now_s: float) -> None:
    """One event of a stream."""
    if "error" in chunk:
        seen.error = str(chunk["error"].get("code") or chunk["error"].get("message"))
        return
    if chunk.get("choices"):
        seen.token_s.append(now_s)
    usage = chunk.get("usage")
    if usage:
        seen.prompt_tokens = usage["prompt_tokens"]
        seen.output_tokens = usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        seen.cached_tokens = details.get("cached_tokens") or 0


async def _pieces(reader: asyncio.StreamReader, *, chunked: bool) -> AsyncIterator[bytes]:
    """The body, as it comes."""
    while chunked:
        head = await reader.readline()
        if not head:
            raise ConnectionResetError("closed in the middle of an answer")
        size = int(head.split(b";")[0], 16)
        piece = await reader.readexactly(size + 2)
        if not size:
            return
        yield piece[:-2]
    while piece := await reader.read(1 << 16):
        yield piece


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The body's lines."""
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r")
    if rest:
        yield rest


# -- counting ----------------------------------------------------------------------------------------------------


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median, 90th and 99th percentile, greatest; None of nothing. The nearest rank, so each was really seen."""
    if not values:
        return None
    ordered = sorted(values)
    ranks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {n: ordered[max(0, -int(-q * len(ordered) // 1) - 1)] for n, q in ranks.items()}


def summary(
    seen: Sequence[Seen], *, first_s: float | None = None, between_s: float | None = None
) -> dict[str, Any]:
    """What the clients saw, as plain data.

    Args:
        first_s, between_s: what a good answer keeps: its first token by then, its tokens so far apart on average.

    Returns:
        Percentiles in seconds; rates over the time from the first sending to the last answer; `goodput`: good answers
        a second, and their share of all requests.
    """
    done = [s for s in seen if s.ok and s.token_s]
    end_s = max((s.ask.at_s + (s.done_s or 0.0) for s in done), default=0.0)
    whole_s = end_s - min((s.ask.at_s for s in seen), default=0.0)
    good = [s for s in done if _good(s, first_s, between_s)]
    asked = sum(s.prompt_tokens for s in done)
    return {
        "requests": len(seen),
        "answered": len(done),
        "errors": dict(Counter(s.error or "no token" for s in seen if not (s.ok and s.token_s))),
        "seconds": whole_s,
        "first_token_s": percentiles([s.token_s[0] for s in done]),
        "between_tokens_s": percentiles([gap for s in done for gap in s.gaps_s]),
        "whole_s": percentiles([s.done_s for s in done if s.done_s is not None]),
        "requests_per_s": len(done) / whole_s if whole_s else 0.0,
        "output_tokens_per_s": sum(s.output_tokens for s in done) / whole_s if whole_s else 0.0,
        "prompt_tokens": asked,
        "cached_share": sum(s.cached_tokens for s in done) / asked if asked else 0.0,
        "goodput": {
            "first_token_s": first_s,
            "between_tokens_s": between_s,
            "per_s": len(good) / whole_s if whole_s else 0.0,
            "share": len(good) / len(seen) if seen else 0.0,
        },
    }


def _good(seen: Seen, first_s: float | None, between_s: float | None) -> bool:
    gaps = seen.gaps_s
    return (first_s is None or seen.token_s[0] <= first_s) and (
        between_s is None or not gaps or sum(gaps) / len(gaps) <= between_s
    )
