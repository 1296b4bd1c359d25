"""What a request gives up when memory runs short, because it says so: digits of its older blocks, or tokens.

    yields="kv=int4"               its sealed blocks are encoded, once, from the plain ones; the newest stay raw
    yields="keydiff:budget=0.5"    it goes under a policy from here on; the first tokens go at once

Either happens between two steps, to all layers alike, and afterwards the request is what it would be under that codec
or policy, but that what was computed before was computed with more. So its output depends on what runs beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from quire.attention.read import Places, Seal
from quire.attention.step import Step
from quire.errors import CapacityError, ConfigError
from quire.retention import Keep, parse_keep
from quire.spec import CacheGroup, KVConfig, Residual
from quire.store.chain import Chain
from quire.store.cold import goes_away
from quire.store.table import BlockTable

if TYPE_CHECKING:
    from quire.models.bridge import Bridge

__all__ = ["Yield", "parse_yield"]

AT_ONCE = 16
"""Blocks that are encoded together."""


@dataclass(frozen=True)
class Yield:
    """One permission, checked against a model and its store.

    Args:
        kind: what it costs.
        keep: of "evict": the policy.
        pairs: of "recode": a plain group to the body and the raw companion in its place.
    """

    text: str
    kind: Literal["recode", "evict"]
    bridge: Any
    keep: Keep | None = None
    pairs: tuple[tuple[CacheGroup, CacheGroup, CacheGroup], ...] = ()

    def apply(self, table: BlockTable) -> bool:
        """Makes use of it; False where there is no room for what is copied, or nothing to gain."""
        if table.length != table.committed or table.cold is not None or table.keeper is not None:
            return False
        return self._evict(table) if self.keep is not None else self._recode(table)

    def _evict(self, table: BlockTable) -> bool:
        assert self.keep is not None
        rules = self.bridge.rules(self.keep)
        if rules.kept_tokens(table.length) >= table.length:
            return False
        rules.apply(table, table.length)
        assert table.keeper is not None
        try:
            table.keeper.before_append(table, 1)
        except CapacityError:
            table.keeper = None
            return False
        return True

    def _recode(self, table: BlockTable) -> bool:
        known = {plain: (body, raw) for plain, body, raw in self.pairs}
        store, fresh = self.bridge.store, {}
        for chain in table.chains:
            if chain.group in known and chain.kept is None:
                body = known[chain.group][0]
                fresh[chain] = new = Chain(body, store.pool_for(body))
        try:
            for chain, new in fresh.items():
                for _ in range(table.committed // chain.group.block_tokens):
                    new.push(new.pool.take())
        except CapacityError:
            for new in fresh.values():
                while new.count:
                    new.pop()
            return False
        if not any(new.count for new in fresh.values()):
            return False
        table.leave()
        for chain, new in fresh.items():
            raw = known[chain.group][1]
            self._encode(chain, new, raw)
            at = next(i for i, c in enumerate(table.chains) if c is chain)
            table.chains[at : at + 1] = [new, _newest(chain, raw, table.committed)]
        return True

    @torch.inference_mode()
    def _encode(self, plain: Chain, body: Chain, raw: CacheGroup) -> None:
        store, layout, device = self.bridge.store, self.bridge.layout, self.bridge.device
        step, size = Step(store, layout, [], device), raw.block_tokens
        for first in range(0, body.count, AT_ONCE):
            entries = np.arange(first, min(body.count, first + AT_ONCE))
            pos = entries[:, None] * size + np.arange(size)
            seal = Seal(
                body.group,
                raw,
                Places(store.units(raw, plain.ids[entries]), device),
                Places(store.units(body.group, body.ids[entries]), device),
                torch.from_numpy(pos).to(device),
                [],
                set(),
            )
            for layer in body.group.layers:
                step.encode(layer, seal)
        body.sealed = body.encoded = body.count


def _newest(plain: Chain, raw: CacheGroup, committed: int) -> Chain:
    """The plain blocks that are still read raw, as a chain of their own; the others go back."""
    out = Chain(raw, plain.pool)
    out.ids, out.count, out.held = plain.ids, plain.count, plain.held
    out.sealed = plain.sealed
    out.drop_behind(committed)
    return out


def parse_yield(bridge: Bridge, text: str) -> Yield:
    """A permission in its string form. Raises ConfigError with one line that says what would work."""
    if text.startswith("kv="):
        return _recoding(bridge, text)
    keep = parse_keep(text)
    policy = keep.policy
    rules = bridge.rules(keep)
    asks = rules.scores and (
        policy.queries is not None
        or policy.last_queries
        or policy.notes
        or policy.calls
        or policy.repeats
    )
    if asks or not rules.scores:
        raise ConfigError(
            f"yields={text!r}: a policy that takes over half way can look at what is kept and at nothing that was seen "
            "before; use keydiff:budget=0.5, or a codec, as kv=int4"
        )
    return Yield(text, "evict", bridge, keep=keep)


def _recoding(bridge: Bridge, text: str) -> Yield:
    from quire.models.attach import layout_of

    plain = bridge.layout
    raws = {g.raw for g in plain.spec}
    full = [g for g in plain.spec if goes_away(g, raws)]
    if any(g.raw is not None for g in full) or not full:
        raise ConfigError(
            f"yields={text!r}: blocks are encoded once, from plain ones, and this cache has none that stay; open it "
            "with kv='auto', or let tokens go, as keydiff:budget=0.5"
        )
    if bridge.way == "dense" or bridge.compiled is not None:
        raise ConfigError(
            f"yields={text!r}: blocks of two forms in one request are read by our own attention only; drop yields, or "
            "compile"
        )
    config = KVConfig(text.removeprefix("kv="), "full", full[0].block_tokens)
    small = layout_of(bridge, config)
    tag = f"~{config.kv}"
    pairs = []
    for g in full:
        body = next((b for b in small.spec if b.coords == g.coords and b.raw is not None), None)
        if body is None:
            continue
        raw = small.spec.group(str(body.raw))
        if raw.block_bytes != g.block_bytes or not isinstance(raw.span, Residual):
            raise ConfigError(f"yields={text!r}: its raw blocks are not those of this cache")
        new_raw = replace(raw, name=raw.name + tag)
        pairs.append((g, replace(body, name=body.name + tag, raw=new_raw.name), new_raw))
    if not pairs:
        raise ConfigError(f"yields={text!r}: that is no smaller than what this cache holds")
    if pairs[0][1].name.partition("/")[0] not in plain.codecs:
        more = (
            {n + tag: c for n, c in small.codecs.items()},
            {n + tag: f for n, f in small.fields.items()},
        )
        bridge.layout = replace(
            plain, codecs={**plain.codecs, **more[0]}, fields={**plain.fields, **more[1]}
        )
    return Yield(text, "recode", bridge, pairs=tuple(pairs))
