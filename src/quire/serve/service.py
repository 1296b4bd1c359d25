"""Requests in, deltas out: the event loop's side of the one engine.

    endpoint ── open_run ── gate ── engine.submit ── Run ── deltas ── endpoint
                                         │
                                  the engine's one thread

A `Run` is one HTTP request: one or several prompts, each a request of the engine. Whatever becomes of it, `close` gives
back its pass and cancels what still runs.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from quire.engine import Delta, Engine, RequestOutput, SamplingParams
from quire.engine.stream import Stream
from quire.errors import CapacityError, ConfigError
from quire.retention import parse_keep
from quire.serve.admission import Gate, Pass
from quire.serve.config import ServeConfig
from quire.serve.errors import ApiError, as_api_error
from quire.serve.forms import CacheOptions
from quire.serve.grammar import Grammar, Grammars, GrammarSource
from quire.serve.keys import Caller
from quire.serve.metrics import Meters
from quire.serve.prompt import Prompts
from quire.serve.tracing import Tracing
from quire.serve.watch import Watch
from quire.store.namespace import Hints, Tenants

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = ["ClientGoneError", "Run", "Service", "Usage", "unless_gone"]

logger = logging.getLogger(__name__)

HEALTH_S = 10.0
"""A decode step takes longer than this: the loop is not healthy."""

FRESH_S = 2.0
"""So long ago may the last token be to count as a sign of life."""

MOST_OWNERS = 4096
_FILE = re.compile(r"\b(file|map)\s*[=:]")

T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one request.

    Args:
        prompt_tokens, cached_tokens: of all prompts; the cached ones are among them.
        output_tokens: of all samples.
    """

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int

    def openai(self) -> dict[str, Any]:
        """As chat and completions say it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Service:
    """One model being served.

    Args:
        engine: nobody else steps it.
        config: what the operator allows.
        name: the model's, as clients write it.
        kv, keep: the recipe and policy that the engine's cache runs.
        secret: from which tenants' salts follow; None: one that ends with the process.
        gate: where several models have one; None: its own.
        tracing: makes a span of each request; None: of none.
    """

    def __init__(
        self,
        engine: Engine,
        config: ServeConfig,
        name: str,
        *,
        kv: str = "auto",
        keep: str = "full",
        secret: bytes | None = None,
        gate: Gate | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.engine = engine
        self.config = config
        self.name = name
        self.kv = kv
        self.keep = keep
        self.prompts = Prompts(engine.tokenizer, engine.runner.max_context_tokens)
        self.tracing = tracing
        self.grammars = Grammars(
            engine.tokenizer, engine.runner.vocab_size, sorted(engine.intake.eos_token_ids)
        )
        self.gate = gate or Gate(config)
        self.tenants = Tenants(secret)
        self.owners: dict[bytes, str] = {}
        """Salt -> tenant, of those who asked last: whose a tree of prefixes is."""
        self.meters = Meters(name)
        self.watch = Watch(self)
        self.created_s = int(time.time())
        self.runs: set[Run] = set()
        self.last_token_s = float("-inf")
        self._probing = asyncio.Lock()
        adapters = getattr(getattr(engine.runner, "adapters", None), "names", ())
        self.models: dict[str, str | None] = {name: None} | {str(a): str(a) for a in adapters}
        self.served: tuple[str, ...] = (name,)
        """Names of all models and adapters of the server."""
        self.shares = getattr(engine.runner, "sharing", None) is not None

    # -- what a request may ask ----------------------------------------------------------------------------------

    def cache_wishes(self, caller: Caller, options: CacheOptions | None) -> dict[str, Any]:
        """What `submit` is told about the cache: whose it is, and the request's own wishes within the limits.

        Raises:
            ApiError: a wish that this server does not grant.
        """
        options = options or CacheOptions()
        fixed = {"kv": self.kv} | ({"keep": self.keep} if self.config.fixed_keep else {})
        for field_name, mine in fixed.items():
            asked = getattr(options, field_name)
            if asked is not None and asked != mine:
                raise ApiError(
                    400,
                    f"this server's cache runs {field_name}={mine!r} for all requests; ask for that, or leave it out",
                    param=f"cache.{field_name}",
                )
        for field_name in ("keep", "yields"):
            if _FILE.search(getattr(options, field_name) or ""):
                raise ApiError(
                    400,
                    "a request reads no files of the server's; what needs one is given when the server starts",
                    param=f"cache.{field_name}",
                )
        if options.yields is not None and self.config.fixed_keep:
            raise ApiError(
                400, "this server's requests give nothing up; leave it out", param="cache.yields"
            )
        if options.share == "prefix" and not self.shares:
            raise ApiError(400, "this server shares no prefixes", param="cache.share")
        keep = options.keep or self.keep
        if options.context_tokens is not None and not _scores(keep):
            raise ApiError(
                400,
                f"cache.context_tokens says after what tokens go, and cache.keep={keep!r} lets none go there; leave it "
                "out, or keep by score, as keep='kvzip:budget=0.5'",
                param="cache.context_tokens",
            )
        hints = None
        if options.priority is not None or options.keep_for_s is not None:
            most = self.config.max_cache_priority
            if options.priority is not None and options.priority > most:
                raise ApiError(
                    400, f"cache.priority is at most {most} here", param="cache.priority"
                )
            if (options.keep_for_s or 0) > self.config.max_keep_s:
                raise ApiError(
                    400,
                    f"cache.keep_for_s is at most {self.config.max_keep_s:g} here",
                    param="cache.keep_for_s",
                )
            if not self.shares or options.share == "off":
                raise ApiError(
                    400,
                    "priority and keep_for_s are about shared blocks; share some",
                    param="cache",
                )
            hints = Hints(options.priority or 0, options.keep_for_s or 0.0)
        namespace = self.tenants.of(caller.name, narrow=options.salt or "")
        self._note(namespace.salt, caller.name)
        return {
            "keep": options.keep,
            "context": options.context_tokens or 0,
            "yields": options.yields,
            "share": options.share,
            "namespace": namespace,
            "hints": hints,
        }

    def _note(self, salt: bytes, tenant: str) -> None:
        self.owners.pop(salt, None)
        self.owners[salt] = tenant
        if len(self.owners) > MOST_OWNERS:
            del self.owners[next(iter(self.owners))]

    async def grammar(self, source: GrammarSource | None) -> Grammar | None:
        """Compiles what a request's output must follow."""
        return None if source is None else await asyncio.to_thread(self.grammars.compile, source)

    def output_tokens(self, prompt_tokens: int, asked: int | None) -> int | None:
        """Most output tokens of a sample: what was asked, within the operator's limit.

        Raises:
            ApiError: it asks for more than the operator allows, or the prompt leaves no room.
        """
        context, most = self.prompts.context_tokens, self.config.max_output_tokens
        if prompt_tokens + (1 if asked != 0 else 0) > context:
            raise ApiError(
                400,
                f"the prompt has {prompt_tokens} tokens and the model's context {context}; shorten it",
                code="context_length_exceeded",
                param="prompt",
            )
        if asked is None or most is None:
            return asked if asked is not None else most
        if asked > most:
            raise ApiError(400, f"max_tokens is at most {most} here", param="max_tokens")
        return asked

    # -- running -------------------------------------------------------------------------------------------------

    def open_run(
        self,
        caller: Caller,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        adapter: str | None = None,
        cache: CacheOptions | None = None,
    ) -> Run:
        """Let a request in and queue its prompts.

        Raises:
            ApiError, RequestError: refused; nothing is queued.
        """
        if len(prompts) * params.n > self.config.max_samples:
            raise ApiError(
                400,
                f"{len(prompts)} prompts × n={params.n} are more than the {self.config.max_samples} samples "
                "that one request may have here",
                param="n",
            )
        wishes = self.cache_wishes(caller, cache)
        limits = [self.output_tokens(len(p), params.max_tokens) for p in prompts]
        shortest = min(map(len, prompts), default=0)
        if wishes["context"] > shortest:
            raise ApiError(
                400,
                f"cache.context_tokens={wishes['context']} is more than the prompt's {shortest} tokens; "
                "/tokenize counts them",
                param="cache.context_tokens",
            )
        room = self.prompts.context_tokens
        most = sum(
            len(p) + params.n * (room - len(p) if m is None else min(m, room - len(p)))
            for p, m in zip(prompts, limits, strict=True)
        )
        try:
            entry = self.gate.enter(caller, most)
        except ApiError as error:
            self.meters.refused(caller.name, error.code or "refused")
            raise
        run = Run(self, caller, entry)
        if self.tracing is not None:
            run.span = self.tracing.begin(
                adapter or self.name,
                caller.name,
                max_tokens=params.max_tokens,
                temperature=params.temperature,
                top_p=params.top_p,
                seed=params.seed,
            )
        try:
            for prompt, limit in zip(prompts, limits, strict=True):
                each = params if limit == params.max_tokens else _with_limit(params, limit)
                run.streams.append(self.engine.submit(prompt, each, adapter=adapter, **wishes))
        except CapacityError as error:
            run.close()
            raise ApiError(400, str(error), code="cache_too_small") from error
        except BaseException:
            run.close()
            raise
        self.runs.add(run)
        return run

    async def health(self) -> None:
        """Returns when the decode loop has been seen to work. Raises ApiError 503 otherwise."""
        if self.gate.draining:
            raise ApiError(503, "the server is shutting down", retry_after_s=self.config.drain_s)
        async with self._probing:  # many probes at once are one token
            if time.monotonic() - self.last_token_s >= FRESH_S:
                await self._probe()

    async def _probe(self) -> None:
        """One token, before all others."""
        token = min(self.engine.intake.eos_token_ids, default=0)
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        share = "off" if self.shares else None
        stream = self.engine.submit([token], params, priority=1000, share=share)
        try:
            async with asyncio.timeout(HEALTH_S):
                async for _ in stream:
                    self.last_token_s = time.monotonic()
        except TimeoutError:
            if time.monotonic() - self.last_token_s < HEALTH_S:
                return  # busy, and alive
            raise ApiError(503, f"no token within {HEALTH_S:g} s", retry_after_s=10.0) from None
        except Exception as error:
            logger.exception("the health check's request failed")
            raise ApiError(503, "the decode loop fails", retry_after_s=10.0) from error
        finally:
            stream.close()

    def drain(self) -> None:
        """No new requests from now on."""
        self.gate.draining = True
        self.watch.close()

    def abort(self) -> None:
        """End every request with an error that its client is told."""
        for run in list(self.runs):
            run.abort(ApiError(503, "the server is shutting down", code="draining"))

    def close(self) -> None:
        """End everything but the tracing, which others may use."""
        self.engine.close()


