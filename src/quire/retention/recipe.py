"""`keep=` as a value: the string form of a retention policy, and the registry that it is resolved against.

full                          every token
window:4096                   a sliding window
sinks:4+window:4096           and the first tokens beside it
h2o:budget=0.2                a fifth stays; 512: tokens; 64MiB: bytes
h2o:budget=512,window=64      with parameters
ada(snapkv:budget=0.2)        a wrapper spreads another policy's budget
ada(h2o:budget=512):floor=0.3 with parameters of its own
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from quire.errors import ConfigError
from quire.retention.contract import Wrapper
from quire.retention.maps import Digest
from quire.spec import SpanPolicy

_NOT_POLICIES = frozenset({"recipe", "contract", "maps"})


def _others() -> Iterable[Any]:
    """Entry points of other packages."""
    from importlib.metadata import entry_points  # itself slow to import, and rarely needed

    return entry_points(group="quire.retention")


@cache
def _own() -> frozenset[str]:
    import quire.retention as folder

    return frozenset(
        m.name for m in pkgutil.iter_modules(folder.__path__) if m.name not in _NOT_POLICIES
    )


@cache
def available() -> tuple[str, ...]:
    """Names of all policies: the files of this folder and the entry points of other packages."""
    return tuple(sorted(_own() | {e.name for e in _others()}))


@cache
def policy_class(name: str) -> type[Any]:
    """The policy's class. Raises ConfigError with the known names."""
    if name in _own():
        own: type[Any] = importlib.import_module(f"quire.retention.{name}").Policy
        return own
    for entry in _others():
        if entry.name == name:
            found: type[Any] = entry.load()
            return found
    raise ConfigError(f"unknown policy {name!r}; known: {', '.join(available())}")


def shown() -> tuple[str, ...]:
    """Policies worth a row of their own where techniques are compared: a class attribute `shown` names them."""
    return tuple(text for n in sorted(_own()) for text in getattr(policy_class(n), "shown", ()))


@dataclass(frozen=True)
class Keep:
    """A parsed `keep=`: its text and its policy. Taken wherever the text is."""

    text: str
    policy: Any

    @property
    def full(self) -> bool:
        """Whether every token stays."""
        return bool(self.policy.name == "full")

    @property
    def scores(self) -> bool:
        """Whether tokens go by their scores, at fixed lengths."""
        return not self.full and not self.spans and not self.reads

    @property
    def canonical(self) -> str:
        """One text for all spellings of the same policy: every parameter by name, defaults too."""
        return _canonical(self.policy)

    @property
    def spans(self) -> bool:
        """Whether it narrows what queries read, rather than score tokens."""
        return isinstance(self.policy, SpanPolicy)

    def check_latents(self) -> None:
        """Refuses what tells heads apart or looks at keys: these models keep one latent for all. Raises ConfigError."""
        if self.reads:
            raise ConfigError(
                f"keep={self.text!r}: this model keeps latents (MLA), whose bounds say nothing of its keys; use "
                "keep='full'"
            )
        if getattr(self.policy, "calls", False):
            raise ConfigError(
                f"keep={self.text!r}: this model keeps latents (MLA), which no press knows; use keydiff or h2o"
            )
        if not getattr(self.policy, "by_head", False):
            return
        instead = "layers can: pyramid(h2o:budget=0.2)"
        if self.spans:
            instead = "use window:N or keydiff"
        elif hasattr(self.policy, "uniform"):
            instead = "use uniform=true"
        raise ConfigError(
            f"keep={self.text!r}: this model keeps one latent for all heads, so heads cannot have budgets of their "
            f"own; {instead}"
        )

    @property
    def reads(self) -> bool:
        """Whether every token stays and queries read fewer of them."""
        return bool(getattr(self.policy, "reads", False))

    def bound(self, digest: Digest) -> Keep:
        """The same with what its policy has learned of the model whose weights have that digest.

        Raises:
            ConfigError: it needs that and has nothing.
        """
        bound = getattr(self.policy, "bound", None)
        return self if bound is None else Keep(self.text, bound(digest))


