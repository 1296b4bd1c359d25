"""The redis tier over a real server: our suite for tiers, and whatever can happen to a server. Wrong answers: none."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.errors import ConfigError
from quire.store.tiers import Outcome, Tier
from quire.store.tiers import segments as layout
from quire.store.tiers.address import parse_address
from quire.store.tiers.conformance import (
    BLOCK_BYTES,
    NS,
    OTHER,
    ROOM_BYTES,
    TierConformance,
    block,
    chain,
    empty,
    soon,
)
from quire.store.tiers.recipe import open_tiers, parse_tiers
from quire.store.tiers.redis import RedisTier
from quire.store.tiers.stack import TierStack
from redis_server import (
    RedisServer,
    Spoiling,
    certificate,
    free_port,
    needs_redis,
    ours,
    redis_server,
)

pytestmark = needs_redis
GONE = (Outcome.MISS, Outcome.CORRUPT)


@pytest.fixture(scope="module")
def running() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    """One that everybody uses, empty, and that nobody harms."""
    with running.client() as client:
        client.flushall()
    return running


@pytest.fixture
def mortal() -> Iterator[RedisServer]:
    """One for this test, which may come to harm."""
    with redis_server() as server:
        yield server


def tier_of(server: RedisServer, capacity_bytes: int = 1 << 30, **options: Any) -> RedisTier:
    password = server.options.get("requirepass")
    return RedisTier(parse_address(server.place, password), capacity_bytes, **options)


def over(tier: Tier, call: Callable[[Any], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        try:
            return await call(tier)
        finally:
            await tier.close()

    return asyncio.run(whole())


hits = TierConformance.hits
"""Loads, and holds every hit to the bytes that were stored."""


class TestRedis(TierConformance):
    @pytest.fixture(autouse=True)
    def _server(self, server: RedisServer) -> None:
        self.server = server

    def make(self, folder: Path) -> Tier:
        return tier_of(self.server, ROOM_BYTES)

    def damage(self, tier: Any, folder: Path) -> bool:
        with self.server.client() as client:
            for name, key, value in ours(self.server):
                if key == block(2).key:
                    client.hset(name, key, value[:-5] + bytes([value[-5] ^ 4]) + value[-4:])
                    return True
        return False


class TestBlocksThatAreDivided(TestRedis):
    """Of 20,000 bytes each, in segments of 7,000."""

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(layout, "SEGMENT_BYTES", 7000)


# -- segments ----------------------------------------------------------------------------------------------------


def test_small_blocks_lie_together_and_large_ones_are_divided(server: RedisServer) -> None:
    small, large = chain(0, 30), [block(100, 9 << 20)]

    async def call(tier: Any) -> None:
        assert set(await tier.store(NS, [*small, *large], deadline=soon())) == {Outcome.STORED}
        assert await hits(tier, [*small, *large]) == [Outcome.HIT] * 31
        health = await tier.health()
        assert health.blocks == 31
        there = sum(len(value) for _, _, value in ours(server))
        assert there < health.used_bytes < there + 64 * 256

    over(tier_of(server), call)
    sizes: dict[bytes, list[int]] = {}
    for name, _, value in ours(server):
        sizes.setdefault(name, []).append(len(value))
    assert sorted(map(len, sizes.values())) == [1, 1, 1, 30]
    assert max(map(sum, sizes.values())) <= layout.SEGMENT_BYTES


def test_the_stack_gives_it_enough_for_a_segment(server: RedisServer) -> None:
    stack = TierStack([tier_of(server)], NS)
    for b in chain(0, 50):
        stack.put(b)
    assert stack.drain(soon())
    stack.close()
    assert len({name for name, _, _ in ours(server)}) == 1


def test_what_one_stored_another_finds_and_both_count(server: RedisServer) -> None:
    blocks = chain(0, 6)

    async def call(tier: Any) -> None:
        other = tier_of(server, ROOM_BYTES)
        await tier.store(NS, blocks[:3], deadline=soon())
        assert await hits(other, blocks) == [Outcome.HIT] * 3 + [Outcome.MISS] * 3
        await other.store(NS, blocks, deadline=soon())
        assert await hits(tier, blocks) == [Outcome.HIT] * 6
        assert (await tier.health()).blocks == (await other.health()).blocks == 6
        for at in range(100, 500, 10):
            await (tier, other)[at // 10 % 2].store(OTHER, chain(at, 10), deadline=soon())
            assert (await other.health()).used_bytes <= ROOM_BYTES
        assert await hits(tier, blocks) == [Outcome.MISS] * 6
        with server.client() as client:  # nothing says where blocks lie that are gone
            left = len(list(client.scan_iter(b"quire:1:*:b:*")))
        assert left == (await tier.health()).blocks
        await other.close()

    over(tier_of(server, ROOM_BYTES), call)


def test_stored_again_it_is_counted_once(server: RedisServer) -> None:
    async def call(tier: Any) -> None:
        await tier.store(NS, chain(0, 4), deadline=soon())
        before = await tier.health()
        with server.client() as client:
            for name in client.scan_iter(b"quire:1:*:b:*"):
                client.delete(name)
        assert await hits(tier, chain(0, 4)) == [Outcome.MISS] * 4
        await tier.store(NS, chain(0, 4), deadline=soon())
        assert await tier.health() == before

    over(tier_of(server), call)


def test_a_segment_of_which_nothing_is_left_counts_no_more(server: RedisServer) -> None:
    async def call(tier: Any) -> None:
        await tier.store(NS, chain(0, 4), deadline=soon())
        before = await tier.health()
        await tier.store(NS, [*chain(10, 3), block(20, 9 << 20)], deadline=soon())
        await tier.drop(NS, [b.key for b in chain(10, 2)])
        assert (await tier.health()).blocks == 8
        await tier.drop(NS, [block(12).key, block(20).key, block(21).key])
        assert await tier.health() == before

    over(tier_of(server), call)


# -- what lies there is spoilt -----------------------------------------------------------------------------------


def test_five_hundred_flipped_bits_give_no_wrong_answer(server: RedisServer) -> None:
    """Anywhere in the values: data, headers, and what says where blocks lie."""
    blocks = chain(0, 8)
    draw = np.random.Generator(np.random.PCG64(7))

    async def call(tier: Any) -> int:
        caught = 0
        for _ in range(25):
            await tier.store(NS, blocks, deadline=soon())
            with server.client() as client:
                places = [(name, key) for name, key, _ in ours(server)]
                places += [(name, b"") for name in client.scan_iter(b"quire:1:*:b:*")]
                for at in draw.integers(0, len(places), 20):
                    name, key = places[at]
                    value = bytearray(client.hget(name, key) if key else client.get(name))
                    bit = int(draw.integers(0, 8 * min(len(value), 600 if at % 2 else len(value))))
                    value[bit // 8] ^= 1 << bit % 8
                    if key:
                        client.hset(name, key, bytes(value))
                    else:
                        client.set(name, bytes(value))
            out = await hits(tier, blocks)
            assert set(out) <= {Outcome.HIT, *GONE}
            caught += sum(o is not Outcome.HIT for o in out)
        return caught

    assert over(tier_of(server), call) > 75


def test_swapped_cut_and_foreign_values_are_no_hits(server: RedisServer) -> None:
    blocks = chain(0, 5)

    async def call(tier: Any) -> list[Outcome]:
        await tier.store(NS, blocks, deadline=soon())
        there = {key: (name, value) for name, key, value in ours(server)}
        (a, first), (_, second) = there[blocks[0].key], there[blocks[1].key]
        with server.client() as client:
            client.hset(a, mapping={blocks[0].key: second, blocks[1].key: first})
            client.hset(a, blocks[2].key, there[blocks[2].key][1][:-100])
            client.hset(a, blocks[3].key, b"")
        return await hits(tier, blocks)

    assert over(tier_of(server), call) == [Outcome.CORRUPT] * 4 + [Outcome.HIT]


def test_names_that_are_something_else(server: RedisServer) -> None:
    """Another program's keys under ours: errors and rejections, and no hit."""
    blocks = chain(0, 2)

    async def call(tier: Any) -> None:
        await tier.store(NS, blocks, deadline=soon())
        name = next(ours(server))[0]
        with server.client() as client:
            client.delete(name)
            client.lpush(name, b"a list")
        assert Outcome.HIT not in await hits(tier, blocks)
        with server.client() as client:
            client.delete(layout.USED)
            client.set(layout.USED, b"a string")
        assert Outcome.STORED not in await tier.store(NS, chain(50, 2), deadline=soon())
        assert not (await tier.health()).ok

    over(tier_of(server), call)


