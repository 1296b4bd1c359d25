"""A Redis or Valkey server as a tier: blocks in segments of 1 to 4 MiB that several servers of a model share.

A server that evicts by itself takes keys of about the same age by chance; a chain of blocks soon loses a link, and is
cut there. What goes here is a segment, and we choose it: the one that was used longest ago, by a sorted set in the
server, which counts for all who share it. `segments.py` has the names.

Whatever the server says is verified; whatever it does not say in time is a TIMEOUT. The client's own retries are off:
they would spend the deadline on waiting.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, TypeVar

from quire.errors import ConfigError
from quire.store.tiers.address import RedisAddress
from quire.store.tiers.contract import Block, Outcome, TierCaps, TierHealth
from quire.store.tiers.envelope import HEADER_BYTES
from quire.store.tiers.segments import (
    BATCH_BYTES,
    LRU,
    PART,
    SECRET,
    USED,
    Pointer,
    batches,
    block_name,
    contents_of,
    count,
    divide,
    part_of,
    segment_name,
    unpack,
    use,
)

__all__ = ["RedisTier"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONNECTIONS = 2
"""Segments that are on their way at a time."""
READ_BYTES = 1 << 18
"""Of an answer at a time; the client's default, a quarter, costs a fifth of the speed."""
STORE_S = 5.0
"""A batch of stores that takes longer is given up, whatever its deadline says."""


