"""Calibrated codecs at work without a model: tables fitted to random numbers, for any layer, head and width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from quire.codecs import load_codec
from quire.codecs.calibrated import Calibrated
from quire.codecs.recipe import codec_text
from quire.spec import Field, KVCodec, Site

ARGUMENTS = {"cq": "form=4c3b"}
"""Few centres: tables are made in no time."""
TOKENS, HEADS = 256, 4


@dataclass(frozen=True)
class Drawn(Mapping[str, torch.Tensor]):
    """Tables of every layer, by `LAYER.FIELD.PART` and the width of a head, made when they are looked up."""

    recipe: str
    width: int
    size: float = 1.0

    def get(self, name: str, default: Any = None) -> Any:
        layer, field, part = name.split(".")
        return _fitted(self.recipe, field, int(layer), self.width, self.size).get(part, default)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(f"{layer}.{f}.any" for layer in range(8) for f in ("k", "v"))

    def __len__(self) -> int:
        return 16


@cache
def _fitted(
    recipe: str, field: str, layer: int, width: int, size: float
) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1 + 2 * layer + (field == "v"))
    x = (
        size
        * torch.randn(HEADS, TOKENS, width, generator=g)
        * (0.5 * torch.randn(HEADS, 1, width, generator=g)).exp()
    )
    codec = load_codec(recipe)
    assert isinstance(codec, Calibrated)
    site = Site(Field(field, (width,), "float32"), codec.group_tokens, layer, tuple(range(HEADS)))
    made = codec.fit(site, x, x**2 if codec.weighted else None, 0)
    return {part: t.float() for part, t in made.items()}


def at_work(recipe: str, width: int, size: float = 1.0) -> KVCodec:
    """The codec of a recipe, with tables of numbers of that size where it needs some."""
    codec: Any = load_codec(named(recipe))
    if not isinstance(codec, Calibrated):
        return codec  # type: ignore[no-any-return]
    made = replace(codec)
    object.__setattr__(made, "_tables", Drawn(codec_text(codec), width, size))
    return made


def named(recipe: str) -> str:
    """A codec's bare name, with the arguments that make its tables small."""
    return f"{recipe}:{ARGUMENTS[recipe]}" if recipe in ARGUMENTS else recipe
