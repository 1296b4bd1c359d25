"""How does the price of a token grow with what is cached, and what does the cache save?

Two answers. (a) Cached decode at contexts from 128 to 4,096 tokens, the attention part timed apart by running plan and
backend alone on the same step: a straight line through each, and how much of the growth is attention's. (b) 500 tokens
after a prompt of 2,000: this cache, transformers' `generate()` with DynamicCache, and no cache at all.

    python benchmarks/road.py                                     the packaged model
    python benchmarks/road.py --layers 8 --hidden 512             a random Llama of that size
    python benchmarks/road.py --full                              no cache in full, instead of sampled

Without `--full` the run without a cache is measured at a few lengths across the range and integrated (Simpson): it is
the same work at every step but for its length. Tokens of all three are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import common
import torch
from common import Document, Spread, Stream, Table

from quire.attention import Row, Step
from quire.engine import Engine, SamplingParams
from quire.engine.runner import Item
from quire.engine.schedule import SchedulerConfig
from quire.models.open import open_runner
from quire.models.runner import ModelRunner, NoCacheRunner


def make_model(args: argparse.Namespace) -> Any:
    """The packaged model, or a random Llama where a size is asked for."""
    if not args.layers:
        from quire.models.load import load_model

        loaded = load_model(args.model, dtype=args.dtype)
        return loaded.model
    return common.random_llama(
        layers=args.layers,
        hidden=args.hidden,
        heads=args.hidden // 64,
        kv_heads=max(1, args.hidden // 256),
        vocab=args.vocab,
        dtype=args.dtype,
        seed=args.seed,
    )


def runner_over(model: Any, args: argparse.Namespace) -> ModelRunner:
    runner = open_runner(model, memory=args.memory)
    assert isinstance(runner, ModelRunner)
    return runner


class Road:
    """One sequence, decoded token by token at a context of our choice."""

    def __init__(self, runner: ModelRunner, vocab: int, seed: int) -> None:
        self.runner, self.vocab, self.seed = runner, vocab, seed
        self.table = runner.open()
        self.tokens: list[int] = []

    def reach(self, n: int) -> None:
        """Prefills up to n cached tokens."""
        want = common.random_tokens(n + 4096, self.vocab, self.seed)
        self.tokens = want
        while self.table.length < n:
            self._forward(min(512, n - self.table.length))

    def step(self) -> None:
        self._forward(1)

    def _forward(self, n: int) -> None:
        start = self.table.length
        self.table.append(n)
        self.runner.forward([Item(self.table, self.tokens, start, start + n, 1)])
        self.table.commit()

    @torch.inference_mode()
    def attention(self, q: torch.Tensor, layers: int) -> None:
        """The plan and the backend alone, every layer, on the step that reads what is cached now."""
        n = self.table.length
        bridge = self.runner.bridge
        step = Step(bridge.store, bridge.layout, [Row(self.table, n - 1, n)])
        for layer in range(layers):
            bridge.backend.run(step, layer, q, scale=q.shape[-1] ** -0.5)


def a_query(model: Any) -> tuple[torch.Tensor, int]:
    """`[1, H_q, D]` and the number of layers."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // heads
    return torch.ones(1, heads, d, dtype=model.dtype), int(config.num_hidden_layers)


def by_context(model: Any, args: argparse.Namespace, stream: Stream) -> Document:
    """(a): time per token at each context, whole and attention alone. Contexts take turns."""
    runner = runner_over(copy.deepcopy(model), args)
    roads: dict[int, Road] = {}
    for n in args.contexts:
        roads[n] = Road(runner, args.vocab, args.seed)
        roads[n].reach(n)
    q, layers = a_query(model)
    whole = {f"{n}": (lambda r=r: [r.step() for _ in range(args.steps)]) for n, r in roads.items()}
    alone = {
        f"{n}, attention": (lambda r=r: [r.attention(q, layers) for _ in range(args.steps)])
        for n, r in roads.items()
    }
    sides = {k: v for pair in zip(whole.items(), alone.items(), strict=True) for k, v in pair}
    turns = common.take_turns(sides, args.repeats, clock=args.clock, stream=stream)
    rows = []
    for n in args.contexts:
        step, attention = (
            turns.spread(f"{n}", args.steps),
            turns.spread(f"{n}, attention", args.steps),
        )
        rest = Spread.of(
            (a - b) / args.steps
            for a, b in zip(turns.seconds[f"{n}"], turns.seconds[f"{n}, attention"], strict=True)
        )
        rows.append(
            {
                "ctx": n,
                "step_ms": step.json(1e3, 4),
                "attention_ms": attention.json(1e3, 4),
                "rest_ms": rest.json(1e3, 4),
            }
        )
    for road in roads.values():
        road.table.release()
    fits = {
        k: common.line_fit(args.contexts, [r[f"{k}_ms"]["median"] for r in rows])
        for k in ("step", "attention", "rest")
    }
    return {
        "rows": rows,
        "fit_ms": fits,
        "attention_share_of_growth": fits["attention"]["slope"] / fits["step"]["slope"],
        "stream_gb_per_s": [round(x, 1) for x in turns.stream_gb_per_s or ()],
    }


