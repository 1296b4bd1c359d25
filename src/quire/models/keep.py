"""Retention at work: what a policy is shown of each sequence, and when its tokens go.

    forward ── attention ──> what queries paid, queries, hidden states      while it is computed, for those who ask
            └─ commit
    append  ── length is due? ── score ── allocate ── protect ──> rows to keep ──> store/compact
            └─ room for the next tokens

Tokens go at fixed lengths only: at the prompt's end and after every so many more, before room is made for the next one.
Chunks end there, so whoever is preempted and computed anew sees the same history.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from hashlib import sha256
from typing import Any

import torch

from quire.attention.sparse import indexed
from quire.errors import ConfigError, InvariantError, RequestError
from quire.models.keeper import Keeper
from quire.models.outside import Outside
from quire.models.reader import Reader
from quire.models.rope import Regimes
from quire.models.saved import keeper_of
from quire.plan.kept import Kept, refuse_nothing_to_drop, retained
from quire.plan.layout import Layout
from quire.retention import Keep, parse_keep
from quire.retention.contract import LEAD_TOKENS
from quire.retention.maps import Digest
from quire.spec import CacheGroup, Sinks
from quire.store.chain import Chain, sinks_of
from quire.store.store import BlockStore
from quire.store.table import BlockTable

__all__ = ["Rules", "bind"]


class Rules:
    """One policy on one model's store.

    Args:
        bridge: the model joined to its store.
        keep: the policy, parsed.

    Raises:
        ConfigError: the model or its codecs cannot do what the policy needs, with what would work.
    """

    def __init__(self, bridge: Any, keep: Keep) -> None:
        self.bridge, self.keep, self.policy = bridge, keep, keep.policy
        self.store: BlockStore = bridge.store
        self.layout: Layout = bridge.layout
        spec = self.layout.narrowed(keep)
        self.groups: tuple[CacheGroup, ...] | None = None
        """What its tables hold instead of the store's own groups, where queries read less or more."""
        if [(g.span, g.coords) for g in spec] != [(g.span, g.coords) for g in self.layout.spec]:
            self.groups = spec.groups
        self.scores = keep.scores
        _check(bridge, keep, spec)
        bodies = retained(spec)
        self.layers = sorted({layer for g in bodies for layer in g.layers})
        self.bytes_per_token = sum(g.bytes_per_token for g in bodies)
        self.kept = Kept(self.layout, self.policy, self.bytes_per_token)
        self.outside: Outside | None = None
        if self.scores and self.policy.calls:
            self.outside = bridge.outside(self)

    @property
    def endless(self) -> bool:
        """Whether all reads lie within windows, whatever the length, and positions have no end of their own."""
        groups = self.groups or self.layout.spec.groups
        bounded = all(g.recurrent or sum(g.span.reach(1 << 40)) < 1 << 39 for g in groups)
        if any(type(getattr(g.span, "inner", g.span)) is Sinks for g in groups):
            return False  # read at their true distance, which grows
        return bounded and self.keep.spans and not self.keep.full and self._rotary

    @cached_property
    def _rotary(self) -> bool:
        try:
            self.bridge.turner()
        except ConfigError:
            return False
        return True

    def heads(self, layer: int) -> tuple[int, ...]:
        """KV heads of a layer."""
        return tuple(sorted({h for g in self.layout.spec for h in g.heads(layer)}))

    def turn(self, layer: int) -> Any:
        """`Seen.turn` for a layer; None where the model cannot say how."""
        if not self._rotary:
            return None
        turn = partial(self.bridge.turner(), layer)
        names = self.bridge.field_names(layer)
        if names[0] != "latent":
            return turn
        fields = (f for g in self.layout.spec if g.holds(layer) for f in self.layout.fields_of(g))
        rotated = next(f.shape[-1] for f in fields if f.name == names[1])

        def turn_last(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
            still, rest = x[..., :-rotated], turn(x[..., -rotated:], by)
            return torch.cat([still.expand(*rest.shape[:-1], -1), rest], -1)

        return turn_last

    @property
    def shares(self) -> bool:
        """Whether its prefixes are those of the store's own groups."""
        return self.groups is None

    @property
    def records(self) -> bool:
        """Whether what enters each layer's attention is kept for a scorer from outside."""
        return self.outside is not None and self.outside.records

    def hit_limit(self, prompt_tokens: int) -> int:
        """At most so many tokens of a prompt may be found."""
        if not self.scores:
            return 1 << 62
        if self.records:
            return 0
        return int(self.policy.hit_limit(prompt_tokens))

    def most_tokens(self, n_tokens: int, prompt_tokens: int) -> int:
        """The most tokens held at once on the way to `n_tokens`, copies while tokens are dropped included."""
        if not self.scores:
            return n_tokens
        first, every = min(n_tokens, prompt_tokens), self.policy.every
        if self.policy.once:
            return max(n_tokens, first + self.kept_tokens(first))
        kept = self.kept_tokens(n_tokens) + every
        times = max(0, -(-(n_tokens - prompt_tokens) // every))  # that tokens go on the way
        most = max(n_tokens, 2 * (prompt_tokens + (times - 1) * every)) if times else n_tokens
        if times and self.policy.bounded:
            most = min(most, max(first + self.kept_tokens(first), 2 * kept))
        held = [min(due, max(first, kept)) + n for due, n in self._repeats(n_tokens, prompt_tokens)]
        return int(max(most, *held)) if held else int(most)

    # -- reading once more -------------------------------------------------------------------------------------------

    def repeat_tokens(self, n_tokens: int) -> int:
        """Drafts at once while `n_tokens` are read once more."""
        return LEAD_TOKENS + min(int(self.policy.repeats), n_tokens)

    def _repeats(self, n_tokens: int, prompt_tokens: int) -> Iterator[tuple[int, int]]:
        """At which lengths a sequence of `n_tokens` is read once more, and with how many drafts at once."""
        done = 0
        if self.scores and self.policy.repeats:
            for due in range(prompt_tokens, max(n_tokens, prompt_tokens + 1), self.policy.every):
                if self.kept_tokens(due) < due:
                    yield due, self.repeat_tokens(due - done)
                    done = due

    def context_tokens(self, context: int, prompt_tokens: int) -> int:
        """The longest sequence whose repetitions, too, lie within a context.

        Raises:
            RequestError: the prompt's own does not.
        """
        for due, n in self._repeats(context, prompt_tokens):
            if due + n <= context:
                continue
            if due > prompt_tokens:
                return due
            room = context - due - LEAD_TOKENS
            raise RequestError(
                f"keep={self.keep.text!r}: the prompt of {due} tokens is read once more behind itself, {n} tokens at a "
                f"time, and the context is {context}; "
                + (f"repeats={room} or less would fit" if room > 0 else "take a shorter prompt")
            )
        return context

    def kept_tokens(self, length: int) -> int:
        """How many tokens of a sequence stay per layer and head on average, protected ones at least."""
        return self.kept.tokens(length)

    @cached_property
    def said(self) -> str:
        """The policy's canonical text, and a digest of what it has learned of the model, where it has."""
        maps = getattr(self.policy, "maps", None)
        if not self.scores or not maps:
            return self.keep.canonical
        found = sha256()
        for layer in sorted(maps):
            for x in maps[layer]:
                found.update(x.cpu().numpy().tobytes())
        return f"{self.keep.canonical} {found.hexdigest()[:16]}"

    def revived(self, chains: Sequence[Chain], about: Any, arrays: Any) -> Keeper:
        """A keeper from its record, see `models.saved.keeper_of`."""
        return keeper_of(self, chains, about, arrays)

    @property
    def published(self) -> bool:
        """Whether others may find what it leaves of a context, as a whole."""
        return self.scores and bool(self.policy.agnostic)

    def apply(
        self, table: BlockTable, prompt_tokens: int | None, context_tokens: int = 0
    ) -> Keeper | None:
        """Puts a sequence of the store under the policy.

        Args:
            table: empty, or over a prefix that was found.
            prompt_tokens: how long its prompt will be; None: what is appended first.
            context_tokens: of them, those after which tokens go before the rest is read; 0: at the prompt's end only.

        Returns:
            Its keeper, where the policy scores.
        """
        if self.groups is not None:
            if table.length:
                raise InvariantError("a sequence begins under its policy")
            table.leave()
            table.chains = [Chain(g, self.store.pool_for(g)) for g in self.groups]
        if self.keep.reads:
            table.keeper = Reader(self.policy, prompt_tokens)
        if not self.scores:
            return None
        table.keeper = keeper = Keeper(self, prompt_tokens, context_tokens)
        return keeper


def bind(keep: Keep, shape: Any, digest: Digest) -> Keep:
    """The policy with what it has learned of a model of that shape.

    Raises:
        ConfigError: it treats heads differently and the model has none to tell apart, or it knows nothing of the model.
    """
    if shape.mla:
        keep.check_latents()
    return keep.bound(digest)


def _check(bridge: Any, keep: Keep, spec: Any) -> None:
    if keep.full:
        return
    who = f"keep={keep.text!r}"
    if bridge.way == "dense":
        raise ConfigError(
            f"{who}: this model's own attention wants the whole history (way 'dense'); use keep='full'"
        )
    refuse_nothing_to_drop(who, bridge.layout.narrowed(parse_keep("full")))
    if any(sinks_of(g.span) for g in spec):
        if bridge.shape.mla:
            raise ConfigError(
                f"{who}: queries of this model (MLA) cannot be turned back for the sinks; use window:N"
            )
        try:
            bridge.turner()
        except ConfigError as e:
            raise ConfigError(f"{who}: {e}; use window:N") from e
    if keep.spans:
        return
    if keep.reads:
        _check_reads(bridge, who)
        return
    policy = keep.policy
    if policy.turns:
        try:
            bridge.turner()
        except ConfigError as e:
            raise ConfigError(f"{who}: {e}; use snapkv or keydiff") from e
    if policy.repeats:
        _check_repeats(bridge, who)
    _check_looks(bridge, policy, who)


def _check_looks(bridge: Any, policy: Any, who: str) -> None:
    """What a policy or a scorer from outside looks at must be there."""
    if policy.calls and bridge.way == "patched":
        raise ConfigError(
            f"{who}: this model has an attention of its own, which no press knows; use keydiff or h2o"
        )
    if (policy.notes or policy.calls) and bridge.compiled is not None:
        raise ConfigError(
            f"{who}: it looks at hidden states, which compiled code does not show; drop compile"
        )


def _check_reads(bridge: Any, who: str) -> None:
    """Bounds of keys must lie beside the blocks, which is settled when a store is opened."""
    if not any(indexed(g) for g in bridge.layout.spec):
        raise ConfigError(
            f"{who}: bounds of keys lie beside the blocks, and this cache was opened without them; open it with "
            "keep='quest:budget=1024', and requests may take others"
        )


def _check_repeats(bridge: Any, who: str) -> None:
    """What is read once more is forgotten again, which not every model's cache can do."""
    if bridge.has_state:
        raise ConfigError(
            f"{who}: it reads the prompt once more and forgets that again, which recurrent state cannot; use keydiff"
        )
    kind = Regimes(bridge.model).kind
    if kind != "fixed":
        raise ConfigError(
            f"{who}: it reads the prompt once more behind itself, and this model's RoPE ({kind}) turns keys by the "
            "length of the whole sequence; use keydiff"
        )
