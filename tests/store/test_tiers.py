"""The tiers by the suite that third parties run, and by hand where their files can be spoilt."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from quire.errors import ConfigError
from quire.store.tiers import Block, Outcome, Tier, TierCaps, TierHealth
from quire.store.tiers import envelope as sealing
from quire.store.tiers import slots as places
from quire.store.tiers.checked import Checked
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
from quire.store.tiers.disk import DiskTier
from quire.store.tiers.envelope import HEADER_BYTES, check, read_header, seal
from quire.store.tiers.faulty import FaultyTier
from quire.store.tiers.fsck import fsck
from quire.store.tiers.host import HostTier
from quire.store.tiers.order import Order
from quire.store.tiers.recipe import open_tiers, parse_tiers
from quire.store.tiers.slots import slot_bytes_for

SLOT = slot_bytes_for(BLOCK_BYTES)


class Shelf:
    """What somebody who reads the protocol quickly would write: bytes in a dictionary, nothing verified."""

    name = "shelf"
    caps = TierCaps()

    def __init__(self) -> None:
        self.there: dict[tuple[bytes, bytes], np.ndarray] = {}

    async def lookup(self, ns: bytes, keys: Sequence[bytes]) -> int:
        return next((i for i, k in enumerate(keys) if (ns, k) not in self.there), len(keys))

    async def load(self, ns: bytes, wanted: Sequence[Block], *, deadline: float) -> list[Outcome]:
        if deadline < soon(0):
            return [Outcome.TIMEOUT] * len(wanted)
        out = []
        for want in wanted:
            found = self.there.get((ns, want.key))
            if found is not None and len(found) == len(want.data):
                np.copyto(want.data, found)
                out.append(Outcome.HIT)
            else:
                out.append(Outcome.MISS)
        return out

    async def store(self, ns: bytes, blocks: Sequence[Block], *, deadline: float) -> list[Outcome]:
        self.there |= {(ns, b.key): b.data.copy() for b in blocks}
        return [Outcome.STORED] * len(blocks)

    async def touch(self, ns: bytes, keys: Sequence[bytes]) -> None:
        """It holds everything."""

    async def drop(self, ns: bytes, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.there.pop((ns, key), None)

    async def health(self) -> TierHealth:
        return TierHealth(True, len(self.there))

    async def close(self) -> None:
        """Nothing to finish."""


class TestHost(TierConformance):
    def make(self, folder: Path) -> Tier:
        return HostTier(ROOM_BYTES)

    def damage(self, tier: Any, folder: Path) -> bool:
        tier._order.get((NS, block(2).key))[1].data[17] ^= 4
        return True


class TestDisk(TierConformance):
    direct: ClassVar[bool] = True

    def make(self, folder: Path) -> Tier:
        return DiskTier(folder / "tier", ROOM_BYTES, direct=self.direct, sync="batch")

    def damage(self, tier: Any, folder: Path) -> bool:
        number, slot = tier._place((NS, block(2).key))
        spoil(tier.files.segments[number].path, slot * SLOT + HEADER_BYTES + 5)
        return True


class TestDiskThroughThePageCache(TestDisk):
    direct = False


class TestSomebodyElses(TierConformance):
    def make(self, folder: Path) -> Tier:
        return Checked(Shelf())

    def damage(self, tier: Any, folder: Path) -> bool:
        tier.inner.there[NS, block(2).key][HEADER_BYTES + 3] ^= 1
        return True


def test_another_package_s_tier_is_found_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = tmp_path / "shelves-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: shelves\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[quire.tiers]\nshelf = shelves_for_quire:open_shelf\n")
    (tmp_path / "shelves_for_quire.py").write_text(
        "from quire.store.tiers.host import HostTier\n"
        "asked = []\n"
        "def open_shelf(capacity_bytes, place):\n"
        "    asked.append((capacity_bytes, place))\n"
        "    return HostTier(capacity_bytes)\n"
    )
    with pytest.raises(ConfigError, match="unknown tier 'shelf'"):
        parse_tiers("shelf:1MiB@there")
    monkeypatch.syspath_prepend(tmp_path)
    (tier,) = open_tiers(parse_tiers("shelf:1MiB@there"))
    assert sys.modules["shelves_for_quire"].asked == [(1 << 20, "there")]
    assert isinstance(tier, Checked), "what is not ours is verified"
    assert asyncio.run(tier.lookup(NS, [block(1).key])) == 0
    asyncio.run(tier.close())
    with pytest.raises(ConfigError, match="known: host, disk, redis, shelf"):
        parse_tiers("drawer:1MiB")


class TestFaultlessFaulty(TierConformance):
    def make(self, folder: Path) -> Tier:
        return FaultyTier(HostTier(ROOM_BYTES))


class TestAllLies(TierConformance):
    """A tier that spoils half of what it gives, behind `Checked`: of the suite, what must hold all the same."""

    def make(self, folder: Path) -> Tier:
        return Checked(FaultyTier(HostTier(ROOM_BYTES), flip=0.3, swap=0.3, cut=0.2))

    test_what_was_stored_is_found = None  # type: ignore[assignment]
    test_nothing_is_found_that_was_not_stored = None  # type: ignore[assignment]
    test_dropped_is_gone = None  # type: ignore[assignment]
    test_a_deadline_that_has_passed = None  # type: ignore[assignment]
    test_more_than_it_holds = None  # type: ignore[assignment]
    test_a_block_that_is_too_large = None  # type: ignore[assignment]


def test_the_suite_fails_a_tier_that_lies(tmp_path: Path) -> None:
    class Lying(TierConformance):
        def make(self, folder: Path) -> Tier:
            return FaultyTier(Shelf(), flip=0.5)

    with pytest.raises(AssertionError, match="a wrong answer"):
        Lying().test_what_was_stored_is_found(tmp_path)


# -- helpers -----------------------------------------------------------------------------------------------------


def spoil(path: Path, at: int, bit: int = 0) -> None:
    with path.open("r+b") as f:
        f.seek(at)
        old = f.read(1)[0]
        f.seek(at)
        f.write(bytes([old ^ 1 << bit]))


def over(tier: Tier, call: Callable[[Any], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        try:
            return await call(tier)
        finally:
            await tier.close()

    return asyncio.run(whole())


def filled(folder: Path, blocks: list[Block], **options: Any) -> Path:
    """A closed disk tier that holds them; its only file."""
    tier = DiskTier(folder, ROOM_BYTES, **options)
    out = over(tier, lambda t: t.store(NS, blocks, deadline=soon()))
    assert out == [Outcome.STORED] * len(blocks)
    (path,) = folder.glob("*.seg")
    return path


def found(folder: Path, blocks: list[Block], ns: bytes = NS) -> list[Outcome]:
    return over(DiskTier(folder, ROOM_BYTES), lambda t: TierConformance.hits(t, blocks, ns))


# -- the envelope ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", sorted(sealing._SUMS))
@pytest.mark.parametrize("n_tokens", [1, 16, sealing.INLINE_TOKENS, sealing.INLINE_TOKENS + 1])
def test_a_header_binds_everything(
    algorithm: int, n_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "ALGORITHM", algorithm)
    b = block(3)
    b = Block(b.key, b.parent, np.arange(n_tokens, dtype="<i4").tobytes(), b.data)
    head = seal(NS, b, 9)
    assert len(head) == HEADER_BYTES
    header = read_header(head)
    assert header is not None
    assert (header.sequence, header.n_tokens, header.parent) == (9, n_tokens, b.parent)
    assert check(NS, b, head, b.data) is Outcome.HIT
    others = [
        (OTHER, b, head),
        (NS, Block(block(4).key, b.parent, b.tokens, b.data), head),
        (NS, Block(b.key, b.parent, b.tokens[:-4] + b"\xff\xff\xff\x7f", b.data), head),
        (NS, Block(b.key, b.parent, b.tokens + b"\0\0\0\0", b.data), head),
        (NS, b, head[:-1]),
        (NS, b, seal(NS, block(3, BLOCK_BYTES - 1))),
    ]
    for ns, want, at in others:
        assert check(ns, want, at, b.data) is Outcome.CORRUPT
    assert check(NS, b, head, b.data[:-1]) is Outcome.CORRUPT


def test_a_checksum_that_is_not_known_here_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    b = block(1)
    monkeypatch.setitem(sealing._SUMS, 7, sealing._sha256)
    monkeypatch.setattr(sealing, "ALGORITHM", 7)
    head = seal(NS, b)
    assert check(NS, b, head, b.data) is Outcome.HIT
    monkeypatch.delitem(sealing._SUMS, 7)
    assert check(NS, b, head, b.data) is Outcome.CORRUPT


# -- order -------------------------------------------------------------------------------------------------------


def test_a_chain_is_eaten_from_its_end() -> None:
    order: Order[int] = Order()
    blocks = chain(0, 4)
    for b in blocks:  # the root is the oldest, and goes last all the same
        order.put((NS, b.key), b.parent, 0)
    gone = []
    while (name := order.oldest()) is not None:
        gone.append(name[1])
        order.pop(name)
    assert gone == [b.key for b in reversed(blocks)]
    assert not order._children


def test_a_branch_that_is_used_outlives_one_that_is_not() -> None:
    order: Order[int] = Order()
    root, old, new = block(0), block(1), block(2)
    for b in (root, old, Block(new.key, root.key, new.tokens, new.data)):
        order.put((NS, b.key), b.parent, 0)
    order.touch(NS, [root.key, old.key])
    assert order.oldest() == (NS, new.key)


# -- the disk: what can happen to files --------------------------------------------------------------------------


def test_five_hundred_flipped_bits_give_no_wrong_answer(tmp_path: Path) -> None:
    """Anywhere in the slots, header and padding included."""
    blocks = chain(0, 8)
    path = filled(tmp_path / "t", blocks)
    draw = np.random.Generator(np.random.PCG64(5))
    caught = 0
    for _ in range(25):
        places_of = draw.integers(0, 8 * SLOT, 20)
        bits = draw.integers(0, 8, 20)
        for at, bit in zip(places_of, bits, strict=True):
            spoil(path, int(at), int(bit))
        out = found(tmp_path / "t", blocks)  # holds each hit to its bytes
        caught += sum(o is not Outcome.HIT for o in out)
        for at, bit in zip(places_of, bits, strict=True):
            spoil(path, int(at), int(bit))
    assert caught > 100
    assert found(tmp_path / "t", blocks) == [Outcome.HIT] * 8


def test_swapped_slots_are_corrupt(tmp_path: Path) -> None:
    """Data under another's header is no hit; whole slots that changed places are found where they are."""
    blocks = chain(0, 4)
    path = filled(tmp_path / "t", blocks)
    raw = np.fromfile(path, np.uint8)[: 4 * SLOT].reshape(4, SLOT)
    spoilt = raw.copy()
    spoilt[[0, 1], HEADER_BYTES:] = raw[[1, 0], HEADER_BYTES:]
    whole = np.fromfile(path, np.uint8)
    whole[: 4 * SLOT] = spoilt.reshape(-1)
    whole.tofile(path)
    out = found(tmp_path / "t", blocks)
    assert sorted(o.value for o in out) == ["corrupt", "corrupt", "hit", "hit"]
    whole[: 4 * SLOT] = raw[[1, 0, 3, 2]].reshape(-1)
    whole.tofile(path)
    assert found(tmp_path / "t", blocks) == [Outcome.HIT] * 4


