"""`cq`: Coupled Quantization: a few channels together are one code, an index into a learned codebook.

Idea: channels of a head say much of each other, so a code for c of them together holds more than c codes of a c-th of
its bits. Codebooks are learned per layer, head, field and group of neighbouring channels, and weigh a token by how much
the loss would feel an error in it. A code stands for itself: no scales, no sinks, no groups of tokens.

    4c8b    c = 4 channels ──> one of 2^8 centres ──> 8 bits: 2 bits a number       1 bit: 8c8b

Source: Coupled Quantization (Zhang et al., arXiv 2405.03917): k-means++ and Lloyd's turns weighted by squared
    gradients summed over a group's channels; encoded by unweighted nearest centre.
Differs: keys are coded before RoPE by default (`rope=before`); `rope=after` codes them as the model hands them over,
    and serves models whose RoPE cannot be turned back. `fisher=false` weighs all tokens alike, for comparison. Centres
    are float16. A window of recent tokens in 16 bits is the recipe's own: `cq:form=8c8b,file=FILE;window=128`.
Cost: bytes per token, head and field: D b / (8 c), rounded up. Codebooks, once per model: 2^b D numbers per layer, KV
    head and field, whatever c is; float16 in the file, float32 at work. Encoding looks at 2^b D / c centres a token,
    decoding gathers; no kernel reads it in place. Needs a calibration (`quire calibrate`) of at least 32 tokens per
    centre. Serves no latents.
Error: the distance from the nearest centre, which nothing bounds for what no text showed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from quire.codecs.calibrated import (
    Calibrated,
    across,
    check_rope,
    needs,
    refuse_latents,
    token_field,
)
from quire.codecs.coded import choose
from quire.errors import ConfigError
from quire.spec import Field, Site

if TYPE_CHECKING:
    import torch

TOKENS_PER_CENTRE = 32
_FORM = re.compile(r"(1|2|4|8|16)c([1-8]|10|12)b")


@dataclass(frozen=True)
class Codec(Calibrated):
    """Parameters `form`: channels and bits of a code; `rope`: keys `before` or `after` it; `fisher` and `file`.

    `fisher`: tokens weigh by squared gradients, true or false; `file`: what `quire calibrate` wrote.
    """

    form: str = "4c8b"
    rope: str = "before"
    fisher: bool = True
    file: str = ""
    name: ClassVar[str] = "cq"

    def __post_init__(self) -> None:
        if not _FORM.fullmatch(str(self.form)):
            raise ConfigError(
                f"codec cq: form={self.form} is not served; it is channels and bits of a code: 2c8b, 4c8b, 8c8b, 8c10b"
            )
        check_rope(self.name, self.rope)
        choose(self.name, "fisher", self.fisher, (True, False))

    @property
    def channels(self) -> int:
        """That share a code."""
        return int(self.form.partition("c")[0])

    @property
    def bits(self) -> int:
        """Of a code."""
        return int(self.form.partition("c")[2][:-1])

    @property
    def needs(self) -> Literal["rotated", "unrotated"]:  # type: ignore[override]
        return needs(self.rope)

    @property
    def weighted(self) -> bool:  # type: ignore[override]
        return self.fisher

    def stored(self, site: Site) -> tuple[Field, ...]:
        refuse_latents(self.name, site)
        if site.width % self.channels:
            fit = max(c for c in (1, 2, 4, 8, 16) if site.width % c == 0)
            raise ConfigError(
                f"codec cq: groups of {self.channels} channels do not divide {site.name}'s {site.width}; "
                f"use form={fit}c8b"
            )
        return (token_field(site, "codes", self.bits * site.width // self.channels),)

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        from quire.ops.pack import pack_bits

        return {"codes": pack_bits(self._codes(site, x), self.bits)}

    def decode(
        self,
        site: Site,
        stored: Mapping[str, torch.Tensor],
        pos: torch.Tensor,
        dtype: torch.dtype,
        *,
        own_basis: bool = False,
    ) -> torch.Tensor:
        from quire.ops.pack import unpack_bits

        codes = unpack_bits(stored["codes"], self.bits, site.width // self.channels)
        return self._values(site, codes).to(dtype)

    def error_bound(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        return (self._values(site, self._codes(site, x)).double() - x.double()).abs()

    def table_bytes(self, site: Site) -> int:
        return 4 * len(site.heads) * site.width << self.bits

    def fit(
        self, site: Site, x: torch.Tensor, weight: torch.Tensor | None, seed: int
    ) -> dict[str, torch.Tensor]:
        from quire.ops.kmeans import kmeans
        from quire.ops.quantise import half

        least = TOKENS_PER_CENTRE << self.bits
        if x.shape[1] < least:
            raise ConfigError(
                f"codec cq: {1 << self.bits} centres want {least:,} tokens to learn from, and there are "
                f"{x.shape[1]:,}; give a longer text, or more of it (--tokens)"
            )
        points, groups = self._groups(x), x.shape[2] // self.channels
        even = points.new_ones(points.shape[:2])
        w = even if weight is None else self._groups(weight).sum(-1)
        centres = kmeans(points, w, 1 << self.bits, seed=seed)
        return {"centres": half(centres.unflatten(0, (x.shape[0], groups)))}

    def _groups(self, x: torch.Tensor) -> torch.Tensor:
        """`[heads, N, D]` to `[heads x D / c, N, c]`."""
        groups: torch.Tensor = x.float().unflatten(-1, (-1, self.channels))
        return groups.transpose(1, 2).flatten(0, 1)

    def _codes(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        """`[..., B, D]` to `[..., B, D / c]`."""
        from quire.ops.kmeans import nearest

        centres = self._table(site, "centres", x, by_head=True).flatten(0, 1)
        many = len(site.heads) > 1
        lines = x.movedim(1, 0) if many else x.unsqueeze(0)  # heads first
        codes = nearest(self._groups(lines.flatten(1, -2)), centres)
        codes = codes.unflatten(0, (len(lines), -1)).transpose(1, 2)
        codes = codes.unflatten(1, lines.shape[1:-1])
        out: torch.Tensor = codes.movedim(0, 1) if many else codes.squeeze(0)
        return out

    def _values(self, site: Site, codes: torch.Tensor) -> torch.Tensor:
        """The inverse: the centres."""
        import torch

        centres = self._table(site, "centres", codes, by_head=True)  # [H, G, K, c]
        first = torch.arange(centres[..., 0, 0].numel(), device=codes.device) * centres.shape[2]
        at = codes + across(site, first.view(centres.shape[:2]).unsqueeze(1), codes.ndim - 2)
        out: torch.Tensor = torch.nn.functional.embedding(at, centres.flatten(0, 2))
        return out.flatten(-2)
