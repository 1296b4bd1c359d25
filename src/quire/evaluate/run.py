"""`evaluate`: configurations, tasks and a text in, rows out.

    text or example ──┬── exact cache (kv="auto") ── logits ──┐
                      ├── configuration 1 ────────── logits ──┼── per-token figures, chunk by chunk
                      └── configuration n ────────── logits ──┘

All configurations score the same chunk in turn, over one set of weights; the logits of one chunk each are all that is
held. Nothing is random but the seeded tasks and intervals: the same call gives the same rows to the last digit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quire.errors import ConfigError, RequestError
from quire.evaluate.decode import Reading, Scorer, twin
from quire.evaluate.inject import Injection, inject
from quire.evaluate.metrics import (
    Estimate,
    kl_divergence,
    paired_bootstrap,
    perplexity,
    proportion,
    runs,
    top1_agreement,
)
from quire.evaluate.report import Evaluation, Row
from quire.evaluate.tasks import PLAIN_TEXT, Example, Filler, Task, Words, generate, parse_task
from quire.models.load import Loaded
from quire.models.memory import arena_bytes
from quire.models.open import open_runner
from quire.models.runner import context_tokens
from quire.spec import DEFAULT_BLOCK_TOKENS

Config = tuple[str, str]
"""(kv, keep)"""

ASK = ("after", "before")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PPL = "ppl"


def evaluate(
    model: Any,
    tokenizer: Any,
    configs: Sequence[Config],
    tasks: Sequence[str] = (PPL,),
    text: str | Sequence[int] | None = None,
    *,
    length_tokens: int | Sequence[int] = 1024,
    max_tokens: int = 65_536,
    examples: int = 25,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
    injected: bool = False,
    block_tokens: int = DEFAULT_BLOCK_TOKENS,
    memory: int | float | str = 0.5,
    attention: str = "auto",
    chunk_tokens: int | None = None,
    ask: str = "after",
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Scores configurations in decode mode against the full-precision cache.

    Args:
        model: a loaded causal transformers model in eval mode, not attached; it is left as it was.
        tokenizer: None only for token ids as `text` and no task but ppl.
        configs: (kv, keep) pairs.
        tasks: "ppl", and what `parse_task` takes.
        text: scored by ppl in windows of `length_tokens`, each after the token that begins a text where there is one;
            also what recall hides its facts in.
        length_tokens: of a window and of a recall task; several lengths are measured one after another.
        max_tokens: of the text that ppl scores.
        examples: per recall task, spread over the depths.
        seed: of examples and intervals.
        injected: inject outliers first (`inject`), and take them out again.
        memory: of all caches together, see `arena_bytes`.
        ask: where a policy drops tokens by score: "after": recall questions come when tokens have gone; "before": the
            first one is part of the prompt, and only its answer counts. A text's first half is the prompt of ppl then,
            and the second is scored, by all configurations alike.
        progress: called with a task's name, texts done and texts in all.

    Raises:
        ConfigError: an unknown codec, policy or task, or a model that cannot be served or injected.
        RequestError: a text shorter than one window, a length beyond the context or too short for a task or for a
            lossy configuration to be read, or no tokenizer where one is needed.
        CapacityError: the memory is too small.
    """
    if ask not in ASK:
        raise ConfigError(f"ask={ask!r} is not known; known: {', '.join(ASK)}")
    asked = [None if t.strip() == PPL else parse_task(t) for t in tasks]
    lengths = [length_tokens] if isinstance(length_tokens, int) else list(length_tokens)
    texts = [
        found
        for n in lengths
        for found in prepare(tokenizer, asked, text, n, max_tokens, examples, depths, seed)
    ]
    for n in lengths:
        _check_length(model, n)
    if not configs:
        raise ConfigError("nothing to evaluate: give at least one configuration, as kv='auto'")
    digest = Loaded(model, tokenizer, "").digest
    with ExitStack() as stack:
        outliers = stack.enter_context(inject(model, seed=seed)) if injected else None
        share = arena_bytes(memory, model.device) // (1 + len(configs))
        options = {"memory": share, "block_tokens": block_tokens, "attention": attention}
        cells = [
            stack.enter_context(_cell(model, c, outliers, options, chunk_tokens))
            for c in [("auto", "full"), *configs]
        ]
        for cell in cells:
            _check_read(cell, min(lengths))
        rows: list[Row] = []
        full: dict[str, float] = {}
        for (n, task), found in zip(product(lengths, asked), texts, strict=True):
            name = PPL if task is None else task.name
            note = _Progress(progress, name, len(found))
            for cell in cells:
                cell.begin()
            if task is None:
                rows += _text_rows(cells, [e.tokens for e in found], n, seed, note)
            else:
                posed = [_known(e) for e in found] if ask == "before" else found
                rows += _recall_rows(cells, task, posed, n, seed, note)
            full[name] = cells[0].scorer.reading.bytes_per_token
    return Evaluation(tuple(rows), digest, full, seed, injected)


