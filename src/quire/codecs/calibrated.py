"""What codecs that learn from a text share: the file of tables, whose it is, and how they come to a site. Not a codec.

    quire calibrate MODEL --codec cq:form=4c8b --text FILE --out cq.safetensors
    kv="cq:form=4c8b,file=cq.safetensors"

A file holds tensors `LAYER.FIELD.PART` and says in its header for which codec, for which weights and from which text
they were made. The header is read without torch, so a wrong file is refused before a model is loaded; without a file
a codec still knows its bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from quire.codecs.coded import Coded
from quire.codecs.recipe import codec_text
from quire.errors import ConfigError, InvariantError
from quire.spec import Field, Site

if TYPE_CHECKING:
    import torch

FORMAT = "quire-calibration-1"


@dataclass(frozen=True)
class Calibration:
    """Tables of one codec for one model.

    Args:
        about: `codec`, `model` (the digest of its weights), and how they were made; strings.
        tables: `LAYER.FIELD.PART` to what the codec's `fit` gave.
    """

    about: Mapping[str, str]
    tables: Mapping[str, torch.Tensor] = field(repr=False, compare=False)

    @property
    def table_bytes(self) -> int:
        """Of all tables, as the file holds them: once per model, however many sequences there are."""
        return sum(t.numel() * t.element_size() for t in self.tables.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file whole or not at all. Raises OSError."""
        from safetensors.torch import save

        about = {**self.about, "format": FORMAT, "sha256": _digest(self.tables)}
        data = save({n: t.contiguous() for n, t in self.tables.items()}, about)
        target = Path(path)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            beside.write_bytes(data)
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


def read_about(path: str | os.PathLike[str], who: str) -> dict[str, str]:
    """The header of a calibration, without torch. Raises ConfigError: no such file, another kind, or cut short."""
    n = there = 0
    try:
        with Path(path).expanduser().open("rb") as file:
            n = int.from_bytes(file.read(8), "little")
            there = file.seek(0, os.SEEK_END)
            file.seek(8)
            header = json.loads(file.read(n)) if n <= there else None
    except OSError as e:
        raise ConfigError(f"{who}: {path} cannot be read ({e.strerror or e})") from e
    except ValueError:
        header = None
    about = header.get("__metadata__") if isinstance(header, dict) else None
    if n > there > 8 and n < 1 << 32:
        raise ConfigError(f"{who}: {path} is cut short; run quire calibrate again")
    if header is None or not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ConfigError(f"{who}: {path} is no calibration that quire calibrate wrote")
    ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
    if there != 8 + n + max(ends, default=0):
        raise ConfigError(
            f"{who}: {path} is cut short ({there:,} bytes of {8 + n + max(ends, default=0):,}); "
            "run quire calibrate again"
        )
    return {str(k): str(v) for k, v in about.items()}


