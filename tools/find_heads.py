"""Finds `duo`'s map: which KV heads need the whole context, and in which order they can do without.

    python tools/find_heads.py [MODEL] --texts emma.txt alice.txt --out duo.json

Recall tasks are hidden in texts. The final hidden states from which the model with every token writes their answers are
what is to be kept; the loss is their mean squared distance from those of the model in which some heads read the sinks
and a window only, over the mean square of the former.

--method removal   begins with all heads reading everything and lets the one go whose going costs least, then the next,
                   to the last; `--at-once K` takes K a round, for models of many heads. What is measured is what is
                   served: the same cache and policy. (default)
--method gates     DuoAttention's own: a gate per head mixes what it reads with all tokens and with few, and gates are
                   trained against that loss and their own sum; heads are ranked by their gates.

The file holds the order, the heads that need everything most first, and how it was found. Afterwards the loss on
examples that took no part is printed for every number of heads that keep all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from quire import packaged
from quire.engine.runner import Item
from quire.errors import ConfigError, QuireError
from quire.evaluate.tasks import PLAIN_TEXT, Example, Filler, Words, generate, parse_task
from quire.models.keep import Rules
from quire.models.load import weights_digest
from quire.models.open import open_runner
from quire.retention import Keep, parse_keep
from quire.retention.duo import Policy
from quire.spec import Coord, Full

TASKS = ("kv", "token-kv", "needle", "passkey")
SEED = 200_000
"""Of the tasks' examples: none that an evaluation asks."""
HELD_OUT = 10_000
"""Added to it for the examples that say how well an order does."""
SPARSE = 0.05
"""What the mean of the gates counts beside the loss, as in the paper."""
RATE = 0.02
"""Of AdamW on the gates, as in the paper."""


def examples(
    tokenizer: Any, texts: Sequence[str], length: int, count: int, seed: int
) -> list[Example]:
    """Recall tasks by turns, each at a depth of its own."""
    words = Words(tokenizer)
    fillers = [Filler(tokenizer.encode(t, add_special_tokens=False)) for t in texts]
    rng = np.random.default_rng(seed)
    return [
        generate(
            parse_task(TASKS[n % len(TASKS)]),
            words,
            fillers[int(rng.integers(len(fillers)))],
            length,
            depth=float(rng.random()),
            seed=seed + n,
        )
        for n in range(count)
    ]


def _asking(example: Example) -> list[int]:
    """Positions from which the tokens of the answers are predicted."""
    return [p - 1 for a in example.answers for p in range(a.start, a.stop)]


def heads_of(layout: Any) -> list[Coord]:
    """The KV heads that read everything by themselves. Raises ConfigError where there are none to tell apart."""
    spec = layout.narrowed(parse_keep("full"))
    raws = {g.raw for g in spec}
    found = [g for g in spec if type(g.span) is Full and g.name not in raws]
    if not found or any(f.name == "latent" for g in found for f in g.fields):
        raise ConfigError("no KV heads of this model read everything: there is nothing to rank")
    return sorted(c for g in found for c in g.coords)


class Reader:
    """Final hidden states of a model under a choice of retrieval heads, through the cache that will serve it."""

    def __init__(self, model: Any, sinks: int, window: int, samples: Sequence[Example]) -> None:
        self.runner: Any = open_runner(model, memory="1GiB")
        self.heads = heads_of(self.runner.bridge.layout)
        self.sinks, self.window, self.samples = sinks, window, list(samples)
        self._last: torch.Tensor | None = None
        self._hook = model.get_output_embeddings().register_forward_pre_hook(self._take)
        self.whole = [self._states(s, None) for s in self.samples]

    def close(self) -> None:
        self._hook.remove()
        self.runner.close()

    def _take(self, _m: Any, args: tuple[Any, ...]) -> None:
        self._last = args[0].detach().reshape(-1, args[0].shape[-1]).float()

    def _rules(self, streaming: Sequence[Coord]) -> Rules:
        kept = [c for c in self.heads if c not in set(streaming)]
        share = len(kept) / len(self.heads)
        policy = Policy(retrieval=share, sinks=self.sinks, window=self.window)
        return Rules(self.runner.bridge, Keep("duo", policy.ranked([*kept, *streaming])))

    def _states(self, sample: Example, rules: Rules | None) -> torch.Tensor:
        tokens, asking = sample.tokens.tolist(), _asking(sample)
        table = self.runner.open()
        try:
            if rules is not None:
                rules.apply(table, len(tokens))
            table.append(len(tokens))
            n = len(tokens) - asking[0]
            self.runner.forward([Item(table, tokens, 0, len(tokens), n)])
        finally:
            table.release()
        assert self._last is not None
        return self._last[-n:][[p - asking[0] for p in asking]]

    def loss(self, streaming: Sequence[Coord]) -> float:
        """With these heads reading the sinks and the window only."""
        rules = self._rules(streaming)
        off = size = 0.0
        for sample, want in zip(self.samples, self.whole, strict=True):
            got = self._states(sample, rules)
            off += float((got - want).square().sum())
            size += float(want.square().sum())
        return off / size

    def curve(self, order: Sequence[Coord]) -> list[float]:
        """The loss with the first n of an order keeping everything, n from 0 to all."""
        return [self.loss(order[n:]) for n in range(len(order) + 1)]


def by_removal(reader: Reader, at_once: int = 1) -> list[Coord]:
    """Heads in the order in which they are needed: the one that went last first."""
    gone: list[Coord] = []
    left = list(reader.heads)
    while left:
        cost = {c: reader.loss([*gone, c]) for c in left}
        going = sorted(left, key=lambda c: cost[c])[:at_once]
        gone += going
        left = [c for c in left if c not in going]
        note(f"{len(left)} of {len(reader.heads)} heads left, loss {cost[going[-1]]:.5f}")
    return gone[::-1]


