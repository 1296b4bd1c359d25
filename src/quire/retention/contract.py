"""What score policies share: a budget, what is protected, and what they are shown. Not a policy itself.

0        sinks                      prompt - boundary  prompt          length - window    length
|#########|...........................|################|...................|################|
 protected  chosen by score            protected once the prompt is over     protected
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from quire.errors import ConfigError
from quire.retention.maps import Digest
from quire.spec import Coord, Interval

if TYPE_CHECKING:
    import torch

__all__ = [
    "FOREVER",
    "LEAD_TOKENS",
    "Budget",
    "Called",
    "Scored",
    "Seen",
    "Wrapper",
    "check_number",
    "check_tokens",
    "parameters",
    "share_out",
]

FOREVER = 1 << 40
"""Tokens after which those go again that go once only."""

LEAD_TOKENS = 8
"""Of the piece before, where tokens are read once more piece by piece, so that the model knows where it is."""

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}


@dataclass(frozen=True)
class Budget:
    """How much of a sequence stays: `tokens` per layer and KV head on average, a `share` of its length, or `bytes`.

    Exactly one is above zero.
    """

    tokens: int = 0
    share: float = 0.0
    bytes: int = 0

    @classmethod
    def parse(cls, value: Any, who: str = "budget") -> Budget:
        """An integer is tokens, a number with a point a share, one with a unit bytes. Raises ConfigError."""
        if isinstance(value, Budget):
            return value
        text = str(value).strip()
        if re.fullmatch(r"[0-9]+", text) and int(text) > 0:
            return cls(tokens=int(text))
        if re.fullmatch(r"[0-9]*\.[0-9]+|[0-9]+\.", text) and 0 < float(text) <= 1:
            return cls(share=float(text))
        found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-zA-Z]+)", text)
        if found and found[2].lower() in _UNITS and float(found[1]) > 0:
            return cls(bytes=int(float(found[1]) * _UNITS[found[2].lower()]))
        raise ConfigError(
            f"{who}={text} is no budget; 512 is tokens, 0.2 a share of the length (above 0, at most 1.0), 64MiB bytes"
        )

    def __str__(self) -> str:
        return (
            str(self.tokens) if self.tokens else str(self.share) if self.share else f"{self.bytes}B"
        )

    def tokens_of(self, length: int, bytes_per_token: float) -> int:
        """Tokens that a sequence of `length` keeps whose tokens take `bytes_per_token`, at most all."""
        if self.tokens:
            return min(length, self.tokens)
        if self.share:
            return min(length, max(1, round(self.share * length)))
        return min(length, max(1, int(self.bytes / bytes_per_token)))


def check_tokens(policy: str, what: str, value: Any, least: int) -> None:
    """Refuses a parameter that is no number of tokens. Raises ConfigError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{policy}: {what}={value} must be an integer of at least {least}")