def test_a_line_that_turns_bits_gives_no_wrong_answer(server: RedisServer) -> None:
    """Which a client of Redis does not notice: TCP's checksum is 16 bits, and a proxy makes it anew."""
    blocks = chain(0, 24)

    async def call() -> None:
        line = Spoiling(server.port, every_bytes=400_000)
        tier = RedisTier(parse_address(server.place), 1 << 30)
        await tier.store(NS, blocks, deadline=soon())
        await tier.close()
        tier.address = parse_address(f"127.0.0.1:{await line.open()}")
        tier._client = tier._connect()
        seen: set[Outcome] = set()
        for _ in range(40):
            seen |= set(await hits(tier, blocks))
            await tier.store(NS, blocks, deadline=soon(1))
        assert line.spoilt > 20
        assert {Outcome.HIT, Outcome.CORRUPT} <= seen
        await tier.close()
        await line.close()

    asyncio.run(call())


# -- the server comes to harm ------------------------------------------------------------------------------------


def test_killed_and_started_again(mortal: RedisServer) -> None:
    blocks = chain(0, 4)

    async def call(tier: Any) -> None:
        await tier.store(NS, blocks, deadline=soon())
        mortal.kill()
        assert await hits(tier, blocks) == [Outcome.ERROR] * 4
        assert await tier.store(NS, blocks, deadline=soon()) == [Outcome.ERROR] * 4
        health = await tier.health()
        assert not health.ok
        assert health.why
        mortal.start()  # with nothing in it
        assert await hits(tier, blocks) == [Outcome.MISS] * 4
        assert await tier.store(NS, blocks, deadline=soon()) == [Outcome.STORED] * 4
        assert await hits(tier, blocks) == [Outcome.HIT] * 4
        with mortal.client() as client:
            client.save()
        mortal.kill()
        mortal.start()  # with what it saved
        assert await hits(tier, blocks) == [Outcome.HIT] * 4
        assert (await tier.health()).ok

    over(tier_of(mortal), call)