def prepare(
    tokenizer: Any,
    tasks: Sequence[Task | None],
    text: str | Sequence[int] | None,
    length_tokens: int,
    max_tokens: int = 65_536,
    examples: int = 25,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
) -> list[list[Example]]:
    """The token sequences of every task, without a model. None stands for ppl. Raises RequestError, see `evaluate`."""
    if seed < 0:
        raise RequestError(f"seed must be at least 0, not {seed}")
    if length_tokens < 2:
        raise RequestError(f"a length of {length_tokens} tokens has nothing to predict; 2 at least")
    if tokenizer is None and (isinstance(text, str) or any(tasks)):
        raise RequestError("this model has no tokenizer: recall tasks and a text as words need one")
    if text is None and None in tasks:
        raise RequestError("task ppl needs a text to score")
    ids = [] if text is None else _encode(tokenizer, text)
    out: list[list[Example]] = []
    words = None if tokenizer is None else Words(tokenizer)
    for task in tasks:
        if task is None:
            out.append(_windows(ids, words.begin if words else [], length_tokens, max_tokens))
            continue
        assert words is not None
        filler = Filler(ids or _encode(tokenizer, PLAIN_TEXT))
        out.append(
            [
                generate(
                    task,
                    words,
                    filler,
                    length_tokens,
                    depth=depths[n % len(depths)],
                    seed=seed + n // len(depths),
                )
                for n in range(examples)
            ]
        )
    return out


def _encode(tokenizer: Any, text: str | Sequence[int]) -> list[int]:
    if isinstance(text, str):
        return [int(t) for t in tokenizer.encode(text, add_special_tokens=False)]
    return [int(t) for t in text]


