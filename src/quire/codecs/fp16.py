"""`fp16`: every element as float16.

Source: IEEE binary16. Cost: 2 bytes per element. Exact for a model that computes in float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quire.codecs.plain import Plain


@dataclass(frozen=True)
class Codec(Plain):
    """Plain float16 storage."""

    name: ClassVar[str] = "fp16"
    dtype: ClassVar[str] = "float16"
    epsilon: ClassVar[float] = 2.0**-11
    smallest: ClassVar[float] = 2.0**-25