def test_killed_in_the_middle_of_loads_and_stores(mortal: RedisServer) -> None:
    many = [block(i, 1 << 20) for i in range(24)]

    async def call(tier: Any) -> None:
        assert set(await tier.store(NS, many, deadline=soon())) == {Outcome.STORED}
        for wait_s in (0.0, 0.002, 0.005, 0.02):
            loads = [asyncio.create_task(hits(tier, many)) for _ in range(2)]
            stores = asyncio.create_task(tier.store(OTHER, many, deadline=soon()))
            await asyncio.sleep(wait_s)
            mortal.kill()
            for out in await asyncio.gather(*loads):
                assert set(out) <= {Outcome.HIT, Outcome.ERROR}
            assert set(await stores) <= {Outcome.STORED, Outcome.ERROR}
            mortal.start()
            await tier.store(NS, many, deadline=soon())
            assert await hits(tier, many) == [Outcome.HIT] * 24

    over(tier_of(mortal), call)


def test_a_stopped_server_costs_the_deadline_and_no_more(mortal: RedisServer) -> None:
    """Each call returns while it is still stopped; what it says late is nobody's answer."""
    blocks, others = chain(0, 8), chain(100, 8)

    async def call(tier: Any) -> None:
        await tier.store(NS, [*blocks, *others], deadline=soon())
        for _ in range(3):
            mortal.stop()
            for _ in range(4):  # more than there are connections
                assert set(await tier.load(NS, list(map(empty, others)), deadline=soon(0.05))) == {
                    Outcome.TIMEOUT
                }
            with pytest.raises(TimeoutError):
                await tier.lookup(NS, [b.key for b in blocks])
            with pytest.raises(TimeoutError):
                await tier.touch(NS, [b.key for b in blocks])
            assert await tier.store(NS, [block(200)], deadline=soon(0.05)) == [Outcome.TIMEOUT]
            assert not (await tier.health()).ok
            mortal.go_on()
            assert await hits(tier, blocks) == [Outcome.HIT] * 8
            assert (await tier.health()).ok

    over(tier_of(mortal, timeout_s=0.05), call)


