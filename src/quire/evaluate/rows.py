"""From texts to rows, task by task: what every cache makes of the same text, and what all texts together say.

ppl        every window, all configurations chunk by chunk       nll, perplexity, dnll, kl, agreement, and by position
recall     every example's answers, or what is written           recall, drecall, and by depth
prompts    the exact cache's own greedy answer, read by all      divergence, same, dnll, kl, agreement
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quire.errors import RequestError
from quire.evaluate.cells import Cell, Progress
from quire.evaluate.decode import Scorer
from quire.evaluate.journal import Journal
from quire.evaluate.metrics import (
    Estimate,
    kl_divergence,
    paired_bootstrap,
    perplexity,
    proportion,
    runs,
    top1_agreement,
)
from quire.evaluate.report import Position, Row
from quire.evaluate.tasks import Example, Task
from quire.evaluate.texts import DEPTHS, PPL, PROMPTS

__all__ = ["prompt_rows", "recall_rows", "recalled", "text_rows", "written"]

BINS = 16
"""Stretches of a window whose loss is shown by itself."""


def _each(
    cells: list[Cell],
    examples: Sequence[Example],
    work: Callable[[Example], None],
    note: Progress,
    journal: Journal | None,
    name: str,
) -> None:
    """Every text through all caches, unless the journal has it."""
    for i, example in enumerate(examples):
        at = f"{name}/{i}"
        known = None if journal is None else journal.text(at)
        if known is None:
            began = [cell.begin_text() for cell in cells]
            work(example)
            found = [cell.text(b) for cell, b in zip(cells, began, strict=True)]
            if journal is not None:
                journal.put_text(at, found)
        else:
            for cell, part in zip(cells, known, strict=True):
                cell.take(*part)
        note.step()


def _compare(
    cells: list[Cell],
    tokens: Sequence[int],
    first: int,
    prompt: int,
    cuts: set[int],
    *,
    must_decode: bool = True,
) -> None:
    """Per-token figures of one text beside the first cell's, all configurations chunk by chunk."""
    passes = (
        c.scorer.score(
            tokens, first=first, prompt_tokens=prompt, cuts=cuts, must_decode=must_decode
        )
        for c in cells
    )
    for chunks in zip(*passes, strict=True):
        for cell, chunk in zip(cells, chunks, strict=True):
            cell.add("nll", -chunk.logprobs.numpy())
            if cell is not cells[0]:
                cell.add("kl", kl_divergence(chunks[0].logits, chunk.logits))
                cell.add("agreement", top1_agreement(chunks[0].logits, chunk.logits))


# -- a text ------------------------------------------------------------------------------------------------------


def text_rows(
    cells: list[Cell],
    texts: list[Example],
    length: int,
    seed: int,
    note: Progress,
    journal: Journal | None,
    name: str,
) -> tuple[list[Row], list[Position]]:
    """Rows of ppl, and its loss over position."""
    full = cells[0]
    half = length // 2 if any(c.scorer.cuts(0, 1) for c in cells) else 0
    cuts = set().union(*(c.scorer.cuts(half, length) for c in cells))
    _each(
        cells,
        texts,
        lambda e: _compare(cells, e.tokens, half, half, cuts),  # type: ignore[arg-type]
        note,
        journal,
        name,
    )
    exact = full.all("nll")
    units = runs([len(e.tokens) - 1 - half for e in texts])
    template = Row("", "", PPL, "", 0.0, None, None, 0.0, len(exact), length, count=len(exact))
    template = replace(template, full_bytes_per_token=full.reading.bytes_per_token)
    rows, places = [], []
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
        rows += [cell.row(template, metric, e) for metric, e in figures.items()]
        places += _positions(cell, nll - exact, half, length, len(texts), seed)
    return rows, places


def _positions(
    cell: Cell, dnll: npt.NDArray[np.float64], half: int, length: int, n: int, seed: int
) -> list[Position]:
    """Loss against the exact cache by where in the window the token stands."""
    by_text = dnll.reshape(n, -1)
    edges = np.unique(np.linspace(0, by_text.shape[1], min(BINS, by_text.shape[1]) + 1).astype(int))
    out = []
    for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        values = by_text[:, a:b]
        e = paired_bootstrap(values.reshape(-1), np.repeat(np.arange(n), b - a), seed=seed)
        out.append(Position(*cell.config, length, half + a, half + b, e.value, e.low, e.high))
    return out


# -- recall ------------------------------------------------------------------------------------------------------


