"""What does a decode step cost beside its matrix products, in our engine and in transformers?

A step less its `nn.Linear` calls (the same calls and shapes, timed alone), on a random Llama: 8 layers, 512 wide,
8 heads over 2 KV heads of 64. Ours is the whole `Engine.step()`: scheduler, tables, forward, sampling, bookkeeping,
deltas. Transformers' is `model(...)` with a DynamicCache and an argmax, with its sdpa and its eager attention, and a
step of its `generate()`. All sides take turns of `--steps` steps in one process; figures are per step.

    python benchmarks/overhead.py --batch 1 32 --dtype float32 bfloat16

The bar: our overhead below that of transformers' bare step (the leaner of its two attentions).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
from common import Document, Spread, Stream, Table, Turns

from quire.engine import Engine, SamplingParams
from quire.engine.schedule import SchedulerConfig
from quire.models.open import open_runner

BARS = ("sdpa", "eager")


class Ours:
    """An engine in the middle of decoding `batch` requests."""

    def __init__(
        self, model: Any, prompts: list[list[int]], memory: str, clock: str = "wall"
    ) -> None:
        self.runner = open_runner(
            model, memory=memory, weights="plain"
        )  # as the linear calls beside
        self.forward_s = 0.0
        self._now = common.CLOCKS[clock]
        self._forward = self.runner.forward
        self.runner.forward = self._timed_forward  # type: ignore[method-assign]
        self.engine = Engine(self.runner, config=SchedulerConfig(step_tokens=4096))
        self.texts: dict[str, list[int]] = {}
        params = SamplingParams(max_tokens=None, ignore_eos=True)
        self.ids = [self.engine.add_request(p, params, on_delta=self._note) for p in prompts]
        while len(self.texts) < len(prompts):
            self.engine.step()

    def _timed_forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        begin = self._now()
        out = self._forward(*args, **kwargs)
        self.forward_s += self._now() - begin
        return out

    def _note(self, delta: Any) -> None:
        self.texts.setdefault(delta.request_id, []).extend(delta.token_ids)

    def steps(self, n: int) -> None:
        for _ in range(n):
            self.engine.step()

    def close(self) -> None:
        self.engine.close()
        bridge = getattr(self.runner, "bridge", None)
        if bridge is not None:
            bridge.close()


class Theirs:
    """transformers' forward with a DynamicCache in the middle of decoding a batch."""

    def __init__(self, model: Any, prompts: list[list[int]]) -> None:
        from transformers import DynamicCache

        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.texts: list[torch.Tensor] = []
        self.ids = torch.tensor(prompts)
        self.history = self.ids
        self.steps(1)

    @torch.inference_mode()
    def steps(self, n: int) -> None:
        for _ in range(n):
            logits = self.model(
                input_ids=self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            ).logits
            self.ids = logits[:, -1].argmax(-1, keepdim=True)
            self.texts.append(self.ids)

    def tokens(self) -> list[list[int]]:
        return torch.cat(self.texts, 1).tolist()


class Generating(Theirs):
    """The same, a turn of steps inside one call of `generate()` that goes on from the cache."""

    @torch.inference_mode()
    def steps(self, n: int) -> None:
        self.history = self.model.generate(
            self.history,
            attention_mask=torch.ones_like(self.history),
            past_key_values=self.cache,
            max_new_tokens=n,
            do_sample=False,
        )

    def tokens(self) -> list[list[int]]:
        return self.history[:, self.ids.shape[1] :].tolist()


def linear_calls(model: Any, shape: tuple[int, int], keep: int) -> Callable[[int], None]:
    """A function that makes n steps' `nn.Linear` calls with inputs as a decode step has them, and nothing else.

    Args:
        shape: of the step's tokens: `[batch, 1]` in transformers, `[1, batch]` packed in ours.
        keep: positions whose logits are wanted, for the last layer.
    """
    calls: list[tuple[Any, torch.Tensor]] = []
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            rows = (shape[0], keep) if module is head else shape
            calls.append((module, torch.randn(*rows, module.in_features).to(module.weight.dtype)))

    @torch.inference_mode()
    def run(n: int) -> None:
        for _ in range(n):
            for module, x in calls:
                module(x)

    return run


def verify(doc: Document, args: argparse.Namespace, dtype: str, batch: int) -> None:
    """Equal tokens in float32; in 16 bits logits as near as the model's own rounding. A changed prompt must show."""
    prompts = make_prompts(args, batch)
    theirs = Theirs(make_model(args, dtype, "sdpa"), prompts)
    ours = Ours(make_model(args, dtype, "sdpa"), prompts, args.memory)
    theirs.steps(12)
    ours.steps(12)
    want, got = theirs.tokens(), [ours.texts[i][:13] for i in ours.ids]
    ours.close()
    same = sum(a == b for w, g in zip(want, got, strict=True) for a, b in zip(w, g, strict=True))
    share = same / sum(map(len, want))
    first = sum(w[0] == g[0] for w, g in zip(want, got, strict=True)) / batch
    where = f"{dtype}, batch {batch}"
    if dtype == "float32":
        common.check(doc, f"tokens equal, {where}", want == got, share)
    else:
        common.check(doc, f"first tokens equal, {where}", first >= 0.9, round(first, 3))
    changed = Theirs(
        make_model(args, dtype, "sdpa"), [[(p[0] + 1) % args.vocab, *p[1:]] for p in prompts]
    )
    changed.steps(12)
    common.check(doc, f"tokens follow the prompt, {where}", changed.tokens() != want)


