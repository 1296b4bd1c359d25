"""Is OScaR's two-bit cache worth a codec? The method as one, on trial: `tools/methods.py` measures it beside others.

`kivi` of rotated keys and values, each key first divided by its own length:

    keys    x ── rotate ──> y ── / |y| ──> kivi by channel    |y| in 16 bits
    values  x ── rotate ──> kivi by token

Source: OScaR (Su et al., arXiv 2605.19660; another method than OSCAR, arXiv 2605.17757): Hadamard rotation of post-RoPE
    keys, token norms kept in 16 bits, two-bit keys by channel in groups of 32 beside 128 recent tokens, rotated values.
Differs: a token's length is that of each head, where the released code takes all heads of a layer together; values are
    rotated here, not in the model's weights; blocks seal as `kivi`'s do. `rotate=false` and `norm=false` leave one half
    of the idea out: the paper says that either half alone loses.

What came of it: docs/methods.md and docs/decisions.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from quire.codecs import kivi, recipe  # noqa: E402 - found by the line above
from quire.codecs.coded import Turned  # noqa: E402
from quire.spec import Field, Site  # noqa: E402

if TYPE_CHECKING:
    import torch

LEAST = 2.0**-14
"""Of a length: float16's smallest number of full precision."""


@dataclass(frozen=True)
class Codec(Turned, kivi.Codec):
    """Parameters of `kivi`, and `rotate` and `norm`: true or false."""

    rotate: bool = True
    norm: bool = True
    name: ClassVar[str] = "oscar"

    def stored(self, site: Site) -> tuple[Field, ...]:
        inner = super().stored(site)
        return (*inner, Field("k.norm", (), "float16")) if self._lengths(site) else inner

    def packing(self, site: Site) -> Any:
        return None

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        from quire.ops.quantise import half

        y = self.turned(x.float())
        if not self._lengths(site):
            return super().encode(site, y, pos)
        norm = half(y.norm(dim=-1, keepdim=True).clamp_min(LEAST))
        return super().encode(site, y / norm.float(), pos) | {"norm": norm.squeeze(-1)}

    def decode(
        self,
        site: Site,
        stored: Mapping[str, torch.Tensor],
        pos: torch.Tensor,
        dtype: torch.dtype,
        *,
        own_basis: bool = False,
    ) -> torch.Tensor:
        import torch

        y = super().decode(site, stored, pos, torch.float32)
        if self._lengths(site):
            y = y * stored["norm"].float().unsqueeze(-1)
        return (y if own_basis else self.turned(y)).to(dtype)

    def _lengths(self, site: Site) -> bool:
        """Whether tokens are divided by their lengths."""
        return self.norm and not site.values


@contextmanager
def registered() -> Iterator[None]:
    """Recipes may say `oscar`, as if a package outside declared it."""
    before = recipe._others  # noqa: SLF001 - entry points of installed packages, and one more
    entry = SimpleNamespace(name=Codec.name, load=lambda: Codec)
    recipe._others = lambda: [*before(), entry]  # noqa: SLF001
    try:
        yield
    finally:
        recipe._others = before  # noqa: SLF001
        for known in (recipe.available, recipe.codec_class, recipe.load_codec):
            known.cache_clear()
