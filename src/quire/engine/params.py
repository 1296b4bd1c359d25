"""How one request's tokens are chosen: the user's wishes, checked before anything runs. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from quire.engine.constraint import Constraint
from quire.errors import RequestError

__all__ = ["MAX_LOGPROBS", "SamplingParams", "check_integer"]

MAX_LOGPROBS = 1000
"""Most alternatives per position: each costs a Python object per token."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. Validated on construction; a bad value says what would work.

    The transforms run in this order, each as `transformers` defines it (see `sampling`): repetition penalty, frequency
    and presence penalty, logit bias, minimum tokens, temperature, top-k, top-p, min-p.

    Args:
        max_tokens: most output tokens; None: as many as the context and the pool allow. 0 only scores the prompt
            (`prompt_logprobs`).
        min_tokens: no end-of-sequence, stop id or stop string before this many output tokens.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k best tokens (and ties of the k-th); 0: all.
        top_p: keep the fewest best tokens whose probabilities reach this sum; 1: all.
        min_p: keep tokens at least this fraction as probable as the best one; 0: all.
        repetition_penalty: logits of tokens in prompt or output are divided (positive) or multiplied (negative) by it.
        presence_penalty: subtracted from logits of tokens in the output.
        frequency_penalty: subtracted as many times as the token occurs in the output.
        logit_bias: token id → what is added to its logit.
        seed: the random stream; None: drawn at submission and reported. Tokens are a function of (seed, sample index,
            output position) and the logits alone, never of the batch.
        n: samples of the same prompt, which is prefilled once.
        stop: strings that end the output; the text is cut before them.
        stop_token_ids: ids that end the output; the id is in `token_ids`, its text is not shown.
        ignore_eos: go on after the end-of-sequence token.
        logprobs: None: none; 0: of each output token; k: also of the k best; under the model's own
            distribution, before any transform.
        prompt_logprobs: the same for the prompt's tokens; the first has none.
        skip_special_tokens: leave special tokens out of the text.
        constraint: a compiled grammar that the output must follow; ends where the grammar does.

    Raises:
        RequestError: a value out of range.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    constraint: Constraint | None = None
    greedy: bool = field(init=False, repr=False, compare=False)
    penalised: bool = field(init=False, repr=False, compare=False)
    plain: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_integer("max_tokens", self.max_tokens, 0, None, optional=True)
        check_integer("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; lower one or raise the other"
            )
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise RequestError(
                "max_tokens=0 gives nothing; use at least 1, or set prompt_logprobs to score the prompt"
            )
        check_number("temperature", self.temperature, 0.0, 100.0)
        if 0 < self.temperature < 1e-5:
            raise RequestError(
                f"temperature={self.temperature} is too small; use 0 for greedy, or at least 1e-5"
            )
        check_integer("top_k", self.top_k, 0, 2**31 - 1)
        check_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        check_number("presence_penalty", self.presence_penalty, -100.0, 100.0)
        check_number("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        check_integer("seed", self.seed, 0, 2**64 - 1, optional=True)
        check_integer("n", self.n, 1, 1024)
        check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        check_integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        if self.constraint is not None and (self.min_tokens or self.ignore_eos):
            raise RequestError(
                "a grammar says where the output ends; drop min_tokens and ignore_eos, or the grammar"
            )
        self._normalise()

    def _normalise(self) -> None:
        """Give the loose fields one form each: tuples, a plain dict, and three derived flags."""
        put = object.__setattr__
        stop = (self.stop,) if isinstance(self.stop, str) else _listed("stop", self.stop)
        for string in stop:
            if not isinstance(string, str) or not string:
                raise RequestError(f"stop holds {string!r}; use non-empty strings, or stop=[]")
        put(self, "stop", stop)
        ids = _listed("stop_token_ids", self.stop_token_ids)
        for token in ids:
            check_integer("stop_token_ids", token, 0, None)
        put(self, "stop_token_ids", ids)
        bias = dict(self.logit_bias)
        for token, value in bias.items():
            check_integer("logit_bias key", token, 0, None)
            check_number("logit_bias value", value, -1e4, 1e4)
        put(self, "logit_bias", bias)
        penalised = (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
        greedy = self.temperature == 0.0
        put(self, "greedy", greedy)
        put(self, "penalised", penalised)
        plain = (
            greedy
            and not penalised
            and not bias
            and self.min_tokens == 0
            and self.logprobs is None
            and self.constraint is None
        )
        put(self, "plain", plain)


def _listed(name: str, value: object) -> tuple[object, ...]:
    """A list or None as a tuple."""
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise RequestError(f"{name}={value!r} must be a list; use {name}=[{value!r}]")
    return tuple(value)


def check_integer(
    name: str, value: object, low: int, high: int | None, *, optional: bool = False
) -> None:
    """Refuse what is not an integer in [low, high]."""
    if value is None and optional:
        return
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not ok or (high is not None and isinstance(value, int) and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise RequestError(
            f"{name}={value!r} must be an integer {limit}{' or None' if optional else ''}"
        )


def check_number(
    name: str, value: object, low: float, high: float, *, open_low: bool = False
) -> None:
    """Refuse what is not a finite number in [low, high], or (low, high] with `open_low`."""
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or not low <= value <= high
        or (open_low and value == low)
    ):
        limit = (
            f"above {low:g} and at most {high:g}" if open_low else f"between {low:g} and {high:g}"
        )
        raise RequestError(f"{name}={value!r} must be a number {limit}")