class Ours:
    """An engine over a copy of the model: the original keeps its own attention for the others."""

    def __init__(self, model: Any, args: argparse.Namespace) -> None:
        self.engine = Engine(
            runner_over(copy.deepcopy(model), args), config=SchedulerConfig(step_tokens=2048)
        )

    def run(self, prompt: list[int], n: int) -> list[int]:
        params = SamplingParams(max_tokens=n, ignore_eos=True)
        return list(self.engine.generate([prompt], params)[0].token_ids)


@torch.inference_mode()
def theirs(model: Any, prompt: list[int], n: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
    )
    return list(out[0, len(prompt) :].tolist())


class Without:
    """`--kv none`: everything recomputed at every step."""

    def __init__(self, model: Any) -> None:
        self.runner = NoCacheRunner(model)
        self.table = self.runner.open()

    def step(self, tokens: list[int]) -> int:
        n = len(tokens)
        return int(self.runner.forward([Item(self.table, tokens, n - 1, n, 1)])[0].argmax())

    def run(self, prompt: list[int], n: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(n):
            tokens.append(self.step(tokens))
        return tokens[len(prompt) :]


def sampled(model: Any, args: argparse.Namespace, text: list[int]) -> Document:
    """Seconds of all steps without a cache, from an odd number of lengths across the range."""
    side = Without(model)
    n, points = args.out, 5
    at = [round(i * (n - 1) / (points - 1)) for i in range(points)]
    seen = []
    for i in at:
        tokens = text[: args.prompt + i]
        side.step(tokens)
        seen.append(min(common.timed(partial(side.step, tokens), args.clock) for _ in range(2)))
    weights = [1, 4, 2, 4, 1]
    mean = sum(w * s for w, s in zip(weights, seen, strict=True)) / sum(weights)
    return {
        "how": f"measured at {points} lengths, integrated",
        "seconds": mean * n,
        "step_ms": {str(args.prompt + i): round(s * 1e3, 3) for i, s in zip(at, seen, strict=True)},
    }


def after_prompt(model: Any, args: argparse.Namespace, stream: Stream) -> Document:
    """(b): `--out` tokens after `--prompt` tokens, three ways."""
    prompt = common.random_tokens(args.prompt, args.vocab, args.seed + 1)
    engine = Ours(model, args)
    turns = common.take_turns(
        {
            "ours": lambda: engine.run(prompt, args.out),
            "generate": lambda: theirs(model, prompt, args.out),
        },
        max(1, args.repeats // 2),
        warm_up=0,
        clock=args.clock,
        stream=stream,
    )
    text = prompt + theirs(model, prompt, args.out)
    if args.full:
        run = partial(Without(model).run, prompt, args.out)
        none: Document = {"how": "in full", "seconds": common.timed(run, args.clock)}
    else:
        none = sampled(model, args, text)
    return {
        "prompt_tokens": args.prompt,
        "out_tokens": args.out,
        "ours_s": turns.spread("ours").json(digits=3),
        "generate_s": turns.spread("generate").json(digits=3),
        "none": none,
        "none_to_ours": Spread.of(none["seconds"] / s for s in turns.seconds["ours"]).json(
            digits=2
        ),
        "none_to_generate": Spread.of(none["seconds"] / s for s in turns.seconds["generate"]).json(
            digits=2
        ),
        "ours_to_generate": turns.ratio("ours", "generate").json(digits=3),
        "stream_gb_per_s": [round(x, 1) for x in turns.stream_gb_per_s or ()],
    }


def verify(doc: Document, model: Any, args: argparse.Namespace) -> None:
    """Equal tokens three ways, and the attention timed alone sees the cache."""
    prompt = common.random_tokens(min(64, args.prompt), args.vocab, args.seed)
    n = min(16, args.out)
    want = theirs(model, prompt, n)
    got = Ours(model, args).run(prompt, n)
    share = sum(a == b for a, b in zip(got, want, strict=True)) / n
    common.check(doc, "ours equals generate()", got == want or args.dtype != "float32", share)
    none = Without(model).run(prompt, n)
    common.check(doc, "no cache equals generate()", none == want or args.dtype != "float32")
    other = theirs(model, [(prompt[0] + 1) % args.vocab, *prompt[1:]], n)
    doc["checks"]["the text depends on the prompt's first token"] = {
        "ok": None,
        "seen": other != want,
    }


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--model", default=None, help="folder or hub id (default: the packaged model)")
    p.add_argument("--layers", type=int, default=0, help="a random Llama of so many layers")
    p.add_argument("--hidden", type=int, default=512, help="its width, a multiple of 256")
    p.add_argument("--vocab", type=int, default=8192)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 1024, 2048, 3072, 4096])
    p.add_argument("--steps", type=int, default=8, help="decode steps of a turn")
    p.add_argument("--prompt", type=int, default=2000)
    p.add_argument("--out", type=int, default=500)
    p.add_argument("--full", action="store_true", help="run without a cache in full")
    p.add_argument("--memory", default="1GiB", help="of the arena")
    args = p.parse_args(argv)
    if args.smoke:
        args.layers, args.hidden, args.vocab, args.memory = 2, 256, 512, "16MiB"
        args.contexts, args.steps, args.repeats = [16, 40, 64], 2, 2
        args.prompt, args.out = 24, 8
    if any(b <= a for a, b in pairwise(args.contexts)) or len(args.contexts) < 2:
        raise SystemExit("--contexts must be two or more ascending numbers")
    common.prepare(args)
    question = (
        "How does the price of a token grow with what is cached, and what does the cache save?"
    )
    doc = common.document("road", question, args)
    model = make_model(args)
    args.vocab = int(model.config.get_text_config(decoder=True).vocab_size)
    doc["model"] = args.model or (
        f"random Llama, {args.layers} x {args.hidden}" if args.layers else "packaged"
    )
    doc["parameters"] = sum(x.numel() for x in model.parameters())
    verify(doc, model, args)
    stream = Stream(8 << 20 if args.smoke else common.STREAM_BYTES)
    doc["by_context"] = by_context(model, args, stream)
    doc["after_prompt"] = after_prompt(model, args, stream)
    return common.report(doc, args, tables(doc))


