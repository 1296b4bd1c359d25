"""A saved sequence comes back bit for bit, and nothing else comes back at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quire.errors import CapacityError, ConfigError, InvariantError, TierError
from quire.spec import CacheGroup, CacheSpec, Field, Full, Residual, Span, State, Window
from quire.store import BlockStore, BlockTable
from quire.store.snapshot import load_table, read_snapshot, save_table, spec_digest

FIELDS = (Field("k", (3,), "float32"), Field("v", (2,), "float32"))


def spec(span: Span | None = None, **changes: object) -> CacheSpec:
    """Two groups of unlike blocks: two layers with the span, and one layer of full attention."""
    first = {"block_tokens": 4, "codec": "fp32"} | changes
    return CacheSpec(
        (
            CacheGroup("a", ((0, 0), (0, 1), (1, 0)), FIELDS, span or Full(), **first),  # type: ignore[arg-type]
            CacheGroup("b", ((2, 0),), FIELDS[:1], Full(), block_tokens=8),
        )
    )


def lossy() -> CacheSpec:
    """A body of whole blocks and its raw companion, which keeps the tail and a residual window."""
    coords = ((0, 0), (0, 1))
    codes = (Field("k.codes", (3,), "uint8"), Field("k.scale", (1,), "float32", "block"))
    return CacheSpec(
        (
            CacheGroup("a", coords, codes, Full(), "toy", block_tokens=4, raw="a.raw"),
            CacheGroup("a.raw", coords, FIELDS, Residual(4, 4, Full()), block_tokens=4),
        )
    )


def recurrent() -> CacheSpec:
    state = (Field("rec0", (5,), "float32", "block"),)
    return CacheSpec((CacheGroup("s", ((0, 0),), state, State(), block_tokens=1),))


def filled(store: BlockStore, lengths: list[int]) -> BlockTable:
    """A table grown in these portions, every byte of the arena random."""
    generator = torch.Generator().manual_seed(1)
    store.arena.buffer.copy_(
        torch.randint(0, 256, store.arena.buffer.shape, generator=generator, dtype=torch.uint8)
    )
    table = store.open()
    for n in lengths:
        table.append(n)
        table.commit()
    return table


def rows(table: BlockTable) -> list[np.ndarray]:
    """Bytes of every row that holds a token, chain by chain, field by field."""
    out = []
    for chain in table.chains:
        group = chain.group
        at = np.arange(1) if group.recurrent else chain.positions(table.length)
        slots = at if group.recurrent else np.searchsorted(chain.all_positions(table.length), at)
        blocks = chain.ids[slots // group.block_tokens]
        assert (blocks >= 0).all()
        unit = torch.from_numpy(table.store.units(group, blocks).astype(np.int64))
        row = torch.from_numpy(slots % group.block_tokens)
        for layer in group.layers:
            for f in group.fields:
                view = table.store.view(group, layer, f.name)
                part = view[unit, :, row] if f.per == "token" else view[unit]
                out.append(part.contiguous().view(torch.uint8).numpy())
    return out


def shape(table: BlockTable) -> list[object]:
    return [
        (
            c.group,
            c.count,
            c.held,
            c.cursor,
            c.sealed,
            c.cut,
            None if c.kept is None else c.kept.tolist(),
            [int(b) < 0 for b in c.ids[: c.count]],
        )
        for c in table.chains
    ]


@pytest.mark.parametrize(
    ("cache", "lengths"),
    [
        (spec(), [11]),
        (spec(), [16]),
        (spec(), [0]),
        (spec(Window(5)), [3, 9, 8]),
        (lossy(), [6, 5, 8]),
        (recurrent(), [7]),
    ],
    ids=["partial", "whole", "empty", "window", "lossy", "recurrent"],
)
def test_a_sequence_comes_back_bit_for_bit(
    cache: CacheSpec, lengths: list[int], tmp_path: Path
) -> None:
    file = tmp_path / "s"
    table = filled(BlockStore(cache, 1 << 16, device="cpu"), lengths)
    save_table(file, table, {"note": "ä"})
    store = BlockStore(cache, 1 << 17, device="cpu")
    other = store.open()  # so that its block ids are others
    other.append(3)
    head = read_snapshot(file)
    assert (head.length, head.extra["note"]) == (table.length, "ä")
    again = load_table(head, store)
    assert (again.length, again.accepted, again.committed) == (table.length,) * 3
    assert shape(again) == shape(table)
    for a, b in zip(rows(again), rows(table), strict=True):
        assert (a == b).all()
    again.append(9)  # and it goes on
    again.commit()
    again.release()
    other.release()
    assert store.usage().held_bytes == 0


def test_kept_tokens_and_split_groups_come_back(tmp_path: Path) -> None:
    table = filled(BlockStore(spec(), 1 << 16, device="cpu"), [11])
    table.split(0, [(1, 0)])
    table.keep(0, [0, 5, 6, 10])
    save_table(tmp_path / "s", table)
    again = load_table(read_snapshot(tmp_path / "s"), BlockStore(spec(), 1 << 16, device="cpu"))
    assert shape(again) == shape(table)
    for a, b in zip(rows(again), rows(table), strict=True):
        assert (a == b).all()


def test_memory_of_others_does_not_leave_the_process(tmp_path: Path) -> None:
    """Rows behind the last token, and what is kept per block of one that is not whole, are somebody else's still."""
    bounds = (*FIELDS, Field("k.bounds", (3,), "float32", "block"))
    groups = (*spec().groups, CacheGroup("c", ((3, 0), (3, 1)), bounds, Full(), block_tokens=8))
    store = BlockStore(CacheSpec(groups), 1 << 16, device="cpu")
    filled(store, []).release()
    store.arena.buffer.fill_(0xAB)
    table = store.open()
    table.append(5)
    table.commit()
    for chain in table.chains:
        used = 5 % chain.group.block_tokens
        units = store.units(chain.group, chain.ids[: chain.count])
        for layer in chain.group.layers:
            for f in chain.group.fields:
                view = store.view(chain.group, layer, f.name)
                for unit in units:
                    view[int(unit)] = 1.0
                view[int(units[-1]), :, used * (f.per == "token") :] = 7.0  # a stranger's
    save_table(tmp_path / "s", table)
    data = (tmp_path / "s").read_bytes()
    assert np.float32(1.0).tobytes() in data
    assert np.float32(7.0).tobytes() not in data
    assert bytes([0xAB] * 4) not in data