def test_a_slot_swapped_under_a_running_tier_is_corrupt(tmp_path: Path) -> None:
    blocks = chain(0, 4)

    async def call(tier: Any) -> list[Outcome]:
        await tier.store(NS, blocks, deadline=soon())
        a, b = (tier._place((NS, blocks[i].key)) for i in (0, 1))
        path = tier.files.segments[a[0]].path
        with path.open("r+b") as f:
            raw = []
            for _, slot in (a, b):
                f.seek(slot * SLOT)
                raw.append(f.read(SLOT))
            for (_, slot), bytes_of in zip((a, b), reversed(raw), strict=True):
                f.seek(slot * SLOT)
                f.write(bytes_of)
        return await TierConformance.hits(tier, blocks)

    out = over(DiskTier(tmp_path / "t", ROOM_BYTES), call)
    assert out == [Outcome.CORRUPT, Outcome.CORRUPT, Outcome.HIT, Outcome.HIT]


@pytest.mark.parametrize("left", [0, 100, HEADER_BYTES, SLOT + 5000, 3 * SLOT - 1])
def test_a_truncated_file(tmp_path: Path, left: int) -> None:
    blocks = chain(0, 6)
    path = filled(tmp_path / "t", blocks)
    with path.open("r+b") as f:
        f.truncate(left)
    out = found(tmp_path / "t", blocks)
    assert out.count(Outcome.HIT) == left // SLOT
    assert Outcome.CORRUPT not in out


