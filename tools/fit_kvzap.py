"""Fits `kvzap`'s map: from the state that enters a layer's attention to the log of `kvzip`'s score of each KV head.

    python tools/fit_kvzap.py [MODEL] --texts emma.txt alice.txt --out kvzap.safetensors

Texts are read in windows, and recall tasks are hidden in them; `kvzip` reads each once more, and its scores are what is
to be told from the hidden states. Sums of products are all that is kept (width squared per layer), so texts may be of
any length. Every tenth window is held out; R2 on them is printed by layer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from quire import packaged
from quire.engine.runner import Item
from quire.evaluate.tasks import Filler, Words, generate, parse_task
from quire.models.hidden import attentions
from quire.models.load import weights_digest
from quire.models.open import open_runner
from quire.retention import parse_keep

FLOOR = 1e-6
"""Scores below it are taken for it: their logarithm would be all that is fitted."""
TASKS = ("kv", "token-kv", "needle", "passkey")
SEED = 100_000
"""Of the tasks' examples: none that an evaluation asks."""


def windows(
    tokenizer: Any, texts: list[str], length: int, count: int, seed: int
) -> Iterator[list[int]]:
    """Windows of the texts and, in turn with them, recall tasks hidden in the texts, without their questions."""
    words = Words(tokenizer)
    ids = [np.array(tokenizer.encode(t, add_special_tokens=False)) for t in texts]
    fillers = [Filler(x) for x in ids]
    rng = np.random.default_rng(seed)
    for n in range(count):
        which = int(rng.integers(len(ids)))
        if n % 2:
            task = parse_task(TASKS[n // 2 % len(TASKS)])
            example = generate(
                task, words, fillers[which], length, depth=float(rng.random()), seed=seed + n
            )
            yield [int(t) for t in example.tokens[: example.asked]]
        else:
            yield [*words.begin, *fillers[which](rng, length - len(words.begin))]


class Sums:
    """One layer's normal equations and, for the held-out windows, what R2 needs."""

    def __init__(self, width: int, heads: int) -> None:
        self.xx = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self.xy = torch.zeros(width + 1, heads, dtype=torch.float64)
        self.held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, x: torch.Tensor, y: torch.Tensor, *, held: bool) -> None:
        x = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
        if held:
            if len(self.held) < 16:
                self.held.append((x, y.double()))
            return
        self.xx += x.T @ x
        self.xy += x.T @ y.double()

    def solve(self, ridge: float) -> torch.Tensor:
        """`[width + 1, heads]`; the bias is not drawn to zero."""
        width = len(self.xx) - 1
        penalty = torch.full(
            (width + 1,), ridge * float(self.xx.diagonal()[:-1].mean()), dtype=torch.float64
        )
        penalty[-1] = 0
        return torch.linalg.solve(self.xx + penalty.diag(), self.xy)

    def r2(self, w: torch.Tensor) -> list[float]:
        """Per head, on what was held out."""
        x, y = (torch.cat(z) for z in zip(*self.held, strict=True))
        return (1 - ((x @ w - y) ** 2).mean(0) / y.var(0, correction=0)).tolist()


def fit(
    model: Any, samples: Iterator[list[int]], repeats: int, ridge: float
) -> tuple[dict[str, torch.Tensor], dict[int, list[float]]]:
    """The map's tensors, and R2 by layer and head."""
    digest_of, hidden = attentions(model), {}
    runner = open_runner(model, memory="1GiB")
    keep = parse_keep(f"kvzip:budget=0.5,repeats={repeats}")
    layers = runner.rules(keep).layers

    def take(layer: int) -> Any:
        def before(_m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden.setdefault(
                layer, kwargs.get("hidden_states", args[0] if args else None).detach()[0].float()
            )

        return before

    handles = [digest_of[n].register_forward_pre_hook(take(n), with_kwargs=True) for n in layers]
    sums: dict[int, Sums] = {}
    try:
        for at, tokens in enumerate(samples):
            hidden.clear()
            table = runner.open(keep, len(tokens))
            table.append(len(tokens))
            runner.forward([Item(table, tokens, 0, len(tokens), 0)])  # and the repetition with it
            for chain in table.chains:
                line = table.keeper.lines.get(chain.group.name)
                for layer in chain.group.layers if line is not None else ():
                    first, heads = chain.group.tile_index(layer), chain.group.heads(layer)
                    y = (
                        line.mass[first : first + len(heads), : len(tokens)]
                        .clamp_min(FLOOR)
                        .log()
                        .T
                    )
                    x = hidden[layer]
                    sums.setdefault(layer, Sums(x.shape[1], y.shape[1])).add(
                        x, y, held=at % 10 == 9
                    )
            table.release()
            print(f"\r{at + 1} windows", end="", file=sys.stderr, flush=True)
    finally:
        for h in handles:
            h.remove()
        runner.close()
    print(file=sys.stderr)
    out, good = {}, {}
    for layer, s in sorted(sums.items()):
        w = s.solve(ridge)
        out[f"{layer}.weight"] = w[:-1].T.float().contiguous()
        out[f"{layer}.bias"] = w[-1].float().contiguous()
        good[layer] = s.r2(w)
    return out, good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=str(packaged.path()),
        help="a folder; default: the packaged model",
    )
    parser.add_argument("--texts", nargs="+", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (default 512)")
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2048)
    parser.add_argument(
        "--ridge", type=float, default=1e-4, help="as a share of the mean square of the states"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    if args.windows < 10 or args.length < 16:
        parser.error("at least 10 windows of 16 tokens")
    texts = [p.read_text(encoding="utf-8") for p in args.texts]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    digest = weights_digest(model)
    samples = windows(tokenizer, texts, args.length, args.windows, args.seed)
    tensors, good = fit(model, samples, args.repeats, args.ridge)
    save_file(tensors, args.out, {"digest": digest, "kind": "kvzap"})
    for layer, r2 in good.items():
        print(f"layer {layer}: R2 held out " + " ".join(f"{x:.3f}" for x in r2))
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, model {digest[:8]}")


if __name__ == "__main__":
    main()
