"""Does one tenant learn what another has asked? A test that an operator can run on the engine that serves.

Three random prompts of one length go through the engine: A's, the same one as B, and one that nobody has seen as B.
What B can observe must not tell the second from the third: tokens found, tokens computed, steps until each token. The
same holds beside a request of A's that is still running. Then A asks again, and must find its own: a test of nothing
proves nothing.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from quire.engine.engine import Engine
from quire.engine.params import SamplingParams
from quire.errors import ConfigError, InvariantError
from quire.store.namespace import Namespace

__all__ = ["Observed", "check_isolation"]

OUTPUT_TOKENS = 2


@dataclass(frozen=True)
class Observed:
    """What a tenant can count of one request: no times, which vary by themselves.

    Args:
        cached_tokens: found, as its answer says.
        computed_tokens: pushed through the model.
        steps: of the engine, from submission to each of its tokens.
    """

    cached_tokens: int
    computed_tokens: int
    steps: tuple[int, ...]


def check_isolation(engine: Engine, a: Namespace, b: Namespace, *, chunks: int = 3) -> Observed:
    """Runs the test on an engine that is otherwise idle.

    Args:
        engine: over a runner that shares prefixes.
        a, b: two tenants without a declared prefix in common.
        chunks: whole chunks of the prompts.

    Returns:
        What B saw, both times.

    Raises:
        ConfigError: nothing is shared here, or the engine is busy.
        InvariantError: B saw a difference, or A did not find its own.
    """
    sharing = getattr(engine.runner, "sharing", None)
    if sharing is None or engine.has_work:
        raise ConfigError("the isolation test needs an idle engine over share='prefix'")
    n_tokens = chunks * sharing.grain + 1

    vocab_size = engine.runner.vocab_size
    firsts = secrets.SystemRandom().sample(range(vocab_size), 3)
    asked, unseen, shared = (  # a first token in common would be a hit of one token on B's own
        [first, *(secrets.randbelow(vocab_size) for _ in range(n_tokens - 1))] for first in firsts
    )
    _observe(engine, asked, a)
    same, other = _observe(engine, asked, b), _observe(engine, unseen, b)
    if same != other or same.cached_tokens:
        raise InvariantError(
            f"a tenant can tell what another has asked: it counts {same} on the other's prompt and {other} on one that "
            "nobody has seen"
        )
    both = _together(engine, shared, a, b)
    if both != other:
        raise InvariantError(
            f"a tenant can tell what another is asking: it counts {both} beside it and {other} alone"
        )
    again = _observe(engine, asked, a)
    if again.cached_tokens < chunks * sharing.grain:
        raise InvariantError(
            f"the test shows nothing: a tenant found {again.cached_tokens} of its own {n_tokens} tokens"
        )
    return same


def _observe(engine: Engine, prompt: list[int], namespace: Namespace) -> Observed:
    return _run(engine, {engine.add_request(prompt, _params(), namespace=namespace): None})


def _together(engine: Engine, prompt: list[int], a: Namespace, b: Namespace) -> Observed:
    """What B counts while A asks the same, just before it."""
    engine.add_request(prompt, _params(), namespace=a)
    return _run(engine, {engine.add_request(prompt, _params(), namespace=b): None})


def _params() -> SamplingParams:
    return SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)


def _run(engine: Engine, watched: dict[str, None]) -> Observed:
    """Steps until nothing is left; what was counted of the watched request."""
    steps: list[int] = []
    cached = computed = at = 0
    while engine.has_work:
        at += 1
        for delta in engine.step():
            if delta.error is not None:
                raise delta.error
            if delta.request_id in watched:
                steps += [at] * len(delta.token_ids)
                if delta.output is not None:
                    cached = delta.output.figures.cached_tokens
                    computed = delta.output.figures.computed_tokens
    return Observed(cached, computed, tuple(steps))
