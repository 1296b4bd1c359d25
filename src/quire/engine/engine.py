"""The only loop: schedule, forward, sample, hand out.

`generate` for a list of prompts, `add_request`/`step`/`cancel` for those who drive themselves, `stream` for an event
loop. All three share one queue and may be mixed; a lock makes whoever steps the only one, and what others submit
meanwhile is taken up at the next step.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from quire.engine.audit import Auditor
from quire.engine.core import Core, EngineStats
from quire.engine.intake import Intake, Prompt, as_list
from quire.engine.loop import Courier, Driver, Subscriber
from quire.engine.params import SamplingParams
from quire.engine.request import Delta, Request, RequestOutput
from quire.engine.runner import Runner
from quire.engine.schedule import SchedulerConfig
from quire.engine.scheduler import Scheduler
from quire.engine.sharing import Opener
from quire.engine.stream import Stream
from quire.errors import CapacityError, RequestError
from quire.retention import Keep
from quire.store.namespace import Hints, Namespace

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

Sink = Callable[[Delta], None]
T = TypeVar("T")


class Engine:
    """Serves requests over one model, as many at a time as fit.

    Args:
        runner: the model and its cache.
        tokenizer: any `transformers` tokenizer; None: prompts are token ids and nothing has a text.
        config: sizes of a step.
        eos_token_ids: what ends a sequence; default: the tokenizer's.
        clock: seconds; for the figures and for the order of arrival.

    A request is a function of itself: the same prompt, parameters and seed give the same tokens alone or in a batch,
    preempted or not, as far as the runner's logits are the same.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any = None,
        *,
        config: SchedulerConfig | None = None,
        eos_token_ids: Iterable[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.clock = clock
        rate = getattr(runner, "audit", 0.0)
        auditor = Auditor(runner, rate) if rate else None
        self.opener = Opener(runner, getattr(runner, "adapter_digest", None), auditor)
        self.scheduler = Scheduler(
            runner,
            config,
            clock,
            cut=getattr(runner, "cut", None),
            restart_tokens=getattr(runner, "restart_tokens", None),
            opener=self.opener,
        )
        self.opener.waiting = self.scheduler.next_waiting
        self.intake = Intake(runner, runner.vocab_size, tokenizer, eos_token_ids, clock)
        self.core = Core(
            runner, self.scheduler, tokenizer, clock, self._deliver, auditor, self.opener
        )
        self._requests: dict[str, Request] = {}  # submitted and unfinished
        self._inbox: deque[Request | str | Callable[[], None]] = deque()  # ids are to be cancelled
        self._out: list[Delta] = []
        self._ids = itertools.count()
        self._submitted = 0
        self._lock = threading.Lock()
        self._courier = Courier()
        self._driver = Driver(self._turn, lambda: self.has_work)
        self._closed = False

    # ---- submit -----------------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        adapter: str | None = None,
        keep: str | Keep | None = None,
        context: int | str = 0,
        share: str | None = None,
        namespace: Namespace | None = None,
        hints: Hints | None = None,
        yields: str | None = None,
        on_delta: Sink | None = None,
    ) -> str:
        """Submit a request; it runs when somebody steps.

        Args:
            prompt: text, or token ids.
            params: default: greedy, 16 tokens.
            request_id: any name not in use; default: a number.
            priority: higher goes earlier, and `SchedulerConfig.priority_step_s` of waiting makes up for one level.
            adapter: given to the runner's forward; requests of one forward share it.
            keep: which of its tokens stay, as `keep="h2o:budget=0.2"`; default: as the runner was opened.
            context: how much of the prompt is a context that others ask about, too: the text that it begins with, or
                its number of tokens. Tokens go at its end, before the rest is read, and where the policy asks no
                question and prefixes are shared, what stays is found by whoever brings the same context and policy.
            share: "off": find nothing and leave nothing; default: as the runner was opened.
            namespace: who may find what it leaves, and whose it finds; default: those without one.
            hints: how long its blocks should stay cached.
            yields: what it gives up when memory runs short and not before, so that its output depends on what runs
                beside it: a codec for its older blocks, as `"kv=int4"`, or tokens, as `"keydiff:budget=0.5"`.
            on_delta: called with every delta, from the thread that steps; default: `step` returns them.

        Returns:
            The request's id.

        Raises:
            RequestError: it is wrong: an empty prompt, one beyond the context, unknown ids, a name in use.
            CapacityError: it could never fit the cache.
        """
        request = self._prepare(
            prompt,
            params,
            request_id,
            priority=priority,
            adapter=adapter,
            keep=keep,
            context=context,
            share=share,
            namespace=namespace,
            hints=hints,
            yields=yields,
        )
        self._submit(request, on_delta)
        return request.request_id

    def cancel(self, request_id: str) -> bool:
        """End a request and release what it holds: at once when nobody is stepping, else before the next step.

        Returns:
            Whether it was there to be cancelled.
        """
        if request_id not in self._requests:
            return False
        self._inbox.append(request_id)
        self._take_up()
        return True

    def _prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None = None,
        **wishes: Any,
    ) -> Request:
        """Check everything that can be known now; nothing is queued yet."""
        if self._closed:
            raise RequestError("the engine is closed")
        if request_id is None:
            request_id = next(name for name in map(str, self._ids) if name not in self._requests)
        elif request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use; choose another")
        return self.intake.request(request_id, prompt, params, **wishes)

    def _submit(self, request: Request, sink: Sink | None) -> None:
        request.sink = sink
        if self._requests.setdefault(request.request_id, request) is not request:
            raise RequestError(f"request id {request.request_id!r} is in use; choose another")
        self._submitted += 1
        self._inbox.append(request)
        self._take_up()

    def _take_up(self) -> None:
        """Apply the inbox now if nobody is stepping; whoever is will do it, and the driver is told."""
        while self._inbox and self._lock.acquire(blocking=False):
            try:
                self._drain()
                if self._closed:  # it came while the engine was closing
                    self.core.abort(RequestError("the engine was closed"))
                self._flush()
            finally:
                self._lock.release()
        self._driver.wake()  # last: between inbox and queue a request is no work that the driver could see

    def _drain(self) -> None:
        """Take up what was submitted; the lock is held."""
        inbox = self._inbox
        while inbox:
            order = inbox.popleft()
            if isinstance(order, Request):
                self.core.add(order)
            elif isinstance(order, str):
                self.core.cancel(order)
            else:
                order()

    def _turn(self) -> None:
        """One step, its deltas delivered."""
        with self._lock:
            try:
                self._drain()
                self.core.step()
            except BaseException as error:
                failure = error if isinstance(error, Exception) else RequestError("interrupted")
                self.core.abort(failure)
                raise
            finally:
                self._flush()
        if self._inbox:
            self._take_up()

    def _deliver(self, request: Request, delta: Delta) -> None:
        """To the request's sink, or to whoever calls `step`."""
        if delta.output is not None:
            self._requests.pop(request.request_id, None)
        if request.sink is None:
            self._out.append(delta)
            return
        try:
            request.sink(delta)
        except Exception:
            logger.exception("on_delta of request %s failed; it is cancelled", request.request_id)
            self._inbox.append(request.request_id)

    def _flush(self) -> None:
        """Let the event loops have what a step posted; who has gone away is cancelled."""
        self._inbox.extend(self._courier.flush())

    # ---- run --------------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Is anything submitted and unfinished?"""
        return bool(self._inbox) or self.scheduler.unfinished

    def step(self) -> list[Delta]:
        """One step: at most one forward per adapter.

        Returns:
            The deltas since the last call, of requests without `on_delta`.

        Raises:
            Exception: what the runner raised. Every request that was in flight has been released and told (its last
                delta carries the error); the engine can go on with new ones.
        """
        self._turn()
        out, self._out = self._out, []
        return out

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        keep: str | Keep | None = None,
        context: int | str = 0,
        share: str | None = None,
        namespace: Namespace | None = None,
        hints: Hints | None = None,
        on_delta: Sink | None = None,
    ) -> list[RequestOutput]:
        """Run prompts to their end as one continuous batch.

        Args:
            prompts: one prompt, or several: texts or lists of token ids.
            params: for all of them, or one each.
            adapter, keep, context, share, namespace, hints: for all of them, see `add_request`.
            on_delta: called with every delta, in the order of computation.

        Returns:
            One output per prompt, in order.

        Raises:
            RequestError, CapacityError: a prompt is refused, before any runs.
            Exception: what the runner raised.
        """
        many = as_list(prompts)
        each = (
            [params] * len(many)
            if params is None or isinstance(params, SamplingParams)
            else list(params)
        )
        if len(each) != len(many):
            raise RequestError(
                f"{len(many)} prompts and {len(each)} params; give one for all, or one each"
            )
        wishes: dict[str, Any] = {
            "adapter": adapter,
            "keep": keep,
            "context": context,
            "share": share,
            "namespace": namespace,
            "hints": hints,
        }
        requests = []
        for number, (prompt, its_params) in enumerate(zip(many, each, strict=True)):
            try:
                requests.append(self._prepare(prompt, its_params, **wishes))
            except (RequestError, CapacityError) as error:
                if len(many) == 1:
                    raise
                raise type(error)(f"prompt {number}: {error}") from error
        done: dict[str, RequestOutput] = {}
        errors: list[Exception] = []

        def sink(delta: Delta) -> None:
            if delta.output is not None:
                done[delta.request_id] = delta.output
            if delta.error is not None:
                errors.append(delta.error)
            if on_delta is not None:
                on_delta(delta)

        try:
            for request in requests:
                self._submit(request, sink)
            while len(done) < len(requests):
                self._turn()
        finally:
            for request in requests:
                if request.request_id not in done:
                    self.cancel(request.request_id)
        if errors:
            raise errors[0]
        return [done[request.request_id] for request in requests]

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        adapter: str | None = None,
        keep: str | Keep | None = None,
        share: str | None = None,
        namespace: Namespace | None = None,
        hints: Hints | None = None,
    ) -> AsyncIterator[Delta]:
        """The deltas of one request as they come; the last one carries the output.

        One background thread steps for all streams. Leaving the loop, closing the generator or cancelling its task
        cancels the request.

        Raises:
            RequestError, CapacityError: refused, at the first iteration; or the engine was closed.
            Exception: what the runner raised.
        """
        stream = self.submit(
            prompt,
            params,
            request_id=request_id,
            priority=priority,
            adapter=adapter,
            keep=keep,
            share=share,
            namespace=namespace,
            hints=hints,
        )
        try:
            async for delta in stream:
                yield delta
        finally:
            stream.close()

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        **wishes: Any,
    ) -> Stream:
        """The same as `stream`, but checked and queued when this returns; called within an event loop.

        Args:
            wishes: priority, adapter, keep, context, share, namespace, hints and yields, see `add_request`.

        Returns:
            Its deltas. Whoever stops reading before the end calls `close`, which cancels the request.

        Raises:
            RequestError, CapacityError: refused.
        """
        request = self._prepare(prompt, params, request_id, **wishes)
        subscriber = Subscriber()
        self._submit(request, partial(self._courier.post, subscriber))
        self._driver.start()
        return Stream(request, subscriber.queue, partial(self._abandon, request))

    def _abandon(self, request: Request) -> None:
        """Cancel it, unless it has ended and its name is another's by now."""
        if self._requests.get(request.request_id) is request:
            self.cancel(request.request_id)

    def close(self) -> None:
        """End the background thread and every request; waiting consumers get a RequestError. Idempotent.

        What is cached is written to the first tier that lasts, where the runner has one; its own `close` closes it.
        """
        if self._closed:
            return
        self._closed = True
        self._driver.stop()
        with self._lock:
            self._drain()
            self.core.abort(RequestError("the engine was closed"))
            self._flush()
        self.opener.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- look -------------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Counters and queues, as a snapshot."""
        return self.core.stats(requests=self._submitted, live_requests=len(self._requests))

    def between(self, work: Callable[[], T]) -> Future[T]:
        """Call `work` where no step runs: now if nobody is stepping, else before the next step.

        For a look at what steps change. Everybody's tokens wait for it, so it should take a millisecond at most.

        Returns:
            Its result, or its error.
        """
        future: Future[T] = Future()

        def order() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - handed to whoever asked
                future.set_exception(error)
            else:
                future.set_result(result)

        self._inbox.append(order)
        self._take_up()
        return future

    def held_bytes(self) -> dict[str, int]:
        """What each live request's tables reference now; blocks that samples share count for each of them."""
        held = {}
        for name, request in list(self._requests.items()):
            tables = [sample.table for sample in request.samples]
            held[name] = sum(table.held_bytes() for table in tables if table is not None)
        return held