class Gates:
    """A gate per head, and attention that mixes by it what a head reads with all tokens and with few."""

    def __init__(self, heads: Sequence[Coord], sinks: int, window: int) -> None:
        self.places = {c: i for i, c in enumerate(heads)}
        self.sinks, self.window = sinks, window
        self.values = torch.ones(len(heads), requires_grad=True)
        self.mixed = False

    def _of(self, layer: int, n_heads: int) -> torch.Tensor:
        at = [self.places.get((layer, h)) for h in range(n_heads)]
        return torch.stack([torch.ones(()) if i is None else self.values[i] for i in at])

    def attend(
        self,
        module: Any,
        q: Any,
        k: Any,
        v: Any,
        _mask: Any,
        scaling: float | None = None,
        **more: Any,
    ) -> tuple[Any, None]:
        """As transformers' attention functions, of one text without padding."""
        if more.get("softcap") is not None or more.get("s_aux") is not None:
            raise ConfigError("gates know plain softmax only; use --method removal")
        share, n = q.shape[1] // k.shape[1], q.shape[2]
        at = torch.arange(n)
        back = at[:, None] - at
        seen = (back >= 0) & (back < (more.get("sliding_window") or n))
        scores = q @ k.repeat_interleave(share, 1).mT * (scaling or q.shape[-1] ** -0.5)
        values = v.repeat_interleave(share, 1)

        def out(mask: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ values
            return found

        whole = out(seen)
        if self.mixed:
            few = out(seen & ((back < self.window) | (at < self.sinks)))
            gate = self._of(int(module.layer_idx), k.shape[1])
            whole = torch.lerp(few, whole, gate.repeat_interleave(share)[None, :, None, None])
        return whole.transpose(1, 2), None


def by_gates(
    model: Any,
    heads: Sequence[Coord],
    samples: Sequence[Example],
    sinks: int,
    window: int,
    steps: int,
) -> list[Coord]:
    """Heads by trained gates, the largest first. The model's parameters want no gradients afterwards."""
    gates = Gates(heads, sinks, window)
    AttentionInterface.register("find_heads", gates.attend)
    model.requires_grad_(requires_grad=False)
    before = model.config._attn_implementation  # noqa: SLF001 - what set_attn_implementation sets has no other name
    model.set_attn_implementation("find_heads")
    last: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _m, a: last.append(a[0]))
    optimiser = torch.optim.AdamW([gates.values], lr=RATE, weight_decay=0.0)
    try:
        for step in range(steps):
            sample = samples[step % len(samples)]
            ids, asking = torch.from_numpy(sample.tokens)[None], _asking(sample)
            last.clear()
            for gates.mixed in (False, True):
                with torch.set_grad_enabled(gates.mixed):
                    model(ids, use_cache=False)
            want, got = (x[0, asking].float() for x in last)
            distance = (got - want).square().sum() / want.square().sum()
            optimiser.zero_grad()
            (distance + SPARSE * gates.values.mean()).backward()
            optimiser.step()
            with torch.no_grad():
                gates.values.clamp_(0, 1)
            if step % 20 == 19:
                sums = gates.values.sum().item()
                note(f"step {step + 1}: distance {distance.item():.5f}, gates {sums:.2f}")
    finally:
        hook.remove()
        model.set_attn_implementation(before)
    found = gates.values.tolist()
    note("gates " + ", ".join(f"{c}: {g:.2f}" for c, g in zip(heads, found, strict=True)))
    return sorted(heads, key=lambda c: -found[gates.places[c]])


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=str(packaged.path()),
        help="a folder; default: the packaged model",
    )
    parser.add_argument("--texts", nargs="+", type=Path, help="default: a few built-in sentences")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--method", choices=("removal", "gates"), default="removal")
    parser.add_argument("--at-once", type=int, default=1, metavar="K")
    parser.add_argument("--steps", type=int, default=400, help="of gates (default 400)")
    parser.add_argument("--length", type=int, default=768, help="tokens of an example")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--sinks", type=int, default=Policy.sinks)
    parser.add_argument("--window", type=int, default=Policy.window)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    if min(args.at_once, args.steps, args.examples) < 1:
        parser.error("--at-once, --steps and --examples are at least 1")
    if args.length <= 2 * (args.sinks + args.window):
        parser.error("--length must be more than twice what streaming heads keep")
    texts = [p.read_text(encoding="utf-8") for p in args.texts or ()] or [PLAIN_TEXT]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    asked = examples(tokenizer, texts, args.length, args.examples, args.seed)
    reader = Reader(model, args.sinks, args.window, asked if args.method == "removal" else [])
    heads = reader.heads
    order = by_removal(reader, args.at_once) if args.method == "removal" else []
    reader.close()
    if args.method == "gates":
        order = by_gates(model, heads, asked, args.sinks, args.window, args.steps)
    held = examples(tokenizer, texts, args.length, args.examples, args.seed + HELD_OUT)
    reader = Reader(model, args.sinks, args.window, held)
    curve = reader.curve(order)
    reader.close()
    how = {k: getattr(args, k) for k in ("method", "length", "examples", "sinks", "window", "seed")}
    found = {
        "digest": weights_digest(model),
        "heads": order,
        "how": how,
        "loss": [round(x, 6) for x in curve],
    }
    args.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    for n, loss in enumerate(curve):
        print(f"{n} of {len(heads)} heads keep all: loss {loss:.5f}")
    print(f"{args.out}: {', '.join(f'{a}.{b}' for a, b in order)}, those that need all first")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (QuireError, OSError) as e:
        print(e, file=sys.stderr)
        sys.exit(2)
