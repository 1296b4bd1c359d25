"""One sequence's cache as a file, and back, bit for bit.

    safetensors   header: {"quire": json}       what the blocks are: spec, lengths, the order of every chain
                  chain0: [n, block_bytes] u8   the blocks of the first chain that are still held, in order
                  chain1: ...

Nothing in the file is executed, and nothing is trusted: a checksum covers blocks and header, and a file of another
`CacheSpec` is refused, because its bytes would mean something else. Bytes behind the last token are written as zeros:
memory that belonged to somebody else does not leave the process.

Reading a header needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quire.errors import CapacityError, ConfigError, InvariantError, TierError
from quire.spec import CacheGroup, CacheSpec
from quire.store.chain import GONE, Chain

if TYPE_CHECKING:
    from quire.store.arena import Arena
    from quire.store.store import BlockStore
    from quire.store.table import BlockTable

__all__ = [
    "KEEPER",
    "Snapshot",
    "chain_bytes",
    "chain_record",
    "load_table",
    "read_snapshot",
    "restore_chain",
    "save_table",
    "spec_digest",
]

FORMAT = 2
KEEPER = "keeper:"
"""Before the names of arrays that a policy has of a sequence."""

Revive = Callable[["BlockTable", Mapping[str, Any], Mapping[str, np.ndarray]], None]
"""revive(table, about, arrays): gives a table the keeper that it had."""


@dataclass(frozen=True)
class Snapshot:
    """What a file says about itself.

    Args:
        path: where it lies.
        spec: digest of the `CacheSpec` that its blocks follow.
        length: logical tokens.
        chains: per chain: group name, coords, entries, which of them are held, and where it was cut.
        extra: what the caller put in, strings only.
        keeper: what a policy knows of it; None: it keeps all that its spans need.
        checksum: SHA-256 over all of the above and the blocks.
    """

    path: Path
    spec: str
    length: int
    chains: tuple[Mapping[str, Any], ...]
    extra: Mapping[str, str]
    keeper: Mapping[str, Any] | None
    checksum: str


def spec_digest(spec: CacheSpec) -> str:
    """SHA-256 over all that gives a block's bytes their meaning: groups, coordinates, fields, codecs, sizes."""
    groups = [
        (g.name, g.coords, g.fields, g.span, g.codec, g.retention, g.block_tokens, g.raw)
        for g in spec.groups
    ]
    return hashlib.sha256(repr((FORMAT, groups, sorted(spec.shared.items()))).encode()).hexdigest()


# -- writing -----------------------------------------------------------------------------------------------------


def save_table(
    path: str | os.PathLike[str], table: BlockTable, extra: Mapping[str, str] | None = None
) -> None:
    """Writes a sequence's blocks to a file, which appears whole or not at all.

    Args:
        path: where to; a file there is replaced.
        table: all of its tokens committed.
        extra: kept beside them, for instance the tokens.

    Raises:
        ConfigError: the file cannot be written, or a policy's scorer from outside is half way.
        InvariantError: the table has tokens that are not final.

    Cost: the held blocks once through host memory.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if table.closed or table.committed != table.length:
        raise InvariantError(
            f"only settled tables can be saved: {table.committed} of {table.length} tokens committed"
        )
    if table.cold is not None:
        raise ConfigError(
            f"a sequence of {table.length} tokens with blocks in a tier cannot be saved; give the cache more memory"
        )
    arena = table.store.arena
    blocks = {f"chain{i}": chain_bytes(arena, c, table.length) for i, c in enumerate(table.chains)}
    blocks |= {f"own{i}": c.own for i, c in enumerate(table.chains) if c.own is not None}
    keeper = None
    if table.keeper is not None:
        keeper, arrays = table.keeper.record()
        blocks |= {KEEPER + name: x for name, x in arrays.items()}
    meta = {
        "format": FORMAT,
        "spec": spec_digest(table.store.spec),
        "length": table.length,
        "chains": [chain_record(chain) for chain in table.chains],
        "extra": dict(extra or {}),
        "keeper": keeper,
    }
    document = json.dumps(meta | {"checksum": _checksum(meta, blocks)})
    target = Path(path)
    half = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        save_file(blocks, half, metadata={"quire": document})
        half.replace(target)
    except (OSError, SafetensorError) as e:
        half.unlink(missing_ok=True)
        raise ConfigError(f"{target} cannot be written ({e}); choose another place") from e


def chain_record(chain: Chain) -> dict[str, Any]:
    """What a chain is, but for the bytes of its blocks and the positions of its own."""
    ids = chain.ids[: chain.count]
    return {
        "group": chain.group.name,
        "coords": [list(c) for c in chain.group.coords],
        "held": "".join("0" if b == GONE else "1" for b in ids),
        "cursor": chain.cursor,
        "sealed": chain.sealed,
        "encoded": chain.encoded,
        "cut": chain.cut,
        "kept": None if chain.kept is None else [int(p) for p in chain.kept],
    }


def chain_bytes(arena: Arena, chain: Chain, length: int) -> np.ndarray:
    """`[held, block_bytes] uint8`: the chain's blocks of a sequence of `length` tokens, zeros where no token is."""
    group, pool, buffer = chain.group, chain.pool, arena.buffer
    size, live = group.block_bytes, chain.live()
    out = np.zeros((len(live), size), np.uint8)
    for row, block in enumerate(live):
        at = pool.byte_offset(int(block))
        out[row] = buffer[at : at + size].cpu().numpy()
    out[:, ~_meant(group, group.block_tokens)] = 0
    if chain.partial(length) and chain.count and chain.ids[chain.count - 1] != GONE:
        out[-1, ~_meant(group, chain.slot(length) % group.block_tokens or 1)] = 0
    return out


