"""Which choices compose: tries every pair and writes yes, or refused with the reason, to a table.

    python tools/matrix.py --write docs/matrix.md
    python tools/matrix.py --write docs/matrix.md --only kvarn duo     a new one's cells; the page's others stay

Axes are enumerated, not listed by hand where a folder can be read: codecs from `quire.codecs`, policies from
`quire.retention`. A cell is *yes* when the texts are those of transformers' own `generate()`, or, for a codec that
rounds, those of the same codec with the request alone. Such codecs get blocks of 16 tokens and parameters with which
they seal and read back within these texts; one that learns from a text does so here, of each model. With a policy it is
*yes* when a request in a batch says what it says alone under a budget that drops tokens, and, where nothing rounds,
what transformers says under one that covers all; `duo` gets a map of each model, made here. *refused* quotes the error
that a user gets, from the same code. Anything else fails the run: there is no untested cell.
"""

from __future__ import annotations

import argparse
import atexit
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools"), str(ROOT / "src")]

import quire  # noqa: E402
import zoo  # noqa: E402 - the tests' models
from find_heads import heads_of  # noqa: E402
from quire.codecs import available, parse_recipe  # noqa: E402
from quire.codecs.calibrated import Calibrated  # noqa: E402
from quire.engine import Engine, SamplingParams  # noqa: E402
from quire.engine.schedule import SchedulerConfig  # noqa: E402
from quire.evaluate.calibration import calibrate  # noqa: E402
from quire.models.load import weights_digest  # noqa: E402
from quire.models.open import open_runner  # noqa: E402
from quire.retention import available as policies_available  # noqa: E402
from quire.retention.contract import Wrapper  # noqa: E402
from quire.retention.recipe import policy_class  # noqa: E402

N_TOKENS = 10
TEXTS = zoo.prompts()[:3]
LONG_TEXTS = zoo.prompts(lengths=(70, 41))
"""So that codecs seal blocks from which tokens can go."""
MEMORY = "32MiB"

VARIANTS = {
    "multi-head": "gpt2",
    "grouped-query": "llama",
    "multi-query": "falcon",
    "window": "mistral",
    "local/global": "gemma3",
    "softcap": "gemma2",
    "sinks": "gpt_oss",
    "chunked": "llama4",
    "latent (MLA)": "deepseek_v3",
    "shared KV": "gemma3n",
    "hybrid, Mamba-1": "jamba",
    "hybrid, delta rule": "qwen3_next",
    "recurrent only": "mamba2",
    "ALiBi (dense)": "bloom",
}


SEALS_EARLY = {
    "cq": "cq:form=2c2b",
    "kivi": "kivi:residual=8,group=16",
    "kvarn": "kvarn:tile=16",
    "kvquant": "kvquant:tile=16",
}
"""How a codec seals within these texts, where it would not by itself."""
MIXED = ["k=fp32,v=bf16", "bf16;skip_layers=0", "k=int8,v=int4", "int4;sinks=4;window=8"]


def codecs() -> list[str]:
    """Every codec of the folder, the mode without a cache, and one recipe of each kind."""
    return ["auto", *(SEALS_EARLY.get(n, n) for n in available()), *MIXED, "none"]


DROPS = "sinks=1,window=3,boundary=1,every=4"
"""How a policy that scores drops tokens within these texts."""
SPANS = {
    "full": ("full", "full"),
    "window": ("window:6", "window:4096"),
    "sinks": ("sinks:2+window:6", "sinks:2+window:4096"),
    "duo": ("duo:sinks=2,window=6,map=", "duo:retrieval=1.0,map="),
}
STUB = "press:retention.presses.First"
"""A score from outside, as the tests of retention have it."""
INNER = {"ada": "h2o", "pyramid": "snapkv"}
"""What a wrapper is tried around."""


