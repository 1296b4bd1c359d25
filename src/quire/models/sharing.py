"""What a model's blocks depend on beside their tokens, as digests; and which models can share prefixes at all."""

from __future__ import annotations

from hashlib import sha256
from secrets import token_bytes
from typing import Any

from quire.errors import ConfigError
from quire.models.bridge import Bridge
from quire.models.hf_cache import KVCache
from quire.models.load import fingerprint, full_digest
from quire.models.repeat import Piece
from quire.models.rope import Regimes
from quire.share import parse_share
from quire.spec import KVConfig
from quire.store.below import Below
from quire.store.cold import goes_away
from quire.store.pace import Pace
from quire.store.sharing import Sharing
from quire.store.snapshot import spec_digest
from quire.store.tiering import Tiering
from quire.store.tiers.recipe import TiersConfig, open_tiers
from quire.store.tiers.stack import TierStack

__all__ = ["AdapterDigests", "open_sharing", "shorten"]


def open_sharing(bridge: Bridge, config: KVConfig) -> Sharing | None:
    """The prefix cache of a bridge's store; None where nothing is to be shared.

    The base of all names is a digest of the weights as loaded (a sample of each), the model's own configuration, the
    dtype, the way into the model and the layout of the blocks.

    Raises:
        ConfigError: keys of this model depend on more than what lies before them.
    """
    share = parse_share(config.share)
    if not share.on:
        return None
    model = bridge.model
    regimes = Regimes(model)
    if regimes.kind == "dynamic":
        raise ConfigError(
            f"share={config.share!r}: this model's RoPE (dynamic) turns keys by the length of the whole sequence, and "
            "no two lengths beyond the original context alike; use share='off'"
        )
    about = (
        fingerprint(model.named_parameters()),
        model.config.to_json_string(use_diff=False),
        str(model.dtype),
        bridge.way,
        spec_digest(bridge.layout.spec),
    )
    return Sharing(
        bridge.store,
        sha256(repr(about).encode()).digest(),
        evict=share.evict,
        explain=share.explain,
        ghost=share.ghost,
        one_by_one=not bridge.chunked_prefill,
        stateful_tokens=config.block_tokens,
        turn_tokens=regimes.restart_tokens,
    )


