"""From a model's layers and a user's configuration to the groups of a `CacheSpec`.

    layers      0 window   1 full   2 window   3 full        kv="int8;skip_layers=3"
    groups      [window: int8 + raw] [full: int8 + raw] [full: bf16]

A retention policy that narrows what heads read divides such a group further: `full1`, `full1/1`, each with its span.

Layers that keep the same tokens in the same form share a group, and so a block table and a pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from quire.codecs.recipe import Recipe, block_tokens_for, codec_text, parse_recipe, plain_codec
from quire.errors import ConfigError, InvariantError
from quire.retention import Keep, parse_keep
from quire.share import parse_share
from quire.spec import (
    BOUNDS,
    CacheGroup,
    CacheSpec,
    Coord,
    Field,
    Full,
    KVCodec,
    KVConfig,
    Residual,
    Site,
    Span,
    State,
)

if TYPE_CHECKING:
    import torch

Turn = Callable[[int, "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""turn(layer, x, by): rotated `x: [..., D]` moved on by `by` positions, `[...]` broadcastable."""


@dataclass(frozen=True)
class KVLayer:
    """One attention layer's cache as the model gives it: `fields` per token and KV head, in the model's dtype."""

    layer: int
    heads: int
    fields: tuple[Field, ...]
    span: Span = field(default_factory=Full)