def policies() -> dict[str, tuple[str, str]]:
    """Every policy of the folder, a wrapper around one: a form that drops tokens, and one that covers all."""
    out = {}
    for name in policies_available():
        if name in SPANS:
            out[name] = SPANS[name]
        elif name == "quest":
            out[name] = ("quest:budget=9,skip=0", "quest:budget=4096,skip=0")
        elif name == "press":
            out["press(first)"] = tuple(
                f"{STUB},budget={b},sinks=1,window=3" for b in ("0.5", "1.0")
            )
        elif issubclass(policy_class(name), Wrapper):
            inner = INNER.get(name, "keydiff")
            out[f"{name}({inner})"] = tuple(
                f"{name}({inner}:budget={b},{DROPS})" for b in ("0.5", "1.0")
            )
        else:
            out[name] = tuple(f"{name}:budget={b},{DROPS}" for b in ("0.5", "1.0"))
    return out  # type: ignore[return-value]


def block_tokens(kv: str) -> int:
    """Small blocks, so that these texts take several."""
    lossy = kv != "none" and any(not c.plain for c in parse_recipe(kv).loaded())
    return 16 if lossy else 8


@dataclass
class Table:
    """Cells of one pair of axes."""

    rows: str
    columns: str
    cells: dict[tuple[str, str], str] = field(default_factory=dict)


# --- The ways to run ----------------------------------------------------------------------------


def run_engine(
    model: Any,
    kv: str,
    texts: Sequence[zoo.Tokens],
    *,
    memory: int | str = MEMORY,
    budget: int = 12,
    n: int = 1,
    keep: str = "full",
) -> tuple[list[list[int]], int]:
    """Texts of a continuous batch, and how often a request was preempted."""
    runner = open_runner(model, kv=kv, keep=keep, memory=memory, block_tokens=block_tokens(kv))
    try:
        engine = Engine(runner, config=SchedulerConfig(step_tokens=budget))
        params = SamplingParams(max_tokens=N_TOKENS, ignore_eos=True, n=n)
        outputs = engine.generate([list(t) for t in texts], params)
        assert engine.runner.usage().held_bytes == 0
        return [
            list(c.token_ids) for o in outputs for c in o.outputs
        ], engine.stats().scheduler.preemptions
    finally:
        close = getattr(getattr(runner, "bridge", None), "close", None)
        if close is not None:
            close()


def alone(model: Any, kv: str) -> list[list[int]]:
    return [run_engine(model, kv, [t], budget=64)[0][0] for t in TEXTS]


def together(model: Any, kv: str) -> list[list[int]]:
    return run_engine(model, kv, TEXTS)[0]


def forked(model: Any, kv: str) -> list[list[int]]:
    both = run_engine(model, kv, TEXTS, n=2)[0]
    assert both[0::2] == both[1::2], "two greedy samples of one prompt differ"
    return both[0::2]


def preempted(model: Any, kv: str) -> list[list[int]]:
    """An arena in which the three do not fit at once."""
    if kv == "none":
        return together(model, kv)
    probe = open_runner(model, kv=kv, memory=MEMORY, block_tokens=block_tokens(kv))
    spec = probe.bridge.layout.spec  # type: ignore[union-attr]
    probe.bridge.close()  # type: ignore[union-attr]
    longest = max(len(t) for t in TEXTS) + N_TOKENS
    need = spec.bytes_for(longest, chunk_tokens=longest)
    for share in (1.3, 1.5, 1.8, 2.2):
        texts, times = run_engine(model, kv, TEXTS, memory=int(need * share) + (64 << 10))
        if times:
            return texts
    return texts  # a recurrent-only model holds one block a sequence: nothing to preempt for


def found_again(
    model: Any, kv: str, texts: Sequence[zoo.Tokens], keep: str = "full"
) -> tuple[list[list[int]], int]:
    """What each text is continued by when it comes the second time, and how many tokens of all were found.

    Mamba-1 kinds go on from a state whatever is left: these texts are too short for what pays.
    """
    runner = open_runner(
        model, kv=kv, keep=keep, memory=MEMORY, block_tokens=block_tokens(kv), share="prefix"
    )
    states = runner.sharing.states
    if states is not None:
        states.resumes = lambda *_: True
    params = SamplingParams(max_tokens=N_TOKENS, ignore_eos=True)
    try:
        engine = Engine(runner, config=SchedulerConfig(step_tokens=64))
        for _ in "ab":
            outputs = [engine.generate([list(t)], params)[0] for t in texts]
        assert engine.runner.usage().held_bytes == 0
        cached = sum(o.figures.cached_tokens for o in outputs)
        return [list(o.token_ids) for o in outputs], cached
    finally:
        runner.close()