def _windows(ids: list[int], begin: list[int], length: int, max_tokens: int) -> list[Example]:
    """Non-overlapping windows of exactly `length` tokens, what begins a text included; the rest is left out."""
    inner = length - len(begin)
    count = min(len(ids) // inner, max(1, max_tokens // inner)) if inner > 0 else 0
    if not count:
        raise RequestError(
            f"the text has {len(ids)} tokens, fewer than one window of {length}; give a longer text or a smaller length"
        )
    return [Example(np.array(begin + ids[i * inner : (i + 1) * inner]), ()) for i in range(count)]


def _check_length(model: Any, length: int) -> None:
    from quire.models.rope import Regimes

    config = model.config.get_text_config(decoder=True)
    context = context_tokens(config, Regimes(model).stretch)
    if length > context:
        raise RequestError(
            f"a length of {length} tokens is beyond the model's context of {context}"
        )


# -- caches ------------------------------------------------------------------------------------------------------


@dataclass
class _Cell:
    """One configuration at work."""

    config: Config
    scorer: Scorer
    values: dict[str, list[npt.NDArray[Any]]] = field(default_factory=dict)

    def begin(self) -> None:
        """A new task: figures begin at zero."""
        self.scorer.reading = Reading()
        self.values = {}

    def add(self, name: str, values: Any) -> None:
        """Per-token values of one more chunk."""
        self.values.setdefault(name, []).append(np.asarray(values))

    def all(self, name: str) -> npt.NDArray[np.float64]:
        """The values of all chunks."""
        return np.concatenate(self.values[name]).astype(np.float64)

    def row(self, template: Row, metric: str, e: Estimate, **changes: Any) -> Row:
        """A row of this configuration."""
        reading = self.scorer.reading
        return replace(
            template,
            kv=self.config[0],
            keep=self.config[1],
            metric=metric,
            value=e.value,
            low=e.low,
            high=e.high,
            bytes_per_token=reading.bytes_per_token,
            decoded=reading.decoded_queries / reading.queries,
            **changes,
        )


@contextmanager
def _cell(
    model: Any,
    config: Config,
    outliers: Injection | None,
    options: dict[str, Any],
    chunk_tokens: int | None,
) -> Iterator[_Cell]:
    options = {"weights": "plain"} | options  # the twin shares them with the model
    runner = open_runner(twin(model), kv=config[0], keep=config[1], **options)
    try:
        scorer = Scorer(runner, chunk_tokens=chunk_tokens)
        if outliers is not None:
            outliers.bind(runner)
        yield _Cell(config, scorer)
    finally:
        bridge = getattr(runner, "bridge", None)
        if bridge is not None:
            bridge.close()


def _check_read(cell: _Cell, length: int) -> None:
    """Refuses a length at which a lossy configuration would never be read decoded, before anything is scored."""
    spec = cell.scorer.runner.bridge.layout.spec
    spans = [raw.span for raw in spec if any(g.raw == raw.name for g in spec.groups)]
    if spans and not any(s.start(length - 2) > s.sinks for s in spans):
        raise RequestError(
            f"kv={cell.config[0]!r}: in {length} tokens no query would read a decoded position; take a length above "
            "one block, the residual window and the sinks"
        )


@dataclass
class _Progress:
    call: Callable[[str, int, int], None] | None
    task: str
    total: int
    done: int = 0

    def step(self) -> None:
        self.done += 1
        if self.call is not None:
            self.call(self.task, self.done, self.total)


# -- rows --------------------------------------------------------------------------------------------------------


def _text_rows(
    cells: list[_Cell], texts: list[Any], length: int, seed: int, note: _Progress
) -> list[Row]:
    """Per-token figures of every window, all configurations chunk by chunk."""
    full = cells[0]
    half = length // 2 if any(c.scorer.cuts(0, 1) for c in cells) else 0
    cuts = set().union(*(c.scorer.cuts(half, length) for c in cells))
    for tokens in texts:
        passes = (c.scorer.score(tokens, first=half, prompt_tokens=half, cuts=cuts) for c in cells)
        for chunks in zip(*passes, strict=True):
            for cell, chunk in zip(cells, chunks, strict=True):
                cell.add("nll", -chunk.logprobs.numpy())
                if cell is not full:
                    cell.add("kl", kl_divergence(chunks[0].logits, chunk.logits))
                    cell.add("agreement", top1_agreement(chunks[0].logits, chunk.logits))
        note.step()
    exact = full.all("nll")
    units = runs([len(t) - 1 - half for t in texts])
    template = Row("", "", PPL, "", 0.0, None, None, 0.0, len(exact), length, count=len(exact))
    template = replace(template, full_bytes_per_token=full.scorer.reading.bytes_per_token)
    rows = []
    for cell in cells[1:]:
        nll = cell.all("nll")

        def estimate(values: Any) -> Estimate:
            return paired_bootstrap(values, units, seed=seed)

        own = estimate(nll)
        figures = {
            "nll": own,
            "perplexity": own.map(lambda x: perplexity(np.array([x]))),
            "dnll": estimate(nll - exact),
            "kl": estimate(cell.all("kl")),
            "agreement": estimate(cell.all("agreement")),
        }
        rows += [cell.row(template, name, e) for name, e in figures.items()]
    return rows


def _recall_rows(
    cells: list[_Cell], task: Task, examples: list[Example], length: int, seed: int, note: _Progress
) -> list[Row]:
    """Exact match of every answer, over all depths and by depth; answers of one example are drawn together."""
    for example in examples:
        for cell in cells:
            cell.add("right", recalled(cell.scorer, example))
        note.step()
    units = np.repeat(np.arange(len(examples)), [len(e.answers) for e in examples])
    depths = np.array([a.depth for e in examples for a in e.answers])
    tokens = np.array([a.stop - a.start for e in examples for a in e.answers])
    nearest = np.abs(depths[:, None] - np.array(DEPTHS)).argmin(1)
    template = Row("", "", task.name, "", 0.0, None, None, 0.0, int(tokens.sum()), length)
    template = replace(
        template,
        count=len(tokens),
        full_bytes_per_token=cells[0].scorer.reading.bytes_per_token,
    )
    rows = []
    for cell in cells[1:]:
        right, exact = cell.all("right"), cells[0].all("right")
        rows.append(cell.row(template, "recall", proportion(right, units, seed=seed)))
        rows.append(
            cell.row(template, "drecall", paired_bootstrap(right - exact, units, seed=seed))
        )
        for i, depth in enumerate(DEPTHS):
            at = nearest == i
            if at.any():
                e = proportion(right[at], units[at], seed=seed)
                n_tokens, n = int(tokens[at].sum()), int(at.sum())
                rows.append(cell.row(template, "recall", e, depth=depth, tokens=n_tokens, count=n))
    return rows


def _known(example: Example) -> Example:
    """The same with its first question in the prompt, and no other."""
    return replace(example, answers=example.answers[:1], asked=example.answers[0].start)


def recalled(scorer: Scorer, example: Example) -> list[bool]:
    """Per answer, whether every token of it is the most likely one after the text before it, read through the cache."""
    first = example.answers[0].start - 1
    cuts = scorer.cuts(example.asked, len(example.tokens))
    best = torch.full((len(example.tokens),), -1, dtype=torch.int64)
    prompt = example.asked or None
    for chunk in scorer.score(example.tokens, first=first, prompt_tokens=prompt, cuts=cuts):  # type: ignore[arg-type]
        best[chunk.start + 1 : chunk.stop + 1] = chunk.logits.argmax(-1).cpu()
    hit = best.numpy() == example.tokens
    return [bool(hit[a.start : a.stop].all()) for a in example.answers]
