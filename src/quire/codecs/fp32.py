"""`fp32`: every element as float32.

Source: IEEE binary32. Cost: 4 bytes per element. Exact for a model that computes in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quire.codecs.plain import Plain


@dataclass(frozen=True)
class Codec(Plain):
    """Plain float32 storage."""

    name: ClassVar[str] = "fp32"
    dtype: ClassVar[str] = "float32"
    epsilon: ClassVar[float] = 2.0**-24
    smallest: ClassVar[float] = 2.0**-150
