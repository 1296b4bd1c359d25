"""A request larger than the arena: cold blocks on the host, then on a disk, and the tokens of an unlimited arena."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch

import zoo
from quire.attention.read import Read
from quire.attention.step import Step
from quire.engine import Engine, SamplingParams, SchedulerConfig
from quire.errors import CapacityError, ConfigError, TierError
from quire.kernels import native
from quire.models.open import open_runner
from quire.store.cold import Staging, Stream
from tiny_model import chaotic_model

N_PROMPT, N_OUT = 470, 24
RECIPES = {
    "auto": ("64KiB", 8),
    "int8": ("66KiB", 16),
    "kivi:bits=4,group=16,residual=16": ("66KiB", 16),
}
"""An arena, and the tokens of a block; of the plain one a quarter of what the request wants."""
MODELS = {"gemma2": "300KiB", "gpt_oss": "300KiB", "deepseek_v2": "160KiB", "qwen3_next": "160KiB"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _time_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is swapped when is not a matter of how busy the machine is."""
    monkeypatch.setattr("quire.store.pace.STEP_S", 10.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return chaotic_model()


def prompt(n: int = N_PROMPT, vocab: int = 97, seed: int = 1) -> list[int]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (n,), generator=g).tolist()


def serve(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    n_out: int = N_OUT,
    step_tokens: int = 64,
    keeps: Sequence[str | None] = (),
    **options: Any,
) -> tuple[list[list[int]], Any, int]:
    """Tokens, counters, and the most bytes of the arena that were held."""
    runner = open_runner(model, weights="plain", **options)
    most = 0
    try:
        with Engine(runner, config=SchedulerConfig(step_tokens=step_tokens)) as engine:
            engine.core.checks.every = 1
            params = SamplingParams(max_tokens=n_out, ignore_eos=True)
            done: dict[str, Any] = {}
            names = [
                engine.add_request(list(p), params, keep=keep)
                for p, keep in zip_longest(prompts, keeps)
            ]
            while engine.has_work:
                for delta in engine.step():
                    if delta.error is not None:
                        raise delta.error
                    if delta.output is not None:
                        done[delta.request_id] = delta.output.token_ids
                most = max(most, runner.usage().held_bytes)
            stats = engine.stats()
        assert runner.usage().held_bytes == 0
        if runner.below is not None:
            assert runner.below.used_bytes == 0
        assert stats.checks["violations"] == {}
        return [done[n] for n in names], stats, most
    finally:
        runner.close()


@cache
def unlimited(kv: str, attention: str, block_tokens: int) -> list[int]:
    options = {"kv": kv, "attention": attention, "block_tokens": block_tokens}
    return serve(chaotic_model(), [prompt()], memory="8MiB", **options)[0][0]


def where(name: str, folder: Path) -> str:
    return {
        "host": "host:8MiB;offload=on",
        "disk": f"disk:8MiB@{folder}/tier;offload=on",
        "both": f"host:64KiB,disk:8MiB@{folder}/tier;offload=on",
    }[name]


@pytest.mark.parametrize(
    ("kv", "attention", "below"),
    [
        ("auto", "reference", "host"),
        ("auto", "auto", "both"),
        ("int8", "auto", "disk"),
        ("kivi:bits=4,group=16,residual=16", "auto", "host"),
        *(pytest.param("auto", "auto", x, marks=pytest.mark.slow) for x in ("host", "disk")),
        pytest.param("auto", "torch", "both", marks=pytest.mark.slow),
        pytest.param("int8", "reference", "host", marks=pytest.mark.slow),
    ],
)
def test_a_context_four_times_the_arena(
    model: Any, tmp_path: Path, kv: str, attention: str, below: str
) -> None:
    memory, size = RECIPES[kv]
    options = {"kv": kv, "attention": attention, "block_tokens": size, "memory": memory}
    (got,), stats, most = serve(model, [prompt()], tiers=where(below, tmp_path), **options)
    assert got == unlimited(kv, attention, size)
    ladder = stats.ladder
    assert 0 < most <= stats.usage.total_bytes
    assert ladder.offloaded_bytes > (3 if kv == "auto" else 0.4) * stats.usage.total_bytes * 0.8
    assert ladder.recomputed == ladder.lost == stats.scheduler.recomputed_tokens == 0


