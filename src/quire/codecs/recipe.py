"""Recipes: the string form of a codec choice, and the registry that it is resolved against.

auto                        the model's own dtype
bf16                        one codec for every field
kivi:bits=2,residual=128    with parameters
k=int8,v=int4               one codec per field
int4;skip_layers=0,1,-1     options for all: these layers stay in the plain codec of the model's dtype
int4;sinks=4;window=128     and so do the first 4 tokens and the last 128 of every layer
map:FILE.toml               a recipe for some layers or KV heads, see `quire.codecs.maps`
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

from quire.codecs.maps import PREFIX, BitMap, read_map
from quire.errors import ConfigError
from quire.spec import DEFAULT_BLOCK_TOKENS, KVCodec

FIELDS = ("k", "v", "latent", "k_rope")
"""What a recipe may name."""

_NOT_CODECS = frozenset({"recipe", "maps", "plain", "coded", "calibrated"})
_OPTIONS = "skip_layers=0,1,-1, sinks=4, window=128"
PLAIN_OF_DTYPE = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


@cache
def _own() -> frozenset[str]:
    import quire.codecs as folder

    return frozenset(
        m.name for m in pkgutil.iter_modules(folder.__path__) if m.name not in _NOT_CODECS
    )


def _others() -> Iterable[Any]:
    """Entry points of other packages."""
    from importlib.metadata import entry_points  # itself slow to import, and rarely needed

    return entry_points(group="quire.codecs")


@cache
def available() -> tuple[str, ...]:
    """Names of all codecs: the files of this folder and the entry points of other packages."""
    return tuple(sorted(_own() | {e.name for e in _others()}))


@cache
def codec_class(name: str) -> type[Any]:
    """The codec's class. Raises ConfigError with the known names.

    Cost: a lookup. Other packages are asked only for a name that is none of ours, which takes tens of milliseconds.
    """
    if name in _own():
        own: type[Any] = importlib.import_module(f"quire.codecs.{name}").Codec
        return own
    for entry in _others():
        if entry.name == name:
            found: type[Any] = entry.load()
            return found
    raise ConfigError(f"unknown codec {name!r}; known: auto, {', '.join(available())}")


@cache
def load_codec(text: str) -> KVCodec:
    """The codec for `"name"` or `"name:parameter=value,..."`.

    Raises:
        ConfigError: unknown name or parameter, or a value that the codec refuses.
    """
    name, _, rest = text.strip().partition(":")
    cls = codec_class(name)
    known = {f.name: f for f in fields(cls)}
    values: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, eq, value = (x.strip() for x in item.partition("="))
        if not eq or key not in known or not value:
            takes = f"it takes {', '.join(known)}" if known else "it takes no parameters"
            raise ConfigError(f"codec {name}: unknown parameter {item.strip()!r}; {takes}")
        if key in values:
            raise ConfigError(f"codec {name}: {key} is given twice")
        values[key] = _value(value)
    try:
        codec: KVCodec = cls(**values)
    except TypeError as e:
        raise ConfigError(f"codec {text.strip()!r}: {e}") from None
    return codec


def codec_text(codec: KVCodec) -> str:
    """The string form that loads an equal codec: its name and the parameters that are not the default."""
    anything: Any = codec
    known: tuple[Field[Any], ...] = fields(anything) if is_dataclass(anything) else ()
    changed = [f.name for f in known if getattr(codec, f.name) != f.default]
    text = ",".join(f"{name}={_text(getattr(codec, name))}" for name in changed)
    return f"{codec.name}:{text}" if text else codec.name


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


@dataclass(frozen=True)
class Recipe:
    """A parsed `kv=` string.

    Args:
        codecs: a field's name, or `""` for every field, to a codec's string form.
        skip_layers: these stay in the plain codec of the model's dtype; negative numbers count from the last.
        sinks: so many first tokens are read raw.
        window: so many recent tokens are read raw, at least; None for the codecs' own residual window.
        map: another recipe for some layers or heads; `codecs` are then those of what it does not name.
    """

    text: str
    codecs: Mapping[str, str] = field(default_factory=dict)
    skip_layers: tuple[int, ...] = ()
    sinks: int = 0
    window: int | None = None
    map: BitMap | None = None

    def at(self, layer: int, head: int) -> Recipe:
        """The recipe of one KV head, which has no map."""
        return self if self.map is None else self.map.at(layer, head)

    def parts(self) -> tuple[Recipe, ...]:
        """All recipes in it: itself, or its map's."""
        return (self,) if self.map is None else self.map.recipes()

    def loaded(self) -> tuple[KVCodec, ...]:
        """The codecs that it names."""
        return tuple(load_codec(c) for r in self.parts() for c in r.codecs.values() if c != "auto")

    def check_options(self) -> None:
        """Refuses options that would change nothing. Raises ConfigError."""
        if self.map is not None:
            return  # its recipes were checked as it was read
        coded = [c for c in self.loaded() if not c.plain]
        if (self.sinks or self.window is not None) and not coded:
            raise ConfigError(
                f"kv={self.text!r}: sinks and window keep tokens out of a codec that rounds them, and none does here; "
                "drop them"
            )
        for codec in coded:
            if self.window is not None and self.window < codec.residual_tokens:
                raise ConfigError(
                    f"kv={self.text!r}: {codec_text(codec)} keeps {codec.residual_tokens} recent tokens raw by itself; "
                    "give a wider window, or change that parameter"
                )

    def check_files(self) -> None:
        """Refuses codecs that learn from a text and have not, or another's. Raises ConfigError."""
        for codec in self.loaded():
            check = getattr(codec, "check_file", None)
            if check is not None:
                check()

    def codec(self, field_name: str, model_dtype: str) -> KVCodec:
        """The codec of a field for a model that computes in `model_dtype`."""
        chosen = self.codecs.get(field_name, self.codecs.get("", "auto"))
        return plain_codec(model_dtype) if chosen == "auto" else load_codec(chosen)

    def skips(self, layer: int, n_layers: int) -> bool:
        """Whether the layer stays plain; negative numbers count from the last."""
        return any(layer == s % n_layers for s in self.skip_layers)