def make_model(args: argparse.Namespace, dtype: str, attention: str) -> Any:
    return common.random_llama(
        layers=args.layers,
        hidden=args.hidden,
        heads=args.hidden // 64,
        kv_heads=max(1, args.hidden // 256),
        vocab=args.vocab,
        dtype=dtype,
        attention=attention,
        seed=args.seed,
    )


def make_prompts(args: argparse.Namespace, batch: int) -> list[list[int]]:
    return [common.random_tokens(args.ctx, args.vocab, args.seed + i) for i in range(batch)]


def measure(args: argparse.Namespace, dtype: str, batch: int, stream: Stream) -> Document:
    """One dtype and batch: every side's step, its linear calls, and the difference."""
    prompts = make_prompts(args, batch)
    ours = Ours(make_model(args, dtype, "sdpa"), prompts, args.memory, args.clock)
    theirs: dict[str, Theirs] = {a: Theirs(make_model(args, dtype, a), prompts) for a in BARS}
    theirs["generate"] = Generating(make_model(args, dtype, "sdpa"), prompts)
    n = args.steps
    model = theirs["sdpa"].model
    packed = linear_calls(model, (1, batch), batch)
    batched = linear_calls(model, (batch, 1), 1)
    forward: list[float] = []

    def our_turn() -> None:
        ours.forward_s = 0.0
        ours.steps(n)
        forward.append(ours.forward_s)

    sides: dict[str, Callable[[], object]] = {"ours": our_turn}
    sides |= {name: (lambda side=side: side.steps(n)) for name, side in theirs.items()}  # type: ignore[misc]
    sides |= {"linear, packed": lambda: packed(n), "linear, batched": lambda: batched(n)}
    turns = common.take_turns(sides, args.repeats, warm_up=1, clock=args.clock, stream=stream)
    ours.close()
    out = _figures(turns, ["ours", *theirs], n)
    least = min(BARS, key=lambda b: out[b]["overhead_ms"]["median"])
    share = _ratio(turns, "ours", least)
    return {
        "dtype": dtype,
        "batch": batch,
        "ctx": args.ctx,
        "sides": out,
        "ours_outside_forward_ms": Spread.of(
            (s - f) / n for s, f in zip(turns.seconds["ours"], forward[1:], strict=True)
        ).json(1e3, 4),
        "compared_with": least,
        "overhead_ratio": share.json(digits=3),
        "generate_ratio": _ratio(turns, "ours", "generate").json(digits=3),
        "below_bar": share.median < 1,
        "stream_gb_per_s": [round(x, 1) for x in turns.stream_gb_per_s or ()],
    }


def _overhead(turns: Turns, name: str) -> list[float]:
    linear = "linear, packed" if name == "ours" else "linear, batched"
    # The least of the linear calls: they are pure streaming, so what is above it is a neighbour's.
    floor = min(turns.seconds[linear])
    return [s - floor for s in turns.seconds[name]]


def _ratio(turns: Turns, above: str, below: str) -> Spread:
    return Spread.of(
        a / b for a, b in zip(_overhead(turns, above), _overhead(turns, below), strict=True)
    )


def _figures(turns: Turns, names: Sequence[str], n: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in names:
        linear = "linear, packed" if name == "ours" else "linear, batched"
        out[name] = {
            "step_ms": turns.spread(name, n).json(1e3, 4),
            "linear_ms": turns.spread(linear, n).json(1e3, 4),
            "overhead_ms": Spread.of(x / n for x in _overhead(turns, name)).json(1e3, 4),
        }
    return out


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    p.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    p.add_argument("--ctx", type=int, default=256, help="tokens of each prompt")
    p.add_argument("--steps", type=int, default=16, help="steps of a turn")
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--hidden", type=int, default=512, help="a multiple of 256")
    p.add_argument("--vocab", type=int, default=8192)
    p.add_argument("--memory", default="1GiB", help="of the arena")
    args = p.parse_args(argv)
    if args.smoke:
        args.batch, args.dtype, args.ctx, args.steps = [1, 3], ["float32"], 20, 2
        args.layers, args.hidden, args.vocab, args.repeats = 2, 256, 512, 2
        args.memory = "16MiB"
    common.prepare(args)
    doc = common.document(
        "overhead", "What does a decode step cost beside its matrix products?", args
    )
    cases = [(d, b) for d in args.dtype for b in args.batch]
    for dtype, batch in cases:
        verify(doc, args, dtype, batch)
    stream = Stream(8 << 20 if args.smoke else common.STREAM_BYTES)
    doc["cases"] = [measure(args, d, b, stream) for d, b in cases]
    doc["bar"] = "our overhead below transformers' bare step, in every case"
    doc["met"] = all(c["below_bar"] for c in doc["cases"])
    table = Table(["dtype, batch", "side", "step ms", "linear ms", "overhead ms", "min", "max"])
    for c in doc["cases"]:
        for name, side in c["sides"].items():
            o = side["overhead_ms"]
            table.add(
                f"{c['dtype']}, {c['batch']}",
                name,
                f"{side['step_ms']['median']:.2f}",
                f"{side['linear_ms']['median']:.2f}",
                *(f"{o[k]:.2f}" for k in ("median", "min", "max")),
            )
    ratios = Table(["overhead, ours over", "side", "median", "min", "max", "outside forward ms"])
    for c in doc["cases"]:
        r = c["overhead_ratio"]
        ratios.add(
            f"{c['dtype']}, {c['batch']}",
            c["compared_with"],
            *(f"{r[k]:.2f}" for k in ("median", "min", "max")),
            f"{c['ours_outside_forward_ms']['median']:.3f}",
        )
    return common.report(doc, args, [table, ratios])


if __name__ == "__main__":
    main()
