"""What a cache holds, as data: fields, groups, the spec of a model, a user's configuration, and the protocols.

Nothing here imports torch, touches memory or knows a model class. A `CacheSpec` says which (layer, KV head) coordinates
keep the same tokens in the same form, and what one block of each such group is made of; bytes per token, waste and
capacity follow from it by arithmetic, so a planner and the running store cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from quire.errors import ConfigError
from quire.spans import Chunked, Full, Interval, Residual, Sinks, Span, State, Streaming, Window

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPE_BYTES",
    "AttentionBackend",
    "CacheGroup",
    "CacheSpec",
    "Chunked",
    "Coord",
    "Field",
    "Full",
    "Interval",
    "KVCodec",
    "KVConfig",
    "Packing",
    "Residual",
    "RetentionPolicy",
    "Sinks",
    "Site",
    "Span",
    "SpanPolicy",
    "State",
    "Streaming",
    "Usage",
    "Window",
    "hadamard_width",
]

ALIGN_BYTES = 64
"""Every field of a tile starts on a cache line."""

DEFAULT_BLOCK_TOKENS = 32
"""See docs/decisions.md: the block size table on ShareGPT lengths."""

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
}

Coord = tuple[int, int]
"""(layer, KV head). Layers without heads (MLA latents, recurrent state) use head 0."""


def aligned(n_bytes: int, unit: int = ALIGN_BYTES) -> int:
    """`n_bytes` rounded up to a multiple of `unit`."""
    return -(-n_bytes // unit) * unit


@dataclass(frozen=True)
class Field:
    """One array of a tile: `shape` elements of `dtype` per token, or once per block."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    per: Literal["token", "block"] = "token"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(
                f"field {self.name}: unknown dtype {self.dtype!r}; known: {', '.join(DTYPE_BYTES)}"
            )

    @property
    def item_bytes(self) -> int:
        """Bytes per token (or per block, for `per="block"`)."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def bytes_in(self, block_tokens: int) -> int:
        """Bytes that this field takes in one tile, without alignment."""
        return self.item_bytes * (block_tokens if self.per == "token" else 1)


BOUNDS = "k.bounds"
"""A field per block, `[2, D]`, where queries may read fewer blocks: the least and largest of its keys, by channel."""


@dataclass(frozen=True)
class CacheGroup:
    """A largest set of coordinates that keep the same tokens in the same form.

    Args:
        name: unique within the spec.
        coords: the (layer, KV head) pairs, ascending; one tile per coordinate and block.
        fields: what a tile stores, in order.
        span: which positions a query reads.
        codec: the recipe, as its string form (`"bf16"`, `"k=int8,v=int4"`).
        retention: the policy's string form.
        block_tokens: tokens per block. A recurrent group holds one live state block per sequence.
        raw: for a lossy body, the name of the plain group over the same coordinates that holds its tail and its
            residual window; the body then holds sealed blocks only.
    """

    name: str
    coords: tuple[Coord, ...]
    fields: tuple[Field, ...]
    span: Span = field(default_factory=Full)
    codec: str = "fp32"
    retention: str = "full"
    block_tokens: int = DEFAULT_BLOCK_TOKENS
    raw: str | None = None

    def __post_init__(self) -> None:
        if not self.coords or list(self.coords) != sorted(set(self.coords)):
            raise ConfigError(f"group {self.name}: coords must be ascending, unique and not empty")
        if self.block_tokens < 1:
            raise ConfigError(
                f"group {self.name}: block_tokens must be at least 1, not {self.block_tokens}"
            )

    def __hash__(self) -> int:
        """Cheap, because plans look groups up; parts of one split differ in their first or number of coordinates."""
        return hash((self.name, self.coords[0], len(self.coords)))

    @cached_property
    def recurrent(self) -> bool:
        """Whether it holds a state per sequence instead of tokens."""
        return isinstance(self.span, State)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers that it has coordinates in, ascending."""
        return tuple(dict.fromkeys(layer for layer, _ in self.coords))

    @cached_property
    def _tiles(self) -> dict[int, tuple[int, tuple[int, ...]]]:
        """Layer to (index of its first tile, its heads)."""
        out: dict[int, tuple[int, tuple[int, ...]]] = {}
        for i, (layer, head) in enumerate(self.coords):
            first, heads = out.get(layer, (i, ()))
            out[layer] = (first, (*heads, head))
        return out

    def holds(self, layer: int) -> bool:
        """Whether it has a coordinate in the layer."""
        return layer in self._tiles

    def heads(self, layer: int) -> tuple[int, ...]:
        """The KV heads of `layer` that this group stores, ascending."""
        return self._tiles[layer][1] if layer in self._tiles else ()

    def tile_index(self, layer: int) -> int:
        """Index of the first tile of `layer` within a block; its heads follow one another."""
        return self._tiles[layer][0]

    @cached_property
    def field_offsets(self) -> dict[str, int]:
        """Byte offset of each field within a tile, aligned to 64 bytes."""
        offsets, at = {}, 0
        for f in self.fields:
            offsets[f.name] = at
            at += aligned(f.bytes_in(self.block_tokens))
        return offsets

    @cached_property
    def tile_bytes(self) -> int:
        """Bytes of one coordinate's share of a block."""
        return sum(aligned(f.bytes_in(self.block_tokens)) for f in self.fields)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block: a tile per coordinate."""
        return self.tile_bytes * len(self.coords)

    def reads(self, other: CacheGroup) -> bool:
        """Whether `other` holds the tail and the residual window of this lossy body."""
        return self.raw == other.name and self.coords == other.coords

    @property
    def bytes_per_token(self) -> float:
        """Bytes per cached token over all coordinates, per-block fields and alignment included (0 for state)."""
        return 0.0 if self.recurrent else self.block_bytes / self.block_tokens

    @property
    def form(self) -> tuple[Any, ...]:
        """All that two groups must share to be one: everything but name and coordinates."""
        return (
            self.fields,
            self.span,
            self.codec,
            self.retention,
            self.block_tokens,
            self.raw is None,
        )


@dataclass(frozen=True)
class CacheSpec:
    """The groups of one model under one configuration; every figure about memory derives from them.

    `shared` maps a layer that stores nothing itself to the layer whose keys and values it reads (cross-layer sharing).
    """

    groups: tuple[CacheGroup, ...]
    shared: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [g.name for g in self.groups]
        if len(set(names)) != len(names):
            raise ConfigError(f"group names must be unique: {', '.join(names)}")
        plain: set[Coord] = set()
        for g in self.groups:
            if g.raw is not None:
                raw = next((o for o in self.groups if o.name == g.raw), None)
                same = raw and (raw.coords, raw.block_tokens) == (g.coords, g.block_tokens)
                if not same:
                    raise ConfigError(
                        f"group {g.name}: its raw group must exist and cover the same coordinates "
                        "in blocks of as many tokens"
                    )
            if g.raw is None and not g.recurrent:
                if plain & set(g.coords):
                    raise ConfigError(
                        f"group {g.name} stores coordinates that another group stores too"
                    )
                plain |= set(g.coords)

    def __iter__(self) -> Iterator[CacheGroup]:
        return iter(self.groups)

    def group(self, name: str) -> CacheGroup:
        """The group of that name. Raises KeyError."""
        for g in self.groups:
            if g.name == name:
                return g
        raise KeyError(name)

    def index(self, name: str) -> int:
        """Position of the named group in `groups`, which is also its chain's position in a table."""
        return next(i for i, g in enumerate(self.groups) if g.name == name)

    @property
    def bytes_per_token(self) -> float:
        """What one more token adds for good: growing groups only (full spans, and bodies rather than raw windows)."""
        return sum(g.bytes_per_token for g in self.groups if _grows(g.span))

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes of state that do not grow with the context (recurrent groups)."""
        return sum(g.block_bytes for g in self.groups if g.recurrent)

    def blocks_for(self, n_tokens: int, *, chunk_tokens: int = 1) -> dict[str, int]:
        """Blocks that one sequence holds at most, per group, on its way to `n_tokens`.

        Args:
            n_tokens: the length reached.
            chunk_tokens: at most so many tokens, drafts included, are uncommitted at a time.

        Returns:
            Group name to blocks: never too few; for spans that do not grow, at most one too many per interval.
        """
        chunk = max(1, min(chunk_tokens, n_tokens))
        out = {}
        for g in self.groups:
            size = g.block_tokens
            if g.recurrent:
                out[g.name] = min(1, n_tokens)
                continue
            out[g.name] = n_tokens // size if g.raw is not None else -(-n_tokens // size)
            if not _grows(g.span):
                out[g.name] = min(out[g.name], _most_blocks(g, n_tokens, chunk))
        return out

    def bytes_for(self, n_tokens: int, *, chunk_tokens: int = 1) -> int:
        """Bytes of the blocks that one sequence of `n_tokens` holds at most."""
        blocks = self.blocks_for(n_tokens, chunk_tokens=chunk_tokens)
        return sum(blocks[g.name] * g.block_bytes for g in self.groups)

    def split(self, name: str, coords: Iterable[Coord]) -> CacheSpec:
        """The spec with `coords` taken out of group `name` into a group of their own (`name/1`, …)."""
        old = self.group(name)
        part = tuple(sorted(set(coords)))
        rest = tuple(c for c in old.coords if c not in set(part))
        if not part or not rest or not set(part) <= set(old.coords):
            raise ConfigError(
                f"split of {name}: choose some, not all, of its {len(old.coords)} coordinates"
            )
        if old.raw is not None or any(g.raw == name for g in self.groups):
            raise ConfigError(
                f"split of {name}: split lossy groups before their first block is sealed"
            )
        fresh = next(
            f"{name}/{i}"
            for i in range(1, 1 << 20)
            if all(g.name != f"{name}/{i}" for g in self.groups)
        )
        at = self.index(name)
        groups = list(self.groups)
        groups[at : at + 1] = [replace(old, coords=rest)]
        return replace(self, groups=(*groups, replace(old, name=fresh, coords=part)))


def _most_blocks(group: CacheGroup, n_tokens: int, chunk: int) -> int:
    """Blocks that a span which does not grow touches at most, `chunk` new tokens included.

    One token at a time some spans are tighter than any intervals of their lengths: a residual window and a chunk begin
    where blocks do, a body holds whole blocks only, and a window has left the sinks behind once it is full.
    """
    size, span = group.block_tokens, group.span
    *fixed, moving = span.reach(n_tokens)
    least = sum(-(-r // size) for r in fixed)
    most = (moving + chunk + size - 2) // size + 1
    if chunk > 1:
        return least + most
    inner = span.inner if isinstance(span, Residual) else span
    if isinstance(inner, Chunked) and (inner.tokens % size == 0 or size % inner.tokens == 0):
        most = min(most, -(-(moving + 1) // size))
    if isinstance(span, Residual):
        most = min(most, -(-span.residual_tokens // size) + 1)
        if fixed and not _grows(inner) and len(inner.reach(n_tokens)) == 1:
            return max(most, -(-(inner.reach(n_tokens)[0] + 1 + span.sinks) // size))
    if group.raw is not None:
        most = min(most, -(-(moving + 1) // size))
    return least + most


def _grows(span: Span) -> bool:
    """Whether needs(b) keeps growing with b."""
    return sum(span.reach(1 << 40)) > (1 << 39)


@dataclass(frozen=True)
class Usage:
    """Bytes of an arena: `held` by live sequences, `cached` for reuse, `free`; they add up to `total`."""

    total_bytes: int
    held_bytes: int
    cached_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class KVConfig:
    """A user's choices, each in its short string form; resolved against the registries when a model is known.

    Args:
        kv: codec recipe: `"auto"` (the model's own dtype), `"int4"`, `"kivi:bits=2,residual=128"`, `"k=int8,v=int4"`,
            each with options after `;`, as in `"int4;skip_layers=0,1,-1"`.
        keep: retention, `"full"` by default; or a `quire.retention.Keep`, as `quire.retention.outside` makes one.
        block_tokens: tokens per block.
        share: `"off"`, or `"prefix"`: prefixes that were computed before are found; `"prefix:evict=lru"`.
    """

    kv: str = "auto"
    keep: Any = "full"
    block_tokens: int = DEFAULT_BLOCK_TOKENS
    share: str = "off"

    def __post_init__(self) -> None:
        if self.block_tokens < 1:
            raise ConfigError(
                f"block_tokens must be at least 1, not {self.block_tokens}; 32 is the default"
            )
        if not self.kv.strip() or not str(self.keep).strip():
            raise ConfigError(
                "kv and keep must not be empty; kv='auto', keep='full' are the defaults"
            )


@dataclass(frozen=True)
class Site:
    """Where a codec works: one of the model's own fields, in blocks of `block_tokens`.

    Args:
        field: as the model gives it.
        block_tokens: of the group that it lies in.
        layer: of the model; None where only shapes and bytes are asked for.
        heads: the KV heads of the layer that are coded together, ascending.
    """

    field: Field
    block_tokens: int
    layer: int | None = None
    heads: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """`"k"`, `"v"`, `"latent"` or `"k_rope"`."""
        return self.field.name

    @property
    def width(self) -> int:
        """Elements per token (and head)."""
        return math.prod(self.field.shape)

    @property
    def values(self) -> bool:
        """Whether it holds values only; a latent is key and value at once and laid out as a key."""
        return self.field.name == "v"


def hadamard_width(channels: int) -> int:
    """The largest power of two that divides `channels`: what one block of a Hadamard rotation mixes."""
    return channels & -channels


@dataclass(frozen=True)
class Packing:
    """How a codec's stored parts lie, for kernels that read them in place: `codes`, `scale` and `min` of a site.

    Args:
        bits: of packed codes (`quire.ops.pack`); 0 for rows of the field's own dtype.
        scaled: what shares a scale: "token" (`[D / group][t]`), "channel" (`[t / group][D]`), "tile" (`[1]`), or "".
            A value is code * scale + min; packed codes without a `min` are (code - 128) * scale.
        group: channels, or tokens, that share a scale.
        turned: in the basis of a Hadamard rotation of so many channels; 0 for the model's own.
        nearest: `encode` does what `ops.quantise` does (8-bit floats: saturate and round), and a kernel may do it.
    """

    bits: int = 0
    scaled: Literal["", "token", "channel", "tile"] = ""
    group: int = 0
    turned: int = 0
    nearest: bool = False


@runtime_checkable
class KVCodec(Protocol):
    """How one field (k, v, latent, k_rope) is stored once its block is sealed.

    `plain` codecs store what they are given, cast to `dtype`: tails are blocks of a plain codec, and sealing under one
    moves nothing. Every other codec encodes a whole block once. A codec is its parameters and nothing else; every
    method is told the site that it serves.

    needs: what `encode` is given of a key: "rotated" (RoPE applied) or "unrotated": turned back to position 0 before
        `encode`, and on to its position after `decode`, by whoever calls them (`plan.layout.Layout`).
    group_tokens: `block_tokens` must be a multiple of it.
    residual_tokens: how many recent tokens stay raw by default.

    A codec may also have `sink_tokens`: so many first tokens stay raw by default. One that learns from a text is a
    `codecs.calibrated.Calibrated`.
    """

    name: str
    plain: bool
    needs: Literal["rotated", "unrotated"]
    group_tokens: int
    residual_tokens: int

    def stored(self, site: Site) -> tuple[Field, ...]:
        """The fields that a tile stores, named `<field>.<part>` (`<field>` alone for the part `""`).

        Raises:
            ConfigError: the codec cannot serve this site; one line that says what would work.
        """
        ...

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encodes whole blocks.

        Args:
            x: `[..., block_tokens, *shape]`, any float dtype; of several `site.heads` dimension 1 is theirs, in order.
            pos: int64, broadcastable to `[..., block_tokens]`.

        Returns:
            Part to `[..., block_tokens, *shape]` for a field per token, `[..., *shape]` for one per block.
        """
        ...

    def decode(
        self,
        site: Site,
        stored: Mapping[str, torch.Tensor],
        pos: torch.Tensor,
        dtype: torch.dtype,
        *,
        own_basis: bool = False,
    ) -> torch.Tensor:
        """The inverse, up to `error_bound`: `[..., block_tokens, *shape]`, in the model's basis or the codec's own."""
        ...

    def query_map(self, site: Site, q: torch.Tensor) -> torch.Tensor:
        """Queries `[..., D]` into the codec's own basis: their products with keys decoded there are the model's."""
        ...

    def output_map(self, site: Site, out: torch.Tensor) -> torch.Tensor:
        """Sums `[..., D]` of values decoded in the codec's own basis, back into the model's."""
        ...

    def packing(self, site: Site) -> Packing | None:
        """How the stored parts lie, where a kernel could read them in place; None: decode, then attend."""
        ...

    def error_bound(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        """Upper bound of |decode(encode(x)) - x|, elementwise in the model's basis, broadcastable to `x`.

        For a decode in float32 or wider; a narrower dtype adds its own rounding.
        """
        ...


@runtime_checkable
class SpanPolicy(Protocol):
    """Which positions a query may read at all: a narrower span for heads that would read everything."""

    name: str

    def span(self, layer: int, head: int, inner: Span) -> Span:
        """Of one KV head, whose model gives it `inner`."""
        ...


@runtime_checkable
class RetentionPolicy(Protocol):
    """Which tokens stay: a score and a budget, at fixed lengths; the store frees the blocks.

    Pure functions of what they are shown; `quire.retention.contract` holds the parameters and defaults that they share.

    queries: whose attention they are shown: of the last N queries, of "all", or of none.
    """

    name: str
    queries: int | Literal["all"] | None

    def score(self, seen: Any) -> torch.Tensor:
        """`[H, T]` for the heads and tokens of a `contract.Seen`; higher stays."""
        ...

    def allocate(
        self, scores: Mapping[Coord, torch.Tensor], tokens: int, length: int
    ) -> Mapping[Coord, int]:
        """How many of its unprotected tokens each head keeps, on average at most `tokens`."""
        ...

    def protect(self, length: int, prompt_tokens: int) -> Sequence[Interval]:
        """Positions that stay whatever their score."""
        ...


@runtime_checkable
class AttentionBackend(Protocol):
    """Plans once per step, runs once per layer."""

    name: str

    def write(self, step: Any, layer: int, values: dict[str, torch.Tensor]) -> None:
        """Stores new tokens' fields, `[n_tokens, heads, *shape]` each, and seals what became whole."""
        ...

    def run(self, step: Any, layer: int, q: torch.Tensor, **options: Any) -> torch.Tensor:
        """`q: [n_tokens, H_q, D]` to `[n_tokens, H_q, D_v]`."""
        ...
