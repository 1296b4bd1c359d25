"""What a user asks, what comes back, and what the engine keeps in between. No tensor, no torch.

A `Request` is one prompt; its `Sample`s are the `n` continuations of it, the unit that is scheduled. One sample's
tokens:

    0               prompt_tokens       computed        len(tokens)
    |---- prompt -------|---- output ------|--- pending ---|
    |------- in the cache, committed ------|

While a prompt is prefilled `computed` may lie inside it; after a preemption it is 0 again and the output is recomputed
like a prompt, unless the sample was swapped out. In a decode step exactly one token is pending: the one sampled last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

from quire.engine.params import SamplingParams
from quire.retention import Keep
from quire.store.insight import Miss
from quire.store.namespace import Hints, Namespace

if TYPE_CHECKING:
    from quire.engine.runner import Item, Table
    from quire.store.fetching import Fetch
    from quire.store.park import Parked
    from quire.store.whole_tiers import Rising

__all__ = [
    "Completion",
    "Delta",
    "FinishReason",
    "Request",
    "RequestFigures",
    "RequestOutput",
    "Sample",
    "State",
    "TokenLogprob",
]

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of one token under the model's own distribution.

    Args:
        token_id: the token that stands there.
        logprob: its log-probability.
        rank: 1 for the most probable token; ties share the better rank.
        top: the best (token id, logprob) pairs, best first, as many as were asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class RequestFigures:
    """What one request cost. Times are readings of the engine's clock, in seconds.

    Args:
        prompt_tokens: tokens of the prompt.
        output_tokens: tokens sampled, all samples together.
        cached_tokens: prompt tokens found in the cache when it was first admitted; a recomputation never counts here.
        loaded_tokens: of them, those that came from a tier.
        miss: why no more of the prompt was found; with share="prefix:explain=on".
        computed_tokens: token positions pushed through the model, recomputed ones included.
        recomputed_tokens: of those, positions that had been computed before a preemption took them.
        preemptions: times that a sample lost its cache to another request.
        swaps: of them, times that it found it again in host memory.
        kv_bytes_held: bytes its tables reference now; samples that share a prompt's blocks each count them.
        kv_bytes_peak: most it ever held.
        kv_bytes_end: held at the last step of each sample, before its release.
        kv_bytes_used_end: of those, bytes that hold a token or a state; the rest is what partly filled blocks waste.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    loaded_tokens: int = 0
    miss: Miss | None = None
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0
    kv_bytes_held: int = 0
    kv_bytes_peak: int = 0
    kv_bytes_end: int = 0
    kv_bytes_used_end: int = 0
    arrival_s: float = 0.0
    admitted_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None

    @property
    def queue_s(self) -> float | None:
        """From arrival to the first forward that it took part in."""
        return None if self.admitted_s is None else self.admitted_s - self.arrival_s

    @property
    def ttft_s(self) -> float | None:
        """From arrival to the first output token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def total_s(self) -> float | None:
        """From arrival to the end."""
        return None if self.finished_s is None else self.finished_s - self.arrival_s


class State(IntEnum):
    """Where a sample is. A new one is nowhere until the scheduler, or its first sibling's prefill, takes it up.

    One that is loading was next, and waits for its prefix to come from a tier; the others go on.
    """

    NEW = 0
    WAITING = 1
    RUNNING = 2
    FINISHED = 3
    LOADING = 4


@dataclass(slots=True, eq=False)
class Sample:
    """One continuation of a prompt: the unit that is scheduled, preempted and recomputed.

    Args:
        request: what it belongs to.
        index: 0 ≤ index < n; part of the random stream.
        tokens: prompt and output; only ever appended to.
        seat: its place in the one total order of the scheduler: smaller goes first, is preempted last.
        rows: rows of a batch it takes; the first sample takes its siblings' until they fork from it.
        need_bytes: what it held when it was preempted: less than that free, and admitting it would only repeat it.
        awaits: the name of a chunk of its prompt that a request before it is computing.
        fetch: what is being brought up from the tiers for it.
        rising: the compaction that it goes on from, on its way up; `sought`: the tiers were asked for it.
        fetched: chunks that were there when the tiers were last asked; they are asked again for more only.
        parked: its table in host memory, where it was preempted and swapped out.
        queued: it waits because there was no room when it was its turn.
        lost: times that a block of it did not come back from a tier.
    """

    request: Request
    index: int
    tokens: list[int]
    prompt_tokens: int
    seat: tuple[float, int, int] = (0.0, 0, 0)
    state: State = State.NEW
    rows: int = 1
    table: Table | None = None
    computed: int = 0
    most_computed: int = 0
    item: Item | None = None
    need_bytes: int = 0
    held_bytes: int = 0
    awaits: bytes | None = None
    fetch: Fetch | None = None
    rising: Rising | None = None
    sought: bool = False
    fetched: int = -1
    parked: Parked | None = None
    queued: bool = False
    lost: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_times_s: list[float] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    text: Any = None
    counts: Any = None
    matcher: Any = None

    @property
    def output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def unscored(self) -> int:
        """First prompt position whose log-probability is still wanted; 0: none."""
        scores = self.request.prompt_logprobs
        if scores is None or self.index or len(scores) >= self.prompt_tokens:
            return 0
        return len(scores)


@dataclass(slots=True, eq=False)
class Request:
    """One prompt on its way through the engine.

    Args:
        max_tokens: `params.max_tokens` resolved against the context and the pool.
        seed: `params.seed`, or the one drawn for it.
        priority: higher goes earlier; waiting makes up for it (`SchedulerConfig.priority_step_s`).
        adapter: requests of one forward share it.
        arrival_s: reading of the clock at submission.
        keep: which of its tokens stay, a parsed `keep=`; None: what the runner does, or a runner that knows no policy.
        context: after so many tokens of its prompt some go already, before the rest is read; 0: at its end only.
        share: whether its prefix is looked up, and what it computes is left for others.
        namespace: who may find it; None: everybody who names none either.
        hints: how long its blocks should stay.
        yields: what it gives up when memory runs short, see `models.yielding`; None: nothing.
        oversize: it is larger than the arena: its cold blocks lie in the tiers.
        prompt_logprobs: one per prompt position scored so far, the first always None; None when not asked for.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    prompt: str | None = None
    priority: int = 0
    adapter: str | None = None
    arrival_s: float = 0.0
    stop_ids: frozenset[int] = frozenset()
    keep: Keep | None = None
    context: int = 0
    share: bool = False
    namespace: Namespace | None = None
    hints: Hints | None = None
    yields: Any = None
    oversize: bool = False
    samples: list[Sample] = field(default_factory=list)
    unfinished: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    figures: RequestFigures = field(default_factory=RequestFigures)
    sink: Any = None

    def __post_init__(self) -> None:
        n_prompt = len(self.prompt_token_ids)
        self.samples = [
            Sample(self, index, list(self.prompt_token_ids), n_prompt)
            for index in range(self.params.n)
        ]
        self.unfinished = self.params.n
        self.figures.prompt_tokens = n_prompt
        self.figures.arrival_s = self.arrival_s
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        if self.params.logprobs is not None:
            for sample in self.samples:
                sample.logprobs = []


