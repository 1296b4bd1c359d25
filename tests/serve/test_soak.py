"""64 streams at a time, long prompts, clients that leave: nothing fails, nothing is held at the end, memory is flat."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import openai
import psutil
import pytest

from quire.serve.config import ServeConfig
from served import Served, serving

STREAMS = 64


async def soak(served: Served, seconds: float) -> tuple[int, int, list[int]]:
    """(answers, clients that left, resident bytes over time)."""
    end, draw = time.monotonic() + seconds, random.Random(0)
    process = psutil.Process()
    counts = {"done": 0, "left": 0}
    sizes: list[int] = []

    async def one(client: openai.AsyncOpenAI) -> None:
        while time.monotonic() < end:
            n_prompt, n_out = draw.randrange(5, 300), draw.randrange(8, 60)
            leaves = draw.random() < 0.1
            prompt = "".join(draw.choices("abcdefgh ", k=n_prompt))
            stream = await client.completions.create(
                model="tiny",
                prompt=prompt,
                max_tokens=n_out,
                stream=True,
                temperature=draw.choice([0.0, 1.0]),
                extra_body={"ignore_eos": True},
                stream_options={"include_usage": True},
            )
            told = 0
            async for chunk in stream:
                if leaves and told > 3:
                    await stream.close()
                    break
                told += len(chunk.choices)
                if chunk.usage is not None:
                    assert chunk.usage.completion_tokens == n_out
            counts["left" if leaves and told > 3 else "done"] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            sizes.append(process.memory_info().rss)
            await asyncio.sleep(0.5)

    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key="x", max_retries=0, timeout=120
    ) as client:
        await asyncio.gather(watch(), *(one(client) for _ in range(STREAMS)))
    return counts["done"], counts["left"], sizes


@pytest.mark.slow
# The client's own generators, of streams left early: collected after their loop has ended, or by another thread.
@pytest.mark.filterwarnings("ignore:.*aiter_raw:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:.*AsyncResponseStream:pytest.PytestUnraisableExceptionWarning")
def test_a_soak_leaves_nothing_behind(tiny_folder: Path) -> None:
    seconds = float(os.environ.get("QUIRE_SOAK_S", "45"))
    config = ServeConfig(port=0, max_requests=STREAMS + 8)
    with serving(str(tiny_folder), config, name="tiny") as served:
        done, left, sizes = asyncio.run(soak(served, seconds))
        served.wait_idle()
        finished = served.engine.stats().finished
        assert done > 2 * STREAMS
        assert left > 0
        assert set(finished) <= {"length", "cancelled"}
        assert not served.service.runs
        half = len(sizes) // 2
        assert max(sizes[half:]) < max(sizes[:half]) * 1.1 + (32 << 20)
