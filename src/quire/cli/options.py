r"""What a command was asked to do, as one frozen value: flags over --config FILE over the environment over defaults.

    [run]                        quire run --config FILE
    model = "path/to/model"
    kv = "bf16"
    max_tokens = 64
    stop = ["\n\n"]

Keys are the long flags, with _ or - between words. At the top of the file they hold for any command.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from quire.engine.params import SamplingParams
from quire.errors import ConfigError, RequestError
from quire.plan.choices import beside
from quire.retention import parse_keep
from quire.spec import DEFAULT_BLOCK_TOKENS

if TYPE_CHECKING:
    from quire.store.tiers.recipe import TiersConfig

__all__ = [
    "ChatOptions",
    "Options",
    "RunOptions",
    "TourOptions",
    "check_context",
    "check_tiers",
    "flag",
    "tiers_of",
]

AUTO = "auto"
"""--share auto: prefixes are shared where the model allows it."""

NO_CACHE = "none"
"""--kv none: nothing is kept, everything is computed at every step."""


def _given(value: Any) -> bool:
    """Whether the command line sets it: 0 does, a flag that is not there does not."""
    return value is not None and value is not False and value not in ([], ())


def flag(name: str) -> str:
    """`max_tokens` to `--max-tokens`."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `run` and `chat` share. `given` names what the user set, in whatever way."""

    model: str | None = None
    kv: str = "auto"
    keep: str = "full"
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    dtype: str | None = None
    device: str | None = None
    memory: str | int | float = 0.5
    block_tokens: int = DEFAULT_BLOCK_TOKENS
    attention: str = "auto"
    weights: str = "auto"
    compile: bool = False
    quiet: bool = False
    given: frozenset[str] = frozenset()

    @classmethod
    def resolve(cls, table: str, flags: Mapping[str, Any]) -> Self:
        """Merges the sources and checks what can be checked without a model.

        Args:
            table: the command's name, and its table in the config file.
            flags: the command line's, None (or False, or empty) where not given. `config` is the file.

        Raises:
            ConfigError: an unknown key, a value of the wrong type, or options that exclude each other.
        """
        known = {f.name for f in fields(cls)} - {"given"}
        values: dict[str, Any] = {}
        if os.environ.get("QUIRE_MODEL"):
            values["model"] = os.environ["QUIRE_MODEL"]
        given = set()
        if flags.get("config") is not None:
            read = _read_config(Path(flags["config"]), table, cls)
            values |= read
            given |= set(read)
        set_flags = {k: v for k, v in flags.items() if k in known and _given(v)}
        values |= set_flags
        given |= set(set_flags)
        for name in {"stop", "cors", "models", "adapter"} & set(values):
            several = values[name]
            values[name] = (several,) if isinstance(several, str) else tuple(several)
        if values.get("tiers") and "share" in known and "share" not in values:
            values["share"] = "prefix"  # what tiers keep is found by its prefix
        made = cls(**values, given=frozenset(given))
        made.check()
        return made

    def check(self) -> None:
        """Raises ConfigError where two options cannot both mean what they say."""
        if self.max_tokens < 1:
            raise ConfigError(f"--max-tokens must be at least 1, not {self.max_tokens}")
        if self.kv == NO_CACHE:
            idle = ("keep", "memory", "block_tokens", "attention")
            for name in sorted(self.given & set(idle)):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ConfigError(
                        f"{flag(name)} describes a cache and --kv none keeps none; drop one of them"
                    )
        self.sampling()

    def sampling(self, **changes: Any) -> SamplingParams:
        """The sampling parameters, with `changes` of one prompt.

        Raises:
            ConfigError: out of range, or without effect.
        """
        wanted: dict[str, Any] = {
            n: getattr(self, n) for n in _SAMPLING if hasattr(self, n)
        } | changes
        try:
            params = SamplingParams(**wanted)
        except RequestError as e:
            raise ConfigError(str(e)) from e
        if params.greedy:
            for name, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                value = getattr(params, name)
                if value != neutral and not (name == "top_k" and value == 1):
                    raise ConfigError(
                        f"{flag(name)} {value:g} has no effect at temperature 0, which always takes the best token; "
                        "add --temperature, say 0.8"
                    )
        return params


_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "ignore_eos",
)


def tiers_of(text: str) -> TiersConfig:
    """Tiers as they were asked for; a Redis server's password may come from the environment. Raises ConfigError."""
    from quire.store.tiers.recipe import parse_tiers

    return parse_tiers(text, password=os.environ.get("QUIRE_REDIS_PASSWORD") or None)


def check_tiers(tiers: str, share: str, kv: str) -> None:
    """Raises ConfigError where tiers are written wrong, or have nothing to keep."""
    if not tiers_of(tiers).on:
        return
    if kv == NO_CACHE:
        raise ConfigError(
            "--tiers keep cached blocks and --kv none caches nothing; drop one of them"
        )
    if share == "off":
        raise ConfigError(
            "--tiers keep what a prefix cache finds, and --share off has none; drop one of them"
        )


