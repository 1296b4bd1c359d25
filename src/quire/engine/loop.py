"""Between one background thread that steps and many event loops that wait.

The engine hands a step's deltas to a `Courier`, which crosses into each event loop once per step, however many streams
wait there. A `Driver` is the thread: it steps while there is work and sleeps otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

from quire.engine.request import Delta

__all__ = ["Courier", "Driver", "Subscriber"]

logger = logging.getLogger(__name__)


class Subscriber:
    """One stream's end: the event loop it lives in and the queue it reads."""

    __slots__ = ("loop", "queue")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Delta] = asyncio.Queue()


class Courier:
    """Collects a step's deltas and delivers them, one crossing per event loop."""

    __slots__ = ("_mail",)

    def __init__(self) -> None:
        self._mail: dict[asyncio.AbstractEventLoop, list[tuple[Subscriber, Delta]]] = {}

    def post(self, subscriber: Subscriber, delta: Delta) -> None:
        """Keep a delta for the next `flush`."""
        self._mail.setdefault(subscriber.loop, []).append((subscriber, delta))

    def flush(self) -> list[str]:
        """Deliver all that was posted.

        Returns:
            Ids of requests whose event loop is closed: nobody waits for them any more.
        """
        if not self._mail:
            return []
        mail, self._mail = self._mail, {}
        lost: list[str] = []
        for loop, letters in mail.items():
            try:
                loop.call_soon_threadsafe(_hand_out, letters)
            except RuntimeError:  # the loop was closed under its streams
                lost += [delta.request_id for _, delta in letters if delta.output is None]
        return lost


def _hand_out(letters: list[tuple[Subscriber, Delta]]) -> None:
    for subscriber, delta in letters:
        subscriber.queue.put_nowait(delta)


class Driver:
    """One daemon thread that calls `turn` while `has_work`, and sleeps until `wake` otherwise.

    Args:
        turn: one step; an exception has been delivered to whom it concerns before it arrives here.
        has_work: is there anything to step?
    """

    def __init__(self, turn: Callable[[], None], has_work: Callable[[], bool]) -> None:
        self._turn = turn
        self._has_work = has_work
        self._awake = threading.Event()
        self._closing = False
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, once."""
        with self._starting:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="quire-engine", daemon=True)
                self._thread.start()

    def wake(self) -> None:
        """There may be work."""
        self._awake.set()

    def stop(self) -> None:
        """End the thread after the step it is in. Idempotent; not to be called from the thread itself."""
        with self._starting:
            self._closing = True
        self._awake.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            if not self._has_work():
                self._awake.wait()
                self._awake.clear()
                continue
            try:
                self._turn()
            except Exception:  # the waiting consumers have it; the thread serves the next ones
                logger.exception("a step failed; its requests were told")
