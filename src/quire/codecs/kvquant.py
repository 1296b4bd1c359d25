"""`kvquant`: two to four bits on a learned grid, keys by channel before RoPE, values by token, outliers kept apart.

Idea: one grid of 2^b levels per layer and field, put where the numbers lie and where the loss feels errors most; what
lies outside a channel's or a token's usual range would stretch the grid, and is stored beside it as it is.

    keys      (x - mid[d]) / reach[d] ──> nearest level      mid and reach of each channel from the calibration
    values    (x - mid[t]) / reach[t] ──> nearest level      of each token and head, from its own least and largest
    outliers  the farthest of a tile of keys, of a token's values: place and float16

Source: KVQuant (Hooper et al., arXiv 2401.18079): nuqX with 1 % outliers per vector, Fisher-weighted k-means
    (equation 7), Q-Norm, the first token in 16 bits.
Differs: a value's token is a vector of one head, where the paper takes all heads of the layer together: a tile then
    stands for itself, may be kept, dropped and read alone, and pays 4 bytes of mid and reach per token and head. Keys'
    outliers have room for one share of a tile's numbers, in whole cache lines, and the farthest have it, whether they
    exceed the range or not; what finds no room is clipped. Values have at least one place per token.
    For comparison: `rope=after`, `fisher=false`, `outliers=matrix` (one range for a whole layer says what is outside),
    `keys=token` (keys as values), `sink=0`.
Cost: bytes of T tokens and a head (T = tile): keys T D b / 8 + 4 n with n = 16 ceil(sparse T D / 16); values T (D b / 8
    + 4 + 3 m) with m = max(1, sparse D), rounded. At D = 128, four bits and tiles of 64: 4.41 bits a number, where the
    paper counts 4.32 at 4,096 values a token. Channels' ranges and the grids, once per model: 8 D bytes per layer and
    head and 2^b float32 twice per layer and field. The first token takes a raw block per sequence. Needs a calibration
    (`quire calibrate`). Decoded to be attended. Serves no latents.
Error: the distance from the nearest level, times reach; more where outliers found no room.
"""

from __future__ import annotations

import math
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

LINE = 16
"""Outliers of a tile come in such numbers: place and value of 16 fill a cache line."""
MOST_POINTS = 1 << 19
"""That a grid is learned from."""


