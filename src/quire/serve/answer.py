"""What the OpenAI endpoints have in common: sampling parameters, log-probabilities, server-sent events."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from starlette.responses import StreamingResponse

from quire.engine import SamplingParams, TokenLogprob
from quire.serve.errors import ApiError, as_api_error, document, event
from quire.serve.forms import OpenAISampling, SamplingForm
from quire.serve.grammar import Grammar
from quire.serve.prompt import Prompts
from quire.serve.service import Run

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

__all__ = [
    "EventStream",
    "chat_logprobs",
    "new_id",
    "openai_sampling",
    "sampling",
    "text_logprobs",
]

logger = logging.getLogger(__name__)

SAME_NAME = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "n",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
)


def new_id(kind: str) -> str:
    """A name for an answer: `chatcmpl-…`."""
    return kind + secrets.token_hex(12)


def sampling(form: SamplingForm, **more: Any) -> SamplingParams:
    """What all dialects share; temperature 1 where none is given, as their documents have it.

    Raises:
        RequestError: out of range.
    """
    wanted: dict[str, Any] = {"temperature": 1.0 if form.temperature is None else form.temperature}
    for name in ("top_p", "top_k", "min_p"):
        value = getattr(form, name)
        if value is not None:
            wanted[name] = value
    return SamplingParams(**wanted, **more)


def openai_sampling(form: OpenAISampling, grammar: Grammar | None, **more: Any) -> SamplingParams:
    """The parameters of a chat or a completion.

    Raises:
        ApiError, RequestError: out of range.
    """
    wanted = {n: getattr(form, n) for n in SAME_NAME if getattr(form, n) is not None}
    if form.stop is not None:
        wanted["stop"] = form.stop
    if form.logit_bias:
        try:
            wanted["logit_bias"] = {int(k): v for k, v in form.logit_bias.items()}
        except ValueError as e:
            raise ApiError(400, "logit_bias maps token ids to numbers", param="logit_bias") from e
    return sampling(form, constraint=grammar, **(wanted | more))


class EventStream(StreamingResponse):
    """Server-sent events of one run, which ends with them: sent, failed, or with nobody there to read.

    Args:
        events: bytes, see `event`.
        run: closed in any case.
        path: whose dialect an error is told in.
        end: the last event of a stream that ended well.
    """

    def __init__(
        self, events: AsyncIterator[bytes], run: Run, path: str, *, end: bytes = b""
    ) -> None:
        super().__init__(
            self._told(events, path, end),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.close()

    async def _told(
        self, events: AsyncIterator[bytes], path: str, end: bytes
    ) -> AsyncIterator[bytes]:
        try:
            async for each in events:
                yield each
            if end:
                yield end
        except Exception as error:  # noqa: BLE001 - the status is sent; the client is told within the stream
            name = "error" if path.startswith(("/v1/messages", "/v1/responses")) else None
            yield event(document(as_api_error(error), path), name)


def chat_logprobs(prompts: Prompts, found: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    """As chat completions say them."""
    if found is None:
        return None
    rows = []
    for one in found:
        text, raw = prompts.token_text(one.token_id)
        top = []
        for token, value in one.top:
            its_text, its_bytes = prompts.token_text(token)
            top.append({"token": its_text, "logprob": _finite(value), "bytes": its_bytes})
        rows.append(
            {"token": text, "logprob": _finite(one.logprob), "bytes": raw, "top_logprobs": top}
        )
    return {"content": rows, "refusal": None}


def text_logprobs(
    prompts: Prompts, found: Sequence[TokenLogprob | None], tokens: Sequence[int], offset: int
) -> dict[str, Any]:
    """As completions say them.

    Args:
        found: one per token; None for a prompt's first.
        tokens: the tokens.
        offset: characters of text before the first.
    """
    texts = [prompts.token_text(t)[0] for t in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if one is None else _finite(one.logprob) for one in found],
        "top_logprobs": [
            None if one is None else {prompts.token_text(t)[0]: _finite(v) for t, v in one.top}
            for one in found
        ],
        "text_offset": offsets,
    }


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's documents name this number instead."""
    return max(logprob, -9999.0)