def after_a_hit(model: Any, kv: str) -> list[list[int]]:
    texts, cached = found_again(model, kv, TEXTS)
    assert cached, "nothing was found"
    return texts


NEW: dict[str, Any] = {
    "max_new_tokens": N_TOKENS,
    "min_new_tokens": N_TOKENS,
    "do_sample": False,
    "pad_token_id": 0,
}


def attached(kind: str) -> Callable[[Any, str], list[list[int]]]:
    """The model's own `generate()` with our cache."""

    def run(model: Any, kv: str) -> list[list[int]]:
        if kv == "none":
            raise quire.ConfigError(
                "kv=none is a mode of quire run, not a cache to attach; leave the model as it is"
            )
        with quire.attach(model, kv=kv, memory=MEMORY, block_tokens=block_tokens(kv)):
            return own(kind)(model, kv)

    return run


def own(kind: str) -> Callable[[Any, str], list[list[int]]]:
    def run(model: Any, _kv: str) -> list[list[int]]:
        width = max(map(len, TEXTS))
        ids = torch.tensor([[0] * (width - len(t)) + t for t in TEXTS])
        mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in TEXTS])
        if kind == "padded":
            out = model.generate(ids, attention_mask=mask, **NEW)
            return out[:, width:].tolist()
        rows = []
        for t in TEXTS:
            extra = {"num_beams": 3} if kind == "beams" else {"prompt_lookup_num_tokens": 3}
            rows.append(model.generate(torch.tensor([t]), **NEW, **extra)[0, len(t) :].tolist())
        return rows

    return run


BATCHING: dict[str, Callable[[Any, str], list[list[int]]]] = {
    "alone": alone,
    "continuous, chunked": together,
    "forked (n)": forked,
    "preempted": preempted,
    "after a prefix hit": after_a_hit,
    "generate, padded": attached("padded"),
    "generate, beams": attached("beams"),
    "generate, drafts": attached("drafts"),
}
GENERATE = {name: name.split(", ")[1] for name in BATCHING if name.startswith("generate")}


# --- What is right ------------------------------------------------------------------------------


@cache
def truth(name: str, kind: str) -> list[list[int]]:
    """transformers' own texts."""
    model = zoo.build(name)
    if kind in ("padded", "beams", "drafts"):
        return own(kind)(model, "auto")
    return zoo.reference(model, TEXTS, N_TOKENS)[0]


@cache
def rounded(name: str, kv: str, kind: str) -> list[list[int]]:
    """The same codec without the choice that is being tried."""
    model = zoo.build(name)
    return attached("beams")(model, kv) if kind == "beams" else alone(model, kv)


def exact(kv: str) -> bool:
    return kv in ("auto", "fp32", "none")


def cell(name: str, kv: str, batching: str) -> str:
    """yes, or the refusal. Raises AssertionError on a wrong text."""
    kind = GENERATE.get(batching, "")
    try:
        kv = learned(name, kv)
    except quire.QuireError as e:
        return f"refused: {e}"
    try:
        want = truth(name, kind) if exact(kv) else None
    except ValueError as e:
        return f"refused: transformers itself: {str(e).splitlines()[0]}"
    try:
        got = BATCHING[batching](zoo.build(name), kv)
        if want is None:
            want = rounded(name, kv, kind)
    except quire.QuireError as e:
        return f"refused: {e}"
    except ValueError as e:
        return f"refused: transformers itself: {str(e).splitlines()[0]}"
    assert got == want, f"{name}, kv={kv}, {batching}: wrong text"
    return "yes"


def stored_differently() -> list[str]:
    """Codecs to try policies on: one stands for all plain ones, whose rows are moved alike."""
    alike = [n for n in available() if parse_recipe(n).loaded()[0].plain]
    return [kv for kv in codecs() if kv not in alike]