def test_a_file_truncated_under_a_running_tier(tmp_path: Path) -> None:
    blocks = chain(0, 6)

    async def call(tier: Any) -> list[Outcome]:
        await tier.store(NS, blocks, deadline=soon())
        (segment,) = tier.files.segments.values()
        with segment.path.open("r+b") as f:
            f.truncate(2 * SLOT + 4096)
        out = await TierConformance.hits(tier, blocks)
        await tier.store(NS, blocks, deadline=soon())
        assert await TierConformance.hits(tier, blocks) == [Outcome.HIT] * 6
        return out

    out = over(DiskTier(tmp_path / "t", ROOM_BYTES), call)
    assert sorted(o.value for o in out) == ["corrupt"] * 4 + ["hit"] * 2


def test_another_namespace_sees_nothing(tmp_path: Path) -> None:
    blocks = chain(0, 3)
    filled(tmp_path / "t", blocks)
    assert found(tmp_path / "t", blocks, OTHER) == [Outcome.MISS] * 3
    assert found(tmp_path / "t", blocks) == [Outcome.HIT] * 3


def test_a_read_error_is_an_error_and_then_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = chain(0, 3)
    path = filled(tmp_path / "t", blocks)
    assert path.exists()

    async def call(tier: Any) -> list[Outcome]:
        def broken(self: Any, slot: int, *into: np.ndarray) -> int:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as m:
            m.setattr(places.Segment, "read", broken)
            out = await TierConformance.hits(tier, blocks)
        assert not (await tier.health()).ok
        return out + await TierConformance.hits(tier, blocks)

    out = over(DiskTier(tmp_path / "t", ROOM_BYTES), call)
    assert out == [Outcome.ERROR] * 3 + [Outcome.MISS] * 3


