"""The string form of `share`: `"off"`, `"prefix"`, `"prefix:evict=lru"`."""

from __future__ import annotations

from dataclasses import dataclass

from quire.errors import ConfigError
from quire.store.evict import EVICTIONS

__all__ = ["ShareConfig", "parse_share"]

MODES = ("off", "prefix")


@dataclass(frozen=True)
class ShareConfig:
    """What is shared.

    Args:
        mode: "off": every request computes its own; "prefix": prefixes that were computed before are found.
        evict: which idle block goes first, "cost" or "lru".

    Raises:
        ConfigError: an unknown value; one line that says what would work.
    """

    mode: str = "off"
    evict: str = "cost"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"unknown share {self.mode!r}; known: {', '.join(MODES)}")
        if self.evict not in EVICTIONS:
            raise ConfigError(f"share: unknown evict={self.evict!r}; known: {', '.join(EVICTIONS)}")

    @property
    def on(self) -> bool:
        """Whether anything is shared."""
        return self.mode != "off"


def parse_share(text: str) -> ShareConfig:
    """`"prefix:evict=lru"` as a value. Raises ConfigError."""
    mode, _, options = text.strip().partition(":")
    values: dict[str, str] = {}
    for part in filter(None, options.split(",")):
        key, equals, value = (x.strip() for x in part.partition("="))
        if key != "evict" or not equals:
            raise ConfigError(f"share={text!r}: unknown option {part!r}; known: evict=cost|lru")
        values[key] = value
    if mode == "off" and values:
        raise ConfigError(
            f"share={text!r}: nothing is shared, so nothing is evicted; drop {options!r}"
        )
    return ShareConfig(mode, **values)