@cache
def heads_map(name: str) -> Path:
    """A map of heads for a model: every other head of those that read everything first."""
    model, heads = zoo.build(name), []
    runner = open_runner(model, memory=MEMORY)
    try:
        heads = heads_of(runner.bridge.layout)  # type: ignore[union-attr]
    except quire.ConfigError:
        pass  # it has none, and the policy says so
    finally:
        runner.bridge.close()  # type: ignore[union-attr]
    path = Path(tempfile.mkdtemp()) / "duo.json"
    atexit.register(shutil.rmtree, path.parent)
    order = heads[::2] + heads[1::2]
    path.write_text(json.dumps({"digest": weights_digest(model), "heads": order}))
    return path


@cache
def learned(name: str, kv: str) -> str:
    """A recipe for a model: of a codec that learns from a text one that names a calibration, made here."""
    codec = (
        next((c for c in parse_recipe(kv).loaded() if isinstance(c, Calibrated)), None)
        if kv != "none"
        else None
    )
    if codec is None:
        return kv
    text = zoo.prompts(lengths=(300,))[0]
    made = calibrate(zoo.build(name), kv, text, length_tokens=50)
    path = Path(tempfile.mkdtemp()) / "made.safetensors"
    atexit.register(shutil.rmtree, path.parent)
    made.save(path)
    return codec.with_file(str(path))


def spelled(name: str, policy: str) -> tuple[str, str]:
    """A policy's two forms for a model: one that drops tokens, one that covers all."""
    drops, covers = policies()[policy]
    if drops.endswith("map="):
        drops, covers = (f"{text}{heads_map(name)}" for text in (drops, covers))
    return drops, covers


def refusal(error: Exception, keep: str) -> str:
    """As the page quotes it."""
    return (
        f"refused: {str(error).removeprefix(f'keep={keep!r}: ').replace(f'keep={keep!r}', 'keep')}"
    )


def shared(name: str, kv: str, policy: str) -> str:
    """yes, no hit where the policy asks too many queries for that, or the refusal. AssertionError on a wrong text."""
    model, (drops, _) = zoo.build(name), spelled(name, policy)
    texts = LONG_TEXTS if name == "llama" else TEXTS[1:]
    try:
        kv = learned(name, kv)
        got, cached = found_again(model, kv, texts, drops)
        want = [run_engine(model, kv, [t], keep=drops, budget=64)[0][0] for t in texts]
    except (quire.ConfigError, quire.RequestError) as e:
        return refusal(e, drops)
    assert got == want, f"{name}, kv={kv}, keep={drops}, shared: wrong text"
    return "yes" if cached else "no hit"


def kept(name: str, kv: str, policy: str) -> str:
    """yes, or the refusal, for a policy. Raises AssertionError on a wrong text."""
    model, (drops, covers) = zoo.build(name), spelled(name, policy)
    texts = LONG_TEXTS if name == "llama" else TEXTS[1:]
    try:
        kv = learned(name, kv)
        got = run_engine(model, kv, texts, keep=drops)[0]
        want = run_engine(model, kv, texts[:1], keep=drops, budget=64)[0]
        whole = run_engine(model, kv, TEXTS[1:2], keep=covers, budget=64)[0] if exact(kv) else []
    except (quire.ConfigError, quire.RequestError) as e:
        return refusal(e, drops)
    assert got[:1] == want, f"{name}, kv={kv}, keep={drops}: wrong text"
    if exact(kv):
        assert whole == truth(name, "")[1:2], f"{name}, kv={kv}, keep={covers}: wrong text"
    return "yes"