@pytest.mark.parametrize(
    "other",
    [
        spec(codec="bf16"),
        spec(block_tokens=8),
        spec(Window(5)),
        spec(retention="sinks:4"),
        CacheSpec(spec().groups[:1]),
        CacheSpec(spec().groups, shared={3: 2}),
    ],
)
def test_another_spec_is_refused(other: CacheSpec, tmp_path: Path) -> None:
    save_table(tmp_path / "s", filled(BlockStore(spec(), 1 << 16, device="cpu"), [5]))
    store = BlockStore(other, 1 << 16, device="cpu")
    with pytest.raises(ConfigError, match="another model, codec or block size"):
        load_table(read_snapshot(tmp_path / "s"), store)
    assert store.usage().held_bytes == 0


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "s"
    save_table(file, filled(BlockStore(spec(), 1 << 16, device="cpu"), [11]), {"tokens": "[1, 2]"})
    whole = file.read_bytes()
    generator = np.random.default_rng(0)
    places = [0, 3, 8, 9, len(whole) - 1, *generator.integers(0, len(whole), 150).tolist()]
    for at in places:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(generator.integers(8))
        file.write_bytes(damaged)
        store = BlockStore(spec(), 1 << 16, device="cpu")
        with pytest.raises((TierError, ConfigError)):
            load_table(read_snapshot(file), store)
        assert store.usage().held_bytes == 0


@pytest.mark.parametrize("left", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(left: int, tmp_path: Path) -> None:
    file = tmp_path / "s"
    save_table(file, filled(BlockStore(spec(), 1 << 16, device="cpu"), [11]))
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(TierError, match="restore a copy"):
        read_snapshot(file)


def test_a_file_changed_between_looking_and_loading_is_refused(tmp_path: Path) -> None:
    store = BlockStore(spec(), 1 << 16, device="cpu")
    table = filled(store, [5])
    save_table(tmp_path / "s", table)
    head = read_snapshot(tmp_path / "s")
    table.append(1)
    table.commit()
    save_table(tmp_path / "s", table)
    with pytest.raises(TierError, match="damaged"):
        load_table(head, store)


def test_no_room_takes_nothing(tmp_path: Path) -> None:
    save_table(tmp_path / "s", filled(BlockStore(spec(), 1 << 16, device="cpu"), [40]))
    store = BlockStore(spec(), 2048, device="cpu")
    with pytest.raises(CapacityError):
        load_table(read_snapshot(tmp_path / "s"), store)
    assert store.usage().held_bytes == 0


def test_files_that_are_no_snapshots(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(ConfigError, match="there is no file"):
        read_snapshot(tmp_path / "none")
    save_file({"x": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(ConfigError, match="no cache of Quire's"):
        read_snapshot(tmp_path / "other")
    save_file({"x": np.zeros(3)}, tmp_path / "new", metadata={"quire": json.dumps({"format": 99})})
    with pytest.raises(ConfigError, match="format 99"):
        read_snapshot(tmp_path / "new")


def test_only_settled_tables_are_saved_and_files_appear_whole(tmp_path: Path) -> None:
    table = filled(BlockStore(spec(), 1 << 16, device="cpu"), [5])
    with pytest.raises(ConfigError, match="cannot be written"):
        save_table(tmp_path / "no" / "s", table)
    save_table(tmp_path / "s", table)
    assert [p.name for p in tmp_path.iterdir()] == ["s"], "nothing half written beside it"
    table.append(1)
    with pytest.raises(InvariantError, match="5 of 6"):
        save_table(tmp_path / "s", table)


def test_the_digest_is_the_same_in_every_process() -> None:
    code = (
        "from quire.spec import *\nfrom quire.store.snapshot import spec_digest\n"
        "f=(Field('k',(3,),'float32'),)\n"
        "print(spec_digest(CacheSpec((CacheGroup('a',((0,0),),f,Window(5)),))))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:0]={sys.path!r}\n{code}"],
            check=True,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    here = CacheSpec((CacheGroup("a", ((0, 0),), FIELDS[:1], Window(5)),))
    assert seen == {spec_digest(here) + "\n"}
