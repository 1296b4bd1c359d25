"""Claims about dropping tokens: that the heaviest fifth is enough, and that streams need their first tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from quire.evaluate.claims.claim import Claim, Outcome

if TYPE_CHECKING:
    from quire.evaluate.claims.measured import Bench

__all__ = ["CLAIMS"]

FIFTH = ("h2o:budget=0.2", "random:budget=0.2")
MEMORY = "1GiB"
SAME = 0.01
"""A share by which quality may differ and count as kept, as in the paper's tables."""


def _heavy(bench: Bench) -> Outcome:
    """A text's second half after four fifths of the first went, and keys asked for before and after that."""
    from quire.evaluate.run import evaluate

    length, examples = (512, 5) if bench.quick else (1024, 20)
    configs = [("auto", keep) for keep in ("full", *FIFTH)]
    model, tokenizer = bench.loaded.model, bench.loaded.tokenizer
    found: dict[tuple[str, str], float] = {}
    for ask in ("before", "after"):
        rows = evaluate(
            model,
            tokenizer,
            configs,
            ["needle"],
            bench.ids,
            length_tokens=length,
            examples=examples,
            ask=ask,
            memory=MEMORY,
        ).rows
        found |= {(ask, r.keep): r.value for r in rows if r.metric == "recall" and r.depth is None}
    texts = evaluate(
        model, tokenizer, configs, ["ppl"], bench.ids, length_tokens=length, memory=MEMORY
    ).rows
    ppl = {r.keep: r.value for r in texts if r.metric == "perplexity"}
    h2o, random = FIFTH
    worse = {keep: ppl[keep] / ppl["full"] - 1 for keep in FIFTH}
    kept = worse[h2o] <= SAME and found["before", h2o] >= (1 - SAME) * found["before", "full"]
    recall = ", ".join(
        f"{found[ask, 'full']:.0%} in full and {found[ask, h2o]:.0%} when asked {ask}"
        for ask in ("before", "after")
    )
    return Outcome(
        f"perplexity of what follows {worse[h2o]:+.1%} (a random fifth {worse[random]:+.1%}); of hidden keys are found "
        f"{recall} tokens went",
        "reproduced" if kept else "contradicted",
        f"kept: at most {SAME:.0%} lost in both, questions known beforehand as in the paper; texts of {length:,} "
        "tokens, the packaged model",
    )


def _stream(bench: Bench) -> Outcome:
    """A text through a cache far shorter than it, with its first four tokens and without."""
    from quire.evaluate.attention import look

    cache = 256
    ids = bench.ids[: 2048 if bench.quick else 6144]
    with bench.opened("auto") as runner:
        heads = look(runner, ids[:cache]).heads
    resting = sum(0 in (h.sinks or ()) for h in heads)
    ppl = {}
    for keep in (f"sinks:4+window:{cache - 4}", f"window:{cache}"):
        with bench.opened("auto", keep=keep) as runner:
            ppl[keep] = _perplexity(runner, ids, cache)
    with_sinks, without = ppl.values()
    ratio = without / with_sinks
    said = (
        f"beyond {cache} tokens, perplexity {with_sinks:.2f} with four sinks and {without:.2f} without; {resting} of "
        f"{len(heads)} heads rest on the first token"
    )
    if ratio >= 1.5 and math.isfinite(with_sinks):
        return Outcome(said, "reproduced", f"{len(ids):,} tokens through a cache of {cache}")
    if resting < len(heads) / 4:
        why = (
            "the packaged model hardly rests on its first token, so little is lost when that leaves"
        )
        return Outcome(said, "not here", f"{why}; {len(ids):,} tokens through a cache of {cache}")
    return Outcome(said, "contradicted", "many heads rest on the first token, yet a window will do")


def _perplexity(runner: Any, ids: list[int], first: int) -> float:
    """Of the tokens behind the `first` ones, as a stream in chunks reads them."""
    from quire.engine.runner import Item

    table, total = runner.open(), 0.0
    try:
        for start in range(0, len(ids) - 1, 128):
            stop = min(len(ids) - 1, start + 128)
            table.append(stop - start)
            logits = runner.forward([Item(table, ids, start, stop, stop - start)])
            table.commit()
            logs = logits.double().log_softmax(-1)
            total -= sum(float(logs[i - start, ids[i + 1]]) for i in range(max(start, first), stop))
    finally:
        table.release()
    return math.exp(total / (len(ids) - 1 - first))


CLAIMS = (
    Claim(
        "h2o",
        "H2O keeps quality with 20 % of the tokens",
        "arXiv 2306.14048",
        _heavy,
    ),
    Claim(
        "sinks",
        "A long stream without attention sinks falls apart, with four of them it does not",
        "StreamingLLM, arXiv 2309.17453",
        _stream,
    ),
)