def test_a_server_that_evicts_by_itself(mortal: RedisServer) -> None:
    """Links of chains go, as it likes: misses and nothing else."""
    with mortal.client() as client:
        client.config_set("maxmemory", "6mb")
        client.config_set("maxmemory-policy", "allkeys-lru")

    async def call(tier: Any) -> None:
        seen: list[Outcome] = []
        for at in range(0, 1200, 12):
            assert set(await tier.store(NS, chain(at, 12), deadline=soon())) == {Outcome.STORED}
            seen += await hits(tier, chain(max(0, at - 240), 24))
        assert set(seen) == {Outcome.HIT, Outcome.MISS}
        n = await tier.lookup(NS, [b.key for b in chain(1188, 12)])
        assert (await hits(tier, chain(1188, 12))).count(Outcome.HIT) == n == 12

    over(tier_of(mortal), call)
    with mortal.client() as client:
        assert client.info()["evicted_keys"] > 10


def test_a_full_server_takes_nothing_and_gives_what_it_has(mortal: RedisServer) -> None:
    blocks = chain(0, 4)

    async def call(tier: Any) -> None:
        await tier.store(NS, blocks, deadline=soon())
        with mortal.client() as client:
            client.config_set("maxmemory", str(client.info()["used_memory"]))
        assert await tier.store(NS, chain(10, 4), deadline=soon()) == [Outcome.REJECTED] * 4
        health = await tier.health()
        assert not health.ok
        assert "OOM" in health.why or "memory" in health.why
        assert await hits(tier, blocks) == [Outcome.HIT] * 4
        assert await hits(tier, chain(10, 4)) == [Outcome.MISS] * 4
        with mortal.client() as client:
            client.config_set("maxmemory", "0")
        assert await tier.store(NS, chain(10, 4), deadline=soon()) == [Outcome.STORED] * 4
        assert (await tier.health()).ok

    over(tier_of(mortal), call)


def test_a_replica_is_read_and_not_written(mortal: RedisServer) -> None:
    blocks = chain(0, 2)
    over(tier_of(mortal), lambda t: t.store(NS, blocks, deadline=soon()))
    with mortal.client() as client:
        client.config_set("replica-serve-stale-data", "yes")
        client.replicaof("127.0.0.1", mortal.port + 1)

    async def call(tier: Any) -> None:
        assert await tier.store(NS, [block(9)], deadline=soon()) == [Outcome.REJECTED]

    over(tier_of(mortal), call)


# -- who may come in ---------------------------------------------------------------------------------------------

SECRET = "pass word/with@all:of%it"
QUOTED = "pass%20word%2Fwith%40all%3Aof%25it"