@dataclass(frozen=True)
class StateLayer:
    """One recurrent layer: state per sequence, `fields` stored per block."""

    layer: int
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class Layout:
    """A `CacheSpec` with the codecs that fill it.

    `codecs` maps a group to field to codec; `fields` maps a group to the model's own fields, before any codec.
    """

    spec: CacheSpec
    codecs: Mapping[str, Mapping[str, KVCodec]]
    fields: Mapping[str, tuple[Field, ...]]
    dtype: str
    narrowed: Callable[[Keep], CacheSpec] = field(repr=False, compare=False, default=None)  # type: ignore[assignment]
    """The same groups under another policy's spans; their codecs and fields are found here."""
    turn: Turn | None = field(default=None, repr=False, compare=False)
    """The model's RoPE, where a codec needs keys before it; whoever joins a model to the layout finds it."""

    def codecs_of(self, group: CacheGroup) -> Mapping[str, KVCodec]:
        """The codecs of a group, or of the one that it was split from."""
        return self.codecs[group.name.partition("/")[0]]

    def fields_of(self, group: CacheGroup) -> tuple[Field, ...]:
        """The model's own fields of a group, before any codec."""
        return self.fields[group.name.partition("/")[0]]

    def sites_of(self, group: CacheGroup, layer: int | None = None) -> tuple[Site, ...]:
        """Where the codecs of a group work: its model fields, in its blocks; of one layer for work on numbers."""
        heads = () if layer is None else group.heads(layer)
        return tuple(Site(f, group.block_tokens, layer, heads) for f in self.fields_of(group))

    @property
    def table_bytes(self) -> int:
        """Memory that what codecs learned takes, once for all sequences."""
        return sum(
            codec.table_bytes(site)
            for g in self.spec
            for layer in (() if g.recurrent else g.layers)
            for site in self.sites_of(g, layer)
            if hasattr(codec := self.codecs_of(g)[site.name], "table_bytes")
        )

    @property
    def unrotated(self) -> KVCodec | None:
        """A codec that needs keys before RoPE; None where none does."""
        every = (of.get("k") for of in self.codecs.values())
        return next((c for c in every if c is not None and c.needs == "unrotated"), None)

    def bound(self, digest: Callable[[], str], device: torch.device | str = "cpu") -> Layout:
        """The same with the tables that codecs learned of the model of that digest. Raises ConfigError."""
        known: dict[str, KVCodec] = {}

        def of(codec: Any) -> KVCodec:
            if not hasattr(codec, "bound"):
                return codec  # type: ignore[no-any-return]
            text = codec_text(codec)
            if text not in known:
                known[text] = codec.bound(digest(), device)
            return known[text]

        codecs = {g: {n: of(c) for n, c in by_name.items()} for g, by_name in self.codecs.items()}
        out = replace(self, codecs=codecs)
        for group in self.spec:
            for layer in () if group.recurrent else group.layers:
                for site in out.sites_of(group, layer):
                    check = getattr(out.codecs_of(group)[site.name], "check_site", None)
                    if check is not None:
                        check(site)
        return out

    def encode(
        self, group: CacheGroup, site: Site, x: torch.Tensor, pos: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What a group's codec makes of whole blocks that the model handed over, see `KVCodec.encode`."""
        codec = self.codecs_of(group)[site.name]
        return codec.encode(site, self._turned(codec, site, x, -pos), pos)

    def decode(
        self,
        group: CacheGroup,
        site: Site,
        stored: Mapping[str, torch.Tensor],
        pos: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Whole blocks as the model reads them, see `KVCodec.decode`."""
        import torch

        codec = self.codecs_of(group)[site.name]
        if not _turns(codec, site):
            return codec.decode(site, stored, pos, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return self._turned(codec, site, codec.decode(site, stored, pos, wide), pos).to(dtype)

    def _turned(
        self, codec: KVCodec, site: Site, x: torch.Tensor, by: torch.Tensor
    ) -> torch.Tensor:
        if not _turns(codec, site):
            return x
        if self.turn is None or site.layer is None:
            raise InvariantError(
                f"codec {codec.name} needs keys before RoPE, and nobody said how they turn"
            )
        return self.turn(site.layer, x if x.itemsize >= 4 else x.float(), by)


def _turns(codec: KVCodec, site: Site) -> bool:
    return site.name == "k" and codec.needs == "unrotated"


def build_layout(
    layers: Sequence[KVLayer | StateLayer],
    config: KVConfig,
    *,
    dtype: str,
    shared: Mapping[int, int] | None = None,
    codecs: Mapping[str, KVCodec] | None = None,
    keep: Keep | None = None,
) -> Layout:
    """Groups the layers by form.

    Args:
        layers: every layer that stores something; those that read another's cache are in `shared` instead.
        config: the user's choices.
        dtype: what the model computes in.
        codecs: replaces the recipe's codecs by field name (`""` for all); for codecs that are not registered.
        keep: the configuration's policy, bound to the model where it has learned of one; by default as it would be
            of a model whose map is not at hand.

    Raises:
        ConfigError: the recipe cannot serve this model.
    """
    keep = keep or assume_map(parse_keep(config.keep), layers)
    recipe = parse_recipe(config.kv)
    if codecs is None:
        recipe.check_options()
    n_layers = 1 + max(x.layer for x in layers)
    if any(not -n_layers <= s < n_layers for s in recipe.skip_layers):
        raise ConfigError(
            f"kv={config.kv!r}: skip_layers must lie within -{n_layers}..{n_layers - 1}"
        )
    _check_fields(config.kv, recipe, layers)
    if recipe.map is not None:
        recipe.map.check_shape(
            {x.layer: x.heads for x in layers if isinstance(x, KVLayer)}, n_layers
        )
    made = _Groups(config, dtype, keep)
    for x in layers:
        if isinstance(x, StateLayer):
            made.add_state(x)
            continue
        for part, heads in _parts(recipe, x):
            chosen = {f.name: _choose(f, x.layer, n_layers, part, codecs, dtype) for f in x.fields}
            made.add_tokens(x, heads, chosen, part)
    return made.layout(dict(shared or {}))


def _parts(recipe: Recipe, x: KVLayer) -> list[tuple[Recipe, list[int]]]:
    """A layer's heads by the recipe that they are kept in."""
    out: dict[str, tuple[Recipe, list[int]]] = {}
    for head in range(x.heads):
        part = recipe.at(x.layer, head)
        out.setdefault(part.text, (part, []))[1].append(head)
    return list(out.values())


def assume_map(keep: Keep, layers: Sequence[KVLayer | StateLayer]) -> Keep:
    """A policy that treats heads differently over these layers' heads, as far as bytes go: evenly over the layers.

    Raises:
        ConfigError: these layers have no heads to tell apart.
    """
    kv = [x for x in layers if isinstance(x, KVLayer)]
    if any(f.name == "latent" for x in kv for f in x.fields):
        keep.check_latents()
    ranked = getattr(keep.policy, "ranked", None)
    if ranked is None:
        return keep
    heads = [(x.layer, h) for x in kv if type(x.span) is Full for h in range(x.heads)]
    return Keep(keep.text, ranked(sorted(heads, key=lambda c: (c[1], c[0]))))


def check_config(config: KVConfig, *, runs: bool = True) -> None:
    """Refuses a configuration that no model can have. Raises ConfigError.

    Args:
        runs: whether numbers will be coded, so that codecs that learn from a text must have; bytes need no more than
            their parameters.
    """
    parse_keep(config.keep)
    parse_share(config.share)
    recipe = parse_recipe(config.kv)
    recipe.check_options()
    if runs:
        recipe.check_files()
    block_tokens_for(recipe.loaded(), config.block_tokens)


def _check_fields(kv: str, recipe: Recipe, layers: Sequence[KVLayer | StateLayer]) -> None:
    """Refuses a recipe that names what the model does not have, rather than ignore it."""
    have = {f.name for x in layers if isinstance(x, KVLayer) for f in x.fields}
    asked = {name for part in recipe.parts() for name in part.codecs if name}
    idle = recipe.codecs.get("") == "auto" and not (recipe.skip_layers or recipe.map)
    if not have and (not idle or asked):
        raise ConfigError(
            f"kv={kv!r}: this model keeps recurrent state only, which is stored as it is; use kv='auto'"
        )
    if asked - have:
        raise ConfigError(
            f"kv={kv!r}: this model caches {', '.join(sorted(have))}, not {', '.join(sorted(asked - have))}"
        )


def _choose(
    f: Field,
    layer: int,
    n_layers: int,
    recipe: Recipe,
    codecs: Mapping[str, KVCodec] | None,
    dtype: str,
) -> KVCodec:
    if recipe.skips(layer, n_layers):
        return plain_codec(dtype)
    if codecs is not None:
        return codecs.get(f.name) or codecs[""]
    return recipe.codec(f.name, dtype)


class _Groups:
    """Collects coordinates under equal forms, in order of first appearance."""

    def __init__(self, config: KVConfig, dtype: str, keep: Keep) -> None:
        self.config = config
        self.keep = keep
        self.dtype = dtype
        self.coords: dict[tuple[object, ...], list[Coord]] = {}
        self.chosen: dict[tuple[object, ...], Mapping[str, KVCodec]] = {}
        self.model_fields: dict[tuple[object, ...], tuple[Field, ...]] = {}
        self.spans: dict[tuple[object, ...], Span] = {}
        self.raw: dict[tuple[object, ...], tuple[int, int]] = {}
        """Sinks and the residual window that are read raw."""

    def add_state(self, x: StateLayer) -> None:
        self._add((x.fields, State()), x.fields, {}, State(), [(x.layer, 0)])

    def add_tokens(
        self, x: KVLayer, heads: Sequence[int], chosen: Mapping[str, KVCodec], recipe: Recipe
    ) -> None:
        window = max(c.residual_tokens for c in chosen.values())
        sinks = max(recipe.sinks, *(getattr(c, "sink_tokens", 0) for c in chosen.values()))
        raw = sinks, window if recipe.window is None else recipe.window
        if all(c.plain for c in chosen.values()):
            raw = 0, 0
        key = (x.fields, x.span, tuple(chosen[f.name] for f in x.fields), raw)
        self.raw[key] = raw
        self._add(key, x.fields, chosen, x.span, [(x.layer, h) for h in heads])

    def _add(
        self,
        key: tuple[object, ...],
        fields: tuple[Field, ...],
        chosen: Mapping[str, KVCodec],
        span: Span,
        coords: list[Coord],
    ) -> None:
        self.coords.setdefault(key, []).extend(coords)
        self.chosen[key], self.model_fields[key], self.spans[key] = chosen, fields, span

    def layout(self, shared: Mapping[int, int]) -> Layout:
        codecs: dict[str, Mapping[str, KVCodec]] = {}
        fields: dict[str, tuple[Field, ...]] = {}
        groups = self._all(self.keep)
        for group, used, own in groups:
            name = group.name.partition("/")[0]
            codecs[name], fields[name] = used, own
        spec = CacheSpec(tuple(g for g, _, _ in groups), shared)

        def narrowed(keep: Keep) -> CacheSpec:
            return CacheSpec(tuple(g for g, _, _ in self._all(keep)), shared)

        return Layout(spec, codecs, fields, self.dtype, narrowed)

    def _all(self, keep: Keep) -> list[tuple[CacheGroup, Mapping[str, KVCodec], tuple[Field, ...]]]:
        """Every group with its codecs and the model's own fields."""
        out: list[tuple[CacheGroup, Mapping[str, KVCodec], tuple[Field, ...]]] = []
        count, narrows = 0, keep.spans
        for key, coords in self.coords.items():
            own = self.spans[key]
            name = f"{type(own).__name__.lower()}{count}"
            parts: dict[Span, list[Coord]] = {}
            for layer, head in sorted(coords):
                span = keep.policy.span(layer, head, own) if narrows else own
                parts.setdefault(span, []).append((layer, head))
            for i, (span, some) in enumerate(parts.items()):
                retention = keep.text if span != own else "full"
                made = self._make(name, f"/{i}" if i else "", key, span, tuple(some), retention)
                out += [(group, used, self.model_fields[key]) for group, used in made]
                count += len(made) if not i else 0
        return out

    def _indexed(self, key: tuple[object, ...]) -> bool:
        """Whether bounds of keys lie beside its blocks: the store's policy reads fewer, and queries would read all."""
        names = {f.name for f in self.model_fields[key]}
        return self.keep.reads and names == {"k", "v"} and type(self.spans[key]) is Full

    def _make(
        self,
        name: str,
        part: str,
        key: tuple[object, ...],
        span: Span,
        coords: tuple[Coord, ...],
        retention: str,
    ) -> list[tuple[CacheGroup, Mapping[str, KVCodec]]]:
        """One group, or a lossy body with its raw companion."""
        chosen, fields = self.chosen[key], self.model_fields[key]
        if not chosen:
            group = CacheGroup(name + part, coords, fields, span, codec=self.dtype, block_tokens=1)
            return [(group, {})]
        size = block_tokens_for(chosen.values(), self.config.block_tokens)
        sites = [Site(f, size) for f in fields]
        stored = tuple(s for site in sites for s in chosen[site.name].stored(site))
        text = _recipe_text(chosen)
        if self._indexed(key):
            shape = next(f.shape for f in fields if f.name == "k")
            stored += (Field(BOUNDS, (2, *shape), self.dtype, "block"),)
        body = CacheGroup(name + part, coords, stored, span, text, retention, size)
        if all(c.plain for c in chosen.values()):
            return [(body, chosen)]
        sinks, residual = self.raw[key]
        raw_codec = plain_codec(self.dtype)
        raw_fields = tuple(s for site in sites for s in raw_codec.stored(site))
        raw_name = f"{name}.raw{part}"
        raw = CacheGroup(
            raw_name,
            coords,
            raw_fields,
            Residual(size, residual, span, sinks),
            raw_codec.name,
            retention,
            size,
        )
        body = CacheGroup(name + part, coords, stored, span, text, retention, size, raw=raw_name)
        return [(body, chosen), (raw, {f.name: raw_codec for f in fields})]


def _recipe_text(chosen: Mapping[str, KVCodec]) -> str:
    """The codecs of a group in the form that a user writes: `"kivi:bits=2"`, `"k=int8,v=int4"`."""
    texts = {f: codec_text(c) + _stamp(c) for f, c in chosen.items()}
    same = len(set(texts.values())) == 1
    return next(iter(texts.values())) if same else ",".join(f"{f}={t}" for f, t in texts.items())


def _stamp(codec: KVCodec) -> str:
    """What tells the tables of a codec that learned from those of all others: names of blocks depend on it."""
    stamp = getattr(codec, "stamp", "")
    return f"#{stamp}" if stamp else ""
