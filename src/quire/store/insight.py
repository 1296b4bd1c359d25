"""What the prefix cache can say about itself: why a request missed, and what other sizes of memory would have found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quire.errors import CapacityError
from quire.spec import CacheGroup, CacheSpec, Field
from quire.store.index import TOKEN_BYTES, chunk_name, packed
from quire.store.store import BlockStore

if TYPE_CHECKING:
    from quire.store.namespace import Namespace
    from quire.store.path import Path
    from quire.store.sharing import Sharing
    from quire.store.table import BlockTable

__all__ = ["Explainer", "Ghost", "GhostFigures", "Miss", "Shadow", "counting_store"]

LONG = b"long"
"""Ends the base of long sequences' names, see `Sharing.base_of`."""
MOST_HASHES = 1024
"""For one miss, looking for it in other namespaces: a few milliseconds. What would take more is not found out."""

Reason = Literal["differs", "evicted", "never stored", "other namespace", "no checkpoint"]


@dataclass(frozen=True, slots=True)
class Miss:
    """Why no more of a prompt was found. For the operator: "other namespace" must not be told to a tenant.

    Args:
        at: the first position that was not found.
        reason: "differs": the cache goes on with another token at `position`; "evicted": it was there, and went
            `ago_s` seconds before, when `by` took its memory; "never stored"; "other namespace": somebody else has it;
            "no checkpoint": tokens behind it are there, without the state of the recurrent layers.
        position: of the first token that differs, with the `stored` and the `asked` one.
        by: the request that took the memory; "" where none is known.
    """

    at: int
    reason: Reason
    position: int | None = None
    stored: int | None = None
    asked: int | None = None
    ago_s: float | None = None
    by: str | None = None

    def text(self) -> str:
        """One line."""
        if self.reason == "differs":
            return f"from token {self.at} on: token {self.position} is {self.asked}, the cache has {self.stored}"
        if self.reason == "evicted":
            by = f", for request {self.by}" if self.by else ""
            return f"from token {self.at} on: evicted {self.ago_s:.1f} s before{by}"
        return f"from token {self.at} on: {self.reason}"