def tables(doc: Document) -> list[Table]:
    a = doc["by_context"]
    first = Table(["ctx", "step ms", "min", "max", "attention ms", "rest ms"])
    for r in a["rows"]:
        first.add(
            r["ctx"],
            *(f"{r['step_ms'][k]:.3f}" for k in ("median", "min", "max")),
            f"{r['attention_ms']['median']:.3f}",
            f"{r['rest_ms']['median']:.3f}",
        )
    lines = Table(["line", "at 0, ms", "us per 1,000 tokens", "r2"])
    for k, f in a["fit_ms"].items():
        lines.add(k, f"{f['at_zero']:.3f}", f"{f['slope'] * 1e6:.1f}", f"{f['r2']:.4f}")
    b = doc["after_prompt"]
    second = Table(
        [f"{b['out_tokens']} after {b['prompt_tokens']}", "seconds", "none takes", "min", "max"]
    )
    for name in ("ours", "generate"):
        r = b[f"none_to_{name}"]
        second.add(
            name,
            f"{b[f'{name}_s']['median']:.2f}",
            *(f"{r[k]:.1f}x" for k in ("median", "min", "max")),
        )
    second.add(f"none ({b['none']['how']})", f"{b['none']['seconds']:.2f}", "", "", "")
    return [first, lines, second]


if __name__ == "__main__":
    main()
