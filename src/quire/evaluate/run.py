"""`evaluate`: configurations, tasks, a text and prompts in, rows out.

    text or example ──┬── exact cache (kv="auto") ── logits ──┐
                      ├── configuration 1 ────────── logits ──┼── per-token figures, chunk by chunk
                      └── configuration n ────────── logits ──┘

All configurations score the same chunk in turn, over one set of weights; the logits of one chunk each are all that is
held. Nothing is random but the seeded tasks and intervals: the same call gives the same rows to the last digit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from quire.errors import ConfigError, RequestError
from quire.evaluate.cells import Cell, Config, Progress, check_read, open_cells
from quire.evaluate.inject import inject
from quire.evaluate.journal import Journal, digest_of
from quire.evaluate.report import Cost, Evaluation, Position, Row
from quire.evaluate.rows import prompt_rows, recall_rows, recalled, text_rows
from quire.evaluate.speed import costs_of
from quire.evaluate.tasks import Example, Task, parse_task
from quire.evaluate.texts import DEPTHS, PPL, PROMPTS, prepare
from quire.models.load import Loaded
from quire.models.runner import context_tokens
from quire.retention.recipe import parse_keep
from quire.spec import DEFAULT_BLOCK_TOKENS

__all__ = ["ASK", "DEPTHS", "PPL", "PROMPTS", "Config", "evaluate", "prepare", "recalled"]

ASK = ("after", "before")


def evaluate(
    model: Any,
    tokenizer: Any,
    configs: Sequence[Config],
    tasks: Sequence[str] = (PPL,),
    text: str | Sequence[int] | None = None,
    *,
    prompts: Sequence[Sequence[int]] = (),
    answer_tokens: int = 64,
    end: Sequence[int] = (),
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
    speed_tokens: int = 0,
    journal: Journal | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    found: Callable[[Sequence[Row]], None] | None = None,
) -> Evaluation:
    """Scores configurations in decode mode against the full-precision cache.

    Args:
        model: a loaded causal transformers model in eval mode, not attached; it is left as it was.
        tokenizer: None only for token ids as `text` and `prompts`, and no task but ppl.
        configs: (kv, keep) pairs.
        tasks: "ppl", and what `parse_task` takes.
        text: scored by ppl in windows of `length_tokens`, each after the token that begins a text where there is one;
            also what recall hides its facts in.
        prompts: token ids of each; the exact cache answers them greedily, and all read the answers along.
        answer_tokens: of each, at most; one of the tokens `end` ends it.
        length_tokens: of a window and of a recall task; several lengths are measured one after another.
        max_tokens: of the text that ppl scores.
        examples: per recall task, spread over the depths.
        seed: of examples and intervals.
        injected: inject outliers first (`inject`), and take them out again.
        memory: of all caches together, see `arena_bytes`.
        ask: where a policy drops tokens by score: "after": recall questions come when tokens have gone; "before": the
            first one is part of the prompt, and only its answer counts, whose first token the prompt's last query gives
            before any token goes. A text's first half is the prompt of ppl then,
            and the second is scored, by all configurations alike.
        speed_tokens: steps of decoding that are timed under each configuration; 0 for none.
        journal: keeps every text as it is scored, and has those of a run that was killed.
        progress: called with a task's name, texts done and texts in all.
        found: called with the rows of each task and length once they are there.

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
        made
        for n in lengths
        for made in prepare(tokenizer, asked, text, n, max_tokens, examples, depths, seed)
    ]
    _check(model, configs, asked, lengths, prompts, answer_tokens)
    if any(parse_keep(keep).scores for _, keep in configs):
        for task, some in zip(asked * len(lengths), texts, strict=True):
            _check_posed(task, _posed(some, ask), ask)
    digest = Loaded(model, tokenizer, "").digest
    tag = digest_of([list(c) for c in configs])
    with ExitStack() as stack:
        outliers = stack.enter_context(inject(model, seed=seed)) if injected else None
        cells = stack.enter_context(
            open_cells(
                model,
                [("auto", "full"), *configs],
                outliers,
                memory=memory,
                block_tokens=block_tokens,
                attention=attention,
                chunk_tokens=chunk_tokens,
            )
        )
        if asked:
            for cell in cells:
                check_read(cell, min(lengths))
        at = _Work(cells, tokenizer, seed, tag, journal, progress, found)
        for (n, task), some in zip(product(lengths, asked), texts, strict=True):
            at.task(task, n, _posed(some, ask))
        if prompts:
            at.prompts(prompts, answer_tokens, end)
        if speed_tokens:
            every = [e.tokens.tolist() for some in texts for e in some] + [list(p) for p in prompts]
            at.costs = costs_of(cells, max(every, key=len), speed_tokens, memory, model.device)
    return Evaluation(
        tuple(at.rows),
        digest,
        at.full,
        seed,
        injected,
        positions=tuple(at.places),
        costs=tuple(at.costs),
    )


