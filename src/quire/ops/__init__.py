"""Reference mathematics in plain torch, on any device and in any dtype: what every fast kernel is held to."""

from quire.ops.attend import Partial, attend, empty_partial, finish, merge, sink_partial
from quire.ops.rope import rope_angles, rotate_half, rotate_interleaved
from quire.ops.rotate import hadamard, hadamard_width

__all__ = [
    "Partial",
    "attend",
    "empty_partial",
    "finish",
    "hadamard",
    "hadamard_width",
    "merge",
    "rope_angles",
    "rotate_half",
    "rotate_interleaved",
    "sink_partial",
]
