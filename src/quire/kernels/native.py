"""The CPU library: where it is, what it takes, and how it is called (with integers and pointers, about a microsecond).

The structures mirror `cpu/quire_cpu.h`, which documents them. Torch is imported before the library is opened, so that
both share torch's OpenMP runtime: two of them fight for the cores.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import Structure, byref, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from struct import Struct
from typing import Any

import numpy as np

from quire.errors import InvariantError
from quire.kernels.build import LIBRARY

log = logging.getLogger("quire")

ABI = 8
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
ROWS = {"float32": 0, "bfloat16": 1, "float16": 2, "float8_e4m3fn": 3, "float8_e5m2": 4}
"""Kinds of fields that are rows, by the dtype of their elements."""
TILES = {8: 5, 4: 6, 2: 7}
"""Kinds of fields that are packed integers, by their bits."""
FOLDS = {"each": 0, "mean": 1, "max": 2}
"""How probabilities of a KV head's query heads become one."""
SCALED = {"": 0, "token": 1, "channel": 2, "tile": 3}
"""What shares a scale."""
HEAD_DIMS = range(16, 257, 16)
"""Head dimensions that the attention kernel serves."""
ROTARY = range(16, 257, 16)
"""Widths of the rotary part that the latent kernel serves; of the latent itself, WIDTHS."""
WIDTHS = range(16, 1025, 16)
"""Channels of a field that the encoding and the latent kernel serve."""

SEGMENT = np.dtype(
    [("table", "i8"), ("form", "i4"), ("query", "i4"), ("lo", "i4"), ("hi", "i4")], align=True
)
"""One stretch of slots that a query reads; `table` is the address of its blocks' places."""
PLACE = np.dtype([("first", "i8"), ("head", "i8")])
"""Where a segment's probabilities go, in floats."""


class FieldLayout(Structure):
    """How the keys or the values of a tile lie."""

    _fields_ = (
        *((name, c_int64) for name in ("codes", "scale", "min")),
        *((name, c_int32) for name in ("kind", "scaled", "group", "turned")),
    )


class Form(Structure):
    """How a codec lays out the tiles of one group and layer, and which KV heads they hold."""

    _fields_ = (
        ("first", c_int64),
        ("tile_bytes", c_int64),
        ("heads", c_void_p),
        ("k", FieldLayout),
        ("v", FieldLayout),
        ("block_tokens", c_int32),
        ("unused", c_int32),
    )


class DecodeArgs(Structure):
    """Arguments of `decode`."""

    _fields_ = (
        *((name, c_void_p) for name in ("arena", "forms", "segments", "q", "out", "sinks")),
        *((name, c_void_p) for name in ("lse", "probs", "places")),
        *((name, c_int64) for name in ("q_row", "q_head", "out_row", "out_head")),
        *((name, c_int32) for name in ("n_segments", "kv_heads", "share", "d")),
        *((name, c_int32) for name in ("dtype", "threads", "isa", "folded")),
        ("scale", c_float),
        ("softcap", c_float),
    )


class LatentArgs(Structure):
    """Arguments of `latent`."""

    _fields_ = (
        *((name, c_void_p) for name in ("arena", "forms", "segments", "q", "out")),
        *((name, c_int64) for name in ("q_row", "q_head", "out_row", "out_head")),
        *((name, c_int32) for name in ("n_segments", "heads", "d", "d_rope")),
        *((name, c_int32) for name in ("dtype", "threads", "isa")),
        ("scale", c_float),
    )


class GatherArgs(Structure):
    """Arguments of `gather`."""

    _fields_ = (
        *((name, c_void_p) for name in ("arena", "units", "out")),
        ("first", c_int64),
        ("tile_bytes", c_int64),
        ("field", FieldLayout),
        *((name, c_int32) for name in ("n_rows", "n_heads", "n_blocks", "block_tokens", "d")),
        *((name, c_int32) for name in ("values", "dtype", "threads")),
    )


class WriteArgs(Structure):
    """Arguments of `write`."""

    _fields_ = (
        *((name, c_void_p) for name in ("arena", "units", "rows", "tokens", "heads")),
        ("source", c_void_p * 2),
        ("source_row", c_int64 * 2),
        ("source_head", c_int64 * 2),
        ("offset", c_int64 * 2),
        ("tile_bytes", c_int64),
        ("width", c_int32 * 2),
        *((name, c_int32) for name in ("n_tokens", "n_heads", "source_dtype", "dtype")),
    )


class EncodeArgs(Structure):
    """Arguments of `encode`."""

    _fields_ = (
        *((name, c_void_p) for name in ("arena", "source", "target")),
        *((name, c_int64) for name in ("source_first", "source_tile")),
        *((name, c_int64) for name in ("target_first", "target_tile")),
        ("field", FieldLayout),
        *((name, c_int32) for name in ("n_blocks", "n_heads", "block_tokens", "d")),
        *((name, c_int32) for name in ("values", "dtype", "threads", "isa")),
    )


