"""Any program over a tier, damage and restarts included: a hit is what was stored under that name there."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.store.tiers import Outcome
from quire.store.tiers.address import parse_address
from quire.store.tiers.checked import Checked
from quire.store.tiers.conformance import NS, OTHER, block, empty, soon
from quire.store.tiers.disk import DiskTier
from quire.store.tiers.faulty import FaultyTier
from quire.store.tiers.host import HostTier
from quire.store.tiers.redis import RedisTier
from redis_server import ABSENT, RedisServer

SIZES = (3000, 5000)
ROOM = 10 * 12288
NUMBERS = st.lists(st.integers(0, 11), min_size=1, max_size=4, unique=True)


class Tiers(RuleBasedStateMachine):
    """Blocks of two sizes; which one a number has follows from it."""

    server: ClassVar[RedisServer]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="quire-law-"))
        self.loop = asyncio.new_event_loop()
        self.stored: set[tuple[bytes, int]] = set()
        self.damaged = False
        self.tier: Any = None
        self.kind = ""

    def run(self, call: Any) -> Any:
        return self.loop.run_until_complete(call)

    async def make(self) -> Any:
        if self.kind == "host":
            return HostTier(ROOM)
        if self.kind == "disk":
            return DiskTier(self.folder / "t", ROOM, direct=False, segment_bytes=3 * 8192)
        if self.kind == "redis":
            return RedisTier(parse_address(self.server.place), ROOM)
        inner = HostTier(ROOM)
        return Checked(FaultyTier(inner, flip=0.4, swap=0.4, cut=0.3))

    @initialize(kind=st.sampled_from(["host", "disk", "lying", *([] if ABSENT else ["redis"])]))
    def begin(self, kind: str) -> None:
        self.kind = kind
        if kind == "redis":
            with self.server.client() as client:
                client.flushall()
        self.tier = self.run(self.make())

    @staticmethod
    def blocks(numbers: list[int]) -> list[Any]:
        return [block(n, SIZES[n % 3 == 0]) for n in numbers]

    @rule(numbers=NUMBERS, ns=st.sampled_from([NS, NS, NS, OTHER]))
    def store(self, numbers: list[int], ns: bytes) -> None:
        out = self.run(self.tier.store(ns, self.blocks(numbers), deadline=soon()))
        for n, outcome in zip(numbers, out, strict=True):
            assert outcome in (Outcome.STORED, Outcome.REJECTED)
            if outcome is Outcome.STORED:
                self.stored.add((ns, n))

    @rule(numbers=NUMBERS, ns=st.sampled_from([NS, NS, NS, OTHER]))
    def store_and_load(self, numbers: list[int], ns: bytes) -> None:
        self.store(numbers, ns)
        self.load(numbers, ns)

    @rule(numbers=NUMBERS, ns=st.sampled_from([NS, NS, NS, OTHER]))
    def load(self, numbers: list[int], ns: bytes) -> None:
        blocks = self.blocks(numbers)
        wanted = [empty(b) for b in blocks]
        out = self.run(self.tier.load(ns, wanted, deadline=soon()))
        for n, b, want, outcome in zip(numbers, blocks, wanted, out, strict=True):
            if outcome is Outcome.HIT:
                assert (ns, n) in self.stored
                assert np.array_equal(want.data, b.data)
            elif outcome is Outcome.CORRUPT:
                assert self.damaged or self.kind == "lying"

    @rule(numbers=NUMBERS, ns=st.sampled_from([NS, OTHER]))
    def lookup(self, numbers: list[int], ns: bytes) -> None:
        n = self.run(self.tier.lookup(ns, [b.key for b in self.blocks(numbers)]))
        assert all((ns, x) in self.stored for x in numbers[:n])

    @rule(numbers=NUMBERS, ns=st.sampled_from([NS, OTHER]))
    def drop(self, numbers: list[int], ns: bytes) -> None:
        self.run(self.tier.drop(ns, [b.key for b in self.blocks(numbers)]))
        assert self.run(self.tier.lookup(ns, [self.blocks(numbers)[0].key])) == 0

    @rule(numbers=NUMBERS)
    def touch(self, numbers: list[int]) -> None:
        self.run(self.tier.touch(NS, [b.key for b in self.blocks(numbers)]))

    @rule()
    def reopen(self) -> None:
        if self.kind in ("disk", "redis"):
            self.run(self.tier.close())
            self.tier = self.run(self.make())

    @precondition(lambda self: self.kind == "disk" and self.tier.files.segments)
    @rule(at=st.integers(0, 1 << 20), bit=st.integers(0, 7), data=st.data())
    def damage(self, at: int, bit: int, data: Any) -> None:
        segment = self.tier.files.segments[
            data.draw(st.sampled_from(sorted(self.tier.files.segments)))
        ]
        at %= segment.slots * segment.slot_bytes
        with segment.path.open("r+b") as f:
            f.seek(at)
            old = f.read(1)[0]
            f.seek(at)
            f.write(bytes([old ^ 1 << bit]))
        self.damaged = True

    @invariant()
    def within_capacity(self) -> None:
        if self.tier is not None:
            health = self.run(self.tier.health())
            assert health.ok
            assert health.used_bytes <= health.capacity_bytes

    @precondition(lambda self: self.kind == "disk")
    @invariant()
    def every_slot_has_one_place(self) -> None:
        tier = self.tier
        free = [place for places in tier._free.values() for place in places]
        held = [tier._place(name) for name in tier._size]
        slots = [(n, i) for n, s in tier.files.segments.items() for i in range(s.slots)]
        assert sorted([*free, *held]) == sorted(slots)

    def teardown(self) -> None:
        if self.tier is not None:
            self.run(self.tier.close())
        self.loop.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class TestTiers(Tiers.TestCase):  # type: ignore[misc]
    @classmethod
    def setUpClass(cls) -> None:
        if not ABSENT:
            Tiers.server = RedisServer()

    @classmethod
    def tearDownClass(cls) -> None:
        if not ABSENT:
            Tiers.server.close()