def test_a_full_disk_rejects_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, n: int) -> None:
        raise OSError(28, "No space left on device")

    blocks = chain(0, 80)

    async def call(tier: Any) -> None:
        with monkeypatch.context() as m:
            m.setattr(places.os, "posix_fallocate", full)
            assert await tier.store(NS, blocks[:2], deadline=soon()) == [Outcome.REJECTED] * 2
            assert "No space left" in (await tier.health()).why
        assert await tier.store(NS, blocks[:4], deadline=soon()) == [Outcome.STORED] * 4
        with monkeypatch.context() as m:  # from now on the oldest give way
            m.setattr(places.os, "posix_fallocate", full)
            for at in range(4, 80, 4):
                await tier.store(NS, blocks[at : at + 4], deadline=soon())
        out = await TierConformance.hits(tier, blocks)
        assert out.count(Outcome.HIT) == len(tier._size) > 2

    over(DiskTier(tmp_path / "t", ROOM_BYTES), call)


def test_a_write_error_leaves_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def call(tier: Any) -> None:
        def broken(self: Any, slot: int, *buffers: np.ndarray) -> None:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as m:
            m.setattr(places.Segment, "write", broken)
            assert await tier.store(NS, chain(0, 2), deadline=soon()) == [Outcome.ERROR] * 2
        assert await TierConformance.hits(tier, chain(0, 2)) == [Outcome.MISS] * 2
        assert await tier.store(NS, chain(0, 2), deadline=soon()) == [Outcome.STORED] * 2

    over(DiskTier(tmp_path / "t", ROOM_BYTES), call)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("n_bytes", [4096, 3 * 4096, 3 * 4096 + 64])
def test_blocks_of_whole_pages(tmp_path: Path, n_bytes: int, direct: bool) -> None:
    """Those go to and from their own memory; a page too few and one too many do not."""
    blocks = []
    for i in range(5):
        b = block(i, n_bytes)
        data = places.buffer_of(n_bytes)
        data[:] = b.data
        blocks.append(Block(b.key, b.parent, b.tokens, data))

    async def call(tier: Any) -> None:
        assert await tier.store(NS, blocks, deadline=soon()) == [Outcome.STORED] * 5
        for _ in range(2):
            wanted = [
                Block(b.key, b.parent, b.tokens, places.buffer_of(n_bytes))
                for b in reversed(blocks)
            ]
            assert await tier.load(NS, wanted, deadline=soon()) == [Outcome.HIT] * 5
            for b, want in zip(reversed(blocks), wanted, strict=True):
                assert np.array_equal(b.data, want.data)

    over(DiskTier(tmp_path / "t", ROOM_BYTES, direct=direct), call)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    async def call(tier: Any) -> None:
        with pytest.raises(ConfigError, match="in use by another process"):
            DiskTier(tmp_path / "t", ROOM_BYTES)
        with pytest.raises(ConfigError, match="in use by another process"):
            fsck(tmp_path / "t")

    over(DiskTier(tmp_path / "t", ROOM_BYTES), call)
    over(DiskTier(tmp_path / "t", ROOM_BYTES), lambda t: t.health())


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not a tier's"):
        DiskTier(tmp_path, ROOM_BYTES)
    assert (tmp_path / "letter.txt").read_text() == "dear"
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / places.MARK).write_text('{"format": 2}')
    with pytest.raises(ConfigError, match="has format 2"):
        DiskTier(tmp_path / "t", ROOM_BYTES)
    (tmp_path / "t" / places.MARK).write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        DiskTier(tmp_path / "t", ROOM_BYTES)


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = filled(tmp_path / "t", chain(0, 1))
    assert (tmp_path / "t").stat().st_mode & 0o77 == 0
    assert path.stat().st_mode & 0o77 == 0


