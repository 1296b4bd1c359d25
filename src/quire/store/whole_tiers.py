"""Published compactions over tiers: one goes down as a whole, in parts of one size, and comes up whole or not at all.

    body     |blocks of every chain|positions|the keeper's books|        one document, see `store.snapshot`
    parts    |head|...|.......|.......|..0|                              the first under the compaction's name, the
                                                                         others under the body's digest and their number

A tier checks each part against its name and the tokens of the full prefix. As the names of all but the first follow
from what they say together, parts of two different computations are never put together. A part that is bad, late or
gone makes all of it a miss, and the request computes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import pairwise
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from quire.errors import CapacityError, ConfigError
from quire.store.snapshot import KEEPER, chain_bytes, chain_record, restore_chain, spec_digest
from quire.store.tiers.contract import Block, Outcome
from quire.store.tiers.envelope import checksum
from quire.store.tiers.slots import buffer_of
from quire.store.whole import Whole

if TYPE_CHECKING:
    from quire.store.chain import Chain
    from quire.store.pool import BlockPool
    from quire.store.tiering import Tiering

__all__ = ["Rising", "WholeStats", "WholeTiers"]

logger = logging.getLogger(__name__)

FORMAT = 1
PART_BYTES = 256 << 10
_HEAD = struct.Struct("<8sQ16s32x")
"""magic, bytes of the body, its checksum."""
MAGIC = b"QUIREWH\x01"
FIRST_RATE = float(1 << 29)
"""Bytes that are packed in a second, before one was."""

Revive = Callable[[list["Chain"], Mapping[str, Any], Mapping[str, np.ndarray]], Any]
"""revive(chains, about, arrays): the keeper that was recorded. Raises ConfigError, KeyError, ValueError."""


@dataclass(slots=True)
class WholeStats:
    """Counters since the start.

    Args:
        sent: that went down, when they were evicted or at the end.
        dropped: evicted and not sent: no time in that step, or no room in the queue.
        loaded: that came up.
        truncated: that did not come though their first part was there, by reason.
    """

    sent: int = 0
    dropped: int = 0
    loaded: int = 0
    truncated: dict[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class Rising:
    """One compaction that is asked for below.

    Args:
        name, tokens, policy: as of `Whole`.
        done: all that comes has come: `document`, or nothing.
        document: what its body says of itself, and its arrays.
        users: requests that wait for it.
        whole: taken, and being written; `todo`: the blocks that are not yet.
    """

    name: bytes
    tokens: bytes
    policy: str
    done: threading.Event = field(default_factory=threading.Event)
    document: tuple[dict[str, Any], dict[str, np.ndarray]] | None = None
    users: int = 1
    asked_s: float = 0.0
    abandoned: bool = False
    whole: Whole | None = None
    todo: list[tuple[BlockPool, int, np.ndarray]] = field(default_factory=list)


class WholeTiers:
    """The published compactions of one prefix cache below the device.

    Args:
        tiering: whose tiers and whose time for copies they use.
        version: of the code that computes what stays: another's is never found.
    """

    def __init__(self, tiering: Tiering, version: str) -> None:
        self.tiering, self.stack = tiering, tiering.stack
        self.store = tiering.sharing.store
        self.stats = WholeStats()
        self._about = sha256(f"{FORMAT} {version} {spec_digest(self.store.spec)}".encode()).digest()
        self._coming: dict[bytes, Rising] = {}
        self._one = asyncio.Semaphore(1)  # bytes of one are staged at a time
        self._rate = FIRST_RATE

    def report(self) -> dict[str, Any]:
        """Counters as plain data."""
        return asdict(self.stats)

    # -- down ----------------------------------------------------------------------------------------------------

    def evicted(self, whole: Whole) -> None:
        """One is about to be given up: it goes down, if this step has the time."""
        if not self.tiering.usable:
            return
        pace, began = self.tiering.pace, monotonic()
        fits = self.stack.room(0, whole.block_bytes + 2 * PART_BYTES)
        if not fits or whole.block_bytes > pace.left_s * self._rate:
            self.stats.dropped += 1
            return
        sent = all(self.stack.put(b, 0) for b in self._parts(whole))
        pace.spent(monotonic() - began)
        self.stats.sent += sent
        self.stats.dropped += not sent

    def flush(self, level: int, deadline: float) -> None:
        """All of them go to a tier; waits for room in its queue."""
        for whole in self.tiering.sharing.wholes:
            for block in self._parts(whole):
                while not self.stack.room(level, len(block.data)):
                    self.stack.kick()
                    if monotonic() > deadline or self.stack.levels[level].resting:
                        return
                    threading.Event().wait(0.002)
                self.stack.put(block, level)
            self.stats.sent += 1

    def _parts(self, whole: Whole) -> list[Block]:
        """What is stored of one, the first part last: where it is, the others were written before."""
        from safetensors.numpy import save

        began = monotonic()
        about, books = whole.state.record()
        arena = self.store.arena
        arrays = {
            f"chain{i}": chain_bytes(arena, c, whole.length) for i, c in enumerate(whole.chains)
        }
        arrays |= {f"own{i}": c.own for i, c in enumerate(whole.chains) if c.own is not None}
        arrays |= {KEEPER + name: x for name, x in books.items()}
        said = {
            "policy": whole.policy,
            "length": whole.length,
            "chains": [chain_record(c) for c in whole.chains],
            "keeper": about,
        }
        body = np.frombuffer(save(arrays, {"quire": json.dumps(said)}), np.uint8)
        digest = checksum(body)
        n = _parts_of(len(body))
        keys = self._keys(whole.name, digest, n)
        out = []
        for i in range(n):
            data = buffer_of(PART_BYTES)
            data[:] = 0
            first = i * PART_BYTES - _HEAD.size if i else 0
            part = body[first : (i + 1) * PART_BYTES - _HEAD.size]
            at = 0 if i else _HEAD.size
            data[at : at + len(part)] = part
            if not i:
                data[:at] = np.frombuffer(_HEAD.pack(MAGIC, len(body), digest), np.uint8)
            out.append(Block(keys[i], keys[max(0, i - 1)], whole.tokens, data))
        took = max(monotonic() - began, 1e-6)
        self._rate += 0.5 * (whole.block_bytes / took - self._rate)
        return [*out[1:], out[0]]

    def _keys(self, name: bytes, digest: bytes, n_parts: int) -> list[bytes]:
        first = sha256(name + self._about).digest()
        rest = (sha256(first + digest + i.to_bytes(8)).digest() for i in range(1, n_parts))
        return [first, *rest]

    # -- up ------------------------------------------------------------------------------------------------------

    def want(self, name: bytes, tokens: bytes, policy: str) -> Rising | None:
        """Asks the tiers for one; None where there is nobody to ask."""
        if not self.tiering.usable:
            return None
        rising = self._coming.get(name)
        if rising is not None:
            rising.users += 1
            return rising
        rising = self._coming[name] = Rising(name, tokens, policy)
        self.stack.start(self._run(rising))
        return rising

    def ready(self, rising: Rising) -> bool:
        """Whether it has come to its end, or is to be waited for no longer."""
        if rising.done.is_set() or rising.abandoned:
            return True
        now, limit = monotonic(), 3 * self.tiering.deadline_s + 1.0
        rising.asked_s = rising.asked_s or now
        if now - rising.asked_s > limit:
            self._cut(rising, "abandoned")
            return True
        return False

    def abandon(self, rising: Rising) -> None:
        """One request less waits for it."""
        rising.users -= 1
        if not rising.users:
            self._end(rising)

    def bind(self, rising: Rising, revive: Revive) -> bool:
        """Publishes what has come, as far as this step's time goes; whether there is nothing more to wait for."""
        if rising.abandoned or not rising.done.is_set():
            return rising.abandoned
        if rising.whole is None and rising.document is not None:
            try:
                self._take(rising, revive)
            except CapacityError:
                self._cut(rising, "no room")
            except (ConfigError, KeyError, TypeError, ValueError):
                self._cut(rising, Outcome.CORRUPT.value)
        pace, began, first = self.tiering.pace, monotonic(), True
        while rising.todo:
            if not first and pace.left_s <= 0:
                pace.spent(monotonic() - began)
                return False
            pool, block, row = rising.todo.pop()
            self.tiering.mover.write(pool, block, row)
            first = False
        pace.spent(monotonic() - began)
        if rising.whole is not None:
            whole, rising.whole = rising.whole, None
            self.tiering.sharing.wholes.adopt(whole)
            self.stats.loaded += 1
        self._end(rising)
        return True

    def _take(self, rising: Rising, revive: Revive) -> None:
        """Blocks for all of it, held and not written yet. Raises CapacityError, and what a bad document raises."""
        assert rising.document is not None
        said, arrays = rising.document
        if said["policy"] != rising.policy:
            raise ValueError(said["policy"])
        chains: list[Chain] = []
        todo: list[tuple[BlockPool, int, np.ndarray]] = []
        try:
            for i, record in enumerate(said["chains"]):
                rows = arrays[f"chain{i}"]
                chain = restore_chain(self.store, record, rows, arrays.get(f"own{i}"), chains)
                live = chain.live().tolist()
                todo += [(chain.pool, b, row) for b, row in zip(live, rows, strict=True)]
            books = {n.removeprefix(KEEPER): x for n, x in arrays.items() if n.startswith(KEEPER)}
            state = revive(chains, said["keeper"], books)
        except (CapacityError, ConfigError, KeyError, TypeError, ValueError):
            for chain in chains:
                while chain.count:
                    chain.pop()
            raise
        mine = [(pool, block) for pool, block, _ in todo]
        rising.whole = Whole(
            rising.name, rising.tokens, rising.policy, int(said["length"]), chains, state, mine
        )
        rising.todo = todo

    def _cut(self, rising: Rising, reason: str) -> None:
        """It does not come."""
        self.stats.truncated[reason] = self.stats.truncated.get(reason, 0) + 1
        self._end(rising)

    def _end(self, rising: Rising) -> None:
        """Nobody waits for it any more; what it holds goes back."""
        self._coming.pop(rising.name, None)
        rising.abandoned, rising.document = True, None
        whole, rising.whole, rising.todo = rising.whole, None, []
        for pool, block in whole.blocks if whole is not None else ():
            pool.release(block)

    # -- in the tiers' loop --------------------------------------------------------------------------------------

    async def _run(self, rising: Rising) -> None:
        """Never raises."""
        reason = ""
        try:
            async with self._one:
                if not rising.abandoned:
                    reason = await self._load(rising)
        except Exception:  # whatever it was: the request computes
            logger.exception("a compaction from the tiers broke")
            reason = "broken"
        finally:
            if reason:
                self.stats.truncated[reason] = self.stats.truncated.get(reason, 0) + 1
            rising.done.set()
            self.tiering.arrived.set()

    async def _load(self, rising: Rising) -> str:
        """Gives `rising` its document; else the reason, "" where nothing is there."""
        from safetensors.numpy import load

        deadline = monotonic() + self.tiering.deadline_s
        first = self._keys(rising.name, b"", 1)
        levels = await self.stack.locate(first)
        if levels[0] is None:
            return ""
        parts = [Block(first[0], first[0], rising.tokens, buffer_of(PART_BYTES))]
        [found] = await self.stack.load(parts, [levels[0]], deadline)
        if found is not Outcome.HIT:
            return str(found.value)
        magic, n_bytes, digest = _HEAD.unpack(parts[0].data[: _HEAD.size].tobytes())
        if magic != MAGIC or n_bytes > 2 * self.store.arena.total_bytes + PART_BYTES:
            return Outcome.CORRUPT.value
        keys = self._keys(rising.name, digest, _parts_of(n_bytes))
        levels = await self.stack.locate(keys)
        there = [x for x in levels if x is not None]
        if len(there) < len(keys):
            return Outcome.MISS.value
        rest = [
            Block(key, above, rising.tokens, buffer_of(PART_BYTES)) for above, key in pairwise(keys)
        ]
        for found in await self.stack.load(rest, there[1:], deadline):
            if found is not Outcome.HIT:
                return str(found.value)
        await self.stack.touch(keys)
        whole = b"".join(b.data.tobytes() for b in [*parts, *rest])
        body = whole[_HEAD.size : _HEAD.size + n_bytes]
        if checksum(body) != digest:
            return Outcome.CORRUPT.value
        head = int.from_bytes(body[:8], "little")
        said = json.loads(body[8 : 8 + head])["__metadata__"]["quire"]
        rising.document = json.loads(said), load(body)
        return ""


def _parts_of(body_bytes: int) -> int:
    return -(-(_HEAD.size + body_bytes) // PART_BYTES)
