"""`press`: somebody else's score, an object in the form of kvpress, with real freeing, batching and serving.

Idea: most methods of that library are one function, `score(module, hidden_states, keys, values, attentions, kwargs)` ->
    `[1, H_kv, T]`, called once per layer with the whole prompt. Here it is called with the same tensors when the prompt
    is over, and the best tokens stay: copied into blocks of their own, the rest given back.
Source: the interface of NVIDIA's kvpress, `ScorerPress`. No code of it is in here.
Differs: the first tokens and a recent window stay whatever their score; `sinks=0,window=0` leaves all to the score.
    What stays is `round(budget * T)` tokens, there a ratio of what goes, rounded down. Random numbers that a press
    draws are the same each time, so that a request computed anew keeps the same tokens. Attention weights are never
    there. A press that does more than score (a `compress`, a hook or a pass of its own) is refused.
Needs: the package, installed beside: `pip install --no-deps kvpress`. Or any object: `quire.retention.outside(press)`.
Cost: where a score looks at hidden states or positions, `T * width` of them per layer are kept until the prompt is
    over, outside the arena, and no prefix is looked for. Tokens go once, at the first prompt's end; later ones stay.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from quire.errors import ConfigError
from quire.retention.contract import FOREVER, Budget, Called, Scored, Seen, check_tokens
from quire.retention.maps import Digest

if TYPE_CHECKING:
    import torch

    from quire.retention.recipe import Keep

_ANYWAY = ("ScorerPress", "BasePress")
"""Classes whose `compress` keeps the best of `score` and nothing else, by name."""
_MORE = ("compress", "forward_hook", "__call__")
_INSTEAD = {
    "AdaKVPress": "ada(press:kvpress.NAME) spreads a layer's budget over its heads",
    "CriticalAdaKVPress": "ada(press:kvpress.NAME) spreads a layer's budget over its heads",
    "PyramidKVPress": "pyramid(press:kvpress.SnapKVPress) spreads the budget over layers",
    "ObservedAttentionPress": "h2o adds up what all queries paid",
    "KVzipPress": "kvzip reads the prompt once more",
    "KVgradPress": "kvzip reads the prompt once more",
    "SimLayerKVPress": "fastgen chooses by head",
    "DecodingPress": "h2o, tova, rkv and others drop while text is generated",
    "CompressionRatioDecodingPress": "h2o, tova, rkv and others drop while text is generated",
}
"""What does the same here."""


class CannotScoreError(Exception):
    """A press failed on one sequence, which keeps everything then: most want more tokens than their window."""


class Held:
    """An object that counts as itself, whatever it says it equals."""

    def __init__(self, press: Any) -> None:
        self.press = press


@dataclass(frozen=True)
class Policy(Scored):
    """`budget`, `sinks`, `window`; `of`: the class, as in `kvpress.SnapKVPress`.

    What else is written goes to the class (`options`). In Python the object may be `given` instead.
    """

    boundary: int = field(default=0, init=False)
    every: int = field(default=FOREVER, init=False)
    of: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    given: Held | None = field(default=None, repr=False)
    """The object itself, where it was not named."""
    scorer: Any = field(default=None, init=False, repr=False, compare=False)
    """The object; None until it is `bound`."""
    name: ClassVar[str] = "press"
    first: ClassVar[str] = "of"
    calls: ClassVar[bool] = True
    once: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Budget.parse(self.budget, f"{self.name}: budget"))
        check_tokens(self.name, "sinks", self.sinks, 0)
        check_tokens(self.name, "window", self.window, 0)
        self._check_budget()
        package, _, cls = str(self.of).rpartition(".")
        if not (package and all(x.isidentifier() for x in (*package.split("."), cls))):
            raise ConfigError(
                f"press: {self.of!r} names no class; press:kvpress.SnapKVPress,budget=0.25 does"
            )
        if "compression_ratio" in dict(self.options):
            raise ConfigError(
                f"press: {cls} gets its compression_ratio from budget=, the share that stays; drop it"
            )
        if self.given is not None:
            object.__setattr__(self, "scorer", self.given.press)
            return
        package = package.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"press: no package {package} is installed here; install it beside, or write press:PACKAGE.CLASS of "
                "one that is"
            )

    @property
    def imports(self) -> tuple[Any, ...]:
        """What of other people's code it loads when it is bound; a request may name only what its server did."""
        return () if self.given is not None else (self.of, self.options)

    def bound(self, digest: Digest) -> Policy:
        """With its object. Raises ConfigError: it cannot be had, or does more than score."""
        if self.scorer is not None:
            return self
        module, _, name = self.of.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as e:
            raise ConfigError(f"press: {self.of} cannot be loaded ({e})") from e
        check_press(cls, name)
        try:
            press = cls(**dict(self.options))
        except Exception as e:
            raise ConfigError(f"press: {name} cannot be made ({type(e).__name__}: {e})") from e
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        out = Policy(**values)
        object.__setattr__(out, "scorer", press)
        return out

    def score(self, seen: Seen) -> torch.Tensor:
        assert seen.called is not None
        called = seen.called()
        try:
            found = call_score(self.scorer, called, seen.layer)
        except Exception as e:
            name, n = type(self.scorer).__name__, called.keys.shape[2]
            raise CannotScoreError(
                f"{name} cannot score {n} tokens ({type(e).__name__}: {e})"
            ) from e
        return found[:, : seen.positions.shape[1]]