def test_the_next_run_is_staged_while_one_is_read(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a thread that ends with the request; whatever its pace, nobody reads a frame that is being filled."""
    filled: list[str] = []
    put = Staging.put

    def slow(self: Staging, *args: Any) -> Any:
        filled.append(threading.current_thread().name)
        if filled[-1].startswith("quire-frames"):
            sleep(0.0002)
        return put(self, *args)

    monkeypatch.setattr(Staging, "put", slow)
    memory, size = RECIPES["auto"]
    options = {"kv": "auto", "attention": "auto", "block_tokens": size, "memory": memory}
    tiers = where("disk", tmp_path)
    (got,), _, _ = serve(model, [prompt()], tiers=tiers, n_out=12, **options)
    assert got == unlimited("auto", "auto", size)[:12]
    ahead = sum(name.startswith("quire-frames") for name in filled)
    assert ahead > 0.8 * len(filled) > 20
    assert not any(t.name.startswith("quire-frames") for t in threading.enumerate())


@pytest.mark.parametrize(
    ("kv", "below"),
    [
        ("auto", "host"),
        ("auto", "both"),
        pytest.param("int8", "host", marks=pytest.mark.slow),
        pytest.param("kivi:bits=4,group=16,residual=16", "host", marks=pytest.mark.slow),
    ],
)
def test_what_lies_in_host_memory_is_read_where_it_lies(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv: str, below: str
) -> None:
    """By the compiled kernel, query by query: only for a prompt's chunks, and from a disk, shares are staged."""
    if native.load() is None:
        pytest.skip("the CPU kernels are not built")
    seen: list[tuple[int, bool]] = []
    staged = Step.staged

    def note(self: Step, layer: int, *, far: bool = False) -> Iterator[Read]:
        for read in staged(self, layer, far=far):
            seen.append((self.n_tokens, far))
            yield read

    monkeypatch.setattr(Step, "staged", note)
    memory, size = RECIPES[kv]
    options = {"kv": kv, "attention": "auto", "block_tokens": size, "memory": memory}
    (got,), stats, _ = serve(model, [prompt()], tiers=where(below, tmp_path), **options)
    assert got == unlimited(kv, "auto", size)
    assert stats.ladder.offloaded_bytes > 0
    assert {far for n, far in seen if n == 1} == (set() if below == "host" else {True})
    assert any(n > 1 and not far for n, far in seen)


@pytest.mark.parametrize(
    "name",
    [
        "gpt_oss",
        "deepseek_v2",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("gemma2", "qwen3_next")),
    ],
)
def test_models_whose_layers_read_everything_in_part(name: str) -> None:
    """Windows and states stay in the arena; caps, sink logits and latents are merged like all else."""
    big, texts = zoo.build(name), [prompt(220, zoo.VOCAB)]
    options = {"block_tokens": 8, "n_out": 12}
    (want,), _, _ = serve(big, texts, memory="8MiB", **options)
    (got,), stats, _ = serve(
        big, texts, memory=MODELS[name], tiers="host:8MiB;offload=on", **options
    )
    assert got == want
    assert stats.ladder.offloaded_bytes > 0


def test_beside_others_that_fit(model: Any) -> None:
    """Small requests get in beside a large one, which gives them room; two large ones take turns."""
    texts = [prompt(), *(prompt(40, seed=s) for s in (2, 3, 4)), prompt(300, seed=5)]
    options = {"block_tokens": 8}
    want, _, _ = serve(model, texts, memory="8MiB", **options)
    got, stats, most = serve(
        model, texts, memory="96KiB", tiers="host:8MiB;offload=on;swap=always", **options
    )
    assert got == want
    assert most <= stats.usage.total_bytes
    assert stats.ladder.offloaded_bytes > 0


def test_policies_beside_it_drop_what_they_would_drop_alone(model: Any) -> None:
    """What a policy is told of its queries does not depend on a streamed sequence in the same step."""
    texts, keep = (
        [prompt(), prompt(60, seed=2)],
        "h2o:budget=0.4,sinks=2,window=4,boundary=3,every=8",
    )
    options = {"block_tokens": 8}
    [alone], _, _ = serve(model, texts[1:], keeps=[keep], memory="8MiB", **options)
    [full], _, _ = serve(model, texts[1:], memory="8MiB", **options)
    assert alone != full, "the control: what is dropped shows"
    (_, got), stats, _ = serve(
        model, texts, keeps=[None, keep], memory="96KiB", tiers="host:8MiB;offload=on", **options
    )
    assert stats.ladder.offloaded_bytes > 0
    assert got == alone


def test_host_memory_lent_to_the_swapped_is_taken_back(model: Any) -> None:
    """Who comes later and goes first needs room for cold blocks: those that it pushed out are computed anew."""
    texts = [prompt(90, seed=2), prompt(80, seed=3), prompt()]
    want = [serve(model, [t], memory="8MiB", block_tokens=8, n_out=16)[0][0] for t in texts]
    runner = open_runner(
        model,
        memory="96KiB",
        block_tokens=8,
        weights="plain",
        tiers="host:240KiB;offload=on;swap=always",
    )
    try:
        with Engine(runner, config=SchedulerConfig(step_tokens=64)) as engine:
            engine.core.checks.every = 1
            params = SamplingParams(max_tokens=16, ignore_eos=True)
            done: dict[str, list[int]] = {}
            names = [engine.add_request(t, params) for t in texts[:2]]
            while engine.core.output_tokens < 4:
                engine.step()
            names.append(engine.add_request(texts[2], params, priority=1000))
            while engine.has_work:
                for delta in engine.step():
                    assert delta.error is None
                    if delta.output is not None:
                        done[delta.request_id] = delta.output.token_ids
            stats = engine.stats()
        assert [done[n] for n in names] == want
        assert stats.ladder.swapped > stats.ladder.returned
        assert stats.ladder.recomputed > stats.ladder.swap_no_room
        assert stats.checks["violations"] == {}
        assert runner.below.used_bytes == runner.usage().held_bytes == 0
    finally:
        runner.close()