def _meant(group: CacheGroup, n_tokens: int) -> np.ndarray:
    """`[block_bytes] bool`: the bytes of a block's first `n_tokens` rows; what is per block comes with all of them."""
    meant = np.zeros((len(group.coords), group.tile_bytes), bool)
    for f in group.fields:
        if f.per == "block" and n_tokens < group.block_tokens:
            continue
        start = group.field_offsets[f.name]
        meant[:, start : start + f.bytes_in(n_tokens)] = True
    return meant.reshape(-1)


def _checksum(meta: Mapping[str, Any], blocks: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(blocks):
        found.update(f"{name} {blocks[name].shape}".encode())
        found.update(np.ascontiguousarray(blocks[name]).data)
    return found.hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------


def read_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """The header alone: enough to refuse a file before a model is loaded. Its checksum is not verified yet.

    Raises:
        ConfigError: there is no such file, or it is no snapshot.
        TierError: it is damaged.
    """
    return _open(Path(path), blocks=False)[0]


def load_table(snapshot: Snapshot, store: BlockStore, revive: Revive | None = None) -> BlockTable:
    """A sequence as it was when it was saved, in blocks of `store`.

    Args:
        revive: for one whose tokens go by score.

    Raises:
        ConfigError: the store's spec is another one, or the policy.
        TierError: the file is damaged, or was changed since its header was read.
        CapacityError: the store has no room for it; nothing was taken.
    """
    if snapshot.spec != spec_digest(store.spec):
        raise ConfigError(
            f"{snapshot.path} was saved with another model, codec or block size; use the same ones, or another file"
        )
    now, blocks = _open(snapshot.path, blocks=True)
    meta = {
        "format": FORMAT,
        "spec": now.spec,
        "length": now.length,
        "chains": [dict(c) for c in now.chains],
        "extra": dict(now.extra),
        "keeper": now.keeper,
    }
    if now.checksum != snapshot.checksum or _checksum(meta, blocks) != now.checksum:
        raise _damaged(snapshot.path)
    table = store.open()
    table.chains = []
    try:
        for i, record in enumerate(now.chains):
            rows = blocks[f"chain{i}"]
            chain = restore_chain(store, record, rows, blocks.get(f"own{i}"), table.chains)
            _write(store, chain, rows)
        table.length = table.accepted = table.committed = now.length
        if now.keeper is not None:
            if revive is None:
                raise ConfigError(f"{snapshot.path} was saved under a policy that drops tokens")
            arrays = {n.removeprefix(KEEPER): x for n, x in blocks.items() if n.startswith(KEEPER)}
            revive(table, now.keeper, arrays)
    except (ConfigError, CapacityError):
        table.release()
        raise
    except (KeyError, TypeError, ValueError) as e:
        table.release()
        raise _damaged(snapshot.path) from e
    return table


def _open(path: Path, *, blocks: bool) -> tuple[Snapshot, dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    try:
        with safe_open(path, framework="numpy") as f:
            document = (f.metadata() or {}).get("quire")
            found = {n: f.get_tensor(n) for n in f.keys()} if blocks else {}  # noqa: SIM118 - no mapping
    except SafetensorError as e:
        raise TierError(
            f"{path} is no snapshot of a cache, or was cut off; restore a copy, or begin a new file"
        ) from e
    except OSError as e:
        raise ConfigError(f"{path} cannot be read ({e.strerror or e})") from e
    if document is None:
        raise ConfigError(f"{path} is a safetensors file, but holds no cache of Quire's")
    try:
        meta = json.loads(document)
        if meta["format"] != FORMAT:
            raise ConfigError(
                f"{path} has format {meta['format']}; this version reads format {FORMAT}"
            )
        head = Snapshot(
            path,
            str(meta["spec"]),
            int(meta["length"]),
            tuple(dict(c) for c in meta["chains"]),
            {str(k): str(v) for k, v in meta["extra"].items()},
            None if meta["keeper"] is None else dict(meta["keeper"]),
            str(meta["checksum"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, ConfigError):
            raise
        raise _damaged(path) from e
    return head, found


def restore_chain(
    store: BlockStore,
    record: Mapping[str, Any],
    rows: np.ndarray,
    own: np.ndarray | None,
    chains: list[Chain],
) -> Chain:
    """One more of a sequence's chains, over blocks of its own, whose bytes are still to be written.

    Args:
        record: as `chain_record` made it.
        rows: the bytes, of which the shape is checked.
        own: positions of the chain's own.
        chains: it is appended to them at once, so that who began with them can give blocks back.

    Raises:
        CapacityError: no block is left.
        KeyError, TypeError, ValueError: no such record.
    """
    group = _group(store.spec, record)
    if rows.dtype != np.uint8 or rows.shape != (record["held"].count("1"), group.block_bytes):
        raise ValueError(f"{rows.dtype} {rows.shape} for {group.name}")
    pool = store.pool_for(group)
    chain = Chain(group, pool)
    chains.append(chain)
    for held in record["held"]:
        if held == "1":
            chain.push(pool.take())
        else:
            chain.push(GONE)
            chain.held -= 1
    chain.cursor, chain.sealed, chain.cut = (int(record[k]) for k in ("cursor", "sealed", "cut"))
    chain.encoded = int(record["encoded"])
    chain.kept = None if record["kept"] is None else np.asarray(record["kept"], np.int64)
    if own is not None:
        if chain.kept is None or own.shape != (len(group.coords), len(chain.kept)):
            raise ValueError(f"positions {own.shape} for {group.name}")
        chain.own = own.astype(np.int64)
    return chain


def _write(store: BlockStore, chain: Chain, rows: np.ndarray) -> None:
    import torch

    buffer, size = store.arena.buffer, chain.group.block_bytes
    with torch.inference_mode():  # where the arena may have been made
        for block, row in zip(chain.live(), rows, strict=True):
            start = chain.pool.byte_offset(int(block))
            buffer[start : start + size] = torch.from_numpy(row)


def _group(spec: CacheSpec, record: Mapping[str, Any]) -> CacheGroup:
    """The group that a chain belongs to, narrowed where a sequence had split it."""
    name = record["group"]
    group = spec.group(name.partition("/")[0])
    coords = tuple((int(a), int(b)) for a, b in record["coords"])
    if group.name == name and group.coords == coords:
        return group
    tag = name.removeprefix(
        group.name
    )  # of a part with tokens of its own; so is its raw companion's
    raw = None if group.raw is None else group.raw + tag
    return replace(group, name=name, coords=coords, raw=raw)


def _damaged(path: Path) -> TierError:
    return TierError(
        f"{path} is damaged: its content does not match its checksum; restore a copy, or begin a new file"
    )