class RedisTier:
    """Blocks in a server's memory.

    Args:
        address: of the server; one that is no cluster.
        capacity_bytes: of all blocks there, of whichever process and model. A server with a smaller `maxmemory` evicts,
            or refuses, by itself.
        timeout_s: for what has no deadline of its own.
        needed: raise also where it does not answer, or takes nothing.

    Raises:
        ConfigError: no capacity, the package `redis` is missing, a certificate cannot be read, or the server refuses
            us. One that does not answer is only warned of: it may come later.

    Cost: a load is two round trips and a copy; the bytes arrive in the tiers' loop.
    """

    name = "redis"

    def __init__(
        self,
        address: RedisAddress,
        capacity_bytes: int,
        *,
        timeout_s: float = 1.0,
        needed: bool = False,
    ) -> None:
        if capacity_bytes < 2 * HEADER_BYTES:
            raise ConfigError(f"a redis tier of {capacity_bytes} bytes holds nothing; give it more")
        self.caps = TierCaps(
            persistent=True,
            shared=True,
            local=False,
            max_block_bytes=capacity_bytes - HEADER_BYTES,
            batch_bytes=BATCH_BYTES,
        )
        self.address, self.capacity_bytes = address, capacity_bytes
        self.timeout_s, self._needed = min(1.0, timeout_s), needed
        self._why = ""  # it takes nothing
        self._writing = asyncio.Lock()
        self._secret = secrets.token_bytes(32)
        self._client = self._connect()
        self._greet()

    def secret(self) -> bytes:
        """32 bytes that all who share the server have: what names depend on that others must not guess."""
        return self._secret

    # -- asked ---------------------------------------------------------------------------------------------------

    async def lookup(self, ns: bytes, keys: Sequence[bytes]) -> int:
        """See `Tier`."""

        async def work() -> int:
            found = await self._pointers(ns, keys)
            parts = list(dict.fromkeys(p for pointer in found for p in pointer))
            async with self._client.pipeline(transaction=False) as pipe:
                for part in parts:
                    pipe.exists(segment_name(ns, part))
                there = dict(zip(parts, await pipe.execute(), strict=True))
            whole = (bool(pointer) and all(map(there.get, pointer)) for pointer in found)
            return next((i for i, here in enumerate(whole) if not here), len(keys))

        return await self._soon(work) if keys else 0

    async def load(self, ns: bytes, wanted: Sequence[Block], *, deadline: float) -> list[Outcome]:
        """See `Tier`."""
        out = [Outcome.TIMEOUT] * len(wanted)
        await self._within(deadline, out, lambda: self._load(ns, wanted, out))
        return out

    async def store(self, ns: bytes, blocks: Sequence[Block], *, deadline: float) -> list[Outcome]:
        """See `Tier`."""
        out = [Outcome.TIMEOUT] * len(blocks)

        async def work() -> None:
            async with self._writing:
                await self._store(ns, blocks, out)

        await self._within(min(deadline, monotonic() + STORE_S), out, work)
        return out

    async def touch(self, ns: bytes, keys: Sequence[bytes]) -> None:
        """See `Tier`."""

        async def work() -> None:
            found = await self._pointers(ns, keys)
            parts = list(dict.fromkeys(p for pointer in found for p in pointer))
            if parts:
                async with self._client.pipeline(transaction=False) as pipe:
                    use(pipe, ns, parts)
                    pipe.touch(*(segment_name(ns, part) for part in parts))
                    await pipe.execute(raise_on_error=False)  # a full server refuses, and is read

        if keys:
            await self._soon(work)

    async def drop(self, ns: bytes, keys: Sequence[bytes]) -> None:
        """See `Tier`."""

        async def work() -> None:
            found = await self._pointers(ns, keys)
            parts = list(dict.fromkeys(p for pointer in found for p in pointer))
            async with self._client.pipeline(transaction=False) as pipe:
                for key, pointer in zip(keys, found, strict=True):
                    for part in pointer:
                        pipe.hdel(segment_name(ns, part), key)
                    pipe.delete(block_name(ns, key))
                for part in parts:
                    pipe.exists(segment_name(ns, part))
                left = (await pipe.execute())[-len(parts) or None :]
            await self._uncount(ns, [p for p, there in zip(parts, left, strict=False) if not there])

        if keys:
            await self._soon(work)

    async def health(self) -> TierHealth:
        """See `Tier`."""
        try:
            async with asyncio.timeout(self.timeout_s):
                async with self._client.pipeline(transaction=False) as pipe:
                    pipe.set(SECRET, self._secret, nx=True)  # where it was evicted
                    pipe.hmget(USED, "bytes", "blocks")
                    found = (await pipe.execute(raise_on_error=False))[1]
                if isinstance(found, Exception):
                    raise found
                n_bytes, blocks = (int(x or 0) for x in found)
        except self._errors as e:
            why = str(e) or "no answer in time"
            return TierHealth(ok=False, capacity_bytes=self.capacity_bytes, why=why)
        return TierHealth(
            not self._why, max(0, blocks), max(0, n_bytes), self.capacity_bytes, self._why
        )

    async def close(self) -> None:
        """See `Tier`."""
        with suppress(*self._errors):
            await self._client.aclose(close_connection_pool=True)

    # -- loads ---------------------------------------------------------------------------------------------------

    async def _load(self, ns: bytes, wanted: Sequence[Block], out: list[Outcome]) -> None:
        pointers = await self._pointers(ns, [w.key for w in wanted])
        asked: dict[bytes, list[int]] = {}  # by segment, in the order in which they are wanted
        for i, pointer in enumerate(pointers):
            if not pointer:
                out[i] = Outcome.MISS
            for part in pointer:
                asked.setdefault(part, []).append(i)
        come: list[dict[bytes, bytes | None]] = [{} for _ in wanted]
        left = iter(asked.items())

        async def fetch() -> None:
            for part, blocks in left:
                async with self._client.pipeline(transaction=False) as pipe:
                    pipe.hmget(segment_name(ns, part), [wanted[i].key for i in blocks])
                    use(pipe, ns, [part])
                    values = (await pipe.execute(raise_on_error=False))[0]
                if isinstance(values, Exception):  # only the load matters
                    raise values
                for i, value in zip(blocks, values, strict=True):
                    come[i][part] = value
                    if len(come[i]) == len(set(pointers[i])):
                        out[i] = unpack(ns, wanted[i], [come[i][p] for p in pointers[i]])
                        come[i].clear()

        await _together(fetch, min(CONNECTIONS, len(asked)))
        bad = [
            w.key
            for w, o, p in zip(wanted, out, pointers, strict=True)
            if p and o in (Outcome.CORRUPT, Outcome.MISS)
        ]
        with suppress(*self._errors):  # they are of no use; what has come is
            await self.drop(ns, bad)

    # -- stores --------------------------------------------------------------------------------------------------

    async def _store(self, ns: bytes, blocks: Sequence[Block], out: list[Outcome]) -> None:
        here = await self._here(ns, [b.key for b in blocks])
        new: list[int] = []
        for i, block in enumerate(blocks):
            if here[i]:
                out[i] = Outcome.STORED
            elif len(block.data) > self.caps.max_block_bytes:
                out[i] = Outcome.REJECTED
            else:
                new.append(i)
        for batch in batches(new, [len(b.data) for b in blocks]):
            outcome = await self._put(ns, [blocks[i] for i in batch])
            for i in batch:
                out[i] = outcome

    async def _here(self, ns: bytes, keys: Sequence[bytes]) -> list[bool]:
        """Whether all of each block is there."""
        found = await self._pointers(ns, keys)
        asked = [(i, part) for i, pointer in enumerate(found) for part in pointer]
        here = [bool(pointer) for pointer in found]
        if asked:
            async with self._client.pipeline(transaction=False) as pipe:
                for i, part in asked:
                    pipe.hexists(segment_name(ns, part), keys[i])
                for (i, _), there in zip(asked, await pipe.execute(), strict=True):
                    here[i] = here[i] and bool(there)
        return here

    async def _put(self, ns: bytes, blocks: Sequence[Block]) -> Outcome:
        """Blocks of one segment, or one block of several; all of it or nothing."""
        contents = contents_of(ns, blocks)
        parts = [part_of(ns, number, content) for number, content in enumerate(contents)]
        try:
            await self._make_room(sum(PART.unpack(part)[1] for part in parts))
            async with self._client.pipeline(transaction=True) as pipe:
                for part, content in zip(parts, contents, strict=True):
                    pipe.hset(segment_name(ns, part), mapping=content)
                    count(pipe, part, 1)
                for block in blocks:
                    pipe.set(block_name(ns, block.key), b"".join(parts))
                use(pipe, ns, parts, new=True)
                added = (await pipe.execute())[-len(parts) :]
            known = [part for part, new in zip(parts, added, strict=True) if not new]
            if known:  # they were counted before
                async with self._client.pipeline(transaction=False) as pipe:
                    for part in known:
                        count(pipe, part, -1)
                    await pipe.execute()
        except (
            self._refusals
        ) as e:  # the server has no room, or does not let us write; it may still be read
            self._why = f"{self.address} takes nothing: {e}"
            return Outcome.REJECTED
        self._why = ""
        return Outcome.STORED

    async def _make_room(self, n_bytes: int) -> None:
        """Lets the segments go that were used longest ago."""
        used = int(await self._client.hget(USED, "bytes") or 0)
        while used + n_bytes > self.capacity_bytes:
            popped = await self._client.zpopmin(LRU, 1)
            if not popped:  # somebody emptied the server
                await self._client.delete(USED)
                return
            ns, part = popped[0][0][: -PART.size], popped[0][0][-PART.size :]
            name = segment_name(ns, part)
            keys = await self._client.hkeys(name)
            async with self._client.pipeline(transaction=True) as pipe:
                count(pipe, part, -1)
                pipe.unlink(name, *(block_name(ns, key) for key in keys))
                used = (await pipe.execute())[0]

    # -- within --------------------------------------------------------------------------------------------------

    async def _uncount(self, ns: bytes, gone: list[bytes]) -> None:
        """Segments of which nothing is left; each is counted off by whoever takes it from the set."""
        for part in gone:
            if await self._client.zrem(LRU, ns + part):
                async with self._client.pipeline(transaction=True) as pipe:
                    count(pipe, part, -1)
                    await pipe.execute()

    async def _pointers(self, ns: bytes, keys: Sequence[bytes]) -> list[Pointer]:
        """Where each block is; [] where it is not, or where what is said makes no sense."""
        found = await self._client.mget([block_name(ns, key) for key in keys]) if keys else []
        if len(found) != len(keys):
            raise OSError(f"{self.address} gave {len(found)} answers to {len(keys)} questions")
        return [divide(value) for value in found]

    async def _within(
        self, deadline: float, out: list[Outcome], work: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """Runs it until then; what it has not settled stays a TIMEOUT, or becomes an ERROR."""
        left = deadline - monotonic()
        if left <= 0 or not out:
            return
        try:
            async with asyncio.timeout(left):
                await self._again(work)
        except TimeoutError:
            pass
        except self._errors as e:
            logger.debug("tier redis at %s: %s", self.address, e)
            out[:] = [Outcome.ERROR if o is Outcome.TIMEOUT else o for o in out]

    async def _soon(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What has no deadline of its own."""
        async with asyncio.timeout(self.timeout_s):
            return await self._again(work)

    async def _again(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """A second time over new connections, where one turned out to be of a server that has ended since."""
        try:
            return await work()
        except self._broken:
            await self._client.connection_pool.disconnect(inuse_connections=False)
            return await work()

    def _connect(self) -> Any:
        try:
            import redis
            from redis.asyncio import BlockingConnectionPool, Redis, SSLConnection
            from redis.asyncio.connection import Connection, UnixDomainSocketConnection
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ImportError as e:
            raise ConfigError(
                "a redis tier needs the package redis; pip install 'quire[redis]'"
            ) from e
        nonsense = (LookupError, TypeError, ValueError)  # what reading a nonsensical answer raises
        self._errors: tuple[type[Exception], ...] = (
            OSError,
            redis.exceptions.RedisError,
            *nonsense,
        )
        self._broken: tuple[type[Exception], ...] = (OSError, redis.exceptions.ConnectionError)
        self._refusals: tuple[type[Exception], ...] = (
            redis.exceptions.ResponseError,
            redis.exceptions.ExecAbortError,
        )
        kind = SSLConnection if self.address.tls else Connection
        pool = BlockingConnectionPool(
            connection_class=UnixDomainSocketConnection if self.address.path else kind,
            max_connections=CONNECTIONS + 2,
            timeout=None,  # whoever waits has a deadline
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            socket_read_size=READ_BYTES,
            **self.address.options(),
        )
        return Redis(connection_pool=pool)

    def _greet(self) -> None:
        """Whether the server is one, and lets us in; the secret that is there, or ours from now on."""
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        options = self.address.options()
        if self.address.path:
            options["unix_socket_path"] = options.pop("path")
        refused = (
            redis.exceptions.AuthenticationError,
            redis.exceptions.AuthorizationError,
            redis.exceptions.NoPermissionError,
        )
        limit = {"socket_timeout": 2.0, "socket_connect_timeout": 2.0}
        once = Retry(NoBackoff(), 0)
        client = redis.Redis(ssl=self.address.tls, protocol=2, retry=once, **limit, **options)
        try:
            client.set(SECRET, self._secret, nx=True)
            found: Any = client.get(SECRET)
            if isinstance(found, bytes) and len(found) == 32:
                self._secret = found
        except refused as e:
            raise ConfigError(
                f"{self.address} refuses us ({e}); give QUIRE_REDIS_PASSWORD, or redis://USER@… for another user"
            ) from None
        except redis.exceptions.ResponseError as e:
            if "DB index" in str(e):
                raise ConfigError(
                    f"{self.address} refuses us ({e}); name another database"
                ) from None
            self._why = str(e)
            self._warn(e, "it is read, and not written to")
        except redis.exceptions.InvalidResponse as e:
            raise ConfigError(
                f"{self.address} does not speak as Redis does ({e}); name another port"
            ) from None
        except self._errors as e:
            if isinstance(e, FileNotFoundError):
                raise ConfigError(f"{self.address}: {e}") from None
            self._warn(e)
        finally:
            client.close()

    def _warn(self, e: Exception, so: str = "going on without it until it answers") -> None:
        if self._needed:
            raise ConfigError(f"{self.address}: {e}") from None
        logger.warning("tier redis at %s: %s; %s", self.address, e, so)


async def _together(work: Callable[[], Coroutine[Any, Any, None]], n: int) -> None:
    """So many at a time; the first that fails, or a deadline, ends them all."""
    tasks = [asyncio.create_task(work()) for _ in range(n)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