def plain_codec(model_dtype: str) -> KVCodec:
    """The plain codec that holds `model_dtype` exactly."""
    if model_dtype not in PLAIN_OF_DTYPE:
        raise ConfigError(
            f"no plain codec for {model_dtype}; load the model in float32, float16, bfloat16 or float64"
        )
    return load_codec(PLAIN_OF_DTYPE[model_dtype])


def parse_recipe(text: str) -> Recipe:
    """Parses and checks a `kv=` string without a model.

    Raises:
        ConfigError: one line that says what would work.
    """
    if text.strip().startswith(PREFIX):
        found = read_map(text.strip(), parse_recipe)
        return Recipe(text, found.rest.codecs, map=found)
    body, *options = (part.strip() for part in text.split(";"))
    given: dict[str, tuple[int, ...]] = {}
    for option in options:
        key, _, value = (x.strip() for x in option.partition("="))
        if key not in ("skip_layers", "sinks", "window"):
            raise ConfigError(f"kv={text!r}: unknown option {key!r}; known: {_OPTIONS}")
        if key in given:
            raise ConfigError(f"kv={text!r}: {key} is given twice")
        try:
            given[key] = tuple(int(x) for x in value.split(","))
        except ValueError:
            given[key] = ()
        if key == "skip_layers" and not given[key]:
            raise ConfigError(
                f"kv={text!r}: skip_layers takes layer numbers, as in skip_layers=0,1,-1"
            )
        if key != "skip_layers" and (len(given[key]) != 1 or given[key][0] < 0):
            raise ConfigError(f"kv={text!r}: {key} takes a number of tokens, as in {key}=4")
    codecs = _fields(text, body) if _per_field(body) else {"": body}
    (sinks,), (window,) = given.get("sinks", (0,)), given.get("window", (None,))
    recipe = Recipe(text, codecs, given.get("skip_layers", ()), sinks, window)
    recipe.loaded()
    return recipe


def block_tokens_for(codecs: Iterable[KVCodec], block_tokens: int) -> int:
    """Tokens per block under these codecs: as asked, or for the default of 32 the least multiple that serves them.

    Raises:
        ConfigError: another number was asked for, and the codecs' groups do not fill such blocks.
    """
    codecs = list(codecs)
    unit = math.lcm(*(c.group_tokens for c in codecs))
    if block_tokens == DEFAULT_BLOCK_TOKENS or block_tokens % unit == 0:
        return math.lcm(block_tokens, unit)
    names = ", ".join(dict.fromkeys(codec_text(c) for c in codecs if c.group_tokens > 1))
    raise ConfigError(
        f"blocks of {block_tokens} tokens do not hold whole groups of {names}; take a multiple of {unit}, as "
        f"{-(-block_tokens // unit) * unit}"
    )


def _fields(text: str, body: str) -> dict[str, str]:
    """`"k=kivi:bits=2,residual=128,v=int4"`: what names no field is one more parameter of the codec before it."""
    codecs: dict[str, str] = {}
    last = ""
    for item in body.split(","):
        name, _, codec = (x.strip() for x in item.partition("="))
        if name in codecs:
            raise ConfigError(f"kv={text!r}: {name} is given twice")
        if name in FIELDS:
            codecs[name] = codec
            last = name
        elif ":" in codecs.get(last, ""):
            codecs[last] += f",{item.strip()}"
        else:
            raise ConfigError(
                f"kv={text!r}: unknown field {name!r}; fields are {', '.join(FIELDS)}"
            )
    return codecs


def _per_field(body: str) -> bool:
    """Whether the text reads `field=codec,...` rather than `codec:parameter=value,...`."""
    return "=" in body.partition(":")[0]