def outside(press: Any, budget: Any = None, *, sinks: int = 4, window: int = 32) -> Keep:
    """Any object with kvpress's `score` as a policy, for `keep=` of an engine, a request or `attach`.

    Args:
        press: `score(module, hidden_states [1, T, width], keys, values [1, H_kv, T, D], attentions None, kwargs)` gives
            `[1, H_kv, T]`, higher stays. One object serves one model.
        budget: what stays, see `Budget`; by default what its own `compression_ratio` leaves, or a quarter.
        sinks, window: first and last tokens that stay whatever their score.

    Raises:
        ConfigError: it has no score, or does more than score.
    """
    from quire.retention.recipe import Keep

    cls = type(press)
    check_press(cls, cls.__name__)
    if budget is None:
        ratio = float(getattr(press, "compression_ratio", 0) or 0)
        budget = Budget(share=1 - ratio) if 0 < ratio < 1 else Budget(share=0.25)
    policy = Policy(
        budget=budget,
        sinks=sinks,
        window=window,
        of=f"outside.{cls.__name__}",
        given=Held(press),
    )
    text = f"press:{cls.__name__},budget={policy.budget},sinks={sinks},window={window}"
    return Keep(text, policy)


def check_press(cls: type[Any], name: str) -> None:
    """Refuses a class whose objects do more than score, or nothing of the kind. Raises ConfigError."""
    if not isinstance(cls, type):
        raise ConfigError(
            f"press: {name} is no class; write press:PACKAGE.CLASS, as press:kvpress.SnapKVPress"
        )
    instead = _INSTEAD.get(name)
    hint = f"; {instead}" if instead else ""
    for what in _MORE:
        owner = next((k for k in cls.__mro__ if what in vars(k)), None)
        if owner is not None and owner.__name__ not in _ANYWAY:
            raise ConfigError(
                f"press: {name} has a {what} of its own, so it does more than score tokens, and only scores are taken "
                f"from outside{hint}"
            )
    if not callable(getattr(cls, "score", None)):
        raise ConfigError(
            f"press: {name} has no score(module, hidden_states, keys, values, attentions, kwargs){hint}"
        )


def call_score(press: Any, called: Called, layer: int) -> torch.Tensor:
    """`[H, T]` float32, finite: what a press says of one layer's tokens.

    Raises:
        ConfigError: it gives something else.
        Exception: whatever it raises.
    """
    import torch

    heads, tokens = called.keys.shape[1:3]
    before = getattr(press, "compression_ratio", None)
    if before is not None:  # some scores mark what goes, and must know how many
        press.compression_ratio = max(0.0, 1 - (called.kept_tokens + 0.5) / tokens)
    device = called.keys.device
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            torch.manual_seed(layer)
            found = press.score(
                called.module, called.hidden, called.keys, called.values, None, called.kwargs
            )
    finally:
        if before is not None:
            press.compression_ratio = before
    if not isinstance(found, torch.Tensor) or found.shape != (1, heads, tokens):
        what = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ConfigError(
            f"press: {type(press).__name__} scores (1, {heads}, {tokens}) tokens with {what}"
        )
    most = torch.finfo(torch.float32).max
    return found[0].float().nan_to_num(nan=-most, posinf=most, neginf=-most)
