"""The door: a request is checked here, once, for everything that can be known before it runs. No torch.

What is refused is refused in one line that says what would work; what passes fits, at least alone, and will finish.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from quire.engine.params import SamplingParams, check_integer
from quire.engine.request import Request
from quire.engine.runner import Room
from quire.engine.sharing import check_share
from quire.errors import CapacityError, ConfigError, RequestError
from quire.retention import Keep, parse_keep
from quire.store.namespace import Hints, Namespace

__all__ = ["Intake", "Prompt", "as_list", "check_text", "common", "output_limit"]

Prompt = str | Sequence[int]


def output_limit(
    room: Room, prompt_tokens: int, params: SamplingParams, keep: Keep | None = None
) -> int:
    """Most output tokens of such a request, here.

    Args:
        room: the runner, or a model of one.
        prompt_tokens: of the prompt.
        params: `max_tokens=None` takes what context and pool allow.
        keep: which of its tokens stay, where the room knows policies.

    Raises:
        RequestError: no prompt, or one beyond the context.
        CapacityError: it could never fit the pool, even alone.

    Cost: one question to the pool; a bisection where the answer is no.
    """
    context, asked = room.max_context_tokens, params.max_tokens
    policy: dict[str, Any] = {}
    if keep is not None:
        policy = {"keep": keep, "prompt_tokens": prompt_tokens}
        longer = room.context_tokens(keep, prompt_tokens)  # type: ignore[attr-defined]
        context = (
            min(context, longer) if asked is None else longer
        )  # nobody is given a stream without end unasked
    if prompt_tokens < 1:
        raise RequestError("the prompt is empty; give at least one token")
    left = context - prompt_tokens
    if left < 0 or (left == 0 and asked != 0):
        raise RequestError(
            f"the prompt has {prompt_tokens} tokens and the context {context}; "
            f"at most {max(context - 1, 0)} leave room for output"
        )
    want = left if asked is None else min(asked, left)
    if want < params.min_tokens:
        raise RequestError(
            f"min_tokens={params.min_tokens}, but the context of {context} leaves {left} after the prompt"
        )

    def fits(output_tokens: int) -> bool:  # the last token sampled is never put into the cache
        return room.fits(prompt_tokens + max(output_tokens, 1) - 1, **policy)

    if fits(want):
        return want
    low, high = 0, want  # fits(low), unless even the prompt does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low < 1 or not fits(low):
        raise CapacityError(
            f"a prompt of {prompt_tokens} tokens does not fit the cache even alone; "
            "shorten it, give the cache more memory, or choose a smaller codec"
        )
    if asked is None and low >= params.min_tokens:
        return low
    raise CapacityError(
        f"{prompt_tokens} prompt and {want} output tokens do not fit the cache even alone; "
        f"max_tokens={low} would"
    )


class Intake:
    """Makes requests of prompts and wishes.

    Args:
        room: where they will live.
        vocab_size: token ids are below it.
        tokenizer: for text prompts and stop strings; may be None.
        eos_token_ids: what ends a sequence; None: the tokenizer's.
        clock: seconds; stamps the arrival.
    """

    def __init__(
        self,
        room: Room,
        vocab_size: int,
        tokenizer: Any,
        eos_token_ids: Iterable[int] | None,
        clock: Callable[[], float],
    ) -> None:
        self.room = room
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        if eos_token_ids is None:
            eos = getattr(tokenizer, "eos_token_id", None)
            eos_token_ids = () if eos is None else (eos,)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.clock = clock

    def request(
        self,
        name: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        adapter: str | None = None,
        keep: str | Keep | None = None,
        context: int | str = 0,
        share: str | None = None,
        namespace: Namespace | None = None,
        hints: Hints | None = None,
        yields: str | None = None,
    ) -> Request:
        """Check and make one.

        Raises:
            RequestError: it is wrong.
            CapacityError: it could never fit.
        """
        params = params or SamplingParams()
        ids = self._token_ids(prompt)
        for what, tokens in (
            ("the prompt", ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            if tokens and not (min(tokens) >= 0 and max(tokens) < self.vocab_size):
                raise RequestError(
                    f"{what} holds a token id outside the vocabulary of {self.vocab_size}"
                )
        if params.stop and self.tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer; use stop_token_ids, or give the engine one"
            )
        check_integer("priority", priority, -1000, 1000)
        knows = getattr(self.room, "check_adapter", None)
        if adapter is not None and knows is not None:
            knows(adapter)
        policy = self._policy(keep)
        context_tokens = self._context(context, prompt, ids, policy)
        sharing = getattr(self.room, "sharing", None)
        shares = check_share(share, sharing)
        if hints is not None and (sharing is None or not shares):
            raise RequestError(
                "hints are about cached blocks and this request shares none; drop them"
            )
        if hints is not None and sharing is not None:
            sharing.check_hints()
        stop_ids = frozenset(params.stop_token_ids)
        most = output_limit(self.room, len(ids), params, policy)
        larger = getattr(self.room, "oversize", None)
        return Request(
            request_id=name,
            prompt_token_ids=ids,
            params=params,
            max_tokens=most,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            prompt=prompt if isinstance(prompt, str) else None,
            priority=priority,
            adapter=adapter,
            keep=policy,
            context=context_tokens,
            arrival_s=self.clock(),
            share=shares,
            namespace=namespace,
            hints=hints,
            yields=self._yields(yields, policy),
            oversize=larger is not None and policy is None and larger(len(ids) + max(most, 1) - 1),
            stop_ids=stop_ids if params.ignore_eos else stop_ids | self.eos_token_ids,
        )

    def _policy(self, keep: str | Keep | None) -> Keep | None:
        """The policy of a request: its own, or the runner's; None where that is to keep everything."""
        usual: Keep | None = getattr(self.room, "keep", None)
        if keep is None or (usual is None and str(keep) == "full"):
            return None if usual is None or usual.full else usual
        if usual is None:
            raise RequestError(
                f"this runner keeps no policy, so keep={keep!r} means nothing; drop it"
            )
        try:
            policy = parse_keep(keep)
            self._check_imports(keep, policy, usual)
            self.room.rules(policy)  # type: ignore[attr-defined]
        except ConfigError as e:
            raise RequestError(str(e)) from e
        return None if policy.full and usual.full else policy

    def _context(
        self, context: int | str, prompt: Prompt, ids: Sequence[int], policy: Keep | None
    ) -> int:
        """After how many tokens of a prompt some go already; 0: at its end only. Raises RequestError."""
        if context in (0, ""):
            return 0
        if policy is None or not policy.scores:
            keeps = "full" if policy is None else policy.text
            raise RequestError(
                f"context says after what tokens go, and keep={keeps!r} lets none go there; drop it, or keep by score, "
                "as keep='kvzip:budget=0.5'"
            )
        if isinstance(context, str):
            if not isinstance(prompt, str) or not prompt.startswith(context):
                raise RequestError(
                    "context must be the text that the prompt begins with, or a number of tokens"
                )
            context = common(self._token_ids(context), ids)
        check_integer("context", context, 1, len(ids))
        if context < len(ids) and not self.room.chunked_prefill:
            raise RequestError(
                "this model takes prompts whole, so no tokens go before a prompt's end; drop context"
            )
        return context

    def _yields(self, yields: str | None, policy: Keep | None) -> Any:
        """What a request gives up when memory runs short."""
        if yields is None:
            return None
        known = getattr(self.room, "yields", None)
        if known is None:
            raise RequestError(
                f"this runner can give nothing up, so yields={yields!r} means nothing"
            )
        if policy is not None:
            raise RequestError(
                f"yields={yields!r} is for requests that keep everything, and this one has keep={policy.text!r}; "
                "drop one of them"
            )
        usual: Keep | None = getattr(self.room, "keep", None)
        try:
            if usual is not None and not yields.startswith("kv="):
                self._check_imports(yields, parse_keep(yields), usual)
            return known(yields)
        except ConfigError as e:
            raise RequestError(str(e)) from e

    @staticmethod
    def _check_imports(keep: str | Keep, policy: Keep, usual: Keep) -> None:
        """A text loads no code of other people's that was not loaded at the start. Raises ConfigError."""
        wanted = getattr(policy.policy, "imports", ())
        if isinstance(keep, str) and wanted and wanted != getattr(usual.policy, "imports", ()):
            raise ConfigError(
                f"keep={keep!r}: a request loads no code from outside; it may change budget, sinks and window of the "
                "press that was opened with --keep, or give an object: quire.retention.outside(press)"
            )

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(
                    "a text prompt needs a tokenizer; give token ids, or the engine one"
                )
            check_text(prompt)
            return list(self.tokenizer.encode(prompt))
        ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        ids = list(ids) if isinstance(ids, Iterable) else [None]
        if not all(type(token) is int for token in ids):
            raise RequestError("a prompt must be text or one flat list of integer token ids")
        return ids


def check_text(text: str) -> None:
    """Refuses half a character, which undecodable bytes become on the way in. Raises RequestError."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise RequestError(
            f"the text is not Unicode: {text[e.start]!r} at character {e.start + 1} is half a character; "
            "was it UTF-8 before?"
        ) from e


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several → several; an array is one prompt, or a prompt per row."""
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        return [prompts]
    many = list(prompts)
    if many and all(isinstance(part, int) for part in many):
        return [many]  # type: ignore[list-item]
    return many  # type: ignore[return-value]
