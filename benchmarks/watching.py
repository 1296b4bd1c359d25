"""What does a dashboard cost those who wait for tokens, and what does the reason of every miss?

The engine's thread gives a look's time once a second while anybody looks on: a census of all blocks and the hottest
branches of the prefix tree, on caches of up to a million blocks. Beside it what a worker thread does with the copies.
Then a miss behind a common beginning, with 64 namespaces that could have it, explained and not. Without torch.

    python benchmarks/watching.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import common
import sharing as indexes
from common import Document, Spread, Table

from quire.serve.watch import MOST_CELLS, MOST_CHUNKS
from quire.store import BlockStore
from quire.store.census import STATES, Census, hottest
from quire.store.sharing import Namespace, Sharing


class Missing:
    """Requests that agree with what their namespace has for `chunks` chunks and then go on by themselves."""

    def __init__(self, chunks: int, namespaces: int, *, explain: bool) -> None:
        spec = indexes.spec_of()
        store = BlockStore(spec, 4 * (chunks + 8) * namespaces * spec.groups[0].block_bytes)
        self.sharing = Sharing(store, explain=explain)
        self.stem = common.random_tokens(32 * chunks, 50_000, 1)
        self.spaces = [Namespace(str(i).encode()) for i in range(namespaces)]
        for i, space in enumerate(self.spaces):
            self.ask(space, [*self.stem, *[i] * 32])
        self.n = 0

    def ask(self, space: Namespace, ids: list[int]) -> Any:
        table = self.sharing.open(ids, space)
        miss = None if table.path is None else table.path.miss
        table.append(len(ids) - table.length)
        table.commit()
        table.release()
        return miss

    def miss(self) -> Any:
        """One look-up that finds the stem, and no more."""
        self.n += 1
        space = self.spaces[self.n % len(self.spaces)]
        table = self.sharing.open([*self.stem, *[1000 + self.n] * 33], space)
        found = table.length, None if table.path is None else table.path.miss
        table.release()
        return found


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--blocks", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    p.add_argument(
        "--chunks", type=int, nargs="+", default=[4, 64, 1024], help="found before a miss"
    )
    args = p.parse_args(argv)
    if args.smoke:
        args.blocks, args.chunks = [300, 1000], [4, 20]
    common.prepare(args)
    doc = common.document(
        "watching", "What do a dashboard and explained misses cost?", args, with_torch=False
    )
    looks = Table(["blocks", "census ms", "tree ms", "max", "of a second %", "in a thread ms"])
    doc["looks"] = [_look(doc, args, blocks, looks) for blocks in args.blocks]
    misses = Table(["chunks found", "look-up µs", "explained µs", "ratio", "min", "max"])
    doc["misses"] = [_miss(doc, args, chunks, misses) for chunks in args.chunks]
    return common.report(doc, args, [looks, misses])


def _look(doc: Document, args: Any, blocks: int, table: Table) -> Document:
    filled = indexes.Filled(blocks, args.seed)
    store = filled.sharing.store
    census = Census(store)
    counted = sum(row["bytes"][s] for row in census.rows() for s in STATES[1:])  # type: ignore[index]
    usage = store.usage()
    common.check(
        doc, f"{blocks} blocks are counted", counted == usage.held_bytes + usage.cached_bytes
    )
    roots = list(filled.sharing.roots)
    turns = common.take_turns(
        {
            "census": lambda: Census(store),
            "tree": lambda: hottest(filled.sharing, roots, MOST_CHUNKS),
            "thread": lambda: (census.rows(), census.cells(MOST_CELLS)),
        },
        args.repeats,
        clock=args.clock,
    )
    spreads = {name: turns.spread(name) for name in ("census", "tree", "thread")}
    both = Spread.of(
        a + b for a, b in zip(turns.seconds["census"], turns.seconds["tree"], strict=True)
    )
    table.add(
        blocks,
        *(f"{1e3 * spreads[n].median:.2f}" for n in ("census", "tree")),
        f"{1e3 * both.greatest:.2f}",
        f"{100 * both.median:.3f}",
        f"{1e3 * spreads['thread'].median:.2f}",
    )
    return {
        "blocks": blocks,
        **{f"{name}_ms": s.json(1e3, 3) for name, s in spreads.items()},
        "of_a_second": round(both.median, 6),
    }


def _miss(doc: Document, args: Any, chunks: int, table: Table) -> Document:
    sides = {
        name: Missing(chunks, 64, explain=name == "explained") for name in ("plain", "explained")
    }
    for name, side in sides.items():
        found, miss = side.miss()
        common.check(doc, f"{name}: {chunks} chunks are found", found == 32 * chunks)
        said = None if miss is None else miss.reason
        common.check(
            doc,
            f"{name}: {chunks} chunks, the reason",
            (said == "differs") == (name == "explained"),
            said,
        )
    n = 3 if args.smoke else 20
    turns = common.take_turns(
        {name: (lambda s=side: [s.miss() for _ in range(n)]) for name, side in sides.items()},  # type: ignore[misc]
        args.repeats,
        clock=args.clock,
    )
    plain, explained = (turns.spread(name, n) for name in ("plain", "explained"))
    ratio = turns.ratio("explained", "plain")
    table.add(
        chunks,
        f"{1e6 * plain.median:.0f}",
        f"{1e6 * explained.median:.0f}",
        *(f"{x:.2f}" for x in (ratio.median, ratio.least, ratio.greatest)),
    )
    return {
        "chunks": chunks,
        "plain_us": plain.json(1e6, 1),
        "explained_us": explained.json(1e6, 1),
        "ratio": ratio.json(digits=3),
    }


if __name__ == "__main__":
    main()
