"""`bf16`: every element as bfloat16.

Source: bfloat16. Cost: 2 bytes per element. Exact for a model that computes in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quire.codecs.plain import Plain


@dataclass(frozen=True)
class Codec(Plain):
    """Plain bfloat16 storage."""

    name: ClassVar[str] = "bf16"
    dtype: ClassVar[str] = "bfloat16"
    epsilon: ClassVar[float] = 2.0**-8
    smallest: ClassVar[float] = 2.0**-134
