"""One request's deltas as an event loop reads them. No torch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

from quire.engine.request import Delta, Request

__all__ = ["Stream"]


class Stream:
    """An asynchronous iterator over a submitted request's deltas; the last one carries the output.

    Args:
        request: as checked: its tokens, limits and seed.
        queue: where its deltas arrive.
        abandon: cancels the request.
    """

    def __init__(
        self, request: Request, queue: asyncio.Queue[Delta], abandon: Callable[[], None]
    ) -> None:
        self.request = request
        self._queue = queue
        self._abandon = abandon
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """The next delta. Raises the error that ended the request."""
        if self._ended:
            raise StopAsyncIteration
        delta = await self._queue.get()
        self._ended = delta.output is not None
        if delta.error is not None:
            raise delta.error
        return delta

    def close(self) -> None:
        """Cancel the request unless it has ended. Idempotent."""
        if not self._ended:
            self._ended = True
            self._abandon()
