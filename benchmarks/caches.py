"""What does a whole model decode per second, and hold in bytes, with each cache that one could give it?

One random Llama (`--random`, as `quire bench` makes it), equal prompts, the same greedy steps:

    dynamic, static, quantized    transformers' forward with its own caches (quantized: every backend that is installed)
    attach KV                     the same forward after `quire.attach(model, kv=KV)`; linear layers plain, as above
    engine KV                     whole `Engine.step()`s, linear layers as `--weights` says (default: as an engine does)

Every side first continues short forced texts: what stores the model's own dtype must give dynamic's logits, what rounds
must give those of Quire's reference backend under the same recipe (transformers' quantized caches are not judged). Then
all sides take turns of `--steps` steps. The floor is what memory allows: weights and this cache over a streaming read.

    python benchmarks/caches.py --random 55m --ctx 512 2048 --batch 1 4
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import common
import torch
from common import Document, Spread, Stream, Table, Turns
from transformers import DynamicCache, QuantizedCache, StaticCache

import quire
from quire.bench.cases import Case, step_bytes
from quire.bench.models import SIZES, random_llama
from quire.codecs import parse_recipe
from quire.codecs.recipe import plain_codec
from quire.engine import Engine, SamplingParams
from quire.engine.runner import Item
from quire.errors import QuireError
from quire.evaluate.decode import twin
from quire.models.open import open_runner

TOLERANCE = {"float32": 2e-3, "bfloat16": 0.2, "float16": 0.2}
"""Largest difference of a logit, in their standard deviations: what attaching asks of a model."""

PEERS = {"openvino_genai": "OpenVINO GenAI", "llama_cpp": "llama.cpp", "vllm": "vLLM"}
FORCED = 6


class Forward:
    """The model's own forward over any cache, in the middle of decoding a batch."""

    def __init__(self, model: Any, cache: Any, prompts: Sequence[Sequence[int]]) -> None:
        self.model, self.cache = model, cache
        self.logits = self._step(torch.tensor(prompts))

    @torch.inference_mode()
    def _step(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.model(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def steps(self, n: int) -> None:
        for _ in range(n):
            self.logits = self._step(self.logits.argmax(-1, keepdim=True))

    def forced(self, columns: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits after the prompts and after each further column of tokens: `[columns + 1, B, vocab]`."""
        every = [self.logits] + [self._step(ids) for ids in columns]
        return torch.stack(every).float()

    def kv_bytes(self) -> int:
        if hasattr(self.cache, "held_bytes"):
            return int(self.cache.held_bytes())
        return sum(x.numel() * x.element_size() for x in tensors_of(self.cache.layers))

    def close(self) -> None:
        self.cache = None


class Attached(Forward):
    """The same over Quire's cache."""

    def __init__(
        self, model: Any, kv: str, prompts: Sequence[Sequence[int]], memory: str, attention: str
    ) -> None:
        self.attached = quire.attach(model, kv=kv, memory=memory, attention=attention)
        super().__init__(model, self.attached.cache(), prompts)

    def close(self) -> None:
        super().close()
        self.attached.detach()


class Engined:
    """An engine in the middle of decoding a batch."""

    def __init__(self, runner: Any, prompts: Sequence[Sequence[int]]) -> None:
        self.runner = runner
        self.engine = Engine(runner, eos_token_ids=())
        params = SamplingParams(max_tokens=None, ignore_eos=True)
        started: set[str] = set()
        for p in prompts:
            self.engine.add_request(
                list(p), params, on_delta=lambda d: started.add(str(d.request_id))
            )
        while len(started) < len(prompts):
            self.engine.step()

    def steps(self, n: int) -> None:
        for _ in range(n):
            self.engine.step()

    def kv_bytes(self) -> int:
        return sum(t.held_bytes() for t in self.runner.bridge.store.tables)

    def close(self) -> None:
        self.engine.close()
        self.runner.close()


def tensors_of(thing: object, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Every tensor within lists, tuples and attributes, once."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for x in thing:
            yield from tensors_of(x, seen)
    elif type(thing).__module__.startswith("transformers.cache_utils"):
        for x in vars(thing).values():
            yield from tensors_of(x, seen)


class Sides:
    """How each side is opened over its own twin of one model."""

    def __init__(self, args: argparse.Namespace, tokens: int) -> None:
        make = partial(random_llama, args.random, context=tokens, dtype=args.dtype, seed=args.seed)
        self.args, self.tokens = args, tokens
        self.plain: Any = make().model
        # what an engine does with the linear layers must not reach the other sides
        self.engines: Any = make().model if args.weights != "plain" else self.plain
        self.vocab = int(self.plain.config.vocab_size)
        self.kv = list(dict.fromkeys(args.kv))
        self.own = self._own()

    def _own(self) -> dict[str, Callable[[], Any]]:
        """transformers' caches; a quantized one for every backend that works here."""
        config = self.plain.config
        found: dict[str, Callable[[], Any]] = {
            "dynamic": lambda: DynamicCache(config=config),
            "static": lambda: StaticCache(config=config, max_cache_len=self.tokens),
        }
        for backend in ("quanto", "hqq", "fp8"):
            make = partial(QuantizedCache, backend, config=config)
            try:
                make()
            except (ImportError, ValueError) as e:
                reason = " ".join(str(e).split())
                common.say(f"quantized {backend}: left out: {reason}")
                continue
            found[f"quantized {backend}"] = make
        return found

    def forward(
        self, name: str, prompts: Sequence[Sequence[int]], attention: str = "auto"
    ) -> Forward:
        """One of transformers' caches by its name, or `attach KV`."""
        model = twin(self.plain)
        if name.startswith("attach "):
            kv = name.partition(" ")[2]
            return Attached(model, kv, prompts, self.args.memory, attention)
        return Forward(model, self.own[name](), prompts)

    def runner(self, kv: str, attention: str = "auto") -> Any:
        return open_runner(
            twin(self.engines),
            kv=kv,
            memory=self.args.memory,
            attention=attention,
            weights=self.args.weights,
        )


def lossless(name: str, dtype: str) -> bool:
    """Whether a side stores what a model of `dtype` computes."""
    kind, _, kv = name.partition(" ")
    if kind in ("attach", "engine"):
        return all(c == plain_codec(dtype) for c in parse_recipe(kv).loaded())
    return kind in ("dynamic", "static")


def check_sides(doc: Document, args: argparse.Namespace, sides: Sides, names: list[str]) -> None:
    """Logits of short forced texts; see the module's text. A changed prompt must show."""
    n = min(96, sides.tokens - FORCED - 1)
    prompts = [common.random_tokens(n, sides.vocab, args.seed + i) for i in range(2)]
    columns = [
        torch.tensor([[(7 * s + 3 * i) % sides.vocab] for i in range(2)]) for s in range(FORCED)
    ]

    def logits(name: str, texts: list[list[int]], attention: str = "auto") -> torch.Tensor:
        side = sides.forward(name, texts, attention)
        try:
            return side.forced(columns)
        finally:
            side.close()

    want = logits("dynamic", prompts)
    sigma = float(want.std())
    bound = TOLERANCE[args.dtype]
    for name in names:
        got = logits(name, prompts)
        exact = lossless(name, args.dtype)
        beside = want if exact else logits(name, prompts, "reference")
        gap = float((got - beside).abs().max()) / sigma
        if name.startswith("quantized"):  # theirs: stated, not judged
            gap = float((got - want).abs().max()) / sigma
            doc["checks"][f"{name}: distance from dynamic"] = {"ok": None, "seen": gap}
            continue
        what = "dynamic's logits" if exact else "the reference backend's logits"
        common.check(doc, f"{name} gives {what}", gap <= bound, gap)
    changed = [[(p[0] + 1) % sides.vocab, *p[1:]] for p in prompts]
    gap = float((logits("dynamic", changed) - want).abs().max()) / sigma
    common.check(doc, "another prompt is noticed", gap > bound, gap)
    for kv in sides.kv:
        name = f"engine {kv}"
        got = runner_logits(sides.runner(kv), prompts, columns)
        exact = lossless(name, args.dtype)
        beside = want if exact else runner_logits(sides.runner(kv, "reference"), prompts, columns)
        gap = float((got - beside).abs().max()) / sigma
        what = "dynamic's logits" if exact else "the reference backend's logits"
        common.check(doc, f"{name} gives {what}", gap <= bound, gap)


def runner_logits(
    runner: Any, prompts: list[list[int]], columns: Sequence[torch.Tensor]
) -> torch.Tensor:
    """What `Forward.forced` gives, by an engine's runner, which is closed."""
    tables, texts, out = [runner.open() for _ in prompts], [list(p) for p in prompts], []
    try:
        for column in (None, *columns):
            items = []
            for i, (table, text) in enumerate(zip(tables, texts, strict=True)):
                start = table.length
                if column is not None:
                    text.append(int(column[i, 0]))
                table.append(len(text) - start)
                items.append(Item(table, text, start, len(text), 1))
            out.append(runner.forward(items).float())
            for table in tables:
                table.commit()
    finally:
        runner.close()
    return torch.stack(out)


def measure(
    doc: Document, args: argparse.Namespace, sides: Sides, ctx: int, batch: int, stream: Stream
) -> None:
    """All sides in turns at one context and batch."""
    prompts = [common.random_tokens(ctx, sides.vocab, args.seed + i) for i in range(batch)]
    names = [*sides.own, *(f"attach {kv}" for kv in sides.kv)]
    opened: dict[str, Any] = {}
    try:
        for name in names:
            common.say(f"{batch} x {ctx}: prefill, {name}")
            opened[name] = sides.forward(name, prompts)
        for kv in sides.kv:
            common.say(f"{batch} x {ctx}: prefill, engine {kv}")
            opened[f"engine {kv}"] = Engined(sides.runner(kv), prompts)
        steps = args.steps
        turns = common.take_turns(
            {name: partial(side.steps, steps) for name, side in opened.items()}
            | {"stream": stream.read},
            args.repeats,
            clock=args.clock,
        )
        case = Case("decode", ctx, batch, max(2, steps))
        weights, _ = step_bytes(case, opened[f"engine {sides.kv[0]}"].runner)
        for name, side in opened.items():
            doc["cases"].append(
                row(name, ctx, batch, steps, turns, side.kv_bytes(), weights, stream.n_bytes)
            )
    finally:
        for side in opened.values():
            side.close()


def row(
    name: str,
    ctx: int,
    batch: int,
    steps: int,
    turns: Turns,
    kv_bytes: int,
    weights: int,
    stream_bytes: int,
) -> dict[str, Any]:
    seconds = turns.seconds[name]
    rates = Spread.of(batch * steps / s for s in seconds)
    reads = [stream_bytes / s for s in turns.seconds["stream"]]
    return {
        "side": name,
        "ctx": ctx,
        "batch": batch,
        "tokens_per_s": rates.json(digits=2),
        "to_dynamic": turns.ratio("dynamic", name).json(digits=3),
        "share_of_floor": Spread.of(
            steps * (weights + kv_bytes) / r / s for r, s in zip(reads, seconds, strict=True)
        ).json(digits=3),
        "kv_bytes": kv_bytes,
        "weight_bytes": weights,
        "stream_gb_per_s": Spread.of(reads).json(1e-9, 1),
    }


def main(argv: Sequence[str] | None = None) -> Document:
    p = common.parser(__doc__ or "")
    p.add_argument("--random", default="55m", help=f"the model's size: {', '.join(SIZES)}")
    p.add_argument("--dtype", default="bfloat16", choices=sorted(TOLERANCE))
    p.add_argument("--kv", nargs="+", default=["auto", "int8", "int4"], help="Quire's recipes")
    p.add_argument("--ctx", type=int, nargs="+", default=[512, 2048])
    p.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    p.add_argument("--steps", type=int, default=8, help="steps of a turn")
    p.add_argument("--weights", default="auto", help="of the engines: auto, plain, prepacked")
    p.add_argument("--memory", default="1GiB", help="of each of Quire's arenas")
    args = p.parse_args(argv)
    if args.smoke:
        args.random, args.ctx, args.batch, args.kv = "tiny", [40], [1, 2], ["auto", "int8"]
        args.steps, args.repeats, args.memory, args.dtype = 2, 2, "16MiB", "float32"
    if args.random not in SIZES or min(*args.ctx, *args.batch, args.steps) < 1:
        raise SystemExit(
            f"--random is one of {', '.join(SIZES)}; --ctx, --batch and --steps are at least 1"
        )
    common.prepare(args)
    question = "What does a model decode per second, and hold, with each cache?"
    doc = common.document("caches", question, args)
    doc["cases"] = []
    doc["peers"] = {name: find_spec(module) is not None for module, name in PEERS.items()}
    stream = Stream(8 << 20 if args.smoke else common.STREAM_BYTES)
    try:
        sides = Sides(args, max(args.ctx) + (args.repeats + 2) * args.steps + 1)
        common.say("verifying")
        check_sides(doc, args, sides, [*sides.own, *(f"attach {kv}" for kv in sides.kv)])
        for batch in args.batch:
            for ctx in args.ctx:
                measure(doc, args, sides, ctx, batch, stream)
    except QuireError as e:
        raise SystemExit(f"caches: {e}") from None
    doc["verdicts"] = [
        f"{name}: " + ("installed, but nothing here drives it" if there else "not installed")
        for name, there in doc["peers"].items()
    ]
    return common.report(doc, args, [table(doc)])


def table(doc: Document) -> Table:
    out = Table(
        [
            *("batch x ctx, cache", "tokens/s", "min", "max", "x dynamic", "min", "max"),
            *("of floor %", "KV bytes"),
        ]
    )
    for r in doc["cases"]:
        out.add(
            f"{r['batch']} x {r['ctx']}, {r['side']}",
            *(f"{r['tokens_per_s'][k]:.1f}" for k in ("median", "min", "max")),
            *(f"{r['to_dynamic'][k]:.2f}" for k in ("median", "min", "max")),
            f"{100 * r['share_of_floor']['median']:.0f}",
            f"{r['kv_bytes']:,}",
        )
    return out


if __name__ == "__main__":
    main()
