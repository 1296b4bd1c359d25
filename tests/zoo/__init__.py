"""Tiny random models of every family the bridge must serve; `zoo.build("llama")` makes one."""

from zoo import table as table
from zoo.core import (
    CHUNK,
    NO_LIMIT,
    VOCAB,
    WINDOW,
    ZOO,
    Entry,
    Tokens,
    Way,
    build,
    names,
    no_near_ties,
    prompts,
    reference,
    scatter_weights,
    smallest_margin,
    wanders,
)

__all__ = [
    "CHUNK",
    "NO_LIMIT",
    "VOCAB",
    "WINDOW",
    "ZOO",
    "Entry",
    "Tokens",
    "Way",
    "build",
    "names",
    "no_near_ties",
    "prompts",
    "reference",
    "scatter_weights",
    "smallest_margin",
    "wanders",
]
