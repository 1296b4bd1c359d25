"""The string form of `share`: `"off"`, `"prefix"`, `"prefix:evict=lru"`, `"prefix:explain=on,ghost=1,audit=0.01"`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quire.errors import ConfigError

__all__ = ["ShareConfig", "parse_share"]

MODES, EVICTIONS = ("off", "prefix"), ("cost", "lru")


@dataclass(frozen=True)
class ShareConfig:
    """What is shared.

    Args:
        mode: "off": every request computes its own; "prefix": prefixes that were computed before are found.
        evict: which idle block goes first, "cost" or "lru".
        explain: say of each request why no more of it was found.
        ghost: share of the prefixes that are followed to say what half and twice the memory would find; 0: none.
        audit: share of the hits that are computed again without the cache, and compared; 0: none.

    Raises:
        ConfigError: an unknown value; one line that says what would work.
    """

    mode: str = "off"
    evict: str = "cost"
    explain: bool = False
    ghost: float = 0.0
    audit: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"unknown share {self.mode!r}; known: {', '.join(MODES)}")
        if self.evict not in EVICTIONS:
            raise ConfigError(f"share: unknown evict={self.evict!r}; known: {', '.join(EVICTIONS)}")
        for name in ("ghost", "audit"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"share: {name}={getattr(self, name)} must be a share in 0..1")

    @property
    def on(self) -> bool:
        """Whether anything is shared."""
        return self.mode != "off"


def parse_share(text: str) -> ShareConfig:
    """`"prefix:evict=lru"` as a value. Raises ConfigError."""
    mode, _, options = text.strip().partition(":")
    values: dict[str, Any] = {}
    for part in filter(None, options.split(",")):
        key, equals, value = (x.strip() for x in part.partition("="))
        if key not in _READ or not equals:
            raise ConfigError(f"share={text!r}: unknown option {part!r}; known: {_KNOWN}")
        try:
            values[key] = _READ[key](value)
        except (KeyError, ValueError) as e:
            raise ConfigError(f"share={text!r}: {key} cannot be {value!r}; known: {_KNOWN}") from e
    if mode == "off" and values:
        raise ConfigError(
            f"share={text!r}: nothing is shared, so the options mean nothing; drop {options!r}"
        )
    return ShareConfig(mode, **values)


_KNOWN = "evict=cost|lru, explain=on|off, ghost=SHARE, audit=SHARE"
_READ: dict[str, Callable[[str], Any]] = {
    "evict": str,
    "explain": {"on": True, "off": False}.__getitem__,
    "ghost": float,
    "audit": float,
}