@dataclass
class _Work:
    """An evaluation under way."""

    cells: list[Cell]
    tokenizer: Any
    seed: int
    tag: str
    journal: Journal | None
    progress: Callable[[str, int, int], None] | None
    found: Callable[[Sequence[Row]], None] | None
    rows: list[Row] = field(default_factory=list)
    places: list[Position] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    full: dict[str, float] = field(default_factory=dict)

    def task(self, task: Task | None, length: int, texts: list[Example]) -> None:
        """All texts of one task and length."""
        name = PPL if task is None else task.name
        note, at = self._begin(name, len(texts)), f"{self.tag}/{length}/{name}"
        options = (length, self.seed, note, self.journal, at)
        if task is None:
            rows, places = text_rows(self.cells, texts, *options)
            self.places += places
        else:
            rows = recall_rows(self.cells, task, texts, *options, self.tokenizer)
        self._end(name, rows)

    def prompts(
        self, prompts: Sequence[Sequence[int]], answer_tokens: int, end: Sequence[int]
    ) -> None:
        """A user's prompts."""
        note, at = self._begin(PROMPTS, len(prompts)), f"{self.tag}/{answer_tokens}/{PROMPTS}"
        options = (self.seed, note, self.journal, at)
        self._end(PROMPTS, prompt_rows(self.cells, prompts, answer_tokens, end, *options))

    def _begin(self, name: str, total: int) -> Progress:
        for cell in self.cells:
            cell.begin()
        return Progress(self.progress, name, total)

    def _end(self, name: str, rows: list[Row]) -> None:
        self.rows += rows
        self.full[name] = self.cells[0].reading.bytes_per_token
        if self.found is not None:
            self.found(rows)


def _check(
    model: Any,
    configs: Sequence[Config],
    tasks: Sequence[Task | None],
    lengths: Sequence[int],
    prompts: Sequence[Sequence[int]],
    answer_tokens: int,
) -> None:
    """What cannot be measured on this model. Raises RequestError, ConfigError."""
    context = _context(model)
    if tasks and max(lengths) > context:
        raise RequestError(
            f"a length of {max(lengths)} tokens is beyond the model's context of {context}"
        )
    for i, prompt in enumerate(prompts, 1):
        if not 0 < len(prompt) <= context - answer_tokens:
            raise RequestError(
                f"prompt {i} has {len(prompt)} tokens: with an answer of {answer_tokens} it does not fit the context "
                f"of {context}"
            )
    if not configs:
        raise ConfigError("nothing to evaluate: give at least one configuration, as kv='auto'")
    if not (tasks or prompts):
        raise ConfigError("nothing to evaluate: give a task, or prompts")


def _posed(texts: list[Example], ask: str) -> list[Example]:
    """Texts as they are asked of all caches."""
    return [_known(e) for e in texts] if ask == "before" else texts


def _check_posed(task: Task | None, texts: Sequence[Example], ask: str) -> None:
    """Refuses answers that are known before anything goes: no cache would be read for them. Raises RequestError."""
    if task is None or ask != "before":
        return
    answers = [a for e in texts for a in e.answers]
    if answers and all(a.stop - a.start == 1 for a in answers):
        raise RequestError(
            f"{task.name}: its answers are one token, which the prompt's last query gives before any token goes; "
            "ask after, or a task whose answers are longer, as kv"
        )


def _known(example: Example) -> Example:
    """The same with its first question in the prompt, and no other."""
    if not example.answers:
        return replace(example, asked=0)
    return replace(example, answers=example.answers[:1], asked=example.answers[0].start)


def _context(model: Any) -> int:
    from quire.models.rope import Regimes

    config = model.config.get_text_config(decoder=True)
    return int(context_tokens(config, Regimes(model).stretch))
