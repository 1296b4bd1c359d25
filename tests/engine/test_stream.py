"""Streams: one background thread, many event loops, nobody left waiting."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import pytest

from engine.fake_runner import FakeRunner
from quire.engine import Delta, Engine, SamplingParams, SchedulerConfig
from quire.errors import RequestError

if TYPE_CHECKING:
    import torch

LONG = SamplingParams(max_tokens=100_000)
PATIENCE_S = 60.0


class Gated(FakeRunner):
    """A model that computes only while its gate is open."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = threading.Event()
        self.gate.set()
        self.waits = threading.Event()

    def forward(self, items: Any, adapter: str | None = None) -> torch.Tensor:
        if not self.gate.is_set():
            self.waits.set()
        assert self.gate.wait(PATIENCE_S)
        return super().forward(items, adapter)


async def collect(stream: AsyncIterator[Delta]) -> list[Delta]:
    return [delta async for delta in stream]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - another thread makes it true
            await asyncio.sleep(0.001)


async def until_idle(engine: Engine) -> None:
    await until(lambda: not engine.has_work and not engine.held_bytes())


def run(main: Any) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(PATIENCE_S):
            return await main

    return asyncio.run(bounded())


def test_a_stream_gives_what_generate_gives() -> None:
    prompts = [[i, 1, 2] for i in range(12)]
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=6)
    expected = Engine(FakeRunner()).generate(prompts, params)

    async def main(engine: Engine) -> list[list[Delta]]:
        return await asyncio.gather(*(collect(engine.stream(p, params)) for p in prompts))

    with Engine(FakeRunner(30), config=SchedulerConfig(step_tokens=16)) as engine:
        streams = run(main(engine))
        assert engine.stats().scheduler.preemptions > 0
    for deltas, reference in zip(streams, expected, strict=True):
        assert [t for d in deltas for t in d.token_ids] == reference.token_ids
        assert deltas[-1].output is not None
        assert deltas[-1].output.token_ids == reference.token_ids


def test_cancelling_the_consumer_cancels_the_request() -> None:
    runner = FakeRunner()

    async def main(engine: Engine) -> None:
        first = asyncio.Event()

        async def consume() -> None:
            async for _ in engine.stream([1], LONG):
                first.set()

        task = asyncio.create_task(consume())
        await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_idle(engine)

    with Engine(runner) as engine:
        run(main(engine))
        assert engine.stats().finished == {"cancelled": 1}
        assert runner.pool.opened == 0


def test_leaving_the_loop_cancels_the_request() -> None:
    runner = FakeRunner()

    async def main(engine: Engine) -> None:
        stream = engine.stream([1], LONG)
        async for delta in stream:
            assert delta.token_ids
            break
        await stream.aclose()  # type: ignore[attr-defined]
        await until_idle(engine)

    with Engine(runner) as engine:
        run(main(engine))
        assert engine.stats().finished == {"cancelled": 1}
        assert runner.pool.opened == 0


def test_engine_errors_reach_every_consumer(caplog: pytest.LogCaptureFixture) -> None:
    runner = FakeRunner()
    runner.fail_at = 5

    async def main(engine: Engine) -> None:
        streams = [collect(engine.stream([i], LONG)) for i in range(5)]
        errors = await asyncio.gather(*streams, return_exceptions=True)
        assert all(isinstance(e, RuntimeError) and "fire" in str(e) for e in errors)
        runner.fail_at = None
        deltas = await collect(engine.stream([1], SamplingParams(max_tokens=3)))
        assert deltas[-1].finish_reason == "length"

    with Engine(runner) as engine:
        run(main(engine))
    assert runner.pool.opened == 0
    assert "a step failed" in caplog.text


def test_a_refused_request_raises_in_its_consumer() -> None:
    async def main(engine: Engine) -> None:
        with pytest.raises(RequestError, match="empty"):
            await collect(engine.stream([], LONG))

    with Engine(FakeRunner()) as engine:
        run(main(engine))


def test_close_wakes_every_consumer() -> None:
    runner = Gated()

    async def main(engine: Engine) -> None:
        tasks = [asyncio.create_task(collect(engine.stream([i], LONG))) for i in range(3)]
        await until(lambda: len(runner.steps) >= 3)
        await asyncio.to_thread(engine.close)
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, RequestError)
            assert "closed" in str(error)
        with pytest.raises(RequestError, match="closed"):
            await collect(engine.stream([1], LONG))

    others = set(threading.enumerate())
    engine = Engine(runner)
    run(main(engine))
    assert runner.pool.opened == 0
    ours = set(threading.enumerate()) - others
    assert not [t for t in ours if t.name == "quire-engine"]