def parse_keep(keep: str | Keep) -> Keep:
    """Parses and checks a `keep=` string without a model; a policy that was parsed or made already stays as it is.

    Raises:
        ConfigError: one line that says what would work.
    """
    return keep if isinstance(keep, Keep) else _parse(keep)


@cache
def _parse(text: str) -> Keep:
    terms = [t.strip() for t in _split(text, "+")]
    policy = load_policy(terms[0], text)
    for term in terms[1:]:
        other = load_policy(term, text)
        join = getattr(policy, "join", None)
        policy = join(other) if join is not None else None
        if policy is None:
            raise ConfigError(
                f"keep={text!r}: {terms[0]} and {term} cannot be joined; sinks:4+window:1024 can, and a policy that "
                "scores takes both as parameters, as in h2o:budget=0.2,sinks=4,window=64"
            )
    check = getattr(policy, "check", None)
    if check is not None:
        check(text)
    return Keep(text.strip(), policy)


def load_policy(term: str, text: str = "") -> Any:
    """The policy for `"name"`, `"name:number"`, `"name:parameter=value,..."` or `"name(policy):..."`.

    Raises:
        ConfigError: unknown name or parameter, or a value that the policy refuses.
    """
    text = text or term
    inner, rest = None, ""
    head, bracket, tail = term.partition("(")
    if bracket and ":" not in head:
        body, closed, rest = _closing(tail)
        if not closed or (rest and not rest.startswith(":")):
            raise ConfigError(
                f"keep={text!r}: brackets do not match; ada(snapkv:budget=0.2) is the form"
            )
        inner, name, rest = parse_keep(body).policy, head.strip(), rest[1:]
    else:
        name, _, rest = (x.strip() for x in term.partition(":"))
    cls = policy_class(name)
    wraps = issubclass(cls, Wrapper)
    if wraps != (inner is not None):
        raise ConfigError(
            f"keep={text!r}: {name} "
            + (
                f"needs a policy, as in {name}(snapkv:budget=0.2)"
                if wraps
                else "takes no policy in brackets"
            )
        )
    known = [f.name for f in fields(cls) if f.name not in ("inner", "options") and f.init]
    first = getattr(cls, "first", known[0] if known else "")
    takes_more = any(f.name == "options" for f in fields(cls))
    values: dict[str, Any] = {} if inner is None else {"inner": inner}
    options: dict[str, Any] = {}
    for at, item in enumerate(filter(None, (x.strip() for x in rest.split(",")))):
        key, eq, value = (x.strip() for x in item.partition("="))
        if not eq and at == 0 and known:
            key, value = first, item
        if takes_more and key not in known and key.isidentifier() and value:
            if key in options:
                raise ConfigError(f"keep={text!r}: {key} is given twice")
            options[key] = _value(value)
            continue
        if key not in known or not value:
            takes = f"it takes {', '.join(known)}" if known else "it takes no parameters"
            raise ConfigError(f"keep={text!r}: unknown parameter {item!r} of {name}; {takes}")
        if key in values:
            raise ConfigError(f"keep={text!r}: {key} is given twice")
        values[key] = value if key == "budget" else _value(value)
    if takes_more:
        values["options"] = tuple(options.items())
    return cls(**values)


def _canonical(policy: Any) -> str:
    inner = getattr(policy, "inner", None) if isinstance(policy, Wrapper) else None
    own = (f for f in fields(policy) if f.init and f.name != "inner")
    values = ",".join(f"{f.name}={getattr(policy, f.name)}" for f in own)
    return f"{policy.name}({'' if inner is None else _canonical(inner)}):{values}"


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _split(text: str, at: str) -> list[str]:
    """Splits where no bracket is open."""
    out, depth = [""], 0
    for c in text:
        depth += (c == "(") - (c == ")")
        if c == at and not depth:
            out.append("")
        else:
            out[-1] += c
    if depth or not all(x.strip() for x in out):
        raise ConfigError(f"keep={text!r} is no policy; h2o:budget=0.2 or sinks:4+window:1024 are")
    return out


def _closing(text: str) -> tuple[str, bool, str]:
    """What lies before the bracket that closes, whether there is one, and what lies behind."""
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return text[:i], True, text[i + 1 :].strip()
    return text, False, ""