def check_number(policy: str, what: str, value: Any, low: float, high: float) -> None:
    """Refuses a parameter that is no number from `low` to `high`. Raises ConfigError."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        to = f"in {low}..{high}" if high < float("inf") else f"of at least {low}"
        raise ConfigError(f"{policy}: {what}={value} must be a number {to}")


@dataclass(frozen=True)
class Called:
    """What a layer's attention was called with over one whole sequence of T tokens, as one call.

    Args:
        module: the layer's attention.
        hidden: `[1, T, width]` in the model's dtype, what entered it; None for a scorer that does not look at it.
        keys, values: `[1, H, T, D]` in the model's dtype, as stored (keys after RoPE).
        kwargs: what else it was given, `position_embeddings` among it.
        kept_tokens: how many are to stay.
    """

    module: Any
    hidden: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor
    kwargs: dict[str, Any]
    kept_tokens: int


@dataclass(frozen=True)
class Seen:
    """What a policy is shown of some KV heads of one layer; T tokens each, of which it scores every one.

    Args:
        coords: the heads, `(layer, head)`; H of them, all of one layer.
        n_layers: that keep tokens in this model.
        positions: `[H, T]` int64, true position of each token, ascending; heads may keep different ones.
        length: of the sequence.
        prompt_tokens: where its prompt ended.
        mass: `[H, T]` float32, what the policy's `queries` (or those of its `repeats`) paid to each token, if it asked.
        queries: `[share * H, N, D]` float32, the last queries after RoPE, if it asked, at `query_positions: [N]`.
        scale: what the model multiplies the product of a query and a key by.
        notes: `[H, T]` float32, what its `note` said of each token when it came.
        read: `read("k")`, `read("v")`: `[H, T, D]` float32 as stored (keys after RoPE), decoded. Costs a pass.
        called: what the layer's attention was called with, all heads of the layer, if it asked.
        turn: `turn(x, by)` moves queries or keys `x: [..., D]` on by so many positions; None where the model cannot say
            how.
    """

    coords: tuple[Coord, ...]
    n_layers: int
    positions: torch.Tensor
    length: int
    prompt_tokens: int
    read: Callable[[str], torch.Tensor]
    mass: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    query_positions: torch.Tensor | None = None
    scale: float = 1.0
    notes: torch.Tensor | None = None
    turn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    called: Callable[[], Called] | None = None

    @property
    def layer(self) -> int:
        """Of all its heads."""
        return self.coords[0][0]


@dataclass(frozen=True)
class Scored:
    """Parameters and defaults of score policies.

    Args:
        budget: what stays, protected tokens included, see `Budget`.
        sinks: first tokens that always stay.
        window: recent tokens that always stay.
        boundary: last tokens of the prompt that stay while text is generated.
        every: tokens are dropped at the prompt's end and after every so many more.
    """

    budget: Any = Budget(share=0.25)
    sinks: int = 4
    window: int = 32
    boundary: int = 16
    every: int = 128

    name: ClassVar[str]
    queries: ClassVar[int | Literal["all"] | None] = None
    """Whose attention it is shown as `mass`: the last N queries before tokens are dropped, all, or none."""
    over: ClassVar[Literal["sum", "max", "latest"]] = "sum"
    """What becomes of the probabilities that many queries pay, see `attention.observe.Attended`."""
    fold: ClassVar[Literal["mean", "max"]] = "mean"
    """And of those of the query heads of a KV head."""
    last_queries: ClassVar[int] = 0
    """How many of the last queries themselves it is shown."""
    turns: ClassVar[bool] = False
    """Whether it cannot do without `turn`."""
    notes: ClassVar[bool] = False
    """Whether it has a `note` to make of each token's hidden state."""
    calls: ClassVar[bool] = False
    """Whether it is shown what each layer's attention was `called` with."""
    once: ClassVar[bool] = False
    """Whether tokens go at the end of the first prompt only; what comes later stays."""
    by_head: ClassVar[bool] = False
    """Whether heads of one layer may keep different numbers of tokens."""
    by_layer: ClassVar[bool] = False
    """Whether all heads of a layer get the same scores."""
    agnostic: ClassVar[bool] = False
    """Whether no question takes part, so that what it leaves of a context serves whatever is asked later: others may
    find it, as a whole (`store.whole`)."""
    bounded: ClassVar[bool] = True
    """Whether what stays is within the budget; else `allocate` decides by itself, and no wrapper may spread it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Budget.parse(self.budget, f"{self.name}: budget"))
        for what, least in (("sinks", 0), ("window", 1), ("boundary", 0), ("every", 1)):
            check_tokens(self.name, what, getattr(self, what), least)
        self._check_budget()

    def _check_budget(self) -> None:
        """Refuses fewer tokens than are protected. Raises ConfigError."""
        least = self.sinks + self.window + self.boundary
        if self.budget.tokens and self.budget.tokens < least:
            raise ConfigError(
                f"{self.name}: a budget of {self.budget.tokens} tokens is below the {least} that are protected "
                f"(sinks={self.sinks}, window={self.window}, boundary={self.boundary}); take {least} or more, or "
                "protect fewer"
            )

    @property
    def top(self) -> int:
        """Under "latest", among how many of a query's tokens one must be."""
        return 0

    @property
    def repeats(self) -> int:
        """Asks for what was read to be read once more before tokens go, so many at a time; `mass` is theirs."""
        return 0

    def hit_limit(self, prompt_tokens: int) -> int:
        """At most so many tokens of a prompt may be found instead of computed: its queries are needed."""
        if self.queries == "all" or self.notes:
            return 0
        computed = max(self.queries or 0, self.last_queries, 1 if self.repeats else 0)
        return max(0, prompt_tokens - computed)

    def protect(self, length: int, prompt_tokens: int) -> tuple[Interval, ...]:
        """Positions that stay whatever their score, as intervals that may overlap."""
        out = [(0, min(self.sinks, length)), (max(0, length - self.window), length)]
        if length > prompt_tokens:
            out.append((max(0, prompt_tokens - self.boundary), prompt_tokens))
        return tuple((a, b) for a, b in out if a < b)

    def score(self, seen: Seen) -> torch.Tensor:
        """`[H, T]`, higher stays."""
        raise NotImplementedError

    def allocate(
        self, scores: Mapping[Coord, torch.Tensor], tokens: int, length: int
    ) -> dict[Coord, int]:
        """How many of its unprotected tokens each head keeps.

        Args:
            scores: of each head's unprotected tokens.
            tokens: each head's share, were all alike.
            length: of the sequence.

        Returns:
            For every head at most as many as it has; in all at most `tokens` times the number of heads.
        """
        return {coord: min(tokens, len(s)) for coord, s in scores.items()}

    def expect(self, free: Mapping[Coord, int], tokens: int, length: int) -> dict[Coord, int]:
        """As `allocate`, where nothing is scored yet: of heads with so many unprotected tokens each, what they keep.

        On average, where scores decide which head keeps how many (`by_head`); at most, where nothing bounds them.
        """
        if not self.bounded:
            return dict(free)
        return {coord: min(tokens, n) for coord, n in free.items()}

    def note(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """A number per token and KV head of a layer, `[T, H_kv]`, from what enters its attention, `[T, width]`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Wrapper:
    """A policy around another, whose scores and parameters it takes and whose budget it spreads differently."""

    inner: Any = field(kw_only=True)
    name: ClassVar[str]
    by_head: ClassVar[bool]  # the inner policy's, where a wrapper says nothing else

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Scored | Wrapper):
            inner = getattr(self.inner, "name", self.inner)
            raise ConfigError(
                f"{self.name}({inner}): it spreads the budget of a policy that scores, as in "
                f"{self.name}(snapkv:budget=0.2)"
            )
        if not self.inner.bounded:
            raise ConfigError(
                f"{self.name}({self.inner.name}): {self.inner.name} decides by itself how much each head keeps; use it "
                "without a wrapper"
            )
        below = self.inner
        while isinstance(below, Wrapper):
            if below.name == self.name:
                raise ConfigError(
                    f"{self.name} around {self.name} spreads nothing further; once is enough"
                )
            below = below.inner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def bound(self, digest: Digest) -> Any:
        """As `Keep.bound`, for the policy within."""
        bound = getattr(self.inner, "bound", None)
        return self if bound is None else replace(self, inner=bound(digest))

    def allocate(
        self, scores: Mapping[Coord, torch.Tensor], tokens: int, length: int
    ) -> dict[Coord, int]:
        """As `Scored.allocate`."""
        found: dict[Coord, int] = self.inner.allocate(scores, tokens, length)
        return found

    def expect(self, free: Mapping[Coord, int], tokens: int, length: int) -> dict[Coord, int]:
        """As `Scored.expect`: heads share out among themselves what the inner policy gives them."""
        found: dict[Coord, int] = self.inner.expect(free, tokens, length)
        return found


def share_out(scores: Mapping[Coord, torch.Tensor], tokens: int) -> dict[Coord, int]:
    """How many of the best `tokens` per head on average each head has, the scores of all heads together."""
    import torch

    coords = list(scores)
    every = torch.cat([scores[c] for c in coords])
    owner = torch.cat([torch.full((len(scores[c]),), i) for i, c in enumerate(coords)])
    best = owner[every.topk(min(tokens * len(coords), len(every))).indices.cpu()]
    counts: list[int] = torch.bincount(best, minlength=len(coords)).tolist()
    return dict(zip(coords, counts, strict=True))


def parameters(policy: Any) -> dict[str, Any]:
    """A policy's own parameters by name."""
    return {f.name: getattr(policy, f.name) for f in fields(policy) if f.name != "inner"}