@dataclass(eq=False)
class Run:
    """One HTTP request on its way through the engine. Close it, always."""

    service: Service
    caller: Caller
    entry: Pass
    streams: list[Stream] = field(default_factory=list)
    outputs: dict[int, RequestOutput] = field(default_factory=dict)
    began_s: float = field(default_factory=time.monotonic)
    started: bool = False
    failure: str | None = None
    span: Any = None
    _mail: asyncio.Queue[tuple[int, Delta | Exception | None]] = field(
        default_factory=asyncio.Queue
    )
    _last_s: dict[tuple[int, int], float] = field(default_factory=dict)
    _looked: set[int] = field(default_factory=set)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(number of the prompt, delta) of all prompts, as they come.

        Raises:
            ApiError: out of time, the server ends, or what ended the request in the engine.
        """

        async def pump(at: int, stream: Stream) -> None:
            try:
                async for delta in stream:
                    self._mail.put_nowait((at, delta))
            except Exception as error:  # noqa: BLE001 - handed to the reader
                self._mail.put_nowait((at, error))
            else:
                self._mail.put_nowait((at, None))

        tasks = [asyncio.create_task(pump(at, s)) for at, s in enumerate(self.streams)]
        try:
            left = len(tasks)
            while left:
                try:
                    at, what = await self._next()
                    if isinstance(what, Exception):
                        raise as_api_error(what) from what
                except ApiError as error:
                    self.failure = error.code or str(error.status)
                    raise
                if what is None:
                    left -= 1
                else:
                    self._observe(at, what)
                    yield at, what
        finally:
            for task in tasks:
                task.cancel()

    async def finish(self) -> list[RequestOutput]:
        """All of it, in the order of the prompts."""
        async for _ in self.deltas():
            pass
        return [self.outputs[at] for at in range(len(self.streams))]

    def usage(self) -> Usage:
        """Of what has ended, or of what is known so far."""
        figures = [stream.request.figures for stream in self.streams]
        return Usage(
            sum(f.prompt_tokens for f in figures),
            sum(f.cached_tokens for f in figures),
            sum(f.output_tokens for f in figures),
        )

    def abort(self, error: ApiError) -> None:
        """Let `deltas` raise this."""
        self._mail.put_nowait((0, error))

    def close(self) -> None:
        """Cancel what still runs and leave. Idempotent."""
        for stream in self.streams:
            stream.close()
        self.service.runs.discard(self)
        if self.entry.open:
            usage = self.usage()
            done = bool(self.streams) and len(self.outputs) == len(self.streams)
            sharing = self.service.engine.opener.sharing
            if sharing is not None:
                for stream in self.streams:
                    figures = stream.request.figures
                    self.service.meters.looked(self.caller.name, figures, sharing.grain)
            if self.service.tracing is not None and self.span is not None:
                self._end_span(done=done)
            self.entry.leave(usage.prompt_tokens - usage.cached_tokens + usage.output_tokens)
            self.service.meters.ended(
                self.caller.name, usage, time.monotonic() - self.began_s, done=done
            )

    def _end_span(self, *, done: bool) -> None:
        tracing, outputs = self.service.tracing, self.outputs.values()
        assert tracing is not None
        reasons = [str(sample.finish_reason) for output in outputs for sample in output.outputs]
        error = self.failure or (None if done else "cancelled")
        tracing.ended(self.span, [s.request.figures for s in self.streams], reasons, error)

    async def _next(self) -> tuple[int, Delta | Exception | None]:
        """The next letter; gives up when the time is over."""
        if not self._mail.empty():
            return self._mail.get_nowait()
        config = self.service.config
        limit_s = config.request_timeout_s
        if not self.started:
            limit_s = min(limit_s, config.queue_timeout_s)
        try:
            async with asyncio.timeout(max(0.0, self.began_s + limit_s - time.monotonic())):
                return await self._mail.get()
        except TimeoutError:
            pass
        if self.started:
            raise ApiError(
                504,
                f"the request was not done after {limit_s:g} s; lower max_tokens",
                code="timeout",
            )
        raise ApiError(
            503, f"no first token within {limit_s:g} s", code="queue_timeout", retry_after_s=5.0
        )

    def _observe(self, at: int, delta: Delta) -> None:
        now = self.service.last_token_s = time.monotonic()
        meters, tenant = self.service.meters, self.caller.name
        if delta.token_ids:
            place = (at, delta.index)
            if place in self._last_s:
                meters.next_token(tenant, now - self._last_s[place])
            elif not self.started:
                meters.first_token(tenant, now - self.began_s)
                if self.span is not None:
                    self.span.add_event("first token")
            self._last_s[place] = now
            self.started = True
            meters.tokens(tenant, "output", len(delta.token_ids))
        if at not in self._looked:
            self._looked.add(at)
            figures = self.streams[at].request.figures
            meters.tokens(tenant, "found", figures.cached_tokens)
            meters.tokens(tenant, "computed", figures.prompt_tokens - figures.cached_tokens)
        if delta.output is not None:
            self.outputs[at] = delta.output


def _scores(keep: str) -> bool:
    """Whether tokens go by score; also where the engine will say what is wrong with it."""
    try:
        return parse_keep(keep).scores
    except ConfigError:
        return True


def _with_limit(params: SamplingParams, limit: int | None) -> SamplingParams:
    from dataclasses import replace

    return replace(params, max_tokens=limit)


async def unless_gone(request: Request, run: Run, work: Awaitable[T]) -> T:
    """The result of `work`, unless the client goes away: then the run is closed and this raises ClientGoneError."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        run.close()