def test_submitting_does_not_wait_for_the_step() -> None:
    """While a forward runs, the event loop goes on: submit, cancel and look return at once."""
    runner = Gated()

    async def main(engine: Engine) -> None:
        task = asyncio.create_task(collect(engine.stream([1], SamplingParams(max_tokens=40))))
        await until(lambda: runner.steps)
        runner.gate.clear()
        await asyncio.sleep(0.01)
        late = asyncio.create_task(collect(engine.stream([2], LONG)))
        await asyncio.sleep(0.01)
        name = engine.add_request([3], LONG)
        assert engine.cancel(name)
        engine.stats()
        engine.held_bytes()
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        runner.gate.set()
        deltas = await task
        assert len(deltas) == 40
        await until_idle(engine)

    with Engine(runner) as engine:
        run(main(engine))
        assert engine.stats().finished == {"length": 1, "cancelled": 2}


def test_streams_generate_and_steps_share_one_engine() -> None:
    runner = FakeRunner(40)

    async def main(engine: Engine) -> None:
        stream = asyncio.create_task(collect(engine.stream([1], SamplingParams(max_tokens=60))))
        outputs = await asyncio.to_thread(
            engine.generate, [[2], [3]], SamplingParams(max_tokens=30)
        )
        assert [len(o.token_ids) for o in outputs] == [30, 30]
        assert len(await stream) == 60

    with Engine(runner) as engine:
        run(main(engine))
        name = engine.add_request([4], SamplingParams(max_tokens=5))
        seen: list[Delta] = []
        while not seen or seen[-1].output is None:
            seen += engine.step()
        assert {d.request_id for d in seen} == {name}
        assert sum(len(d.token_ids) for d in seen) == 5


def test_a_loop_that_died_is_forgotten() -> None:
    runner = Gated()
    engine = Engine(runner)

    async def abandon() -> Any:
        stream = engine.stream([1], LONG)
        await anext(stream)
        runner.gate.clear()
        return stream

    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(abandon())
    loop.close()
    runner.gate.set()

    run(until_idle(engine))
    assert engine.stats().finished == {"cancelled": 1}
    engine.close()
    del stream


def test_many_streams_cross_into_their_loop_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Gated()
    crossings = 0

    async def main(engine: Engine) -> None:
        nonlocal crossings
        loop = asyncio.get_running_loop()
        original = loop.call_soon_threadsafe

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal crossings
            crossings += threading.current_thread().name == "quire-engine"
            return original(*args, **kwargs)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        runner.gate.clear()
        tasks = [
            asyncio.create_task(collect(engine.stream([i], SamplingParams(max_tokens=10))))
            for i in range(20)
        ]
        await asyncio.sleep(0.01)
        runner.gate.set()
        await asyncio.gather(*tasks)

    with Engine(runner) as engine:
        run(main(engine))
        assert crossings <= engine.stats().steps <= 12


def test_the_driver_sees_a_request_that_was_slow_to_be_queued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Woken while it was neither in the inbox nor in the queue, the driver must not sleep over it."""

    async def main(engine: Engine) -> None:
        await collect(engine.stream([1], SamplingParams(max_tokens=1)))
        add = engine.core.add

        def slowly(request: Any) -> None:
            time.sleep(0.05)
            add(request)

        monkeypatch.setattr(engine.core, "add", slowly)
        await asyncio.sleep(0.05)  # the driver sleeps
        async with asyncio.timeout(5):
            await collect(engine.stream([2], SamplingParams(max_tokens=1)))

    with Engine(FakeRunner()) as engine:
        run(main(engine))


def test_a_look_comes_between_two_steps() -> None:
    """While nobody steps it is at once, else at the next step; its error is whose asked, and the engine goes on."""

    async def work() -> None:
        runner = Gated(vocab_size=32)
        with Engine(runner) as engine:
            assert engine.between(lambda: 5).result(0) == 5
            stream = engine.submit([1, 2, 3], LONG)
            await anext(stream)
            runner.gate.clear()
            await until(runner.waits.is_set)
            busy = engine.between(lambda: engine.stats().steps)
            broken = engine.between(lambda: 1 / 0)
            await asyncio.sleep(0.05)
            assert not busy.done()
            runner.gate.set()
            assert await asyncio.wrap_future(busy) >= 1
            with pytest.raises(ZeroDivisionError):
                await asyncio.wrap_future(broken)
            await anext(stream)
            stream.close()
            await until_idle(engine)

    asyncio.run(work())
