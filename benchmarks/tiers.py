"""The disk and redis tiers beside plain files and SQLite, and the first token after a restart.

    python benchmarks/tiers.py                       blocks of 1 MiB in a folder under the current one
    python benchmarks/tiers.py --folder /mnt/nvme    elsewhere
    python benchmarks/tiers.py --redis HOST:PORT     that server, instead of one that is started here for the time

Every side has what it wrote on the disk when its time ends: the tier by fdatasync per batch of 16, files by fsync of
each and of their folder, SQLite (WAL, synchronous=FULL) by a commit per 16. Reads are cold: the tier's pass the page
cache by, the others' pages are dropped before. The tier verifies every block that it reads, the others nothing. It has
4 threads, and so have the files of the third side. A Redis server has what it was given in memory, not on a disk:
its tier, which verifies too, stands beside a client that pipelines 16 plain values and verifies nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import socket
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import sleep
from typing import Any

import common
import numpy as np
from common import Document, Table

from quire.bench.machine import Spread
from quire.store.tiers import Block, Outcome
from quire.store.tiers import envelope as sealing
from quire.store.tiers.address import RedisAddress, parse_address
from quire.store.tiers.disk import DiskTier
from quire.store.tiers.redis import RedisTier
from quire.store.tiers.slots import buffer_of

NS = b"n" * 32
FAR = 1e18
BATCH = 16


def blocks_of(n: int, n_bytes: int, turn: int) -> list[Block]:
    """Other bytes and names each turn; in pages of their own, as the engine's are."""
    draw = np.random.Generator(np.random.PCG64(turn))
    out = []
    for i in range(n):
        data = buffer_of(n_bytes)
        data[:] = draw.integers(0, 256, n_bytes, np.uint8)
        key = f"{turn:016d}{i:016d}".encode()
        out.append(Block(key, b"p" * 32, b"\0" * 128, data))
    return out


