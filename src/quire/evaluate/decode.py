"""Scoring a text through the cache: decode-mode evaluation at prefill speed.

    0        start          stop                 len(tokens)
    |-cached-|-- chunk -----|-- not yet ---------|        query i scores token i + 1

A teacher-forced pass goes through a block table in chunks. What query i reads is a function of i alone: decoded values
below s(i), raw ones from there. So every query reads what it would have read while decoding, whatever the chunks are.

Nothing here can score a text without the cache. A `Scorer` stands before the attention backend and counts, from the
masks that attention really applies, what the scored queries read; a pass over a lossy cache that never read a decoded
position raises instead of ending, and figures exist for passes that ended only.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from quire.attention import Row, Step
from quire.engine.runner import Item
from quire.errors import ConfigError, InvariantError, RequestError
from quire.evaluate.metrics import log_probs
from quire.models.memory import free_bytes

CHUNK_TOKENS = 256
_CASTS = (torch.bfloat16, torch.float16, torch.float32)
LOGITS_ELEMENTS = 1 << 24
"""Most logits of one chunk, so that a large vocabulary does not need gigabytes."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The scored queries [start, stop) of one chunk.

    Args:
        targets: `[n]` int64, the token after each query.
        logits: `[n, vocab]` float32.
        logprobs: `[n]` float64, natural log-probability of each target.
    """

    start: int
    stop: int
    targets: torch.Tensor
    logits: torch.Tensor
    logprobs: torch.Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """What finished passes read and held; sums over passes add up.

    Args:
        passes: texts scored to their end.
        tokens: that they put into the cache.
        held_bytes: live bytes of their tables at the end: blocks of all groups with their scales, residual windows,
            tails and padding.
        queries: scored ones.
        decoded_queries: of those, the ones that read a decoded position in some layer.
        raw: (layer, query, position) triples read as they were stored.
        decoded: the same, read decoded.
        segments: reads of some positions by some scored query, over all layers.
    """

    passes: int = 0
    tokens: int = 0
    held_bytes: int = 0
    queries: int = 0
    decoded_queries: int = 0
    raw: int = 0
    decoded: int = 0
    segments: int = 0

    def __add__(self, other: Reading) -> Reading:
        return Reading(*(getattr(self, n) + getattr(other, n) for n in self.__slots__))

    @property
    def bytes_per_token(self) -> float:
        """Measured. Raises InvariantError when no pass has ended."""
        if not self.tokens:
            raise InvariantError("no text was scored to its end: there are no figures")
        return self.held_bytes / self.tokens


class Scorer:
    """Scores texts through one runner's cache, one after another or interleaved with other scorers' texts.

    Args:
        runner: of `open_runner`, over a real cache.
        chunk_tokens: queries per forward; None for a size that bounds the logits. Does not change what is read.

    Raises:
        ConfigError: the runner keeps no cache.
    """

    def __init__(self, runner: Any, *, chunk_tokens: int | None = None) -> None:
        if getattr(runner, "bridge", None) is None:
            raise ConfigError(
                "kv='none' keeps no cache, so there is nothing to evaluate; kv='auto' is the exact one"
            )
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
        self.runner = runner
        self.lossy = any(g.raw is not None for g in runner.bridge.layout.spec)
        self._attends = any(not g.recurrent for g in runner.bridge.layout.spec)
        most = max(1, LOGITS_ELEMENTS // runner.vocab_size)
        self.chunk_tokens = min(CHUNK_TOKENS, most) if chunk_tokens is None else chunk_tokens
        if not runner.chunked_prefill:
            self.chunk_tokens = 1
        self.reading = Reading()

    def cuts(self, prompt_tokens: int, n_tokens: int) -> set[int]:
        """Lengths where chunks end for the policy of this runner, on the way from a prompt to `n_tokens`."""
        rules = self.runner.rules(self.runner.keep)
        if rules.keep.reads:
            return set(range(prompt_tokens, n_tokens))
        if not rules.scores:
            return set()
        return set(range(prompt_tokens, n_tokens, rules.policy.every))

    def score(
        self,
        tokens: Sequence[int],
        *,
        first: int = 0,
        prompt_tokens: int | None = None,
        cuts: Collection[int] = (),
        must_decode: bool = True,
    ) -> Iterator[Scored]:
        """Streams the scores of queries [first, len(tokens) - 1), a chunk at a time.

        Args:
            tokens: the text.
            first: query to be scored.
            prompt_tokens: after which a policy drops tokens for the first time; None: all, so that it drops none.
            cuts: lengths at which chunks end besides; scorers that run side by side share them.
            must_decode: a lossy cache that was never read decoded is an error. Otherwise the pass counts, and
                `reading.decoded_queries` says that it shows nothing.

        Figures of the pass are added to `reading` once the iterator is exhausted.

        Raises:
            RequestError: fewer than two tokens, nothing to score, or more tokens than the context.
            CapacityError: the arena cannot hold the text.
            InvariantError: at the end, when no scored query read the cache, or a lossy cache was never read decoded.
        """
        tokens = [int(t) for t in tokens]
        n = len(tokens)
        self._check_length(n)
        if n < 2 or not 0 <= first < n - 1:
            raise RequestError(
                f"a text of {n} tokens has nothing to score from position {first} on"
            )
        watch = _Watch(self.runner.bridge, n, first)
        table = self.runner.open(prompt_tokens=n if prompt_tokens is None else prompt_tokens)
        try:
            for start, end in self._chunks(n, cuts):
                wanted = max(0, end - max(start, first))
                logits = self._advance(watch, table, tokens, start, end, wanted)
                scored = _scored(logits, tokens, end - wanted, min(end, n - 1))
                if scored is not None:
                    yield scored
            self._finish(watch, n, n - 1 - first, table.held_bytes(), must_decode=must_decode)
        finally:
            table.release()

    def answer(
        self,
        tokens: Sequence[int],
        n_tokens: int,
        *,
        prompt_tokens: int | None = None,
        end: Collection[int] = (),
    ) -> list[int]:
        """What the model writes after a prompt, greedily, one token at a time through the cache.

        Args:
            tokens: the prompt.
            n_tokens: of the answer, at most.
            prompt_tokens: after which a policy drops tokens for the first time; None: all of the prompt.
            end: tokens that end it; the one that did is part of it.

        Raises:
            RequestError: an empty prompt, or more tokens than the context.
        """
        tokens = [int(t) for t in tokens]
        n = len(tokens)
        self._check_length(n + n_tokens)
        if n < 1 or n_tokens < 1:
            raise RequestError("an answer takes a prompt of a token at least, and so does itself")
        watch = _Watch(self.runner.bridge, n + n_tokens, n - 1)
        prompt = n if prompt_tokens is None else prompt_tokens
        table = self.runner.open(prompt_tokens=prompt)
        logits = torch.empty(0)
        try:
            for start, stop in self._chunks(n, self.cuts(prompt, n)):
                logits = self._advance(watch, table, tokens, start, stop, int(stop == n))
            tokens.append(int(logits[-1].argmax()))
            while len(tokens) < n + n_tokens and tokens[-1] not in end:
                at = len(tokens)
                logits = self._advance(watch, table, tokens, at - 1, at, 1)
                tokens.append(int(logits[-1].argmax()))
            read = len(tokens) - 1
            self._finish(watch, read, read - n + 1, table.held_bytes(), must_decode=False)
        finally:
            table.release()
        return tokens[n:]

    def _check_length(self, n_tokens: int) -> None:
        context = self.runner.max_context_tokens
        if n_tokens > context:
            raise RequestError(
                f"a text of {n_tokens} tokens is longer than the context of {context}"
            )

    def _chunks(self, n_tokens: int, cuts: Collection[int]) -> Iterator[tuple[int, int]]:
        every = range(self.chunk_tokens, n_tokens, self.chunk_tokens)
        return pairwise([0, *sorted({n_tokens, *every, *(c for c in cuts if 0 < c < n_tokens)})])

    def _advance(
        self, watch: _Watch, table: Any, tokens: list[int], start: int, end: int, wanted: int
    ) -> torch.Tensor:
        """The logits of the last `wanted` of tokens [start, end), which are cached then."""
        stop = self.runner.cut(table, start, end)
        if stop < end:
            raise InvariantError(f"tokens go at {stop}, where no chunk ends")
        table.append(end - start)
        with watch:
            logits: torch.Tensor = self.runner.forward([Item(table, tokens, start, end, wanted)])
        table.commit()
        return logits

    def _finish(
        self, watch: _Watch, n_tokens: int, queries: int, held_bytes: int, *, must_decode: bool
    ) -> None:
        touched = int(watch.touched[: watch.first + queries].sum())
        if self._attends and watch.raw + watch.decoded <= 0:
            raise InvariantError("this evaluation never read the cache")
        if self.lossy and not touched and must_decode:
            raise InvariantError(
                f"no scored query of this text of {n_tokens} tokens read a decoded position: the configuration is "
                "lossy and was not exercised; score a text longer than one block and the residual window"
            )
        self.reading += Reading(
            1, n_tokens, held_bytes, queries, touched, watch.raw, watch.decoded, watch.segments
        )


def _scored(logits: torch.Tensor, tokens: list[int], start: int, stop: int) -> Scored | None:
    """The rows of queries that have a next token."""
    if start >= stop:
        return None
    logits = logits[: stop - start]
    targets = torch.tensor(tokens[start + 1 : stop + 1], device=logits.device)
    return Scored(start, stop, targets, logits, log_probs(logits, targets))


class _Watch:
    """Stands before a bridge's attention backend during one forward and counts what scored queries read."""

    def __init__(self, bridge: Any, n_tokens: int, first: int) -> None:
        self.bridge, self.first = bridge, first
        self.name = bridge.backend.name
        self.touched = torch.zeros(n_tokens, dtype=torch.bool)
        self.raw = self.decoded = self.segments = 0
        self._backend, self._read_all = bridge.backend, bridge.read_all

    def __enter__(self) -> None:
        self.bridge.backend = self
        if self.bridge.way == "dense":
            self.bridge.read_all = self.read_all

    def __exit__(self, *exc: object) -> None:
        self.bridge.backend = self._backend
        self.bridge.__dict__.pop("read_all", None)

    def write(self, step: Step, layer: int, values: dict[str, torch.Tensor]) -> None:
        """The backend's own `write`."""
        self._backend.write(step, layer, values)

    def run(
        self,
        step: Step,
        layer: int,
        q: torch.Tensor,
        *,
        window: int | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """The backend's own `run`, counted."""
        for r in step.of_layer(layer)[2]:
            self._note(r, r.qpos, window)
        out: torch.Tensor = self._backend.run(step, layer, q, window=window, **options)
        return out

    def read_all(self, row: Row, layer: int, name: str) -> torch.Tensor:
        """The dense way's own read, counted once per layer: all queries of the row read what its last one reads."""
        if name == self.bridge.field_names(layer)[0]:
            last = Row(row.table, row.stop - 1, row.stop)
            step = Step(self.bridge.store, self.bridge.layout, [last], self.bridge.device)
            for r in step.of_layer(layer)[2]:
                self._note(r, torch.arange(row.start, row.stop)[None], None)
        out: torch.Tensor = self._read_all(row, layer, name)
        return out

    def _note(self, read: Any, qpos: torch.Tensor, window: int | None) -> None:
        """One read: `qpos [R, T]` are the queries that its mask `[R, T or 1, N]` speaks of."""
        mask = read.mask(window)
        if mask is None:
            per_query = torch.full(qpos.shape, read.kpos.shape[1])
        else:
            per_query = mask.sum(-1).cpu().expand(qpos.shape)
        qpos = qpos.cpu()
        count = per_query[qpos >= self.first]
        total = int(count.sum())
        self.segments += total > 0
        if read.mode == "raw":
            self.raw += total
        else:
            self.decoded += total
            self.touched[qpos[(qpos >= self.first) & (per_query > 0)]] = True


def twin(model: Any) -> Any:
    """A second set of modules over the same weights, so that several caches can serve one model at a time.

    Cost: the module tree and buffers; parameters are shared, changes to their values are seen by both.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, memo)


def in_float32(model: Any) -> Any:
    """The same weights computed with in float32, beside which only a cache rounds.

    The model itself where it computes in that or more, holds weights that are no plain 16-bit numbers, or finds no room
    for the copy, which takes four bytes a weight.
    """
    weights = list(model.parameters())
    plain = all(type(p) is torch.nn.Parameter and p.dtype in _CASTS for p in weights)
    needed = 4 * sum(p.numel() for p in weights)
    if model.dtype not in _CASTS[:2] or not plain or needed > free_bytes(model.device) // 2:
        return model
    return copy.deepcopy(model).float()
