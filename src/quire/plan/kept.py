"""What a sequence holds under a policy that scores, before there are scores: the keeper's own arithmetic.

    prompt        |################################|        held whole until its end
    tokens go     |################################|##|     the kept ones are copied beside it: the peak
    steady        |##|.. up to `every` more                 then they go again

Which tokens stay is the policy's affair; how many, and in how many blocks, follows from lengths alone. Where heads
share a budget by their scores (`by_head`) their numbers are rounded to blocks one by one, and the sum is right on
average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from quire.codecs.coded import Coded
from quire.errors import ConfigError
from quire.plan.layout import Layout
from quire.retention.contract import LEAD_TOKENS
from quire.spec import CacheGroup, CacheSpec, Coord, Interval, KVCodec, Residual, Site

__all__ = ["MAX_PARTS", "Kept", "part_sizes", "retained", "unit_tokens"]

MAX_PARTS = 16
"""At most so many chains of one group: where heads' budgets differ more finely they are rounded to fewer sizes."""


def retained(spec: Iterable[CacheGroup]) -> list[CacheGroup]:
    """Groups that tokens can be dropped from: those that would keep every one."""
    groups, far = list(spec), 1 << 40
    raws = {g.raw for g in groups}
    return [
        g
        for g in groups
        if not g.recurrent and g.name not in raws and g.span.needs(far) == ((0, far),)
    ]


def unit_tokens(layout: Layout, group: CacheGroup) -> int:
    """Tokens that can only be kept or dropped together: 1, or a whole block."""
    codecs = layout.codecs_of(group)
    sites = layout.sites_of(group)
    return 1 if all(_by_token(codecs[s.name], s) for s in sites) else group.block_tokens


def _by_token(codec: KVCodec, site: Site) -> bool:
    """Whether what a codec stores of one token does not depend on its neighbours."""
    if codec.plain or all(f.per == "token" for f in codec.stored(site)):
        return True
    packing = codec.packing(site)
    return (
        isinstance(codec, Coded)
        and packing is not None
        and bool(packing.bits)
        and packing.scaled == "token"
    )


def part_sizes(
    counts: Mapping[Coord, int],
    have: Mapping[Coord, int],
    sure: Mapping[Coord, int],
    grain: int,
    per_block: int,
) -> dict[Coord, int]:
    """How many units each coordinate really keeps, at most `MAX_PARTS` different numbers.

    Args:
        counts: what it is to keep, of the units it `have`s, and at least those that are `sure`.
        grain: numbers are multiples of it (a lossy body keeps whole blocks).
        per_block: units of a block; where numbers differ at all they are whole blocks, which costs nothing.
    """
    step = grain
    if len(set(counts.values())) > 1:
        step = math.lcm(grain, per_block)
    while True:
        sizes = {c: _rounded(n, step, have[c], grain, sure[c]) for c, n in counts.items()}
        if len(set(sizes.values())) <= MAX_PARTS:
            return sizes
        step *= 2