def shorten(cache: KVCache, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments without the columns that every row of an empty cache finds; later ones are only noted.

    Args:
        cache: one that `generate()` made.
        kwargs: of the model's forward, with `input_ids: [B, T]`; a padded batch is padded on the left.

    Returns:
        The same, or with shorter `input_ids` and positions; the mask stays, it covers what is cached, too.
    """
    if not _still_shares(cache):
        return kwargs
    ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    columns = ids.shape[1]
    rows = ids.tolist()
    if mask is not None and mask.ndim == 2:
        valid = mask[:, -columns:].bool().tolist()
        rows = [
            [t for t, v in zip(r, m, strict=True) if v] for r, m in zip(rows, valid, strict=True)
        ]
        if not cache.tables and any(
            any(m[: columns - len(r)]) for r, m in zip(rows, valid, strict=True)
        ):
            cache.shares = (
                False  # padding elsewhere than on the left: rows have no columns in common
            )
            return kwargs
    sharing, pads = cache.bridge.sharing, [columns - len(row) for row in rows]
    assert sharing is not None
    if cache.tables:
        for table, known, more in zip(cache.tables, cache.tokens, rows, strict=True):
            if sharing.turned(len(known)) != sharing.turned(len(known) + len(more)):
                table.leave()  # keys of two kinds in one sequence: transformers' own, and nobody else's
            known.extend(more)
        return kwargs
    if len({sharing.turned(len(row)) for row in rows}) > 1:
        cache.shares = False  # the longest row's factors turn the keys of all
        return kwargs
    if not cache.bridge.chunked_prefill and any(pads):
        cache.shares = False  # what is computed token by token begins with a whole row of tokens
        return kwargs
    found = _open_alike(cache, rows, columns)
    cache.follow(rows)
    if sharing.states is not None and not any(t.keeper for t in cache.tables):
        found = _compute_ahead(cache, rows, pads, found)
    if not any(t.length for t in cache.tables):
        return kwargs
    cache.columns = found
    short = {**kwargs, "input_ids": ids[:, found:]}
    for name in ("position_ids", "cache_position", "token_type_ids"):
        given = kwargs.get(name)
        if given is not None and given.shape[-1] == columns:
            short[name] = given[..., found:]
    return short


def _still_shares(cache: KVCache) -> bool:
    """Whether nothing has happened within a `generate()` that names do not say."""
    if cache.tables:
        cache.check_worn(cache.bridge.worn)
        if not cache.tokens:  # or it began with embeddings
            cache.shares = False
    return cache.shares


def _open_alike(cache: KVCache, rows: list[list[int]], columns: int) -> int:
    """Opens a table for each row so that all of them end at the same column, the furthest; returns that column.

    row 0   ....|== found ==|           columns, with padding on the left
    row 1   |=== found =====|

    A policy that scores computes the queries that it needs: of no row more is found than leaves them.
    """
    sharing = cache.bridge.sharing
    assert sharing is not None
    rules = cache.bridge.rules(cache.bridge.keep)
    pads = [columns - len(row) for row in rows]
    most = [rules.hit_limit(len(row)) for row in rows]
    found = columns - 1
    while True:
        inside = [max(0, found - pad) for pad in pads]
        wanted = [min(n, limit) for n, limit in zip(inside, most, strict=True)]
        tables = [
            sharing.open(row, limit=n, adapter=cache.adapters)
            for row, n in zip(rows, wanted, strict=True)
        ]
        ends = [
            pad + t.length if n else found for pad, n, t in zip(pads, inside, tables, strict=True)
        ]
        lengths = [t.length for t in tables]
        if sharing.states is not None and any(lengths) and not all(lengths):
            ends = [0]  # no forward is over rows with and without history
        if min(ends) == found:
            cache.tables = tables
            if rules.scores or cache.bridge.keep.reads:
                for table, row in zip(tables, rows, strict=True):
                    rules.apply(table, len(row))
            return found
        for t in tables:
            t.release()
        found = min(ends)


def _compute_ahead(cache: KVCache, rows: list[list[int]], pads: list[int], found: int) -> int:
    """Computes what lies before the last column in pieces that end where states are to be kept.

    Returns:
        The column at which the model's own forward is to begin.

    Cost: a forward per piece and row, over what `generate()` would have computed at once.
    """
    tables, bridge = cache.tables, cache.bridge
    marks = {pad + m for pad, t in zip(pads, tables, strict=True) if t.path for m in t.path.marks}
    ends = sorted(c for c in marks if c > max(pads) and c > found)
    if (
        not bridge.chunked_prefill
    ):  # behind what is there, or behind the first piece, token by token
        ends = [found] if any(t.length for t in tables) else ends[:1]
        ends += [c for end in ends for c in range(end + 1, len(rows[0]))]
        ends = [c for c in ends if c > found]
    at = found
    for at in ends:
        for table, row, pad in zip(tables, rows, pads, strict=True):
            start = table.length
            table.append(at - pad - start)
            bridge.read(Piece(table, row, start, at - pad))
            table.commit()
    return at


def open_tiering(runner: Any, config: TiersConfig, weights: bytes) -> tuple[Tiering | None, Below]:
    """Tiers below a runner's prefix cache, and what running sequences have of them.

    What lies in them outlives the process, so names there depend on every element of the weights and not on a sample,
    on the form in which the linear layers read them, and on the version of the code that computes keys and values.

    Args:
        runner: a `ModelRunner` over a new store.
        weights: digest of all of them, and the form that was asked for.

    Returns:
        The first None where nothing is shared: the tiers then serve running sequences alone.

    Raises:
        ConfigError: nothing is shared and nothing else asked for, or a tier cannot be had.
    """
    import transformers

    if config.offload:
        check_offload(runner.bridge, config)
    sharing, arena = runner.sharing, runner.bridge.store.arena
    if sharing is None:
        if not config.live:
            raise ConfigError(
                "tiers keep what a prefix cache names; open the runner with share='prefix', or with tiers that say "
                "swap=auto or offload=on, for running requests alone"
            )
        stack = TierStack(open_tiers(config), token_bytes(32))
        return None, Below(arena, stack, config)
    about = (weights, runner.weights is not None, transformers.__version__)
    sharing.rebase(repr(about).encode())
    runner.adapter_digest.whole = True
    ns = sha256(b"quire tier 1" + sharing.base).digest()
    stack, pace = TierStack(open_tiers(config), ns), Pace()
    return Tiering(sharing, stack, config.deadline_s, pace), Below(arena, stack, config, pace)


def check_offload(bridge: Bridge, config: TiersConfig) -> None:
    """Raises ConfigError where blocks of a running sequence cannot be read from elsewhere."""
    who, drop = f"tiers={config.text!r}: offload", "drop offload=on"
    raws = {g.raw for g in bridge.layout.spec}
    if not any(goes_away(g, raws) for g in bridge.layout.spec):
        raise ConfigError(
            f"{who} moves blocks of layers that read everything, and this cache has none; {drop}"
        )
    if not bridge.keep.full:
        raise ConfigError(
            f"{who} keeps every token and keep={bridge.keep.text!r} does not; drop one of them"
        )
    if bridge.way == "dense":
        raise ConfigError(
            f"{who} hands attention over in parts, and this model's own wants all at once (way 'dense'); {drop}"
        )
    if bridge.compiled is not None:
        raise ConfigError(
            f"{who} stages blocks between layers, which compiled code does not; {drop}"
        )
    kind = Regimes(bridge.model).kind
    if kind != "fixed":
        raise ConfigError(
            f"{who}: this model's RoPE ({kind}) computes long sequences anew, at once; {drop}"
        )


class AdapterDigests:
    """Digests of a model's adapters, made anew when somebody loads other weights under the same name.

    Args:
        model: with its adapters' parameters named `….NAME.…`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.whole = False
        """Over every element instead of a sample."""
        self._known: dict[str, tuple[tuple[tuple[int, int], ...], bytes]] = {}

    def __call__(self, name: str) -> bytes:
        """32 bytes. Cost: a look at every parameter of the adapter; its numbers only when one was touched."""
        part = f".{name}."
        own = [(n, p) for n, p in self.model.named_parameters() if part in f".{n}."]
        state = tuple((p.data_ptr(), p._version) for _, p in own)
        known = self._known.get(name)
        if known is None or known[0] != state:
            seen = full_digest(own).hex() if self.whole else fingerprint(own)
            digest = sha256(f"{name} {seen}".encode()).digest()
            self._known[name] = known = state, digest
        return known[1]