def test_two_sizes_share_the_capacity(tmp_path: Path) -> None:
    small = [block(i, 5000) for i in range(2000, 2400)]

    async def call(tier: Any) -> None:
        for at in range(0, 400, 8):
            await tier.store(NS, small[at : at + 8], deadline=soon())
        assert tier.files.file_bytes > ROOM_BYTES * 3 // 4
        assert await tier.store(NS, chain(0, 3), deadline=soon()) == [Outcome.STORED] * 3
        assert await TierConformance.hits(tier, chain(0, 3)) == [Outcome.HIT] * 3
        assert (await TierConformance.hits(tier, small)).count(Outcome.HIT) > 100
        assert tier.files.file_bytes <= ROOM_BYTES

    over(DiskTier(tmp_path / "t", ROOM_BYTES), call)


def test_the_order_outlives_a_restart(tmp_path: Path) -> None:
    """What was written last is still the last to go."""
    room = 8 * SLOT
    first, second = chain(0, 5), chain(50, 5)

    async def one(tier: Any) -> None:
        await tier.store(NS, first, deadline=soon())

    async def two(tier: Any) -> None:
        assert await TierConformance.hits(tier, first) == [Outcome.HIT] * 5
        await tier.touch(NS, [b.key for b in first])
        await tier.store(NS, second, deadline=soon())
        out = await TierConformance.hits(tier, first)
        assert out == [Outcome.HIT] * out.count(Outcome.HIT) + [Outcome.MISS] * out.count(
            Outcome.MISS
        )
        assert Outcome.HIT in out

    over(DiskTier(tmp_path / "t", room), one)
    over(DiskTier(tmp_path / "t", room), two)


# -- fsck --------------------------------------------------------------------------------------------------------


def test_fsck_names_bad_slots_and_drops_them(tmp_path: Path) -> None:
    path = filled(tmp_path / "t", chain(0, 6))
    clean = fsck(tmp_path / "t")
    assert (clean.good, clean.bad, clean.good_bytes) == (6, [], 6 * BLOCK_BYTES)
    assert clean.namespaces == {NS[:8].hex(): 6}
    spoil(path, 1 * SLOT + HEADER_BYTES + 100)
    spoil(path, 3 * SLOT + 70)
    again = fsck(tmp_path / "t")
    assert [(slot, why) for _, slot, why in again.bad] == [
        (1, "its data does not match its header"),
        (3, "its header is damaged"),
    ]
    assert again.good == 4
    assert again.dropped == 0
    assert fsck(tmp_path / "t", drop=True).dropped == 2
    after = fsck(tmp_path / "t")
    assert (after.good, after.bad) == (4, [])
    assert after.empty == clean.empty + 2


def test_fsck_refuses_what_is_no_tier(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        fsck(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no disk tier"):
        fsck(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A file system of 300 KiB, which some kernels give no O_DIRECT either."""
    folder = tmp_path / "small"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or subprocess.run(words, capture_output=True, check=False).returncode
    ):
        pytest.skip("needs the right to mount a small file system")
    try:

        async def call(tier: Any) -> None:
            blocks = chain(0, 40)
            out = await tier.store(NS, blocks, deadline=soon())
            assert out.count(Outcome.STORED) > 4
            found = await TierConformance.hits(tier, blocks)
            assert found.count(Outcome.HIT) > 4
            assert "No space left" in (await tier.health()).why or Outcome.REJECTED not in out

        over(DiskTier(folder / "t", ROOM_BYTES), call)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_buffers_begin_at_pages() -> None:
    many = [places.buffer_of(n) for n in (1, 4096, 5000, 1 << 20) for _ in range(50)]
    assert all(b.ctypes.data % places.PAGE == 0 for b in many)
    assert {len(b) for b in many} == {1, 4096, 5000, 1 << 20}


def test_no_capacity() -> None:
    with pytest.raises(ConfigError, match="holds nothing"):
        HostTier(0)
    with pytest.raises(ConfigError, match="holds nothing"):
        DiskTier("/nowhere", 100)


def test_a_slow_line_times_out_in_time() -> None:
    async def call(tier: Any) -> list[Outcome]:
        blocks = chain(0, 5)
        await tier.inner.store(NS, blocks, deadline=soon())
        return list(await tier.load(NS, [empty(b) for b in blocks], deadline=soon(0.1)))

    out = over(FaultyTier(HostTier(ROOM_BYTES), bytes_per_s=400_000), call)
    assert out[0] is Outcome.HIT
    assert out[-1] is Outcome.TIMEOUT