def read(path: str | os.PathLike[str], who: str) -> Calibration:
    """A whole calibration. Raises ConfigError, as `read_about`, and for bytes that are not those written."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    about = read_about(path, who)
    try:
        tables = load_file(Path(path).expanduser())
    except (SafetensorError, OSError) as e:
        raise ConfigError(f"{who}: {path} cannot be read ({e})") from e
    if _digest(tables) != about.get("sha256"):
        raise ConfigError(f"{who}: {path} is damaged; run quire calibrate again")
    return Calibration(about, tables)


def _digest(tables: Mapping[str, torch.Tensor]) -> str:
    import torch

    found = hashlib.sha256()
    for name in sorted(tables):
        t = tables[name].contiguous()
        found.update(f"{name} {tuple(t.shape)} {t.dtype}\n".encode())
        found.update(t.view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Calibrated(Coded):
    """Defaults for codecs with a parameter `file`; their subclasses `fit` tables and look them up by site.

    Where a site has several heads, dimension 1 of what is encoded and decoded is theirs, in order.
    """

    file: str
    at_work: ClassVar[tuple[str, ...]] = ("file",)
    """Parameters that tables do not depend on."""
    weighted: bool = True
    """Whether `fit` wants gradients."""
    shown: ClassVar[tuple[str, ...]] = ()
    _tables: Mapping[str, torch.Tensor] = {}

    @property
    def settings(self) -> str:
        """The recipe as far as tables depend on it."""
        usual = {f.name: f.default for f in fields(self) if f.name in self.at_work}  # type: ignore[arg-type]
        return _text(replace(self, **usual))  # type: ignore[type-var]

    @property
    def stamp(self) -> str:
        """What tells its tables from all others; empty where no file is named. Raises ConfigError."""
        return read_about(self.file, f"codec {self.name}")["sha256"][:16] if self.file else ""

    def check_file(self) -> None:
        """Refuses to work without a calibration of its own. Raises ConfigError."""
        if not self.file:
            raise ConfigError(
                f"codec {self.name} needs a calibration of this model: quire calibrate MODEL --codec {self.settings} "
                f"--text FILE --out NEW.safetensors, then kv='{self.with_file('NEW.safetensors')}'"
            )
        self._check(read_about(self.file, f"codec {self.name}"))

    def bound(self, digest: str, device: torch.device | str = "cpu") -> Self:
        """The same with its tables on a device, for the model of that digest. Raises ConfigError."""
        self.check_file()
        found = read(self.file, f"codec {self.name}")
        if found.about.get("model") != digest:
            raise ConfigError(
                f"codec {self.name}: {self.file} was calibrated on another model "
                f"({found.about.get('model', '')[:8]}, this one is {digest[:8]}); run quire calibrate on this one"
            )
        return self.with_tables({n: t.to(device) for n, t in found.tables.items()})

    def with_file(self, file: str) -> str:
        """The recipe that names a file."""
        return _text(replace(self, file=file))  # type: ignore[type-var]

    def with_tables(self, tables: Mapping[str, torch.Tensor]) -> Self:
        """The same at work with these tables."""
        out = replace(self)  # type: ignore[type-var]
        object.__setattr__(out, "_tables", {n: t.float() for n, t in tables.items()})
        return out

    def check_site(self, site: Site) -> None:
        """Refuses layers that the calibration does not know. Raises ConfigError."""
        if not any(n.startswith(f"{site.layer}.{site.name}.") for n in self._tables):
            raise ConfigError(
                f"codec {self.name}: {self.file} knows nothing of {site.name} in layer {site.layer}; "
                "run quire calibrate again"
            )

    def table_bytes(self, site: Site) -> int:
        """Memory that the tables of one layer's field take at work, in float32."""
        raise NotImplementedError

    def fit(
        self, site: Site, x: torch.Tensor, weight: torch.Tensor | None, seed: int
    ) -> dict[str, torch.Tensor]:
        """Tables of one layer's field.

        Args:
            site: with its layer and heads.
            x: `[heads, N, D]`, as `encode` will be given it.
            weight: squared gradients of the loss by `x`; None where it does not ask for them.

        Raises:
            ConfigError: too few tokens.
        """
        raise NotImplementedError

    def _check(self, about: Mapping[str, str]) -> None:
        if about.get("codec") != self.settings:
            raise ConfigError(
                f"codec {self.name}: {self.file} was calibrated for {about.get('codec')}, not for {self.settings}; "
                "name that codec, or run quire calibrate for this one"
            )

    def _table(self, site: Site, part: str, like: torch.Tensor, *, by_head: bool) -> torch.Tensor:
        """One table, of the site's heads in order where it has one per head, on the device of `like`."""
        found = self._tables.get(f"{site.layer}.{site.name}.{part}")
        if found is None:
            raise InvariantError(
                f"codec {self.name} has no {part} of {site.name} in layer {site.layer}"
            )
        if by_head and site.heads != tuple(range(len(found))):
            found = found[list(site.heads)]
        return found.to(like.device)


def _text(codec: Any) -> str:
    return codec_text(codec)


def check_rope(codec: str, rope: str) -> None:
    """Raises ConfigError."""
    if rope not in ("before", "after"):
        raise ConfigError(f"codec {codec}: rope={rope} is not served; known: before, after")


def needs(rope: str) -> Literal["rotated", "unrotated"]:
    """What `KVCodec.needs` says of a parameter `rope`."""
    return "unrotated" if rope == "before" else "rotated"


def refuse_latents(codec: str, site: Site) -> None:
    """Raises ConfigError for what is no key or value of a head."""
    if site.name not in ("k", "v"):
        raise ConfigError(
            f"codec {codec} cannot serve {site.name}: it is learned of keys and values, and a latent is both; "
            "use int8, fp8 or int4"
        )


def token_field(site: Site, part: str, bits: int) -> Field:
    """Codes of so many bits per token, each token from a byte on."""
    return Field(f"{site.name}.{part}", (-(-bits // 8),), "uint8")


def across(site: Site, table: torch.Tensor, lead: int) -> torch.Tensor:
    """`[heads, ...]` laid along `[*lead, ...]` of what is coded, where heads are dimension 1."""
    if len(site.heads) <= 1:
        return table[0]
    return table.view(1, len(site.heads), *[1] * (lead - 2), *table.shape[1:])