@dataclass(slots=True)
class Completion:
    """One finished (or cancelled) sample.

    Args:
        text: the output decoded, cut before a stop string, without a stop id; "" without a tokenizer.
        token_ids: every token sampled, a stop id included.
        stop_reason: the stop string or stop id that ended it; None for end-of-sequence, length or cancellation.
        logprobs: one per token, when asked for.
        token_times_s: reading of the clock at each token.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None
    token_times_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class RequestOutput:
    """A whole request, when its last sample is finished.

    `text`, `token_ids` and `finish_reason` are those of the first one.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    figures: RequestFigures
    seed: int
    prompt_logprobs: list[TokenLogprob | None] | None = None

    @property
    def text(self) -> str:
        """The first sample's text."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first sample's output tokens."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first sample ended."""
        return self.outputs[0].finish_reason


@dataclass(slots=True)
class Delta:
    """What one step added to one sample.

    Args:
        token_ids: new tokens, possibly none (a cancellation).
        text: new text that will not be taken back; may be empty while a character or a stop string is incomplete. The
            deltas of a sample concatenate to its `Completion.text`.
        finish_reason: set on the sample's last delta.
        output: set on the request's last delta.
        error: why the request failed; then it is the last delta, and `output` holds what there was.
    """

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    output: RequestOutput | None = None
    error: Exception | None = None