def test_the_password_lets_in_and_is_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    blocks = chain(0, 2)
    with redis_server(requirepass=SECRET) as server:
        good = f"redis:1GiB@redis://default:{QUOTED}@{server.place}"
        for config in (parse_tiers(good), parse_tiers(f"redis:1GiB@{server.place}", SECRET)):
            (tier,) = open_tiers(config)

            async def call(tier: Any) -> None:
                await tier.store(NS, blocks, deadline=soon())
                assert await hits(tier, blocks) == [Outcome.HIT] * 2

            over(tier, call)
        said = [repr(parse_tiers(good)), str(parse_tiers(good).tiers[0].address)]
        wrong = f"redis:1GiB@redis://:{QUOTED}x@{server.place}"
        for text in (wrong, f"redis:1GiB@{server.place}"):
            with pytest.raises(ConfigError, match="refuses us") as caught:
                open_tiers(parse_tiers(text))
            said.append(str(caught.value))
        assert all("\n" not in line for line in said)

        async def changed(tier: Any) -> None:
            with server.client() as client:
                client.config_set("requirepass", "another")
                client.client_kill_filter(_type="normal", skipme=True)
            assert await hits(tier, blocks) == [Outcome.ERROR] * 2
            said.append((await tier.health()).why)

        over(open_tiers(parse_tiers(good))[0], changed)
    for line in [*said, caplog.text]:
        assert SECRET not in line
        assert QUOTED not in line
        assert "pass" not in line.replace("password", "").replace("username-pass", "")


def test_a_user_who_may_do_little_suffices(mortal: RedisServer) -> None:
    with mortal.client() as client:
        client.acl_setuser(
            "quire",
            enabled=True,
            passwords=["+few"],
            keys=["quire:1:*"],
            categories=["+@read", "+@write", "+@connection", "+@transaction"],
        )
        client.acl_setuser("nobody", enabled=True, passwords=["+few"], categories=["+@read"])
        client.acl_setuser("default", enabled=False)
    with pytest.raises(ConfigError, match="refuses us"):
        open_tiers(parse_tiers(f"redis:1MiB@redis://nobody:few@{mortal.place}"))
    config = parse_tiers(f"redis:1MiB@redis://quire@{mortal.place}", "few")

    async def call(tier: Any) -> None:
        for at in range(0, 300, 10):
            assert set(await tier.store(NS, chain(at, 10), deadline=soon())) == {Outcome.STORED}
        assert await tier.lookup(NS, [b.key for b in chain(290, 10)]) == 10
        await tier.touch(NS, [b.key for b in chain(290, 10)])
        await tier.drop(NS, [block(291).key])
        out = [Outcome.HIT, Outcome.MISS, *[Outcome.HIT] * 8]
        assert await hits(tier, chain(290, 10)) == out
        assert (await tier.health()).ok

    over(open_tiers(config)[0], call)


