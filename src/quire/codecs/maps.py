"""Bit maps: another recipe for some layers, or for some KV heads of them, in a small TOML file. Not a codec.

    [map]
    layers = 6                          of the model, and its KV heads: another model's map is refused
    heads = 2
    digest = "82a8…"                    of its weights, where the map was measured on them; may be left out
    kv = "int8"                         what no part names

    [[map.parts]]                       a later part wins
    layers = [0, 5]
    kv = "k=int8,v=int4;window=64"      any recipe but one with skip_layers, or "auto" for the model's own dtype

    [[map.parts]]
    layers = [3]
    heads = [1]                         all of them where it is left out
    kv = "auto"

A recipe may give keys and values codecs of their own, so a map says per layer, per KV head and per tensor.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.codecs.recipe import Recipe

__all__ = ["PREFIX", "BitMap", "MapPart", "read_map"]

PREFIX = "map:"
_KEYS = {"layers", "heads", "digest", "kv", "parts"}
_PART_KEYS = {"layers", "heads", "kv"}


@dataclass(frozen=True)
class MapPart:
    """A recipe for some layers, and for all of their KV heads or some."""

    layers: frozenset[int]
    heads: frozenset[int] | None
    recipe: Recipe


@dataclass(frozen=True)
class BitMap:
    """A map as it was read; `rest` is the recipe of what no part names."""

    where: str
    layers: int
    heads: int
    digest: str
    rest: Recipe
    parts: tuple[MapPart, ...]

    def at(self, layer: int, head: int) -> Recipe:
        """The recipe of one KV head: of the last part that names it."""
        for part in reversed(self.parts):
            if layer in part.layers and (part.heads is None or head in part.heads):
                return part.recipe
        return self.rest

    def recipes(self) -> tuple[Recipe, ...]:
        """All that it holds."""
        return (self.rest, *(p.recipe for p in self.parts))

    def check_shape(self, heads: Mapping[int, int], n_layers: int) -> None:
        """Refuses a model of another shape.

        Args:
            heads: layer to its KV heads, of layers that cache tokens.

        Raises:
            ConfigError: with both shapes.
        """
        most = max(heads.values(), default=0)
        if (self.layers, self.heads) != (n_layers, most):
            raise ConfigError(
                f"kv='{self.where}' is a map of {self.layers} layers of {self.heads} KV heads, and this model has "
                f"{n_layers} of {most}; make one for it with quire tune"
            )
        named = {n for p in self.parts for n in p.layers}
        if named - set(heads):
            raise ConfigError(
                f"kv='{self.where}' names layer {min(named - set(heads))}, which caches no tokens in this model"
            )

    def check_digest(self, digest: Callable[[], str]) -> None:
        """Refuses other weights than the map was measured on. Raises ConfigError."""
        if self.digest and digest() != self.digest:
            raise ConfigError(
                f"kv='{self.where}' was measured on other weights ({self.digest[:8]}, these are {digest()[:8]}); make "
                "one for them with quire tune, or take its digest line out to use it anyway"
            )


def read_map(text: str, parse: Callable[[str], Recipe]) -> BitMap:
    """The map that `kv="map:FILE"` names.

    Args:
        parse: of a recipe.

    Raises:
        ConfigError: no such file, or not a map; one line that says where.
    """
    name = text.removeprefix(PREFIX).strip()
    if not name or ";" in name:
        raise ConfigError(
            f"kv={text!r}: a map is a file, as in map:FILE.toml; options stand in its own recipes"
        )
    try:
        document = tomllib.loads(Path(name).expanduser().read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"kv={text!r}: {e.strerror or e}") from e
    except ValueError as e:
        raise ConfigError(f"kv={text!r}: not TOML ({e})") from e
    table = document.get("map")
    if not isinstance(table, dict):
        raise ConfigError(f"kv={text!r}: the file has no [map] table")
    where = f"kv={text!r}: [map]"
    _known(table, _KEYS, where)
    layers, heads = (_count(table, key, where) for key in ("layers", "heads"))
    digest, parts = table.get("digest", ""), table.get("parts", [])
    if not isinstance(digest, str) or not isinstance(parts, list):
        raise ConfigError(f"{where} digest is a string and parts are [[map.parts]] tables")
    made = []
    for i, part in enumerate(parts, 1):
        said = f"kv={text!r}: part {i}"
        if not isinstance(part, dict):
            raise ConfigError(f"{said} is no table; write [[map.parts]]")
        _known(part, _PART_KEYS, said)
        of = _numbers(part, "layers", layers, said)
        some = _numbers(part, "heads", heads, said) if "heads" in part else None
        made.append(MapPart(of, some, _recipe(part, said, parse)))
    return BitMap(text, layers, heads, digest, _recipe(table, where, parse), tuple(made))


def _known(table: Mapping[str, Any], keys: set[str], where: str) -> None:
    unknown = sorted(set(table) - keys)
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(keys))}")


def _count(table: Mapping[str, Any], key: str, where: str) -> int:
    value = table.get(key)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{where} must say {key} = how many the model has, not {value!r}")
    return value


def _numbers(part: Mapping[str, Any], key: str, count: int, where: str) -> frozenset[int]:
    found = part.get(key)
    if (
        not isinstance(found, list)
        or not found
        or any(type(n) is not int or not 0 <= n < count for n in found)
    ):
        raise ConfigError(
            f"{where}: {key} is a list of numbers within 0..{count - 1}, not {found!r}"
        )
    return frozenset(found)


def _recipe(table: Mapping[str, Any], where: str, parse: Callable[[str], Recipe]) -> Recipe:
    text = table.get("kv")
    if not isinstance(text, str) or text.strip().startswith(PREFIX):
        raise ConfigError(f'{where} must say kv = a recipe, as kv = "int4", not {text!r}')
    try:
        recipe = parse(text)
        recipe.check_options()
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from e
    if recipe.skip_layers:
        raise ConfigError(f"{where}: a map says by its layers what skip_layers says; leave it out")
    return recipe