def forget(path: Path) -> None:
    """Drops a file's pages from the cache."""
    with path.open("rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class TierSide:
    """A tier of ours, as the engine drives it; `make` is called where its loop runs."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.loop = asyncio.new_event_loop()
        self.tier: Any = self.loop.run_until_complete(self._open(make))

    async def _open(self, make: Callable[[], Any]) -> Any:
        return make()

    def put(self, blocks: Sequence[Block]) -> None:
        for at in range(0, len(blocks), BATCH):
            part = blocks[at : at + BATCH]
            out = self.loop.run_until_complete(self.tier.store(NS, part, deadline=FAR))
            assert set(out) == {Outcome.STORED}, out

    def cool(self) -> None:
        """Its reads pass the page cache by."""

    def get(self, wanted: Sequence[Block]) -> None:
        for at in range(0, len(wanted), BATCH):
            part = wanted[at : at + BATCH]
            out = self.loop.run_until_complete(self.tier.load(NS, part, deadline=FAR))
            assert set(out) == {Outcome.HIT}, out

    def clear(self, blocks: Sequence[Block]) -> None:
        self.loop.run_until_complete(self.tier.drop(NS, [b.key for b in blocks]))

    def close(self) -> None:
        self.loop.run_until_complete(self.tier.close())
        self.loop.close()


class FileSide:
    """A file per block, renamed into place."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        folder.mkdir()
        self.pool = ThreadPoolExecutor(threads)

    def _path(self, block: Block) -> Path:
        return self.folder / block.key.decode()

    def _put(self, block: Block) -> None:
        path = self._path(block)
        half = path.with_suffix(".part")
        with half.open("wb", buffering=0) as f:
            f.write(block.data.data)
            os.fsync(f.fileno())
        half.replace(path)

    def put(self, blocks: Sequence[Block]) -> None:
        list(self.pool.map(self._put, blocks))
        fd = os.open(self.folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

    def cool(self) -> None:
        for path in self.folder.iterdir():
            forget(path)

    def _get(self, want: Block) -> None:
        with self._path(want).open("rb", buffering=0) as f:
            assert f.readinto(want.data.data) == len(want.data)

    def get(self, wanted: Sequence[Block]) -> None:
        list(self.pool.map(self._get, wanted))

    def clear(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            self._path(block).unlink()

    def close(self) -> None:
        self.pool.shutdown()


class SqliteSide:
    """A table of blobs."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._open()
        self.db.execute("create table blocks (key blob primary key, data blob) without rowid")

    def _open(self) -> None:
        self.db = sqlite3.connect(self.path)
        self.db.execute("pragma journal_mode=wal")
        self.db.execute("pragma synchronous=full")

    def put(self, blocks: Sequence[Block]) -> None:
        for at in range(0, len(blocks), BATCH):
            with self.db:
                self.db.executemany(
                    "insert into blocks values (?, ?)",
                    [(b.key, b.data.data) for b in blocks[at : at + BATCH]],
                )

    def cool(self) -> None:
        self.db.execute("pragma wal_checkpoint(truncate)")
        self.db.close()
        forget(self.path)
        self._open()

    def get(self, wanted: Sequence[Block]) -> None:
        for want in wanted:
            (data,) = self.db.execute(
                "select data from blocks where key = ?", (want.key,)
            ).fetchone()
            want.data[:] = np.frombuffer(data, np.uint8)

    def clear(self, blocks: Sequence[Block]) -> None:
        with self.db:
            self.db.execute("delete from blocks")

    def close(self) -> None:
        self.db.close()


class PlainRedisSide:
    """What somebody would write: a value per block, 16 in a pipeline."""

    def __init__(self, address: RedisAddress) -> None:
        import redis

        self.client = redis.Redis(**address.options())

    def put(self, blocks: Sequence[Block]) -> None:
        for at in range(0, len(blocks), BATCH):
            with self.client.pipeline(transaction=False) as pipe:
                for b in blocks[at : at + BATCH]:
                    pipe.set(b"plain:" + b.key, b.data.tobytes())
                pipe.execute()

    def cool(self) -> None:
        """Its memory is what it is."""

    def get(self, wanted: Sequence[Block]) -> None:
        for at in range(0, len(wanted), BATCH):
            part = wanted[at : at + BATCH]
            values: Any = self.client.mget([b"plain:" + w.key for w in part])
            for want, value in zip(part, values, strict=True):
                want.data[:] = np.frombuffer(value, np.uint8)

    def clear(self, blocks: Sequence[Block]) -> None:
        self.client.unlink(*(b"plain:" + b.key for b in blocks))

    def close(self) -> None:
        self.client.close()


@contextmanager
def redis_at(place: str | None) -> Iterator[RedisAddress | None]:
    """The server that was named, one of our own, or None where there is none."""
    if place is not None:
        yield parse_address(place)
        return
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None or find_spec("redis") is None:
        common.say("no Redis server or no package redis here: that side is left out")
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["--port", str(port), "--unixsocket", str(path), "--save", "", "--dir", folder]
        process = subprocess.Popen([binary, *words], stdout=subprocess.DEVNULL)
        try:
            while not path.exists():
                if process.poll() is not None:
                    raise SystemExit("the Redis server ended")
                sleep(0.01)
            yield parse_address(f"127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait()


def stores(doc: Document, args: argparse.Namespace, folder: Path) -> None:
    """Puts and cold gets of all sides, in turns."""
    with redis_at(args.redis) as address:
        _stores(doc, args, folder, address)


def _stores(
    doc: Document, args: argparse.Namespace, folder: Path, address: RedisAddress | None
) -> None:
    n = args.blocks
    room = 4 * n * (args.block_bytes + 8192)
    sides: dict[str, Any] = {
        "disk tier": TierSide(partial(DiskTier, folder / "tier", room, sync="batch")),
        "files": FileSide(folder / "files", 1),
        "files, 4 threads": FileSide(folder / "files4", 4),
        "sqlite": SqliteSide(folder / "blocks.db"),
    }
    if address is not None:
        sides["redis tier"] = TierSide(partial(RedisTier, address, 1 << 60, needed=True))
        sides["redis, plain"] = PlainRedisSide(address)
    seconds: dict[tuple[str, str], list[float]] = {
        (s, w): [] for s in sides for w in ("put", "get")
    }
    for turn in range(args.repeats + 1):
        blocks = blocks_of(n, args.block_bytes, turn)
        for name, side in sides.items():
            put = common.timed(partial(side.put, blocks), args.clock)
            side.cool()
            wanted = [Block(b.key, b.parent, b.tokens, buffer_of(args.block_bytes)) for b in blocks]
            for want in wanted:
                want.data[:] = 0
            get = common.timed(partial(side.get, wanted), args.clock)
            same = all(np.array_equal(a.data, b.data) for a, b in zip(wanted, blocks, strict=True))
            if turn == 0:  # what is not counted
                common.check(doc, f"{name} gives back what it was given", same)
                side.clear(blocks)
                continue
            assert same
            seconds[name, "put"].append(put)
            seconds[name, "get"].append(get)
            side.clear(blocks)
    for side in sides.values():
        side.close()
    total = n * args.block_bytes
    for name in sides:
        row: dict[str, Any] = {"side": name}
        for work in ("put", "get"):
            mine, files = seconds[name, work], seconds["files", work]
            row[f"{work}_mb_per_s"] = Spread.of(total / s / 1e6 for s in mine).json(digits=0)
            row[f"{work}_to_files"] = Spread.of(
                f / s for f, s in zip(files, mine, strict=True)
            ).json(digits=2)
        doc["stores"].append(row)


def restart(doc: Document, args: argparse.Namespace, folder: Path) -> None:
    """The packaged model's first token, cold and with what the process before left in the folder."""
    from quire.engine import Engine, SamplingParams
    from quire.models.load import load_model
    from quire.models.open import open_runner

    loaded = load_model()
    prompt = common.random_tokens(args.tokens, 256, args.seed)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    for turn in range(args.repeats):
        tiers = f"disk:1GiB@{folder}/cache{turn}"
        seen: dict[str, Any] = {}
        for when in ("cold", "restarted"):
            runner: Any = open_runner(loaded.model, memory="512MiB", share="prefix", tiers=tiers)
            with Engine(runner, loaded.tokenizer) as engine:
                engine.generate([prompt[:40][::-1]], params)  # warm, with something else
                (out,) = engine.generate([prompt], params)
            runner.close()
            seen[when] = out
        cold, again = seen["cold"], seen["restarted"]
        if turn == 0:
            common.check(doc, "the same tokens after a restart", cold.token_ids == again.token_ids)
            whole = (args.tokens - 1) // 32 * 32
            found = (cold.figures.loaded_tokens, again.figures.loaded_tokens)
            common.check(doc, "all whole blocks were found", found == (0, whole), found)
        doc["restart"]["cold_s"].append(cold.figures.ttft_s)
        doc["restart"]["restarted_s"].append(again.figures.ttft_s)
    made = doc["restart"]
    made["ratio"] = Spread.of(
        a / b for a, b in zip(made["cold_s"], made["restarted_s"], strict=True)
    ).json(digits=1)
    for key in ("cold_s", "restarted_s"):
        made[key] = Spread.of(made[key]).json(1e3, 1)


def steps(doc: Document, args: argparse.Namespace) -> None:
    """Prompts over a few common beginnings in an arena that is too small for them: what copies take of each step."""
    import random
    from time import perf_counter

    from quire.engine import Engine, SamplingParams, SchedulerConfig
    from quire.models.load import load_model
    from quire.models.open import open_runner

    loaded, draw = load_model(), random.Random(args.seed)
    loaded.model.float()  # so that tokens can be compared
    common_parts = [common.random_tokens(args.tokens // 3, 200, i) for i in range(8)]
    prompts = [
        draw.choice(common_parts) + common.random_tokens(draw.randrange(10, 60), 200, 100 + i)
        for i in range(args.requests)
    ]
    config = SchedulerConfig(step_tokens=256, max_running=4)
    outputs: dict[str, list[list[int]]] = {}
    for tiers in ("", "host:256MiB"):
        runner: Any = open_runner(
            loaded.model, memory=args.memory, share="prefix", tiers=tiers, weights="plain"
        )
        taken: list[tuple[float, float]] = []
        with Engine(runner, config=config) as engine:
            names = [
                engine.add_request(p, SamplingParams(max_tokens=8, ignore_eos=True))
                for p in prompts
            ]
            done: dict[str, Any] = {}
            while engine.has_work:
                before, began = _copying(runner), perf_counter()
                done |= {d.request_id: d.output for d in engine.step() if d.output is not None}
                taken.append((perf_counter() - began, _copying(runner) - before))
            found = runner.tiering.report() if tiers else {}
        runner.close()
        outputs[tiers] = [done[n].token_ids for n in names]
        doc["steps"].append(
            {
                "tiers": tiers or "none",
                "steps": len(taken),
                "cached_tokens": sum(o.figures.cached_tokens for o in done.values()),
                "loaded_blocks": found.get("loaded_blocks", 0),
                "demoted_blocks": found.get("demoted_blocks", 0),
                "dropped_blocks": found.get("dropped_blocks", 0),
                "copies_share": round(sum(c for _, c in taken) / sum(s for s, _ in taken), 4),
                "steps_over": sum(c > max(0.002, 0.1 * s) for s, c in taken),
                "worst_ms": round(1e3 * max(c for _, c in taken), 2),
            }
        )
    common.check(doc, "the same tokens with and without", outputs[""] == outputs["host:256MiB"])


def _copying(runner: Any) -> float:
    """Seconds that the engine's thread has spent on copies."""
    stats = None if runner.tiering is None else runner.tiering.stats
    return 0.0 if stats is None else stats.bind_s + stats.demote_s


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--folder", type=Path, default=Path(), help="on the disk that is measured")
    p.add_argument("--redis", metavar="HOST:PORT", help="a server to measure")
    p.add_argument("--blocks", type=int, default=128)
    p.add_argument("--block-bytes", type=int, default=1 << 20)
    p.add_argument("--tokens", type=int, default=2000, help="of the prefix that is found again")
    p.add_argument("--parts", nargs="+", default=["stores", "restart", "steps"])
    p.add_argument("--requests", type=int, default=40, help="of the part steps")
    p.add_argument("--memory", default="18MiB", help="of the arena in the part steps")
    p.set_defaults(repeats=5)
    args = p.parse_args(argv)
    if args.smoke:
        args.blocks, args.block_bytes, args.tokens = 8, 1 << 16, 200
        args.requests, args.memory = 6, "4MiB"
    if min(args.blocks, args.block_bytes, args.tokens, args.requests) < 1:
        raise SystemExit("--blocks, --block-bytes, --tokens and --requests are at least 1")
    common.prepare(args)
    doc = common.document(
        "tiers", "How fast are the disk and redis tiers, and what does a restart keep?", args
    )
    doc["checksum"] = {1: "sha256", 2: "xxh3"}[sealing.ALGORITHM]
    doc["steps"] = []
    doc["stores"], doc["restart"] = [], {"cold_s": [], "restarted_s": []}
    folder = Path(tempfile.mkdtemp(prefix="quire-tiers-", dir=args.folder))
    try:
        work: dict[str, Callable[[], None]] = {
            "stores": partial(stores, doc, args, folder),
            "restart": partial(restart, doc, args, folder),
            "steps": partial(steps, doc, args),
        }
        for part in args.parts:
            common.say(f"{part}: timing")
            work[part]()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return common.report(doc, args, tables(doc))


def tables(doc: Document) -> list[Table]:
    made = Table([f"MB/s ({doc['checksum']})", "put, synced", "x files", "cold get", "x files"])
    for r in doc["stores"]:
        made.add(
            r["side"],
            *(
                f"{r[k]['median']:g} ({r[k]['min']:g} to {r[k]['max']:g})"
                for k in ("put_mb_per_s", "put_to_files", "get_mb_per_s", "get_to_files")
            ),
        )
    out = [made] if doc["stores"] else []
    if doc["restart"]["cold_s"]:
        first = Table(["first token, ms", "median", "min", "max"])
        for key in ("cold_s", "restarted_s"):
            r = doc["restart"][key]
            first.add(key[:-2], r["median"], r["min"], r["max"])
        out.append(first)
    if doc["steps"]:
        keys = ("cached_tokens", "loaded_blocks", "demoted_blocks", "steps", "steps_over")
        made = Table(["tiers", *keys, "copies, share", "worst ms"])
        for r in doc["steps"]:
            made.add(r["tiers"], *(r[k] for k in keys), r["copies_share"], r["worst_ms"])
        out.append(made)
    return out


if __name__ == "__main__":
    main()