def test_tls_with_an_authority_of_its_own(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    blocks = chain(0, 3)
    with redis_server() as server:
        with server.client() as client:
            for name, value in (
                ("tls-cert-file", cert),
                ("tls-key-file", key),
                ("tls-ca-cert-file", cert),
                ("tls-auth-clients", "no"),
            ):
                client.config_set(name, str(value))
            port = free_port()
            client.config_set("tls-port", str(port))
        place = f"rediss://127.0.0.1:{port}"
        (tier,) = open_tiers(parse_tiers(f"redis:1GiB@{place}?ca={cert}"))

        async def call(tier: Any) -> None:
            await tier.store(NS, blocks, deadline=soon())
            assert await hits(tier, blocks) == [Outcome.HIT] * 3

        over(tier, call)
        (tier,) = open_tiers(parse_tiers(f"redis:1GiB@{place}"))  # signed by nobody that is known
        assert over(tier, lambda t: t.store(NS, blocks, deadline=soon())) == [Outcome.ERROR] * 3


def test_a_server_that_is_not_there_yet(
    mortal: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    mortal.kill()
    tier = tier_of(mortal)
    assert "going on without it" in caplog.text
    mortal.start()

    async def call(tier: Any) -> None:
        await tier.store(NS, chain(0, 2), deadline=soon())
        assert await hits(tier, chain(0, 2)) == [Outcome.HIT] * 2

    over(tier, call)


def test_a_database_that_is_not_there(server: RedisServer) -> None:
    with pytest.raises(ConfigError, match="name another database"):
        RedisTier(parse_address(f"{server.place}/99"), 1 << 30)


def test_something_that_is_no_redis() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            while True:
                try:
                    made, _ = listening.accept()
                except OSError:
                    return
                with made:
                    made.recv(100)
                    made.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        port = listening.getsockname()[1]
        with pytest.raises(ConfigError, match="does not speak as Redis does"):
            RedisTier(parse_address(f"127.0.0.1:{port}"), 1 << 30)
        listening.shutdown(socket.SHUT_RDWR)


def test_all_who_share_a_server_have_one_secret(server: RedisServer) -> None:
    one, two = tier_of(server), tier_of(server)
    assert one.secret() == two.secret()
    assert len(one.secret()) == 32
    with server.client() as client:
        client.flushall()

    async def call(tier: Any) -> None:
        assert (await tier.health()).ok

    over(one, call)  # puts it back
    assert tier_of(server).secret() == one.secret()
    over(two, call)


def test_the_breaker_leaves_a_stopped_server_alone(mortal: RedisServer) -> None:
    """After three failures nobody asks it, so nobody waits; what was queued for it is dropped, and closing is quick."""
    stack = TierStack([tier_of(mortal, timeout_s=0.05)], NS)
    try:
        mortal.stop()
        for _ in range(3):
            stack.ask(stack.locate([block(0).key]))
        (level,) = stack.levels
        assert level.resting
        failures = level.counts["failures"]
        wanted = [empty(block(0))]
        assert stack.ask(stack.locate([block(0).key])) == [None]
        assert stack.ask(stack.load(wanted, [0], soon())) == [Outcome.MISS]
        stack.ask(stack.touch([block(0).key]))
        assert level.counts["failures"] == failures
        assert not stack.put(block(0))
    finally:
        stack.close()


def test_what_is_told_of_it_is_how_it_is_now(mortal: RedisServer) -> None:
    mortal.kill()
    stack = TierStack([tier_of(mortal)], NS)
    try:
        (level,) = stack.levels
        assert not level.report()["ok"]
        assert level.report()["why"]
        mortal.start()
        stack.ask(stack.locate([block(0).key]))
        limit = soon()
        while not level.report()["ok"] and soon(0) < limit:
            stack.ask(asyncio.sleep(0.01))
        assert level.report()["ok"]
        assert not level.report()["why"]
    finally:
        stack.close()


def test_what_is_queued_for_a_server_that_stops_is_dropped(
    mortal: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.store.tiers.redis.STORE_S", 0.05)
    stack = TierStack([tier_of(mortal, timeout_s=0.05)], NS)
    try:
        mortal.stop()
        for b in chain(0, 600):
            stack.put(b)
        assert stack.drain(soon())
        (level,) = stack.levels
        assert level.counts["dropped"] > 0
        assert level.counts["store_timeout"] > 0
        assert level.counts["dropped"] + level.counts["store_timeout"] == 600
    finally:
        stack.close()


def test_a_block_that_is_too_large_for_one_reply_of_the_past(server: RedisServer) -> None:
    """Loads of many blocks whose deadline ends in the middle give what has come, in the order that was asked for."""
    many = [block(i, 1 << 20) for i in range(40)]

    async def call(tier: Any) -> None:
        await tier.store(NS, many, deadline=soon())
        for wait_s in (0.001, 0.004, 0.01, 0.02):
            wanted = list(map(empty, many))
            out = await tier.load(NS, wanted, deadline=soon(wait_s))
            assert set(out) <= {Outcome.HIT, Outcome.TIMEOUT}
            for b, want, outcome in zip(many, wanted, out, strict=True):
                assert outcome is not Outcome.HIT or np.array_equal(want.data, b.data)
        assert await hits(tier, many) == [Outcome.HIT] * 40

    over(tier_of(server), call)


def test_wrong_sizes_cost_nothing_of_others(server: RedisServer) -> None:
    async def call(tier: Any) -> None:
        await tier.store(NS, chain(0, 3), deadline=soon())
        (odd,) = await tier.load(NS, [empty(block(1), BLOCK_BYTES - 8)], deadline=soon())
        assert odd is Outcome.CORRUPT
        assert await hits(tier, chain(0, 3)) == [Outcome.HIT, Outcome.MISS, Outcome.HIT]

    over(tier_of(server), call)