def tables(
    only: Sequence[str] = (), old: dict[tuple[str, str, str], str] | None = None
) -> list[Table]:
    """Every pair, the third axis at its default; with `only`, cells of `old` that name none of these as they stand."""
    by_codec = Table("attention", "codec")
    by_batch = Table("attention", "batching")
    pairs = Table("codec", "batching")
    by_policy = Table("attention", "policy")
    both = Table("codec", "policy")
    on_hits = Table("attention, prefixes shared", "policy")
    both_on_hits = Table("codec, prefixes shared", "policy")

    def fill(t: Table, row: str, column: str, tried: Callable[[], str]) -> None:
        known = (old or {}).get((f"{t.rows} × {t.columns}", row, column))
        wanted = any(n in re.split(r"\W+", f"{row} {column}") for n in only)
        t.cells[row, column] = tried() if known is None or wanted or not only else known

    for title, name in VARIANTS.items():
        for kv in codecs():
            fill(by_codec, title, kv, partial(cell, name, kv, "continuous, chunked"))
        for batching in BATCHING:
            fill(by_batch, title, batching, partial(cell, name, "auto", batching))
        for policy in policies():
            fill(by_policy, title, policy, partial(kept, name, "auto", policy))
            fill(on_hits, title, policy, partial(shared, name, "auto", policy))
        print(f"  {title}", file=sys.stderr)
    for kv in codecs():
        for batching in BATCHING:
            fill(pairs, kv, batching, partial(cell, "llama", kv, batching))
        if kv in stored_differently():
            for policy in policies():
                fill(both, kv, policy, partial(kept, "llama", kv, policy))
                fill(both_on_hits, kv, policy, partial(shared, "llama", kv, policy))
        print(f"  {kv}", file=sys.stderr)
    return [by_codec, by_batch, pairs, by_policy, both, on_hits, both_on_hits]


def read(page: str) -> dict[tuple[str, str, str], str]:
    """The cells of a page, by section, row and column, with their reasons written out."""
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", page, re.MULTILINE))
    found: dict[tuple[str, str, str], str] = {}
    section, head = "", []
    for line in page.splitlines():
        if line.startswith("## "):
            section, head = line[3:], []
        elif line.startswith("|") and not line.startswith("| ---"):
            name, *cells = (p.strip().strip("`") for p in line.strip("|").split("|"))
            for column, text in zip(head, cells, strict=bool(head)):
                number = re.fullmatch(r"refused \[(\d+)\]", text)
                found[section, name, column] = f"refused: {reasons[number[1]]}" if number else text
            head = head or cells
    return found


def write(found: Sequence[Table]) -> str:
    """The page."""
    lines = [
        "# What composes",
        "",
        "Written by `make matrix`; every cell was run. *yes*: the texts equal transformers' own `generate()` (or,",
        "for a codec that rounds, the same codec with each request alone). A number refers to the reasons below: the",
        "error that `quire run`, `quire.attach` or the engine gives for the same choice. With a policy, *yes*: what a",
        "request says in a batch is what it says alone while tokens are dropped, and, where nothing rounds, what",
        "transformers says under a budget that covers all; `duo` was given a map of each model. Where prefixes are",
        "shared each text came twice, and the second time says what it says alone; *no hit*: the policy asks so many",
        "of a prompt's queries that nothing of these short texts may be found. Tiers have tests of their own and no",
        "entries yet, nor has the engine's speculation.",
        "",
    ]
    reasons: list[str] = []
    for t in found:
        rows = list(dict.fromkeys(r for r, _ in t.cells))
        columns = list(dict.fromkeys(c for _, c in t.cells))
        lines += [
            f"## {t.rows} × {t.columns}",
            "",
            f"| {t.rows} | "
            + " | ".join(f"`{c}`" if t.columns in ("codec", "policy") else c for c in columns)
            + " |",
        ]
        lines.append("| --- |" + " --- |" * len(columns))
        for r in rows:
            marks = []
            for c in columns:
                text = t.cells[r, c]
                if text.startswith("refused"):
                    if text not in reasons:
                        reasons.append(text)
                    text = f"refused [{reasons.index(text) + 1}]"
                marks.append(text)
            lines.append(f"| {r} | " + " | ".join(marks) + " |")
        lines.append("")
    if reasons:
        lines += [
            "## Reasons",
            "",
            *(f"{i}. {r.removeprefix('refused: ')}" for i, r in enumerate(reasons, 1)),
            "",
        ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="file to write; standard output without it")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="codecs and policies to try again"
    )
    options = parser.parse_args()
    unknown = set(options.only) - {*available(), *policies_available()}
    if unknown or (options.only and not options.write):
        parser.error(
            f"--only takes codecs and policies, beside --write; unknown: {sorted(unknown)}"
        )
    torch.set_num_threads(1)
    old = read(options.write.read_text(encoding="utf-8")) if options.only else None
    page = write(tables(options.only, old))
    if options.write:
        options.write.write_text(page, encoding="utf-8")
    else:
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
