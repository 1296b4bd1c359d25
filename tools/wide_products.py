"""Products of bfloat16 computed in float32 and rounded once, where the processor has none of its own.

Without oneDNN's bfloat16 (AVX-512) torch multiplies in bfloat16 at a tenth of float32's speed. Inputs and outputs stay
what they are, sums are float32 as before and add up in another order: one output in ten thousand rounds to its other
neighbour. All caches that a tool compares go through the same products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from quire.models.prepack import is_packed


def _widened(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The same function over float32 copies of its bfloat16 arguments, where all of them are plain tensors."""

    @wraps(plain)
    def wide(x: Any, *args: Any, **options: Any) -> Any:
        if x.dtype != torch.bfloat16 or any(
            isinstance(a, torch.Tensor) and is_packed(a) for a in args
        ):
            return plain(x, *args, **options)

        def up(t: torch.Tensor) -> torch.Tensor:
            return t.float() if t.dtype == torch.bfloat16 else t

        given = tree_map_only(torch.Tensor, up, (x, args, options))
        return plain(given[0], *given[1], **given[2]).to(x.dtype)

    return wide


@contextmanager
def wide_products() -> Iterator[None]:
    """Linear layers and attention of torch itself; nothing changes where bfloat16 is served."""
    served = torch.ops.mkldnn._is_mkldnn_bf16_supported  # noqa: SLF001 - torch has no public word for it
    if torch.backends.mkldnn.is_available() and served():
        yield
        return
    names = ("linear", "scaled_dot_product_attention")
    before = {name: getattr(functional, name) for name in names}
    for name, plain in before.items():
        setattr(functional, name, _widened(plain))
    try:
        yield
    finally:
        for name, plain in before.items():
            setattr(functional, name, plain)
