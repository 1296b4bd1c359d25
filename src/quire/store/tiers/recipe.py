"""The string form of `tiers`: `"host:8GiB,disk:100GiB@/var/cache/quire"`, the fastest first.

host:SIZE             memory of this process
disk:SIZE@FOLDER      files; what it holds is found again after a restart
redis:SIZE@HOST:PORT  a Redis or Valkey server, shared; see `quire.store.tiers.address` for TLS and users
NAME:SIZE@PLACE       another package's, by its entry point in the group `quire.tiers`
…;deadline=0.5        for all: seconds that a request waits for its blocks before it computes them; 1 by default
…;sync=batch          of a disk: fdatasync after each batch, instead of at the end
…;swap=auto           preempted requests go to the host tier where that is cheaper than computing again; always, off
…;offload=on          cold blocks of a request that is larger than the cache go there, and are read from there; off
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.errors import ConfigError
from quire.store.tiers.address import RedisAddress, masked, parse_address
from quire.store.tiers.checked import Checked
from quire.store.tiers.contract import Tier

__all__ = ["TierRecipe", "TiersConfig", "divided", "open_tiers", "parse_tiers"]

EXAMPLE = "for example host:8GiB,disk:100GiB@/var/cache/quire"
_UNITS = {"": 1, "b": 1} | {f"{u}b": 1000**i for i, u in enumerate("kmgt", 1)}
_UNITS |= {f"{u}ib": 1024**i for i, u in enumerate("kmgt", 1)}
OWN = ("host", "disk", "redis")
SWAPS = ("auto", "always", "off")


@dataclass(frozen=True)
class TierRecipe:
    """One tier: its kind, its capacity, and where it lies ("" where that means nothing); a server has an address."""

    kind: str
    capacity_bytes: int
    place: str = ""
    address: RedisAddress | None = None


@dataclass(frozen=True)
class TiersConfig:
    """All of them, the fastest first; none: nothing leaves the device's memory.

    Args:
        deadline_s: that a request waits for blocks before it computes them.
        sync: of disks, see `DiskTier`.
        swap: whether preempted sequences go to the host tier: "auto" (where measured to be cheaper), "always", "off".
            "": as auto where there is a host tier.
        offload: whether cold blocks of a running sequence that is larger than the arena go there.
    """

    tiers: tuple[TierRecipe, ...] = ()
    deadline_s: float = 1.0
    sync: str = "close"
    swap: str = ""
    offload: bool = False
    text: str = field(default="", compare=False)

    @property
    def on(self) -> bool:
        """Whether there is any."""
        return bool(self.tiers)

    @property
    def swaps(self) -> bool:
        """Whether preempted sequences may go to host memory."""
        return self.swap != "off" and any(t.kind == "host" for t in self.tiers)

    @property
    def live(self) -> bool:
        """Whether somebody asked for what needs no prefix cache: room for running sequences."""
        return self.swap in ("auto", "always") or self.offload

    @property
    def persistent(self) -> bool:
        """Whether blocks may come back after a restart."""
        return any(t.kind != "host" for t in self.tiers)


def parse_tiers(text: str, password: str | None = None) -> TiersConfig:
    """The string form as a value.

    Args:
        text: see the module's. No message and no value that is printed holds its password.
        password: of a Redis server whose address names none.

    Raises:
        ConfigError: one line that says what would work.
    """
    body, *options = (part.strip() for part in text.split(";"))
    text = masked(text)
    if body in ("", "none"):
        if options:
            raise ConfigError(f"tiers={text!r}: options without a tier mean nothing; {EXAMPLE}")
        return TiersConfig()
    tiers = tuple(_tier(part.strip(), text, password) for part in body.split(","))
    kinds = [t.kind for t in tiers]
    if kinds.count("host") > 1 or "host" in kinds[1:]:
        raise ConfigError(f"tiers={text!r}: one host tier, and before all others; {EXAMPLE}")
    places = [t.place for t in tiers if t.place]
    if len(set(places)) < len(places):
        raise ConfigError(f"tiers={text!r}: two tiers cannot share a place")
    return TiersConfig(tiers, text=text, **_options(options, text, kinds))


def divided(text: str, own: str, parts: int) -> str:
    """The recipe of one of several caches: an equal share of each size, and a folder `own` below a disk's.

    A server's size is of all that lies there, whosever it is, and stays.
    """
    body, *options = text.split(";")
    tiers, config = body.split(","), parse_tiers(text)
    if len(tiers) != len(config.tiers):
        raise ConfigError(
            f"tiers={config.text!r}: folders with a comma in their name are for one model"
        )
    out = []
    for part, tier in zip(tiers, config.tiers, strict=True):
        if tier.kind in ("host", "disk") and tier.capacity_bytes < parts << 16:
            raise ConfigError(
                f"tiers={config.text!r}: {tier.capacity_bytes:,} bytes of {tier.kind} are too few for {parts} models; "
                f"give {parts << 16:,} or more"
            )
        place = f"@{Path(tier.place) / own}" if tier.kind == "disk" else ""
        share = f"{tier.kind}:{tier.capacity_bytes // parts}{place}"
        out.append(share if tier.kind in ("host", "disk") else part)
    return ";".join([",".join(out), *options])


def _tier(part: str, text: str, password: str | None) -> TierRecipe:
    found = re.fullmatch(r"([A-Za-z_][\w-]*):\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)(?:@(.+))?", part)
    shown = "a part of it" if "***" in text else repr(part)
    if found is None:
        raise ConfigError(f"tiers={text!r}: {shown} is not KIND:SIZE or KIND:SIZE@PLACE; {EXAMPLE}")
    kind, number, unit, place = found[1], found[2], found[3].lower(), found[4] or ""
    if kind not in OWN and kind not in _others():
        known = ", ".join((*OWN, *sorted(_others())))
        raise ConfigError(f"tiers={text!r}: unknown tier {kind!r}; known: {known}")
    if unit not in _UNITS:
        raise ConfigError(
            f"tiers={text!r}: unknown unit {found[3]!r}; known: KiB, MiB, GiB, TiB, GB"
        )
    if kind == "host" and place:
        raise ConfigError(f"tiers={text!r}: host memory has no place; drop @{place}")
    if kind == "disk" and not place:
        raise ConfigError(
            f"tiers={text!r}: a disk tier needs a folder, disk:{number}{found[3]}@/path"
        )
    if kind == "redis" and not place:
        raise ConfigError(
            f"tiers={text!r}: a redis tier needs a server, redis:{number}{found[3]}@HOST:PORT"
        )
    n_bytes = int(float(number) * _UNITS[unit])
    if n_bytes < 1 << 16:
        raise ConfigError(f"tiers={text!r}: {shown} is {n_bytes} bytes; did you mean {number}GiB?")
    if kind == "redis":
        address = parse_address(place, password)
        return TierRecipe(kind, n_bytes, str(address), address)
    return TierRecipe(kind, n_bytes, place)


def _options(options: list[str], text: str, kinds: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for option in filter(None, options):
        key, _, value = (x.strip() for x in option.partition("="))
        if key == "deadline":
            try:
                values["deadline_s"] = float(value)
            except ValueError:
                values["deadline_s"] = 0.0
            if not 0 < values["deadline_s"] < 3600:
                raise ConfigError(f"tiers={text!r}: deadline is seconds above 0, not {value!r}")
        elif key == "sync":
            if value not in ("batch", "close"):
                raise ConfigError(f"tiers={text!r}: sync is batch or close, not {value!r}")
            if "disk" not in kinds:
                raise ConfigError(f"tiers={text!r}: sync is about disks and there is none")
            values["sync"] = value
        elif key == "swap":
            if value not in SWAPS:
                raise ConfigError(f"tiers={text!r}: swap is {', '.join(SWAPS)}, not {value!r}")
            if "host" not in kinds and value != "off":
                raise ConfigError(
                    f"tiers={text!r}: requests are swapped to a host tier and there is none; {EXAMPLE}"
                )
            values["swap"] = value
        elif key == "offload":
            if value not in ("on", "off"):
                raise ConfigError(f"tiers={text!r}: offload is on or off, not {value!r}")
            values["offload"] = value == "on"
        else:
            known = "deadline, sync, swap, offload"
            raise ConfigError(f"tiers={text!r}: unknown option {key!r}; known: {known}")
    return values


def _others() -> dict[str, Any]:
    """Entry points of other packages, by name."""
    from importlib.metadata import entry_points

    return {e.name: e for e in entry_points(group="quire.tiers")}


def open_tiers(config: TiersConfig) -> list[Tier]:
    """The tiers themselves. Raises ConfigError where one cannot be had; none is left open then."""
    made: list[Tier] = []
    try:
        for recipe in config.tiers:
            made += [_open(recipe, config)]
    except BaseException:
        import asyncio

        for tier in made:
            asyncio.run(tier.close())
        raise
    return made


def _open(recipe: TierRecipe, config: TiersConfig) -> Tier:
    if recipe.kind == "host":
        from quire.store.tiers.host import HostTier

        return HostTier(recipe.capacity_bytes)
    if recipe.kind == "disk":
        from quire.store.tiers.disk import DiskTier

        folder = Path(recipe.place).expanduser()
        return DiskTier(folder, recipe.capacity_bytes, sync=config.sync)  # type: ignore[arg-type]
    if recipe.address is not None:
        from quire.store.tiers.redis import RedisTier

        return RedisTier(recipe.address, recipe.capacity_bytes, timeout_s=config.deadline_s)
    make: Callable[[int, str], Tier] = _others()[recipe.kind].load()
    return Checked(make(recipe.capacity_bytes, recipe.place))