def check_context(context: object, keep: str, who: str) -> None:
    """Raises ConfigError where a context is neither text nor a number of tokens, or nothing goes at its end."""
    text = isinstance(context, str) and bool(context)
    if not text and not (type(context) is int and context > 0):
        raise ConfigError(
            f"{who} must be a number of tokens from 1 on, or the text that the prompt begins with, not {context!r}"
        )
    if not parse_keep(keep).scores:
        raise ConfigError(
            f"{who} says after what tokens go, and --keep {keep} lets none go there; drop it, or keep by score, as "
            "--keep kvzip:budget=0.5"
        )


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """What `quire run` does."""

    prompts: str | None = None
    share: str = "off"
    tiers: str = ""
    context: str | int | None = None
    ignore_eos: bool = False
    json: bool = False
    compare: str | None = None
    trace: bool = False

    def check(self) -> None:
        """See `Options.check`."""
        super().check()
        check_tiers(self.tiers, self.share, self.kv)
        if self.tiers and self.compare is not None:
            raise ConfigError("--compare runs one prompt once; drop --tiers")
        if self.context is not None:
            check_context(self.context, self.keep, "--context")
            if self.compare is not None:
                raise ConfigError(
                    "--context is what several prompts begin with, and --compare runs one; drop --context"
                )
        if self.share != "off" and self.kv == NO_CACHE:
            raise ConfigError(
                "--share finds cached prefixes and --kv none caches nothing; drop one of them"
            )
        if self.compare is not None:
            if self.share != "off":
                raise ConfigError(
                    "--compare runs one prompt, which finds nothing of another's; drop --share"
                )
            if self.compare != NO_CACHE:
                raise ConfigError(f"unknown --compare {self.compare!r}; known: none")
            if self.kv == NO_CACHE:
                raise ConfigError("--compare none compares a cache with none; drop --kv none")
            if self.trace:
                raise ConfigError("--compare and --trace each fill the screen; choose one of them")
        if self.quiet and not self.json:
            for name in ("compare", "trace"):
                if getattr(self, name):
                    raise ConfigError(
                        f"--quiet would hide what --{name} shows; drop one of them, or add --json"
                    )


@dataclass(frozen=True, kw_only=True)
class ChatOptions(Options):
    """What `quire chat` does."""

    max_tokens: int = 256
    share: str = "off"
    tiers: str = ""
    session: str | None = None
    system: str | None = None

    def check(self) -> None:
        """See `Options.check`."""
        super().check()
        check_tiers(self.tiers, self.share, self.kv)
        if tiers_of(self.tiers).offload:
            raise ConfigError(
                "--tiers: offload=on is for requests larger than the cache, and a conversation stays within it; "
                "drop it, or give more --memory"
            )
        if self.session is not None and self.kv == NO_CACHE:
            raise ConfigError(
                "--session keeps a conversation's cache and --kv none has none; drop one of them"
            )


@dataclass(frozen=True, kw_only=True)
class TourOptions(Options):
    """What `quire tour` shows: `panels` by number, all of them when none is named."""

    panels: tuple[int, ...] = ()
    json: bool = False


# -- the file ----------------------------------------------------------------------------------------------------

_OTHERS = {"run", "chat", "eval", "serve", "map", "tune"}
_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "tuple": (list, str),
    "memory": (str, int, float),
    "context": (str, int),
}


def _read_config(path: Path, table: str, cls: type[Options]) -> dict[str, Any]:
    try:
        with path.open("rb") as f:
            document = tomllib.load(f)
    except OSError as e:
        raise ConfigError(f"--config {path}: {e.strerror or e}") from e
    except ValueError as e:
        raise ConfigError(f"--config {path}: not TOML ({e})") from e
    own = document.pop(table, {})
    for name in _OTHERS & set(document):
        document.pop(name)  # another command's, a bit map, or the evidence behind one
    if not isinstance(own, dict):
        raise ConfigError(f"--config {path}: {table} must be a table, [{table}]")
    values: dict[str, Any] = {}
    for where, part in (("", document), (f"[{table}] ", own)):
        for key, value in part.items():
            name = key.replace("-", "_")
            values[name] = _checked(name, value, cls, f"--config {path}: {where}{key}")
    if "kv" in values:
        values["kv"] = beside(values["kv"], path)
    return values


def _checked(name: str, value: Any, cls: type[Options], where: str) -> Any:
    kinds = {f.name: str(f.type) for f in fields(cls) if f.name != "given"}
    if name not in kinds:
        raise ConfigError(f"{where} is unknown; known: {', '.join(sorted(kinds))}")
    kind = name if name in _TYPES else kinds[name].partition("[")[0].partition(" ")[0]
    wanted = _TYPES[kind]
    wrong = not isinstance(value, wanted) or (isinstance(value, bool) and kind != "bool")
    if wrong or (
        kind == "tuple"
        and not isinstance(value, str)
        and not all(isinstance(x, str) for x in value)
    ):
        said = {"tuple": "a list of strings", "str": "a string", "bool": "true or false"}
        raise ConfigError(f"{where} = {value!r} must be {said.get(kind, 'a number')}")
    return value
