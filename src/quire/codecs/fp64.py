"""`fp64`: every element as float64.

Source: IEEE binary64. Cost: 8 bytes per element. Exact for a model that computes in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quire.codecs.plain import Plain


@dataclass(frozen=True)
class Codec(Plain):
    """Plain float64 storage."""

    name: ClassVar[str] = "fp64"
    dtype: ClassVar[str] = "float64"
    epsilon: ClassVar[float] = 2.0**-53
    smallest: ClassVar[float] = 2.0**-1074
