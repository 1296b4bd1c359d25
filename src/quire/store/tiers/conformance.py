"""What every tier must do, as tests that its author runs.

    # test_my_tier.py
    from quire.store.tiers.conformance import TierConformance

    class TestMyTier(TierConformance):
        def make(self, folder):
            return MyTier(...)

pytest collects the class; `make` gives an empty tier that holds at least `ROOM_BYTES`. A persistent tier is made a
second time over the same folder. Where `damage` is overridden, a tier that verifies by itself shows that it does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

import numpy as np

from quire.store.tiers.contract import Block, Outcome, Tier, TierHealth

__all__ = ["BLOCK_BYTES", "NS", "ROOM_BYTES", "TierConformance", "block", "chain", "empty"]

BLOCK_BYTES = 20_000
ROOM_BYTES = 64 * (BLOCK_BYTES + 8192)
NS, OTHER = sha256(b"one model").digest(), sha256(b"another").digest()
HOLDS = (Outcome.STORED, Outcome.REJECTED)


def block(number: int, n_bytes: int = BLOCK_BYTES) -> Block:
    """A block whose bytes follow from its number."""
    data = np.random.Generator(np.random.PCG64(number)).integers(0, 256, n_bytes, np.uint8)
    tokens = np.arange(number, number + 16, dtype="<i4").tobytes()
    return Block(_key(number), _key(number - 1), tokens, data)


def _key(number: int) -> bytes:
    return sha256(f"block {number}".encode()).digest()


def chain(first: int, n: int) -> list[Block]:
    """Blocks of which each stands on the one before."""
    return [block(first + i) for i in range(n)]


def empty(like: Block, n_bytes: int | None = None) -> Block:
    """The same block, its bytes still to be found."""
    n = len(like.data) if n_bytes is None else n_bytes
    return Block(like.key, like.parent, like.tokens, np.zeros(n, np.uint8))


def soon(seconds: float = 30.0) -> float:
    """A deadline."""
    return monotonic() + seconds


class TierConformance:
    """See the module's text."""

    makes_twice: ClassVar[bool] = True
    """Whether a persistent tier is reopened; False where `make` cannot give the same one again."""

    def make(self, folder: Path) -> Tier:
        """An empty tier; of a persistent one, whatever was left in that folder."""
        raise NotImplementedError

    def damage(self, tier: Tier, folder: Path) -> bool:
        """Spoils a byte of a stored block's data; False where that cannot be done."""
        return False

    # -- help ----------------------------------------------------------------------------------------------------

    def run(self, folder: Path, call: Callable[[Any], Awaitable[None]]) -> None:
        """Runs a coroutine over a fresh tier and closes it."""

        async def whole() -> None:
            tier = self.make(folder)
            try:
                await call(tier)
            finally:
                await tier.close()

        asyncio.run(whole())

    @staticmethod
    async def hits(tier: Tier, blocks: list[Block], ns: bytes = NS) -> list[Outcome]:
        """Loads, and holds every hit to the bytes that were stored."""
        wanted = [empty(b) for b in blocks]
        out = await tier.load(ns, wanted, deadline=soon())
        assert len(out) == len(blocks)
        for b, want, outcome in zip(blocks, wanted, out, strict=True):
            assert outcome is not Outcome.HIT or np.array_equal(want.data, b.data), "a wrong answer"
        return list(out)

    # -- tests ---------------------------------------------------------------------------------------------------

    def test_it_has_the_protocol(self, tmp_path: Path) -> None:
        """Names, caps and health."""

        async def call(tier: Tier) -> None:
            assert isinstance(tier, Tier)
            assert tier.name.isidentifier()
            assert tier.caps.max_block_bytes >= BLOCK_BYTES
            health = await tier.health()
            assert isinstance(health, TierHealth)
            assert health.ok

        self.run(tmp_path, call)

    def test_what_was_stored_is_found(self, tmp_path: Path) -> None:
        """Bytes come back as they were; twice is as good as once."""

        async def call(tier: Tier) -> None:
            blocks = chain(0, 5)
            for _ in range(2):
                assert await tier.store(NS, blocks, deadline=soon()) == [Outcome.STORED] * 5
            assert await tier.lookup(NS, [b.key for b in blocks]) == 5
            assert await self.hits(tier, blocks) == [Outcome.HIT] * 5
            assert await self.hits(tier, blocks[::-1]) == [Outcome.HIT] * 5

        self.run(tmp_path, call)

    def test_nothing_is_found_that_was_not_stored(self, tmp_path: Path) -> None:
        """An unknown name, another namespace, other tokens, another size: none of them is a hit."""

        async def call(tier: Tier) -> None:
            blocks = chain(0, 2)
            await tier.store(NS, blocks, deadline=soon())
            assert await tier.lookup(NS, [b.key for b in [*blocks, block(7), blocks[0]]]) == 2
            assert await tier.lookup(OTHER, [b.key for b in blocks]) == 0
            assert await self.hits(tier, [block(7), *blocks]) == [Outcome.MISS, *[Outcome.HIT] * 2]
            assert await self.hits(tier, blocks, OTHER) == [Outcome.MISS] * 2
            assert await tier.lookup(NS, []) == 0
            assert await tier.load(NS, [], deadline=soon()) == []
            for n in (BLOCK_BYTES - 1, BLOCK_BYTES + 1, 2 * BLOCK_BYTES):
                (odd,) = await tier.load(NS, [empty(blocks[0], n)], deadline=soon())
                assert odd is not Outcome.HIT
            if self.verifies:
                await tier.store(NS, blocks, deadline=soon())
                other = Block(blocks[0].key, blocks[0].parent, blocks[1].tokens, blocks[0].data)
                (odd,) = await tier.load(NS, [empty(other)], deadline=soon())
                assert odd is not Outcome.HIT

        self.run(tmp_path, call)

    verifies: ClassVar[bool] = True
    """Whether the tier compares tokens itself; False for one that is used through `Checked`."""

    def test_dropped_is_gone(self, tmp_path: Path) -> None:
        """And can come again."""

        async def call(tier: Tier) -> None:
            blocks = chain(0, 3)
            await tier.store(NS, blocks, deadline=soon())
            await tier.drop(NS, [blocks[1].key, block(9).key])
            assert await tier.lookup(NS, [b.key for b in blocks]) == 1
            assert await self.hits(tier, blocks) == [Outcome.HIT, Outcome.MISS, Outcome.HIT]
            await tier.store(NS, blocks, deadline=soon())
            assert await self.hits(tier, blocks) == [Outcome.HIT] * 3

        self.run(tmp_path, call)

    def test_a_deadline_that_has_passed(self, tmp_path: Path) -> None:
        """Nothing raises, nothing hangs, and what is called a hit is one."""

        async def call(tier: Tier) -> None:
            blocks = chain(0, 3)
            await tier.store(NS, blocks, deadline=soon())
            late = monotonic() - 1
            for out in await tier.load(NS, [empty(b) for b in blocks], deadline=late):
                assert out is Outcome.TIMEOUT
            (kept,) = await tier.store(NS, [block(50)], deadline=late)
            assert kept in (*HOLDS, Outcome.TIMEOUT)
            assert await self.hits(tier, blocks) == [Outcome.HIT] * 3

        self.run(tmp_path, call)

    def test_more_than_it_holds(self, tmp_path: Path) -> None:
        """Blocks give way to others; the end of a chain before its beginning; what was touched stays longer."""

        async def call(tier: Tier) -> None:
            health = await tier.health()
            if not health.capacity_bytes:
                return
            n = 2 * health.capacity_bytes // BLOCK_BYTES
            assert n < 4000, "make a smaller tier for this"
            first = chain(0, 8)
            await tier.store(NS, first, deadline=soon())
            for at in range(1000, 1000 + 10 * n, 80):
                await tier.touch(NS, [b.key for b in first])
                out = await tier.store(NS, chain(at, 8), deadline=soon())
                assert set(out) <= set(HOLDS)
                here = await self.hits(tier, first)
                lost = here.index(Outcome.MISS) if Outcome.MISS in here else len(here)
                assert Outcome.HIT not in here[lost:], "a block outlived what it stands on"
            assert (await self.hits(tier, first)).count(Outcome.HIT) >= 1
            assert (await tier.health()).used_bytes <= health.capacity_bytes

        self.run(tmp_path, call)

    def test_a_block_that_is_too_large(self, tmp_path: Path) -> None:
        """Is refused, and nothing is given up for it."""

        async def call(tier: Tier) -> None:
            if tier.caps.max_block_bytes > 1 << 28:
                return
            await tier.store(NS, [block(0)], deadline=soon())
            huge = block(1, tier.caps.max_block_bytes + 1)
            assert await tier.store(NS, [huge], deadline=soon()) == [Outcome.REJECTED]
            assert await self.hits(tier, [block(0)]) == [Outcome.HIT]

        self.run(tmp_path, call)

    def test_many_at_a_time(self, tmp_path: Path) -> None:
        """Calls overlap; every hit is right."""

        async def call(tier: Tier) -> None:
            async def one(at: int) -> None:
                blocks = chain(100 * (at % 3), 6)
                await tier.store(NS, blocks, deadline=soon())
                await self.hits(tier, blocks)
                if at % 4 == 3:
                    await tier.drop(NS, [blocks[0].key])
                await self.hits(tier, blocks)

            await asyncio.gather(*(one(i) for i in range(12)))

        self.run(tmp_path, call)

    def test_what_persists_is_there_again(self, tmp_path: Path) -> None:
        """After it was closed and made anew."""
        blocks = chain(0, 6)
        persistent: list[bool] = []

        async def first(tier: Tier) -> None:
            persistent.append(tier.caps.persistent and self.makes_twice)
            await tier.store(NS, blocks, deadline=soon())

        async def second(tier: Tier) -> None:
            assert await self.hits(tier, blocks) == [Outcome.HIT] * 6
            assert await self.hits(tier, blocks, OTHER) == [Outcome.MISS] * 6

        self.run(tmp_path, first)
        if persistent[0]:
            self.run(tmp_path, second)

    def test_damage_is_noticed(self, tmp_path: Path) -> None:
        """A spoilt block is CORRUPT once, then gone."""

        async def call(tier: Tier) -> None:
            blocks = chain(0, 4)
            await tier.store(NS, blocks, deadline=soon())
            if not self.damage(tier, tmp_path):
                return
            out = await self.hits(tier, blocks)
            assert out.count(Outcome.CORRUPT) == 1
            assert (await self.hits(tier, blocks)).count(Outcome.MISS) == 1

        self.run(tmp_path, call)
