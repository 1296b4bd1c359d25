"""One step, single-threaded: plan, forward, draw, and what each new token means for its sample.

`Core` knows no thread and no event loop; `Engine` puts those around it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from quire.engine.audit import Auditor
from quire.engine.checks import Checks
from quire.engine.ladder import LadderStats
from quire.engine.request import (
    Completion,
    Delta,
    FinishReason,
    Request,
    RequestOutput,
    Sample,
    State,
    TokenLogprob,
)
from quire.engine.runner import Runner, Usage
from quire.engine.sampler import draw, score
from quire.engine.schedule import SchedulerStats
from quire.engine.scheduler import Scheduler
from quire.engine.sharing import Opener
from quire.engine.text import Transcript
from quire.errors import CapacityError, RequestError, TierError

__all__ = ["Core", "EngineStats"]

Done = list[tuple[Sample, Delta]]

PREFETCHED = 2
"""Of the waiting, whose prefixes are brought up while others compute; half of what tiers load for at a time."""


MOST_LOST = 3
"""Times that a sample is computed anew because its blocks did not come back from a tier."""


@dataclass(slots=True)
class EngineStats:
    """A snapshot of the engine: counters since its start, queues and bytes now.

    Args:
        steps: that computed anything; a step has one forward per adapter in it.
        requests: submitted.
        finished: samples by finish reason.
        output_tokens: sampled.
        ladder: what was done when memory ran short.
        checks: how often invariants were looked at, and violations by name.
    """

    steps: int = 0
    forwards: int = 0
    requests: int = 0
    live_requests: int = 0
    output_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    scheduler: SchedulerStats = field(default_factory=SchedulerStats)
    usage: Usage | None = None
    ladder: LadderStats = field(default_factory=LadderStats)
    checks: dict[str, Any] = field(default_factory=dict)


class Core:
    """The requests that have been taken up, and one step of all of them.

    Args:
        runner: the model and its cache.
        scheduler: who runs.
        tokenizer: None: no text.
        clock: seconds.
        deliver: called with every delta, in order of computation.
        auditor: computes a share of the hits again before they are used.
        opener: the scheduler's, where it brings prefixes up from tiers.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Any,
        clock: Callable[[], float],
        deliver: Callable[[Request, Delta], None],
        auditor: Auditor | None = None,
        opener: Opener | None = None,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.clock = clock
        self.deliver = deliver
        self.auditor = auditor
        self.opener = opener if opener is not None and opener.tiering is not None else None
        self.checks = Checks(runner, scheduler)
        self.live: dict[str, Request] = {}
        self.steps = self.forwards = self.output_tokens = 0
        self.finished: Counter[str] = Counter()

    def add(self, request: Request) -> None:
        """Take a checked request up."""
        if self.tokenizer is not None:
            params = request.params
            for sample in request.samples:
                sample.text = Transcript(
                    self.tokenizer, params.stop, skip_special_tokens=params.skip_special_tokens
                )
        self.live[request.request_id] = request
        self.scheduler.add(request)

    @torch.inference_mode()
    def step(self) -> None:
        """Run one step of what is there; nothing, when nothing is."""
        self._begin_step()
        plan = self.scheduler.schedule()
        for sample in plan.failed:
            self.fail(
                sample.request,
                CapacityError(
                    f"request {sample.request.request_id}: its {len(sample.tokens)} tokens do not fit the cache even "
                    "alone; somebody else holds part of it, or the pool promised more than it has"
                ),
            )
        if not plan.samples:
            waits = self.scheduler.loading and not self.scheduler.moving
            if waits and self.opener is not None:
                self.opener.wait()
            return
        if self.opener is not None:
            self.opener.prefetch(self.scheduler.next_waiting(PREFETCHED))
        self.steps += 1
        if self.auditor is not None:
            self.auditor.run()
        for adapter, samples in plan.batches():
            items = [sample.item for sample in samples if sample.item is not None]
            began = perf_counter()
            logits = self.runner.forward(items, adapter)
            n_tokens = sum(item.stop - item.start for item in items)
            self.scheduler.ladder.rates.computed(n_tokens, perf_counter() - began)
            self.forwards += 1
            self._accept(*self._whole(samples, logits))
        self.checks.step()

    def _begin_step(self) -> None:
        """Samples whose prefix has come take their seats again."""
        alone = not self.scheduler.running
        if self.opener is None:
            self.scheduler.ladder.begin_step(alone=alone)
        else:
            self.opener.begin_step(alone=alone)
            for sample in self.scheduler.loading:
                if self.opener.arrived(sample):
                    self.scheduler.loaded(sample)

    def cancel(self, request_id: str) -> None:
        """End a request where it stands; unknown ids are ignored, they may just have finished."""
        request = self.live.get(request_id)
        if request is None:
            return
        for sample in request.samples:
            if sample.state is not State.FINISHED:
                text = "" if sample.text is None else sample.text.finish()
                sample.finish_reason = "cancelled"
                delta = Delta(request_id, sample.index, [], text, finish_reason="cancelled")
                self._close([(sample, delta)])
                self.deliver(request, delta)

    def fail(self, request: Request, error: Exception) -> None:
        """End a request with an error: its last delta carries it."""
        delta: Delta | None = None
        for sample in request.samples:
            if sample.state is not State.FINISHED:
                sample.finish_reason = "error"
                delta = Delta(request.request_id, sample.index, [], "", finish_reason="error")
                self._close([(sample, delta)])
        if delta is not None:
            delta.error = error
            self.deliver(request, delta)

    def abort(self, error: Exception) -> None:
        """End all requests: a step failed half way, or nobody will step again."""
        for request in list(self.live.values()):
            self.fail(request, error)

    def stats(self, *, requests: int, live_requests: int) -> EngineStats:
        """A snapshot, with the counts of submitted and unfinished requests that the engine keeps."""
        return EngineStats(
            steps=self.steps,
            forwards=self.forwards,
            requests=requests,
            live_requests=live_requests,
            output_tokens=self.output_tokens,
            finished=dict(self.finished),
            scheduler=self.scheduler.stats(),
            usage=self.runner.usage(),
            ladder=self.scheduler.ladder.snapshot(),
            checks=self.checks.report(),
        )

    # ---- after the forward ------------------------------------------------------------------------------------------

    def _accept(self, samples: Sequence[Sample], logits: Tensor) -> None:
        """Book what was computed, draw the next tokens, and hand out what they say."""
        drawing: list[Sample] = []
        rows: list[int] = []
        parents: list[Sample] = []
        ended: list[Sample] = []  # prompts that were only to be scored
        row = 0
        for sample in samples:
            item = sample.item
            assert item is not None
            n_logits, request = item.logits, sample.request
            if n_logits > 1 or request.prompt_logprobs is not None:
                self._score(sample, logits, row)
            row += n_logits
            self.scheduler.advance(sample)
            if sample.computed < len(sample.tokens):
                continue
            if request.max_tokens == 0:
                ended += request.samples  # its siblings have nothing to fork for
            elif len(request.samples) > 1 and request.samples[-1].state is State.NEW:
                parents.append(sample)
                drawing += request.samples
                rows += [row - 1] * len(request.samples)
            else:
                drawing.append(sample)
                rows.append(row - 1)
        now = self.clock()
        deltas: Done = []
        if drawing:
            plain_rows = len(rows) == row and not parents
            tokens, logprobs = draw(logits, drawing, None if plain_rows else rows)
            for at, (sample, token) in enumerate(zip(drawing, tokens, strict=True)):
                if token >= 0:
                    logprob = None if logprobs is None else logprobs[at]
                    deltas.append((sample, self._append(sample, token, logprob, now)))
            if min(tokens) < 0:
                broken = [s for s, token in zip(drawing, tokens, strict=True) if token < 0]
                deltas = self._not_numbers(broken, deltas)
        for sample in ended:
            sample.finish_reason = "length"
            delta = Delta(sample.request.request_id, sample.index, [], "", finish_reason="length")
            deltas.append((sample, delta))
        for parent in parents:
            if parent.state is not State.FINISHED:
                siblings = [s for s in parent.request.samples[1:] if s.finish_reason is None]
                self.scheduler.fork(parent, siblings)
        self._close([pair for pair in deltas if pair[1].finish_reason is not None])
        for sample, delta in deltas:
            self.deliver(sample.request, delta)

    def _whole(self, samples: Sequence[Sample], logits: Tensor) -> tuple[Sequence[Sample], Tensor]:
        """Without those of which blocks did not come back from a tier, and their rows."""
        if all(getattr(s.table, "cold", None) is None for s in samples):
            return samples, logits
        counts = [0 if s.item is None else s.item.logits for s in samples]
        keep = [not self._lost(s) for s in samples]
        rows = [
            logit for part, k in zip(logits.split(counts), keep, strict=True) if k for logit in part
        ]
        kept = [s for s, k in zip(samples, keep, strict=True) if k]
        return kept, torch.stack(rows) if rows else logits[:0]

    def _lost(self, sample: Sample) -> bool:
        """Whether what was computed just now read less than it should have: then nothing of it counts."""
        cold = getattr(sample.table, "cold", None)
        if cold is None or not cold.lost:
            return False
        if sample.lost < MOST_LOST:
            self.scheduler.lose(sample)
            return True
        self.fail(
            sample.request,
            TierError(
                f"request {sample.request.request_id}: its blocks did not come back from a tier {MOST_LOST + 1} times; "
                "look at the tier (`quire fsck`), or give the cache more memory"
            ),
        )
        return True

    def _append(
        self, sample: Sample, token: int, logprob: TokenLogprob | None, now: float
    ) -> Delta:
        """Give a sample its next token; decides whether it was the last."""
        request = sample.request
        params = request.params
        sample.tokens.append(token)
        sample.token_times_s.append(now)
        self.output_tokens += 1
        figures = request.figures
        figures.output_tokens += 1
        if figures.first_token_s is None:
            figures.first_token_s = now
        n_output = len(sample.tokens) - sample.prompt_tokens
        reason: FinishReason | None = None
        text, transcript = "", sample.text
        if token in request.stop_ids:
            reason = "stop"
            if token in params.stop_token_ids:
                sample.stop_reason = token
        elif transcript is not None:
            text = transcript.push(token, armed=n_output >= params.min_tokens)
            if transcript.found is not None:
                reason = "stop"
        if reason is None and n_output >= request.max_tokens:
            reason = "length"
        if reason is not None:
            if transcript is not None and transcript.found is None:
                text += transcript.finish()
            if transcript is not None and transcript.found is not None:
                reason, sample.stop_reason = "stop", transcript.found
            sample.finish_reason = reason
        delta = Delta(request.request_id, sample.index, [token], text, None, reason)
        if reason is not None:
            delta.stop_reason = sample.stop_reason
        if logprob is not None and sample.logprobs is not None:
            sample.logprobs.append(logprob)
            delta.logprobs = [logprob]
        return delta

    def _score(self, sample: Sample, logits: Tensor, row: int) -> None:
        """Log-probabilities of prompt tokens: the logits at position i speak of token i + 1."""
        item, scores = sample.item, sample.request.prompt_logprobs
        width = sample.request.params.prompt_logprobs
        if scores is None or width is None or sample.index or item is None or not item.logits:
            return
        first = len(scores) - 1  # position whose logits are wanted next
        begin = item.stop - item.logits
        stop = min(item.stop, sample.prompt_tokens - 1)
        if first < begin or first >= stop:
            return
        wanted = logits[row + first - begin : row + stop - begin]
        targets = sample.tokens[first + 1 : stop + 1]
        scores += score(wanted, targets, [width] * len(targets))

    def _not_numbers(self, broken: Sequence[Sample], deltas: Done) -> Done:
        """Fail the requests of samples whose logits are NaN; returns what the others have to tell."""
        for sample in broken:
            request = sample.request
            if request.request_id in self.live:
                why = getattr(sample.matcher, "error", None)
                self.fail(
                    request,
                    RequestError(
                        f"request {request.request_id}: the grammar cannot go on at output position "
                        f"{sample.output_tokens}: {why}"
                        if why
                        else f"request {request.request_id}: the model's logits are not numbers at output position "
                        f"{sample.output_tokens}; a wider dtype (float32, bfloat16) may help"
                    ),
                )
        return [(sample, delta) for sample, delta in deltas if sample.state is not State.FINISHED]

    def _close(self, done: Done) -> None:
        """Finish samples; the delta of a request's last one gets the request's output."""
        for sample, delta in done:
            request = sample.request
            if self.opener is not None:
                self.opener.forget(sample)
            self.scheduler.finish(sample)
            self.finished[sample.finish_reason or "error"] += 1
            if request.unfinished == 0:
                request.figures.finished_s = self.clock()
                self.live.pop(request.request_id, None)
                delta.output = _output(request)


def _output(request: Request) -> RequestOutput:
    completions = [
        Completion(
            index=sample.index,
            text="" if sample.text is None else sample.text.text,
            token_ids=sample.tokens[sample.prompt_tokens :],
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
            logprobs=sample.logprobs,
            token_times_s=sample.token_times_s,
        )
        for sample in request.samples
    ]
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=completions,
        figures=request.figures,
        seed=request.seed,
        prompt_logprobs=request.prompt_logprobs,
    )