def _rounded(n: int, step: int, most: int, grain: int, least: int) -> int:
    """To the nearest step, never below what is protected nor above what is there, in whole grains."""
    top = most // grain * grain
    n = max(round(n / step) * step if step > 1 else n, -(-least // grain) * grain)
    return min(n, top)


class Kept:
    """One policy that scores, over one layout.

    Args:
        layout: of the model's own groups.
        policy: `retention.contract.Scored`, or a wrapper of one.
        bytes_per_token: of all layers, which a budget in bytes is divided by; the layout's by default.
    """

    def __init__(self, layout: Layout, policy: Any, bytes_per_token: float | None = None) -> None:
        self.layout, self.policy = layout, policy
        self.spec: CacheSpec = layout.spec
        self.groups = retained(self.spec)
        if bytes_per_token is None:
            bytes_per_token = sum(g.bytes_per_token for g in self.groups)
        self.bytes_per_token = bytes_per_token
        self._known: dict[tuple[str, int, int], tuple[list[tuple[float, int]], int]] = {}

    def tokens(self, length: int) -> int:
        """How many tokens of a sequence stay per layer and head on average, protected ones at least."""
        p = self.policy
        return int(
            max(
                p.sinks + p.window + p.boundary,
                p.budget.tokens_of(length, self.bytes_per_token),
            )
        )

    def goes(self, length: int) -> bool:
        """Whether any token goes at that length."""
        return self.tokens(length) < length

    # -- bytes ---------------------------------------------------------------------------------------------------

    def held_bytes(
        self, length: int, prompt_tokens: int, more_tokens: int = 1, drafts: int = 0
    ) -> int:
        """After tokens went at `length`, when the last of `more_tokens` has its place, and so many drafts behind it.

        Of an unbounded policy at most so much.
        """
        total, last = 0.0, length + more_tokens - 1
        for g in self.spec:
            if g in self.groups and self.goes(length):
                total += self._body(g, length, prompt_tokens, more_tokens, drafts)
            else:
                total += _touched(g, last, 1, drafts) * g.block_bytes
        return round(total)

    def most_bytes(self, length: int, prompt_tokens: int) -> int:
        """Between two lengths at which tokens go, the first of them `length`, just before the second."""
        whole = sum(_touched(g, length, 0) * g.block_bytes for g in self.spec)
        if not self.goes(length):
            return whole
        if self.policy.once:  # there is no second one
            return self.held_bytes(length, prompt_tokens)
        every, again = self.policy.every, int(self.policy.repeats)
        drafts = LEAD_TOKENS + min(again, every) if again else 0
        return min(whole, self.held_bytes(length, prompt_tokens, every, drafts))

    def peak_bytes(self, prompt_tokens: int, chunk_tokens: int = 1) -> int:
        """At a prompt's end: all of it, and beside it what is read once more or the copy of what stays.

        Or its last chunk, where that is held in another form until it is committed.
        """
        n = prompt_tokens
        whole = self.spec.bytes_for(n)
        if not self.goes(n):
            return whole
        if self.policy.repeats:
            spare = LEAD_TOKENS + min(int(self.policy.repeats), n)
            again = sum(_touched(g, n, 0, spare) * g.block_bytes for g in self.spec)
            whole = max(whole, again)
        whole = max(whole, self.spec.bytes_for(n, chunk_tokens=chunk_tokens))
        return max(whole, self.spec.bytes_for(n) + self._copied(n))

    def pools(self, length: int) -> int:
        """How many sizes of block there are at most beyond the layout's own: heads that keep different numbers."""
        if not self.goes(length):
            return 0
        out = 0
        for g in self.groups:
            if self.policy.by_head:
                out += min(MAX_PARTS, len(g.coords))
            else:
                found = {n for n, _ in self._sizes(g, length, length)[0]}
                out += len(found) if len(found) > 1 else 0
        return out

    def _raw(self, group: CacheGroup) -> CacheGroup | None:
        return None if group.raw is None else self.spec.group(group.raw)

    def _low(self, group: CacheGroup, length: int) -> int:
        """Positions before it are chosen from."""
        raw = self._raw(group)
        if raw is None:
            return length
        assert isinstance(raw.span, Residual)
        return int(raw.span.start(length)) // group.block_tokens * group.block_tokens

    def _sizes(
        self, group: CacheGroup, length: int, prompt_tokens: int
    ) -> tuple[list[tuple[float, int]], int]:
        """Tokens that the heads of each layer keep of those before `_low`, how many heads, and that boundary."""
        key = group.name, length, prompt_tokens
        if key not in self._known:
            self._known[key] = self._work_out(group, length, prompt_tokens)
        return self._known[key]

    def _work_out(
        self, group: CacheGroup, length: int, prompt_tokens: int
    ) -> tuple[list[tuple[float, int]], int]:
        policy, raw, size = self.policy, self._raw(group), group.block_tokens
        unit, low = unit_tokens(self.layout, group), self._low(group, length)
        always = list(policy.protect(length, prompt_tokens))
        if raw is not None and isinstance(raw.span, Residual):
            always.append((0, raw.span.sinks))
        sure, have = _covered(always, low, unit), low // unit
        budget = max(0, self.tokens(length) - (length - low)) // unit
        layers = [
            (layer, 0) for layer in group.layers
        ]  # whose heads are alike before there are scores
        free = dict.fromkeys(layers, have - sure)
        more = policy.expect(free, max(0, budget - sure), length)
        counts = {c: sure + max(0, min(more[c], have - sure)) for c in layers}
        if not policy.by_head or not policy.bounded:
            grain = 1 if raw is None else size // unit
            every, least = dict.fromkeys(layers, have), dict.fromkeys(layers, sure)
            counts = part_sizes(counts, every, least, grain, max(1, size // unit))
        return [(float(counts[c] * unit), len(group.heads(c[0]))) for c in layers], low

    def _body(
        self, group: CacheGroup, length: int, prompt_tokens: int, more: int, drafts: int
    ) -> float:
        """Bytes of the kept tokens and of those behind them."""
        kept, low = self._sizes(group, length, prompt_tokens)
        size, behind = group.block_tokens, length + more + drafts - low
        if group.raw is not None:
            whole = (length + more) // size - low // size
            return sum(h * (n / size + whole) for n, h in kept) * group.tile_bytes
        if self.policy.by_head and self.policy.bounded:
            blocks = sum(h * (n / size - (-behind // size)) for n, h in kept)
        else:
            blocks = sum(h * math.ceil((n + behind) / size) for n, h in kept)
        return blocks * group.tile_bytes

    def _copied(self, length: int) -> int:
        """Bytes of the blocks that kept tokens are copied into."""
        total = 0.0
        for g in self.groups:
            kept, low = self._sizes(g, length, length)
            split = self.policy.by_head or len({n for n, _ in kept}) > 1
            blocks = sum(h * math.ceil(n / g.block_tokens) for n, h in kept)
            total += blocks * g.tile_bytes
            raw = self._raw(g)
            if raw is not None and split:
                total += (length // g.block_tokens - low // g.block_tokens) * g.block_bytes
                total += _touched(raw, length, 0) * raw.block_bytes
        return math.ceil(total)


def _covered(intervals: Iterable[Interval], below: int, unit: int) -> int:
    """How many units before a position have a token in one of the intervals."""
    units: set[int] = set()
    for a, b in intervals:
        if a < min(b, below):
            units.update(range(a // unit, -(-min(b, below) // unit)))
    return len(units)


def _touched(group: CacheGroup, length: int, more: int, drafts: int = 0) -> int:
    """Blocks that tokens still needed at `length`, so many more and drafts behind them lie in."""
    if group.recurrent:
        return 1
    size, end = group.block_tokens, length + more
    end = end + drafts if group.raw is None else end // size * size
    blocks, done = 0, 0
    for a, b in (*group.span.needs(length), (length, end)):
        first, last = max(done, a // size), -(-min(b, end) // size)
        if first < last:
            blocks, done = blocks + last - first, last
    return blocks


def refuse_nothing_to_drop(who: str, spec: Iterable[CacheGroup]) -> None:
    """Raises ConfigError where no layer keeps every token."""
    if not retained(spec):
        raise ConfigError(
            f"{who}: no layer of this model keeps every token, so there is nothing to drop; use keep='full'"
        )
