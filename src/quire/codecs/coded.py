"""What the codecs that round share: packed codes in kernel order, and the usual answers. Not a codec itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from quire.errors import ConfigError
from quire.spec import Field, Packing, Site, hadamard_width

if TYPE_CHECKING:
    import torch


class Coded:
    """Defaults of the protocol, and the codes of `quire.ops.pack`."""

    name: ClassVar[str]
    plain: ClassVar[bool] = False
    needs: ClassVar[Literal["rotated", "unrotated"]] = "rotated"

    @property
    def group_tokens(self) -> int:
        return 16  # tokens side by side in packed keys

    @property
    def residual_tokens(self) -> int:
        return 0

    def query_map(self, site: Site, q: torch.Tensor) -> torch.Tensor:
        return q

    def output_map(self, site: Site, out: torch.Tensor) -> torch.Tensor:
        return out

    def packing(self, site: Site) -> Packing | None:
        """How the stored parts lie, where a kernel could read them in place; None: decode, then attend."""
        return None

    def packed_field(self, site: Site, bits: int) -> Field:
        """Where the codes of a block lie. Raises ConfigError for a width that they do not fill."""
        lane, name = 32 // bits, f"{site.name}.codes"
        if site.values:
            return Field(name, (site.block_tokens // lane, site.width, 4), "uint8", "block")
        if site.width % lane:
            raise ConfigError(
                f"codec {self.name} cannot serve {site.name} of {site.width} channels: its {bits}-bit codes lie {lane} "
                f"side by side; a head_dim that is a multiple of {lane} works, or codec fp8, which takes any"
            )
        return Field(name, (site.block_tokens // 16, site.width // lane, 16, 4), "uint8", "block")

    @staticmethod
    def pack(site: Site, codes: torch.Tensor, bits: int) -> torch.Tensor:
        """`[..., B, D]` to the shape of `packed_field`."""
        from quire.ops.pack import pack_keys, pack_values

        return (pack_values if site.values else pack_keys)(codes, bits)

    @staticmethod
    def unpack(site: Site, packed: torch.Tensor, bits: int) -> torch.Tensor:
        """The inverse of `pack`, as float32."""
        from quire.ops.pack import unpack_keys, unpack_values

        return (unpack_values if site.values else unpack_keys)(packed, bits).float()


class Turned(Coded):
    """A codec that works on rotated keys and values, or with `rotate=false` on those of the model."""

    rotate: bool

    def query_map(self, site: Site, q: torch.Tensor) -> torch.Tensor:
        return self.turned(q)

    def output_map(self, site: Site, out: torch.Tensor) -> torch.Tensor:
        return self.turned(out)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """Into the codec's basis and out of it."""
        from quire.ops.rotate import hadamard

        return hadamard(x) if self.rotate else x

    def turned_bound(self, site: Site, x: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
        """The error of x where that of the rotated x is at most `bound`: a rotation's row is a vector of length one."""
        if not self.rotate:
            return bound
        blocks = (-1, hadamard_width(site.width))
        size = x.double().unflatten(-1, blocks).norm(dim=-1, keepdim=True)
        turned = bound.unflatten(-1, blocks).norm(dim=-1, keepdim=True) + 2.0**-19 * size
        every: torch.Tensor = turned.expand(*turned.shape[:-1], blocks[1]).flatten(-2)
        return every


def choose(codec: str, parameter: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuses a parameter's value that is none of the choices. Raises ConfigError."""
    if not any(value is c or (type(value) is type(c) and value == c) for c in choices):
        known = ", ".join(str(c).lower() if isinstance(c, bool) else str(c) for c in choices)
        raise ConfigError(f"codec {codec}: {parameter}={value} is not served; known: {known}")


def affine_fields(site: Site, shape: tuple[int, ...]) -> tuple[Field, Field]:
    """Where float16 scales and minima lie: `value = code * scale + min`."""
    scale, low = (
        Field(f"{site.name}.{part}", shape, "float16", "block") for part in ("scale", "min")
    )
    return scale, low
