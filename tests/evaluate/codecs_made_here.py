"""Lossy codecs that only these tests have, whole and broken, and how a recipe comes to name them.

`Grouped` quantises groups of values with one minimum and one step each, as low-bit codecs do:

    along="tokens"      a group is `group` tokens of one channel      right for keys, whose channels differ in size
    along="channels"    a group is all channels of one token          for keys: the axes swapped
    group=1             a group is one value: minimum = maximum, the codes say nothing and the minimum says it all
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lossy import Lossy
from quire.codecs import recipe
from quire.codecs.coded import Coded
from quire.codecs.kivi import Codec as Kivi
from quire.spec import Field, Packing, Site

if TYPE_CHECKING:
    import pytest


@dataclass(frozen=True)
class Grouped(Coded):
    """2-bit codes, four in a byte; minimum in float32, step in float16."""

    along: str = "tokens"
    group: int = 16
    residual_tokens: int = 0
    name: ClassVar[str] = "grouped"

    @property
    def group_tokens(self) -> int:
        return self.group if self.along == "tokens" else 1

    def stored(self, site: Site) -> tuple[Field, ...]:
        of, block_tokens, width = site.field, site.block_tokens, site.width
        groups = block_tokens // self.group if self.along == "tokens" else block_tokens
        wide = width if self.along == "tokens" else 1
        return (
            Field(f"{of.name}.codes", (width // 4,), "uint8"),
            Field(f"{of.name}.low", (groups, wide), "float32", "block"),
            Field(f"{of.name}.step", (groups, wide), "float16", "block"),
        )

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., block_tokens, D]` to `[..., groups, tokens of a group, D]`."""
        return x.unflatten(-2, (-1, self.group if self.along == "tokens" else 1))

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        g = self._grouped(x.float())
        dim = -2 if self.along == "tokens" else -1
        low, high = g.amin(dim, keepdim=True), g.amax(dim, keepdim=True)
        step = ((high - low) / 3).half()
        codes = ((g - low) / step.float().clamp_min(1e-8)).round().clamp(0, 3).to(torch.uint8)
        four = codes.flatten(-3, -2).unflatten(-1, (-1, 4))
        packed = four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6
        return {"codes": packed, "low": low.squeeze(-2), "step": step.squeeze(-2)}

    def decode(
        self,
        site: Site,
        stored: Mapping[str, torch.Tensor],
        pos: torch.Tensor,
        dtype: torch.dtype,
        *,
        own_basis: bool = False,
    ) -> torch.Tensor:
        four = torch.stack([stored["codes"] >> s & 3 for s in (0, 2, 4, 6)], -1)
        g = self._grouped(four.flatten(-2).float())
        x = g * stored["step"].float().unsqueeze(-2) + stored["low"].unsqueeze(-2)
        return x.flatten(-3, -2).to(dtype)

    def error_bound(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class PerToken(Kivi):
    """KIVI's codes, groups and window with keys scaled like values, by token: what low bits cost without its idea."""

    name: ClassVar[str] = "int2"

    @staticmethod
    def _as_values(site: Site) -> Site:
        return Site(replace(site.field, name="v"), site.block_tokens)

    def stored(self, site: Site) -> tuple[Field, ...]:
        made = super().stored(self._as_values(site))
        return tuple(replace(f, name=f"{site.name}.{f.name.partition('.')[2]}") for f in made)

    def packing(self, site: Site) -> Packing | None:
        """Keys that lie as values do are read by no kernel."""
        return super().packing(site) if site.values else None

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().encode(self._as_values(site), x, pos)

    def decode(self, site: Site, *args: Any, **how: Any) -> torch.Tensor:
        return super().decode(self._as_values(site), *args, **how)

    def error_bound(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        return super().error_bound(self._as_values(site), x)


MADE = {"lossy": Lossy, "grouped": Grouped, "int2": PerToken}


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `kv="lossy:residual_tokens=8"` and `kv="grouped:group=1"` known for one test."""
    known, names = recipe.codec_class, (*recipe.available(), *MADE)
    monkeypatch.setattr(recipe, "available", lambda: names)
    monkeypatch.setattr(recipe, "codec_class", lambda n: MADE.get(n) or known(n))