def recall_rows(
    cells: list[Cell],
    task: Task,
    examples: list[Example],
    length: int,
    seed: int,
    note: Progress,
    journal: Journal | None,
    name: str,
    tokenizer: Any,
) -> list[Row]:
    """Every answer right or wrong, over all depths and by depth; answers of one example are drawn together."""

    def work(example: Example) -> None:
        for cell in cells:
            cell.add("right", recalled(cell.scorer, example, tokenizer))

    _each(cells, examples, work, note, journal, name)
    parts = [e.answers or e.wanted for e in examples]
    units = np.repeat(np.arange(len(examples)), [len(p) for p in parts])
    depths = np.array([np.nan if a.depth is None else a.depth for p in parts for a in p])
    tokens = np.array([a.stop - a.start for e in examples for a in e.answers] or [0])
    if len(tokens) != len(units):  # what is written freely has no places
        tokens = np.repeat(
            [e.reply_tokens / max(1, len(e.wanted)) for e in examples], [len(p) for p in parts]
        )
    nearest = np.abs(depths[:, None] - np.array(DEPTHS))
    nearest = np.where(np.isnan(depths), -1, np.nan_to_num(nearest).argmin(1))
    template = Row("", "", task.name, "", 0.0, None, None, 0.0, int(tokens.sum()), length)
    template = replace(
        template,
        count=len(units),
        full_bytes_per_token=cells[0].reading.bytes_per_token,
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


def recalled(scorer: Scorer, example: Example, tokenizer: Any = None) -> list[bool]:
    """Per answer whether it is right, read through the cache.

    An answer with its place in the text: every token of it is the most likely one after the text before it. What is
    asked for in any order: the words that stand in what the model writes.
    """
    if example.wanted:
        return written(scorer, example, tokenizer)
    first = example.answers[0].start - 1
    cuts = scorer.cuts(example.asked, len(example.tokens))
    best = torch.full((len(example.tokens),), -1, dtype=torch.int64)
    prompt = example.asked or None
    for chunk in scorer.score(example.tokens, first=first, prompt_tokens=prompt, cuts=cuts):  # type: ignore[arg-type]
        best[chunk.start + 1 : chunk.stop + 1] = chunk.logits.argmax(-1).cpu()
    hit = best.numpy() == example.tokens
    return [bool(hit[a.start : a.stop].all()) for a in example.answers]


def written(scorer: Scorer, example: Example, tokenizer: Any) -> list[bool]:
    """Which of the words that are asked for the model writes, whatever their case and order."""
    end = getattr(tokenizer, "eos_token_id", None)
    ends = () if end is None else (int(end),)
    prompt = example.asked or None
    ids = scorer.answer(example.tokens, example.reply_tokens, prompt_tokens=prompt, end=ends)  # type: ignore[arg-type]
    text = str(tokenizer.decode([i for i in ids if i not in ends])).lower()
    return [w.text.lower() in text for w in example.wanted]


# -- prompts -----------------------------------------------------------------------------------------------------


def prompt_rows(
    cells: list[Cell],
    prompts: Sequence[Sequence[int]],
    answer_tokens: int,
    end: Sequence[int],
    seed: int,
    note: Progress,
    journal: Journal | None,
    name: str,
) -> list[Row]:
    """The exact cache's greedy answers, read along by every other: where it would have gone another way, and how far.

    All read the answer one token at a time, so that an exact cache diverges nowhere.

    Raises:
        RequestError: a lossy configuration read no decoded position in any of them.
    """

    def work(example: Example) -> None:
        asked = [int(t) for t in example.tokens]
        answer = cells[0].scorer.answer(asked, answer_tokens, end=end)
        cells[0].begin_text()  # what writing the answer read is no part of the comparison
        tokens, n = asked + answer, len(asked)
        _compare(cells, tokens, n - 1, n, set(range(n, len(tokens))), must_decode=False)

    examples = [Example(np.array(p), ()) for p in prompts]
    _each(cells, examples, work, note, journal, name)
    exact = cells[0].all("nll")
    lengths = [len(x) for x in cells[0].values["nll"]]
    units = np.repeat(np.arange(len(lengths)), lengths)
    longest = max(n + len(p) for n, p in zip(lengths, prompts, strict=True))
    template = Row("", "", PROMPTS, "", 0.0, None, None, 0.0, len(exact), longest, count=len(exact))
    template = replace(template, full_bytes_per_token=cells[0].reading.bytes_per_token)
    rows = []
    for cell in cells[1:]:
        if cell.scorer.lossy and not cell.reading.decoded_queries:
            raise RequestError(
                f"kv={cell.config[0]!r}: no prompt with its answer is long enough ({longest} tokens at most) for a "
                "decoded position to be read; give longer prompts or longer answers"
            )
        same = [bool_run(x) for x in cell.values["agreement"]]
        never = [n == length for n, length in zip(same, lengths, strict=True)]
        each = replace(template, count=len(lengths))
        figures = [
            (each, "divergence", paired_bootstrap(same, seed=seed)),
            (each, "same", proportion(never, np.arange(len(never)), seed=seed)),
            (template, "dnll", paired_bootstrap(cell.all("nll") - exact, units, seed=seed)),
            (template, "kl", paired_bootstrap(cell.all("kl"), units, seed=seed)),
            (template, "agreement", paired_bootstrap(cell.all("agreement"), units, seed=seed)),
        ]
        rows += [cell.row(t, metric, e) for t, metric, e in figures]
    return rows


def bool_run(agrees: Any) -> int:
    """Tokens before the first that differs."""
    agrees = np.asarray(agrees, bool)
    return len(agrees) if agrees.all() else int(agrees.argmin())