def test_with_prefixes_shared(model: Any) -> None:
    texts = [prompt(), prompt()[:200] + prompt(100, seed=9)]
    options = {"block_tokens": 8}
    want, _, _ = serve(model, texts, memory="8MiB", **options)
    got, stats, _ = serve(
        model, texts, memory="96KiB", tiers="host:8MiB;offload=on", share="prefix", **options
    )
    assert got == want
    assert stats.ladder.offloaded_bytes > 0


def test_a_block_that_comes_back_wrong_is_never_read(model: Any, tmp_path: Path) -> None:
    """Every byte of the disk is changed under a running request: it is computed anew, and says the same."""
    runner = open_runner(
        model,
        memory="64KiB",
        block_tokens=8,
        weights="plain",
        tiers=where("disk", tmp_path),
    )
    try:
        with Engine(runner, config=SchedulerConfig(step_tokens=64)) as engine:
            params = SamplingParams(max_tokens=N_OUT, ignore_eos=True)
            engine.add_request(prompt(), params)
            outs = []
            while engine.has_work:
                outs += [d.output for d in engine.step() if d.output is not None]
                if engine.core.output_tokens == 5 and not engine.stats().ladder.lost:
                    spoil(tmp_path / "tier")
            assert engine.stats().ladder.lost == 1
            assert outs[0].token_ids == unlimited("auto", "auto", 8)
        assert runner.usage().held_bytes == 0
    finally:
        runner.close()


def spoil(folder: Path) -> None:
    for path in folder.glob("*.seg"):
        with path.open("r+b") as f:
            data = f.read()
            f.seek(0)
            f.write(bytes(b ^ 0xFF for b in data))


def test_a_disk_that_never_answers_well_ends_the_request(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def lost(_: Stream, cold: Any, *__: Any) -> None:
        cold.lost = True

    monkeypatch.setattr(Stream, "share", lost)
    with pytest.raises(TierError, match="did not come back from a tier 4 times"):
        serve(model, [prompt()], memory="64KiB", block_tokens=8, tiers=where("disk", tmp_path))


def test_cancelled_and_forked(model: Any) -> None:
    runner = open_runner(
        model, memory="64KiB", block_tokens=8, weights="plain", tiers="host:8MiB;offload=on"
    )
    try:
        with Engine(runner, config=SchedulerConfig(step_tokens=64)) as engine:
            name = engine.add_request(prompt(), SamplingParams(max_tokens=30, ignore_eos=True))
            while not engine.stats().ladder.offloaded_bytes:
                engine.step()
            assert runner.below.used_bytes > 0
            engine.cancel(name)
            assert runner.below.used_bytes == runner.usage().held_bytes == 0
            params = SamplingParams(max_tokens=6, ignore_eos=True, n=2, temperature=1.0, seed=3)
            both = engine.generate([prompt()], params)[0]
            assert len({tuple(c.token_ids) for c in both.outputs}) == 2
            assert runner.below.used_bytes == runner.usage().held_bytes == 0
    finally:
        runner.close()


def test_what_does_not_fit_below_either_is_refused(model: Any) -> None:
    runner = open_runner(
        model, memory="64KiB", block_tokens=8, weights="plain", tiers="host:70KiB;offload=on"
    )
    try:
        with Engine(runner) as engine, pytest.raises(CapacityError, match="does not fit"):
            engine.add_request(prompt(), SamplingParams(max_tokens=4))
    finally:
        runner.close()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"keep": "window:64"}, "this cache has none|keeps every token"),
        ({"keep": "h2o:budget=0.5"}, "keeps every token"),
        ({"way": "dense"}, "way 'dense'"),
        ({"kv": "none", "memory": 0.1}, "kv='none' caches nothing"),
    ],
)
def test_what_cannot_be_offloaded_is_refused(model: Any, options: Any, why: str) -> None:
    given = {"memory": "8MiB", "tiers": "host:8MiB;offload=on", "weights": "plain"}
    with pytest.raises(ConfigError, match=why):
        open_runner(model, **{**given, **options})


def test_a_model_of_states_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="this cache has none"):
        open_runner(zoo.build("mamba"), memory="8MiB", tiers="host:8MiB;offload=on")
