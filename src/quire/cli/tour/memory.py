"""Panel 4: the same sequences in rooms of their own, in blocks, and in blocks that share a common beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quire.cli.report import bytes_text
from quire.cli.tour.page import Page, bar
from quire.cli.tour.stage import PROMPT, Stage, tour_text
from quire.engine.runner import Item
from quire.errors import RequestError

if TYPE_CHECKING:
    import torch

TITLE = "One room each, blocks, shared blocks"


def run(stage: Stage) -> dict[str, Any]:
    """Every way really computes and holds all sequences, in a store of its own, and the store is asked."""
    page, pace = stage.page, stage.pace
    room = min(pace.room_tokens, stage.room)
    common = stage.ids[: min(pace.common_tokens, room // 4)]
    tails = _tails(stage, room - len(common))
    size = stage.options.block_tokens
    if page is not None:
        lengths = ", ".join(f"{len(common) + len(t):,}" for t in tails)
        page.words(
            f"{len(tails)} sequences of {lengths} tokens. They begin with the same {len(common)} tokens, as chats with "
            "one system prompt do, and go on differently. All three stores really computed and held them."
        )
        page.line()
    ways: list[dict[str, Any]] = []
    logits: list[torch.Tensor] = []
    with stage.working("keeping the same sequences in three ways …"):
        for name, block_tokens, shared in (
            (f"a room of {room:,} tokens each", room, False),
            (f"blocks of {size} tokens", size, False),
            ("blocks, common beginning shared", size, True),
        ):
            with stage.opened(block_tokens=block_tokens) as runner:
                figures, last = _hold(runner, common, tails, shared=shared)
                ways.append({"way": name} | figures)
                logits.append(last)
    found = {
        "common_tokens": len(common),
        "tokens": [len(common) + len(t) for t in tails],
        "ways": ways,
        "same_next_tokens": all(w["next_tokens"] == ways[0]["next_tokens"] for w in ways),
        "logit_difference": max(float((x - logits[0]).abs().max()) for x in logits[1:]),
        "logit_spread": float(logits[0].std()),
        "more": stage.command("run", PROMPT, "A sealed block is a value.", "--block-tokens", 8),
    }
    if page is not None:
        _show(page, found)
    return found


def _tails(stage: Stage, most: int) -> list[list[int]]:
    """Pieces of the text as it falls apart, spread over it; each at most `most` tokens."""
    wanted = stage.pace.sequences
    fitting: list[list[int]] = []
    for gap in ("\n\n\n", "\n\n"):  # definitions, or paragraphs where those are too long
        pieces = (stage.encode(p) for p in tour_text().split(gap))
        fitting = [p for p in pieces if 1 <= len(p) <= most]
        if len(fitting) >= wanted:
            break
    n = min(wanted, len(fitting))
    if n < 2:
        raise RequestError(
            f"no two pieces of the text fit {most} tokens; a model with a longer context shows it"
        )
    return [fitting[i * len(fitting) // n] for i in range(n)]


def _hold(
    runner: Any, common: list[int], tails: Sequence[list[int]], *, shared: bool
) -> tuple[dict[str, Any], torch.Tensor]:
    """Computes the sequences, then asks the store while all of them are held.

    Returns:
        The figures, and the logits behind each sequence's last token, `[sequences, vocab]`.
    """
    import torch

    tables: list[Any] = []
    computed, last = 0, []
    store = runner.bridge.store
    try:
        if shared:
            trunk = runner.open()
            tables.append(trunk)
            computed += _compute(runner, trunk, common)[0]
            tables += [trunk.fork() for _ in tails]
            tables.pop(0).release()
        else:
            tables += [runner.open() for _ in tails]
        for table, tail in zip(tables, tails, strict=True):
            n, logits = _compute(runner, table, [*common, *tail])
            computed += n
            last.append(logits)
        held = store.usage().held_bytes
        rows = torch.stack(last).cpu()
        figures = {
            "held_bytes": held,
            "used_bytes": _used(tables),
            "blocks": sum(p.held for p in store.pools.values()),
            "computed_tokens": computed,
            "next_tokens": rows.argmax(-1).tolist(),
        }
        return figures, rows
    finally:
        for table in tables:
            table.release()


def _compute(runner: Any, table: Any, tokens: list[int]) -> tuple[int, torch.Tensor]:
    """Adds what the table does not hold yet. Returns how many tokens that were, and the logits behind the last."""
    start, stop = table.length, len(tokens)
    # a scan that restarts on several tokens (Mamba-1 kinds) goes on by single ones
    step = 1 if start and not runner.chunked_prefill else max(1, stop - start)
    logits = None
    for a in range(start, stop, step):
        b = min(stop, a + step)
        table.append(b - a)
        logits = runner.forward([Item(table, tokens, a, b, 1)])
        table.commit()
    assert logits is not None, "a tail has at least one token"
    return stop - start, logits[-1]


def _used(tables: Sequence[Any]) -> int:
    """Bytes of the places that hold a token, those of shared blocks once."""
    rows: dict[tuple[int, int], tuple[int, float]] = {}
    for table in tables:
        for chain in table.chains:
            size = chain.group.block_tokens
            for entry, block in enumerate(chain.ids[: chain.count]):
                if block >= 0:
                    n = (
                        size
                        if chain.group.recurrent
                        else min(size, chain.slot(table.length) - entry * size)
                    )
                    key = (chain.group.block_bytes, int(block))
                    rows[key] = max(rows.get(key, (0, 0.0)), (n, chain.group.block_bytes / size))
    return round(sum(n * each for n, each in rows.values()))


def _show(page: Page, found: dict[str, Any]) -> None:
    ways = found["ways"]
    most = max(w["held_bytes"] for w in ways)
    room = max(6, page.width - 71)
    rows = [
        (
            w["way"],
            bytes_text(w["held_bytes"]),
            f"{100 * w['used_bytes'] / w['held_bytes']:.1f} %",
            f"{w['computed_tokens']:,}",
            bar(w["held_bytes"] / most, room, plain=page.plain),
        )
        for w in ways
    ]
    page.table(("", "held", "of it filled", "computed", "<"), rows)
    page.line()
    tokens = sum(found["tokens"])
    each = ", ".join(f"{w['held_bytes'] / tokens:,.0f}" for w in ways)
    alike = "All three ways" if found["same_next_tokens"] else "Not all ways"
    page.words(
        f"Bytes held per token of the sequences: {each}. {alike} name the same next token for every sequence; no logit "
        f"differs by more than {found['logit_difference']:.1g}, where logits spread by {found['logit_spread']:.1f}. "
        "A fork shares full blocks and copies the last, partly filled one."
    )