@dataclass(frozen=True)
class Codec(Calibrated):
    """Parameters `bits`: 2, 3 or 4; `sparse`: the share of outliers, 0 for none; and those below.

    `outliers`: of a `vector` or of the whole `matrix`; `keys`: by `channel` or by `token`; `rope`: keys `before` or
    `after` it; `fisher`: levels weigh squared gradients, true or false; `qnorm`: levels are moved to keep mean and
    spread, true, false or `auto` (at two bits); `sink`: first tokens in 16 bits; `tile`: tokens whose outliers share
    their room, 16, 32, 64 or 128; `file`: what `quire calibrate` wrote.
    """

    bits: int = 4
    sparse: float = 0.01
    outliers: str = "vector"
    keys: str = "channel"
    rope: str = "before"
    fisher: bool = True
    qnorm: bool | str = "auto"
    sink: int = 1
    tile: int = 64
    file: str = ""
    name: ClassVar[str] = "kvquant"
    at_work: ClassVar[tuple[str, ...]] = ("qnorm", "sink", "tile", "file")

    def __post_init__(self) -> None:
        choose(self.name, "bits", self.bits, (2, 3, 4))
        choose(self.name, "outliers", self.outliers, ("vector", "matrix"))
        choose(self.name, "keys", self.keys, ("channel", "token"))
        check_rope(self.name, self.rope)
        choose(self.name, "fisher", self.fisher, (True, False))
        choose(self.name, "qnorm", self.qnorm, (True, False, "auto"))
        choose(self.name, "tile", self.tile, (16, 32, 64, 128))
        if type(self.sparse) not in (int, float) or not 0 <= self.sparse <= 0.1:
            raise ConfigError(
                f"codec kvquant: sparse={self.sparse} is not served; it is a share from 0 to 0.1, as 0.01"
            )
        if type(self.sink) is not int or not 0 <= self.sink <= self.tile:
            raise ConfigError(
                f"codec kvquant: sink={self.sink} is not served; it is a number of first tokens, 0 to {self.tile}"
            )

    @property
    def group_tokens(self) -> int:
        return self.tile

    @property
    def sink_tokens(self) -> int:
        """First tokens that are read raw."""
        return self.sink

    @property
    def needs(self) -> Literal["rotated", "unrotated"]:  # type: ignore[override]
        return needs(self.rope)

    @property
    def weighted(self) -> bool:  # type: ignore[override]
        return self.fisher

    def stored(self, site: Site) -> tuple[Field, ...]:
        refuse_latents(self.name, site)
        if self.tile * site.width > 1 << 16:
            raise ConfigError(
                f"codec kvquant: a tile of {self.tile} tokens of {site.width} channels is too large to count its "
                "places in 16 bits; use a smaller tile"
            )
        out = [token_field(site, "codes", self.bits * site.width)]
        if not self._by_channel(site):
            out += [Field(f"{site.name}.{part}", (), "float16") for part in ("mid", "reach")]
        if self._pooled(site):
            tiles = site.block_tokens // self.tile
            shape = (tiles, 2, self._room(site))
            out += [Field(f"{site.name}.sparse", shape, "int16", "block")] if self.sparse else []
        elif self.sparse:
            n, place = (self._per_token(site),), "uint8" if site.width <= 256 else "int16"
            out += [Field(f"{site.name}.at", n, place), Field(f"{site.name}.out", n, "float16")]
        return tuple(out)

    def encode(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> dict[str, torch.Tensor]:
        from quire.ops.pack import pack_bits
        from quire.ops.quantise import half

        x = x.float()
        far = self._farthest(site, x, pos)
        mid, reach = self._range(site, x, far)
        codes = self._codes(site, x, mid, reach)
        parts = {"codes": pack_bits(codes, self.bits)}
        if not self._by_channel(site):
            parts |= {"mid": mid.squeeze(-1).half(), "reach": reach.squeeze(-1).half()}
        if far is None:
            return parts
        if not self._pooled(site):
            return parts | {"at": far, "out": half(x.gather(-1, far))}
        import torch

        values = half(self._tiles(x).gather(-1, far)).view(torch.int16)
        return parts | {"sparse": torch.stack([far.to(torch.int16), values], -2)}

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

        from quire.ops.pack import unpack_bits

        codes = unpack_bits(stored["codes"], self.bits, site.width)
        if self._by_channel(site):
            mid, reach = self._channels(site, codes)
        else:
            mid, reach = (stored[n].float().unsqueeze(-1) for n in ("mid", "reach"))
        x = self._levels(site, codes)[codes] * reach + mid
        # what was never written may name any place: it is read by nobody, and must not fall outside
        if "sparse" in stored:
            at, values = stored["sparse"].unbind(-2)
            at = (at.long() & 0xFFFF) % (self.tile * site.width)
            flat = self._tiles(x).scatter(-1, at, values.contiguous().view(torch.float16).float())
            x = flat.unflatten(-1, (self.tile, site.width)).flatten(-3, -2)
        elif "out" in stored:
            x = x.scatter(-1, stored["at"].long() % site.width, stored["out"].float())
        return x.to(dtype)

    def error_bound(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        """Of a number that is no outlier; one that is has float16's error, which may be the larger one."""
        import torch

        x = x.float()
        pos = torch.zeros(x.shape[-2], dtype=torch.int64, device=x.device)
        mid, reach = self._range(site, x, self._farthest(site, x, pos))
        codes = self._codes(site, x, mid, reach)
        dense = (self._levels(site, codes)[codes] * reach + mid - x).abs().double()
        kept = x.double().abs() * 2.0**-11 + 2.0**-24
        return torch.maximum(dense, kept if self.sparse else 0 * kept) * (1 + 1e-6)

    # -- how numbers become codes ------------------------------------------------------------------------------------

    def _by_channel(self, site: Site) -> bool:
        return not site.values and self.keys == "channel"

    def _pooled(self, site: Site) -> bool:
        """Whether a tile's outliers share their room; else each token has its own."""
        return self._by_channel(site) or self.outliers == "matrix"

    def _room(self, site: Site) -> int:
        """Outliers of a tile."""
        return math.ceil(self.sparse * self.tile * site.width / LINE - 1e-9) * LINE

    def _per_token(self, site: Site) -> int:
        """Outliers of a token."""
        return max(1, round(self.sparse * site.width))

    def _tiles(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., B, D]` to `[..., B / T, T x D]`."""
        tiles: torch.Tensor = x.unflatten(-2, (-1, self.tile)).flatten(-2)
        return tiles

    def _channels(self, site: Site, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mid and reach of each channel, laid along `[..., B, D]`."""
        table = self._table(site, "channels", like, by_head=True)  # [H, 2, D]
        mid, reach = (across(site, table[:, i : i + 1], like.ndim - 2) for i in (0, 1))
        return mid, reach

    def _farthest(self, site: Site, x: torch.Tensor, pos: torch.Tensor) -> torch.Tensor | None:
        """Places of the outliers: within a token `[..., B, m]`, or within a tile `[..., B / T, n]`."""
        import torch

        if not self.sparse:
            return None
        if not self._pooled(site):
            centre = x.median(-1, keepdim=True).values
            return (x - centre).abs().topk(self._per_token(site), -1).indices
        if self.outliers == "matrix":
            far = (x - self._table(site, "centre", x, by_head=False)).abs()
        else:
            mid, reach = self._channels(site, x)
            far = (x - mid).abs() / reach.clamp_min(2.0**-24)
        if self._by_channel(site):  # a token that is read raw takes no room here
            far = torch.where(pos.unsqueeze(-1) < self.sink, -1.0, far)
        return self._tiles(far).topk(self._room(site), -1).indices

    def _range(
        self, site: Site, x: torch.Tensor, far: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """mid and reach of each channel, or of each token from what is no outlier, as stored."""
        import torch

        if self._by_channel(site):
            return self._channels(site, x)
        inside = torch.ones_like(x, dtype=torch.bool)
        if far is not None and self._pooled(site):
            inside = self._tiles(inside).scatter(-1, far, value=False)
            inside = inside.unflatten(-1, (self.tile, site.width)).flatten(-3, -2)
        elif far is not None:
            inside = inside.scatter(-1, far, value=False)
        return _middle(x, inside)

    def _codes(
        self, site: Site, x: torch.Tensor, mid: torch.Tensor, reach: torch.Tensor
    ) -> torch.Tensor:
        """Of each number the nearest level of the grid."""
        import torch

        grid = self._table(site, "grid", x, by_head=False)
        z = torch.where(reach > 0, (x - mid) / reach, 0.0).clamp(-1, 1).contiguous()
        return torch.bucketize(z, (grid[1:] + grid[:-1]) / 2)

    def _levels(self, site: Site, like: torch.Tensor) -> torch.Tensor:
        """What codes read as: the grid, or the one that Q-Norm moved."""
        moved = self.bits == 2 if self.qnorm == "auto" else self.qnorm
        return self._table(site, "moved" if moved else "grid", like, by_head=False)

    def table_bytes(self, site: Site) -> int:
        channels = 2 * len(site.heads) * site.width if self._by_channel(site) else 0
        centre = int(self.outliers == "matrix" and self.sparse > 0)
        return 4 * (channels + (2 << self.bits) + centre)

    # -- what is learned ---------------------------------------------------------------------------------------------

    def fit(
        self, site: Site, x: torch.Tensor, weight: torch.Tensor | None, seed: int
    ) -> dict[str, torch.Tensor]:
        import torch

        x = x.float()
        out: dict[str, torch.Tensor] = {}
        inside = torch.ones_like(x, dtype=torch.bool)
        if self.outliers == "matrix" and self.sparse:
            low, high = _ends(x.reshape(1, -1), self.sparse)
            inside = (x >= low) & (x <= high)
            out["centre"] = ((low + high) / 2).reshape(1)
        if self._by_channel(site):
            if self.outliers == "vector" or not self.sparse:
                low, high = (y.unsqueeze(1) for y in _ends(x.transpose(1, 2), self.sparse))
                inside = (x >= low) & (x <= high)
            mid, reach = _middle(x.transpose(1, 2), inside.transpose(1, 2))
            out["channels"] = torch.stack([mid[..., 0], reach[..., 0]], 1).half()
            mid, reach = mid.transpose(1, 2), reach.transpose(1, 2)
        else:
            if self.outliers == "vector" and self.sparse:
                far = (x - x.median(-1, keepdim=True).values).abs()
                inside = inside.scatter(
                    -1, far.topk(self._per_token(site), -1).indices, value=False
                )
            mid, reach = _middle(x, inside)
        z = ((x - mid) / reach.clamp_min(2.0**-24)).clamp(-1, 1)[inside]
        felt = torch.ones_like(x) if weight is None else weight.double() * reach.double() ** 2
        return out | self._grid(z, felt.expand_as(x)[inside], seed)

    def _grid(self, z: torch.Tensor, felt: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
        """The levels, and the same moved so that what they make of the numbers has their mean and spread (Q-Norm)."""
        import torch

        from quire.ops.kmeans import kmeans

        if len(z) < 32 << self.bits:
            raise ConfigError(
                f"codec kvquant: {1 << self.bits} levels want more than {len(z)} numbers to learn from; "
                "give a longer text"
            )
        if len(z) > MOST_POINTS:
            rng = torch.Generator().manual_seed(seed)
            some = torch.randint(len(z), (MOST_POINTS,), generator=rng).to(z.device)
            z, felt = z[some], felt[some]
        levels = kmeans(z.view(1, -1, 1), felt.view(1, -1), 1 << self.bits, seed=seed)
        grid = levels.flatten().sort().values
        read = grid[torch.bucketize(z, (grid[1:] + grid[:-1]) / 2)]
        spread = z.double().std() / read.double().std().clamp_min(1e-9)
        moved = (grid.double() - read.double().mean()) * spread + z.double().mean()
        return {"grid": grid, "moved": moved.float()}


def _ends(x: torch.Tensor, sparse: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows `[..., N]` the numbers below and above which half of the share `sparse` lies."""
    n = x.shape[-1]
    rows = x.sort(-1).values
    skip = min(int(sparse / 2 * n), (n - 1) // 2)
    return rows[..., skip], rows[..., n - 1 - skip]


def _middle(x: torch.Tensor, inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """mid and reach of what is inside of each row (all where nothing is), `[..., 1]`, as float16 holds them."""
    import torch

    from quire.ops.quantise import half

    inside = inside | ~inside.any(-1, keepdim=True)
    low = torch.where(inside, x, torch.inf).amin(-1, keepdim=True) + 0.0
    high = torch.where(inside, x, -torch.inf).amax(-1, keepdim=True) + 0.0
    mid = half((low + high) / 2).float()
    return mid, half((high - low) / 2).float()