class LinearLayer(Structure):
    """One of the layers of `linear`."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "scales", "bias", "out")),
        ("out_row", c_int64),
        *((name, c_int32) for name in ("n", "panel", "bits", "unused")),
    )


class LinearArgs(Structure):
    """Arguments of `linear`."""

    _fields_ = (
        *((name, c_void_p) for name in ("layers", "x")),
        ("x_row", c_int64),
        *((name, c_int32) for name in ("n_layers", "rows", "k", "k_words", "threads", "isa")),
    )


class AttendArgs(Structure):
    """Arguments of `attend`."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "out", "mask")),
        *((f"{x}_{stride}", c_int64) for x in "qkv" for stride in ("batch", "head", "token")),
        *((name, c_int64) for name in ("mask_batch", "mask_token")),
        *((name, c_int32) for name in ("batch", "heads", "kv_heads", "tokens", "keys", "d", "dv")),
        *((name, c_int32) for name in ("threads", "isa")),
        ("scale", c_float),
    )


class Norm(Structure):
    """One of a model's norms, for `norm`."""

    _fields_ = (
        ("weight", c_void_p),
        *((name, c_int32) for name in ("d", "early", "isa")),
        *((name, c_float) for name in ("eps", "offset")),
    )


TURN = Struct("6Q6q8i")
"""Arguments of `rotary`: x[2], out[2], cos, sin; strides of batch[2], token[2], head[2]; heads[2], batch, tokens, d,
angles_batch, threads, isa. Packed: every layer makes a call, and filling a Structure takes longer than the call."""


class Library:
    """The opened library."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._decode, self._write = handle.quire_decode, handle.quire_write
        self._gather, self._encode = handle.quire_gather, handle.quire_encode
        self._latent, self._linear = handle.quire_latent, handle.quire_linear
        self._attend, self._rotary = handle.quire_attend, handle.quire_rotary
        self._norm, self._gated = handle.quire_rms_norm, handle.quire_gated
        self._rotary.argtypes = (c_char_p,)
        self._norm.argtypes = (c_void_p, c_void_p, c_void_p, c_int64, c_int32)
        self._gated.argtypes = (c_void_p, c_void_p, c_void_p, c_int64, c_int32, c_int32)
        self.isa = int(handle.quire_best_isa())
        """The best instruction-set level here: 2, 3, 4 for x86-64-v2, v3, v4, 5 for v4 with integer and bfloat16 dot
        products (avx512vnni, avx512bf16), 6 for those with a matrix unit (AMX); 1 for the compiler's baseline."""

    def decode(self, args: DecodeArgs) -> None:
        """Attention of single queries over their segments."""
        if self._decode(byref(args)):
            raise InvariantError("the attention kernel was given what it does not serve")

    def latent(self, args: LatentArgs) -> None:
        """The same over latents, which all heads share."""
        if self._latent(byref(args)):
            raise InvariantError("the latent kernel was given what it does not serve")

    def gather(self, args: GatherArgs) -> None:
        """Blocks of a field, decoded into rows."""
        if self._gather(byref(args)):
            raise InvariantError("the gathering kernel was given what it does not serve")

    def linear(self, args: LinearArgs) -> None:
        """Linear layers of one input, over packed weights."""
        if self._linear(byref(args)):
            raise InvariantError("the linear kernel was given what it does not serve")

    def attend(self, args: AttendArgs) -> None:
        """Attention of many queries over keys and values side by side."""
        if self._attend(byref(args)):
            raise InvariantError("the prompts' attention kernel was given what it does not serve")

    def norm(self, norm: Any, x: int, out: int, rows: int, threads: int) -> None:
        """Rows of bfloat16 over their root mean square; `norm` is `byref` of a `Norm`."""
        if self._norm(norm, x, out, rows, threads):
            raise InvariantError("the norm's kernel was given what it does not serve")

    def rotary(self, args: bytes) -> None:
        """Queries and keys in bfloat16, turned by their positions; `args` as `TURN` packs them."""
        if self._rotary(args):
            raise InvariantError("the rotation's kernel was given what it does not serve")

    def gated(self, gate: int, up: int, out: int, n: int, threads: int, isa: int = 0) -> None:
        """silu(gate) * up, of n numbers in bfloat16."""
        if self._gated(gate, up, out, n, threads, isa):
            raise InvariantError("the gate's kernel was given what it does not serve")

    def write(self, args: WriteArgs) -> None:
        """Rows of new tokens into their blocks."""
        if self._write(byref(args)):
            raise InvariantError("the writing kernel was given what it does not serve")

    def encode(self, args: EncodeArgs) -> None:
        """Rows of whole blocks, as their codec stores them."""
        if self._encode(byref(args)):
            raise InvariantError("the encoding kernel was given what it does not serve")


def memory(address: int, n_bytes: int) -> Any:
    """The bytes there, as a buffer that owns nothing."""
    return (ctypes.c_uint8 * n_bytes).from_address(address)


@cache
def load() -> Library | None:
    """The library, or None (and one line in the log) where it was not built or does not open."""
    import torch  # noqa: F401 - its OpenMP runtime first

    try:
        handle = ctypes.CDLL(str(LIBRARY))
        found = int(handle.quire_abi())
    except (OSError, AttributeError) as error:
        missing = not LIBRARY.exists()
        log.info(
            "no CPU kernels, attention runs on torch: %s",
            "built without a compiler; `python -m quire.kernels.build` builds them"
            if missing
            else error,
        )
        return None
    if found != ABI:
        log.info(
            "the CPU kernels are of another version (%d, not %d), attention runs on torch: "
            "`python -m quire.kernels.build` builds them anew",
            found,
            ABI,
        )
        return None
    return Library(handle)