class Explainer:
    """Remembers what was evicted, and finds the reason of a miss.

    Args:
        sharing: the cache.
        clock: seconds.
        remember: evicted chunks that are remembered, the latest ones.
        namespaces: that are tried for "other namespace", the latest ones first.

    Cost: on an eviction a dictionary entry; on a miss a hash per other namespace and chunk that it has, at most
    `MOST_HASHES`.
    """

    def __init__(
        self,
        sharing: Sharing,
        clock: Callable[[], float],
        remember: int = 1 << 16,
        namespaces: int = 64,
    ) -> None:
        self.sharing = sharing
        self.clock = clock
        self.remember = remember
        self.most_namespaces = namespaces
        self._evicted: dict[bytes, tuple[float, str]] = {}
        self._namespaces: dict[tuple[Namespace, bytes], None] = {}

    def evicted(self, name: bytes, by: str) -> None:
        """A block of that chunk was given up."""
        self._evicted.pop(name, None)
        self._evicted[name] = self.clock(), by
        if len(self._evicted) > self.remember:
            del self._evicted[next(iter(self._evicted))]

    def explain(
        self, path: Path, table: BlockTable, namespace: Namespace, base: bytes
    ) -> Miss | None:
        """Why the table found no more; None where it found all that it could use."""
        self._namespaces.pop((namespace, base), None)
        self._namespaces[namespace, base] = None
        if len(self._namespaces) > self.most_namespaces:
            del self._namespaces[next(iter(self._namespaces))]
        grain, at = self.sharing.grain, table.length
        chunk = at // grain
        if at >= path.limit or ((chunk + 1) * grain > path.limit and not self.sharing.index.plain):
            return None
        rest = packed(path.tokens[chunk * grain : min(path.limit, (chunk + 1) * grain)])
        parent = path.parent(chunk)
        return (
            self._was_evicted(path, chunk, parent, rest, at)
            or (Miss(at, "no checkpoint") if path.seen and self.sharing.states else None)
            or self._elsewhere(path, namespace, base, chunk, rest, at)
            or self._differs(parent, rest, chunk * grain, at)
            or Miss(at, "never stored")
        )

    def _was_evicted(
        self, path: Path, chunk: int, parent: bytes, rest: bytes, at: int
    ) -> Miss | None:
        """The next chunk, or one that a window would have needed to go on behind what is there."""
        names = [chunk_name(parent, rest), *path.seen]
        gone = [self._evicted[n] for n in names if n in self._evicted]
        if not gone:
            return None
        when, by = max(gone)
        return Miss(at, "evicted", ago_s=self.clock() - when, by=by)

    def _differs(self, parent: bytes, rest: bytes, first: int, at: int) -> Miss | None:
        node, same = self.sharing.index.nearest(parent, rest, whole=False)
        if node < 0 and first == 0:
            return None  # nothing begins like this
        if node < 0:
            node = next(self.sharing.index.children(parent), -1)
        stored = self.sharing.index.tokens(node).tolist() if node >= 0 else []
        if same >= min(len(stored), len(rest) // TOKEN_BYTES):
            return None
        asked = int.from_bytes(rest[same * TOKEN_BYTES : (same + 1) * TOKEN_BYTES], "little")
        return Miss(at, "differs", first + same, stored[same], asked)

    def _elsewhere(
        self, path: Path, own: Namespace, base: bytes, chunk: int, rest: bytes, at: int
    ) -> Miss | None:
        """Whether another namespace has the next chunk behind the same tokens."""
        from quire.store.path import Path

        grain, index = self.sharing.grain, self.sharing.index
        if len(rest) < grain * TOKEN_BYTES:
            return None
        blob = packed(path.tokens[: chunk * grain])
        width, left = grain * TOKEN_BYTES, MOST_HASHES
        before = [blob[i : i + width] for i in range(0, len(blob), width)]
        for namespace, other_base in reversed(self._namespaces):
            if (namespace, other_base.removesuffix(LONG)) == (own, base.removesuffix(LONG)):
                continue
            there = Path(self.sharing, namespace, other_base, path.tokens)
            for each in before:
                node = index.find(there.extend(each), each)
                left -= 1
                if left <= 0:
                    return None
                if node < 0 and self.sharing.gapless:
                    break  # what comes behind cannot be there either
            else:
                if index.find(chunk_name(there.parent(chunk), rest), rest) >= 0:
                    return Miss(at, "other namespace")
        return None


@dataclass(frozen=True, slots=True)
class GhostFigures:
    """What a cache of another size would have found of the same requests.

    Args:
        factor: its size over the real one's.
        asked_tokens: that could have been found, whole chunks only.
    """

    factor: float
    hit_tokens: int
    asked_tokens: int

    @property
    def hit_ratio(self) -> float:
        """Hit tokens over asked ones."""
        return self.hit_tokens / self.asked_tokens if self.asked_tokens else 0.0


class Ghost:
    """The same index and policy over other sizes of memory that only count, fed by the live requests.

    Args:
        sharing: the real cache.
        rate: share of the prefixes that are followed, in (0, 1]; the sizes shrink with it, the ratios stay (spatial
            sampling, SHARDS, FAST '15: by the first chunk, so that a conversation is followed whole or not at all).
        factors: sizes over the real one's.

    A live request holds its chunks in every ghost as it does in the cache; one that finds no room there is no longer
    followed in that size, where it would have had to wait.
    """

    def __init__(
        self, sharing: Sharing, rate: float = 1.0, factors: Sequence[float] = (0.5, 1.0, 2.0)
    ) -> None:
        from quire.store.sharing import Sharing as Again

        spec = sharing.store.spec
        chunk_bytes = sum(spec.groups[g].block_bytes for g, _ in sharing.index.columns)
        chunks = sharing.store.arena.total_bytes / chunk_bytes * rate
        self.grain = sharing.grain
        self.rate = rate
        self._sizes = [
            (f, Again(counting_store(max(1, round(f * chunks))), evict=sharing.evict))
            for f in factors
        ]
        self._asked = 0  # chunks
        self._hits = [0] * len(self._sizes)

    def enter(self, names: Sequence[bytes]) -> Shadow | None:
        """A request looked for these chunks; None where its prefix is not followed."""
        ids = _numbers(names)
        if not ids or ids[0] >= self.rate * (1 << 31):
            return None
        self._asked += len(ids)
        tables: list[BlockTable | None] = []
        for at, (_, sharing) in enumerate(self._sizes):
            path = sharing.look(ids, limit=len(ids))
            self._hits[at] += path.found
            tables.append(sharing.take(path))
        return Shadow(ids, tables)

    def figures(self) -> list[GhostFigures]:
        """One per size."""
        return [
            GhostFigures(factor, hits * self.grain, self._asked * self.grain)
            for (factor, _), hits in zip(self._sizes, self._hits, strict=True)
        ]


class Shadow:
    """One live request in the ghosts; `ids` is the live list that its tables follow."""

    def __init__(self, ids: list[int], tables: list[BlockTable | None]) -> None:
        self.ids, self.tables = ids, tables

    def grow(self, names: Sequence[bytes]) -> None:
        """The request has these chunks now."""
        self.ids[:] = _numbers(names) + self.ids[len(names) :]
        for at, table in enumerate(self.tables):
            if table is not None and table.length < len(names):
                try:
                    table.append(len(names) - table.length)
                    table.commit()
                except CapacityError:
                    table.release()
                    self.tables[at] = None

    def leave(self) -> None:
        """The request is over."""
        for table in self.tables:
            if table is not None:
                table.release()


def _numbers(names: Sequence[bytes]) -> list[int]:
    """A number per chunk, from its name."""
    return [int.from_bytes(n[:TOKEN_BYTES], "little") & 0x7FFFFFFF for n in names]


def counting_store(blocks: int) -> BlockStore:
    """Room for that many blocks of one token, which only counts."""
    group = CacheGroup("chunks", ((0, 0),), (Field("id", (16,), "float32"),), block_tokens=1)
    total = blocks * group.block_bytes
    return BlockStore(CacheSpec((group,)), total, slab_bytes=total)
