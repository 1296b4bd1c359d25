"""Load on a server: when requests leave, what is counted, and a real server that answers them."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from quire.bench.load import Ask, Seen, Target, percentiles, poisson, read_asks, run, summary
from quire.errors import ConfigError


def test_requests_leave_at_random_times_of_one_rate() -> None:
    asks = poisson(4.0, 4000, 20, 3, shared=8, seed=1)
    assert asks == poisson(4.0, 4000, 20, 3, shared=8, seed=1)
    assert asks[-1].at_s == pytest.approx(1000, rel=0.1)
    gaps = [b.at_s - a.at_s for a, b in pairwise(asks)]
    assert sum(g > 0.25 for g in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)
    assert len({ask.prompt[:8] for ask in asks}) == 1
    assert len({ask.prompt[8:] for ask in asks}) == len(asks)
    assert {len(ask.prompt) for ask in asks} == {20}


def test_what_a_trace_shares_stays_shared(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 1000, "output_length": 64, "hash_ids": [1, 2]},
        {"timestamp": 3000, "input_length": 1024, "output_length": 32, "hash_ids": [1, 3]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = read_asks(path, shrink=8, speed=2)
    assert (first.at_s, second.at_s) == (0.0, 1.5)
    assert (len(first.prompt), len(second.prompt)) == (125, 128)
    assert (first.out_tokens, second.out_tokens) == (8, 4)
    assert first.prompt[:64] == second.prompt[:64]
    assert first.prompt[64:] != second.prompt[64:125]
    assert len(read_asks(path, most=1)) == 1


@pytest.mark.parametrize("text", ["", "{}", "x", '{"timestamp": "a"}'])
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="trace"):
        read_asks(path)


def test_percentiles_were_really_seen() -> None:
    values = [float(v) for v in range(1, 101)]
    random.Random(0).shuffle(values)
    assert percentiles(values) == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert percentiles([7.0]) == {"p50": 7.0, "p90": 7.0, "p99": 7.0, "max": 7.0}
    assert percentiles([]) is None


def test_figures_by_hand() -> None:
    def seen(at_s: float, token_s: list[float], **more: Any) -> Seen:
        done_s = token_s[-1] if token_s else None
        tokens = {"prompt_tokens": 10, "output_tokens": len(token_s)}
        return Seen(Ask(at_s, (1,), 3), 200, token_s=token_s, done_s=done_s, **(tokens | more))

    found = summary(
        [
            seen(1.0, [0.5, 0.6, 0.8], cached_tokens=5),
            seen(2.0, [2.0, 2.1, 3.0]),
            Seen(Ask(3.0, (1,), 3), 429, error="HTTP 429"),
            seen(3.0, []),
        ],
        first_s=1.0,
        between_s=0.2,
    )
    assert found["requests"] == 4
    assert found["answered"] == 2
    assert found["errors"] == {"HTTP 429": 1, "no token": 1}
    assert found["seconds"] == 4.0
    assert found["first_token_s"] == {"p50": 0.5, "p90": 2.0, "p99": 2.0, "max": 2.0}
    assert found["between_tokens_s"]["max"] == pytest.approx(0.9)
    assert found["output_tokens_per_s"] == 1.5
    assert found["cached_share"] == 0.25
    assert found["goodput"]["share"] == 0.25
    assert found["goodput"]["per_s"] == 0.25


def script(*steps: tuple[float, bytes]) -> Callable[..., Any]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert json.loads(await reader.readexactly(length))["stream"] is True
        for wait_s, piece in steps:
            await asyncio.sleep(wait_s)
            writer.write(piece)
            await writer.drain()
        writer.close()

    return answer


def chunked(text: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(text), text)


OK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TOKEN = b'data: {"choices": [{"text": "a"}]}\n\n'
USED = {"prompt_tokens": 4, "completion_tokens": 2, "prompt_tokens_details": None}
USAGE = b"data: " + json.dumps({"choices": [], "usage": USED}).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("steps", "tokens", "error"),
    [
        ([(0, OK + chunked(TOKEN[:9])), (0, chunked(TOKEN[9:] + TOKEN + USAGE) + b"0\r\n\r\n")], 2, None),
        ([(0, b"HTTP/1.1 429 Later\r\nContent-Length: 2\r\n\r\n{}")], 0, "HTTP 429"),
        ([(0, OK + chunked(TOKEN + b'data: {"error": {"code": "timeout"}}\n\n') + b"0\r\n\r\n")], 1, "timeout"),
        ([(0, OK + chunked(TOKEN))], 1, "ConnectionResetError"),
        ([(0, b"")], 0, "ConnectionResetError"),
    ],
)  # fmt: skip
def test_what_a_server_does_is_seen(
    steps: list[tuple[float, bytes]], tokens: int, error: str | None
) -> None:
    async def main() -> Seen:
        server = await asyncio.start_server(script(*steps), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            target = Target(f"http://127.0.0.1:{port}/v1", "m", timeout_s=5)
            (seen,) = await run(target, [Ask(0.0, (1, 2), 2)])
        return seen

    seen = asyncio.run(main())
    assert len(seen.token_s) == tokens
    if error is None:
        assert seen.ok
        assert (seen.prompt_tokens, seen.output_tokens, seen.cached_tokens) == (4, 2, 0)
    else:
        assert not seen.ok
        assert seen.error == error
