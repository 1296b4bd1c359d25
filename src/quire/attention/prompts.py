"""A prompt's attention by the compiled kernel: many queries over keys and values that lie side by side, in bfloat16.

torch's fused attention computes every score of a piece, masked or not, and multiplies a small model's heads at a third
of the speed of its own matrix products. The kernel leaves out 64 keys at a time that no query of some reads, whatever
the mask: what lies ahead, what left a window, and the raw or coded half of a lossy cache.
"""

from __future__ import annotations

import torch

from quire.attention.fused import joined_mask
from quire.attention.read import Read
from quire.kernels.native import AttendArgs, Library

MATRIX_UNIT = 6
"""The level at which torch's products run in a matrix unit (AMX), which the kernel does not use."""
MOST_SHARE = 256
"""Query heads of a KV head that the kernel serves."""


def serves(library: Library, isa: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernel is to attend with `q: [R, H_q, T, D]` to `k: [R, H_kv, N, D]` and `v: [R, H_kv, N, D_v]`."""
    if any(x.dtype is not torch.bfloat16 or x.stride(3) != 1 or not x.is_cpu for x in (q, k, v)):
        return False
    if (isa or library.isa) >= MATRIX_UNIT or not k.shape[2]:
        return False
    widths = q.shape[3], v.shape[3]
    return all(w % 16 == 0 and w > 0 for w in widths) and q.shape[1] <= MOST_SHARE * k.shape[1]


def attend_prompt(
    library: Library,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    parts: list[Read],
    window: int | None,
    scale: float,
    isa: int = 0,
) -> torch.Tensor:
    """What `serves` said yes to, to `[R, H_q, T, D_v]`; zeros for a query that reads nothing.

    Cost: 4 * D operations a score that is not left out; per thread 1 MiB or so beside the output.
    """
    mask = joined_mask(parts, window)
    if mask is not None and mask.stride(3) != 1:
        mask = mask.contiguous()
    r, heads, t, d = q.shape
    out = q.new_empty(r, t, heads, v.shape[3])
    of_mask = (0, 0) if mask is None else (mask.stride(0) if len(mask) > 1 else 0, mask.stride(2))
    address = None if mask is None else mask.data_ptr()
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    sizes = r, heads, k.shape[1], t, k.shape[2], d, v.shape[3]
    library.attend(
        AttendArgs(
            *(x.data_ptr() for x in (q, k, v, out)),
            address,
            *strides,
            *of_mask,
            *sizes,
            torch.get_num_threads(),
            isa,
            scale,
        )
    )
    return out.transpose(1, 2)
