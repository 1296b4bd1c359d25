"""Preempted sequences that go to host memory and come back: the same tokens, and every byte of the loan returned."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

import zoo
from quire.engine import Engine, SamplingParams, SchedulerConfig
from quire.engine.ladder import Rates
from quire.errors import ConfigError
from quire.models.open import open_runner
from quire.store.tiering import Tiering
from tiny_model import chaotic_model

LENGTHS = (20, 35, 40, 26, 31)
PARAMS = SamplingParams(max_tokens=80, ignore_eos=True)
SWAP = "host:8MiB;swap=always"
RECIPES = {
    "auto": "160KiB",
    "int8": "84KiB",
    "kivi:bits=2,group=16,residual=16": "84KiB",
    "int4;sinks=2": "140KiB",
}
"""With arenas that hold two or three of the sequences."""
MODELS = {"mistral": "300KiB", "qwen3_next": "240KiB", "deepseek_v2": "200KiB"}


@pytest.fixture(autouse=True)
def _no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many are admitted at once is not a matter of how busy the machine is."""
    monkeypatch.setattr("quire.store.pace.STEP_S", 10.0)
    monkeypatch.setattr(Tiering, "ready", lambda _, fetch: fetch.done.wait(10.0))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Any:
    return chaotic_model()


def prompts(vocab: int = 97) -> list[list[int]]:
    g = torch.Generator().manual_seed(11)
    return [torch.randint(0, vocab, (n,), generator=g).tolist() for n in LENGTHS]


def serve(model: Any, *, keep: str | None = None, **options: Any) -> tuple[list[list[int]], Any]:
    """All prompts at once; afterwards nothing is held, on the device or on the host."""
    given = {"attention": "reference", "block_tokens": 16, "weights": "plain"}
    runner = open_runner(model, **{**given, **options})
    try:
        with Engine(runner, config=SchedulerConfig(step_tokens=64)) as engine:
            engine.core.checks.every = 1
            vocab = runner.vocab_size
            outs = engine.generate(prompts(vocab), PARAMS, keep=keep)
            stats = engine.stats()
        assert runner.usage().held_bytes == 0
        if runner.below is not None:
            assert runner.below.used_bytes == runner.below.host.borrowed_bytes == 0
        assert stats.checks["looks"] > 10
        assert stats.checks["violations"] == {}
        assert stats.ladder.parked == stats.ladder.parked_bytes == 0
        return [o.token_ids for o in outs], stats
    finally:
        runner.close()


@cache
def roomy(kv: str, attention: str, keep: str | None = None) -> list[list[int]]:
    return serve(chaotic_model(), kv=kv, memory="8MiB", attention=attention, keep=keep)[0]


@pytest.mark.parametrize(
    ("kv", "share", "attention"),
    [
        ("auto", "prefix", "auto"),
        ("int8", "off", "auto"),
        ("kivi:bits=2,group=16,residual=16", "prefix", "reference"),
        *(pytest.param(kv, "prefix", "auto", marks=pytest.mark.slow) for kv in list(RECIPES)[1:]),
    ],
)
def test_swapped_sequences_say_the_same(model: Any, kv: str, share: str, attention: str) -> None:
    options = {"kv": kv, "share": share, "attention": attention}
    got, stats = serve(model, memory=RECIPES[kv], tiers=SWAP, **options)
    assert got == roomy(kv, attention)
    ladder = stats.ladder
    assert ladder.swapped == ladder.returned == stats.scheduler.preemptions > 0
    assert stats.scheduler.recomputed_tokens == ladder.recomputed == 0
    assert ladder.swapped_bytes > 0 < ladder.copy_bytes_per_s


@pytest.mark.parametrize("kv", ["auto", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "keep", ["h2o:budget=0.5,every=16", "ada(snapkv:budget=0.4,window=8,every=8)"]
)
def test_rows_that_a_policy_has_compacted_come_back(model: Any, kv: str, keep: str) -> None:
    memory = {"auto": "128KiB", "int8": "48KiB"}[kv]
    got, stats = serve(model, kv=kv, keep=keep, memory=memory, tiers=SWAP)
    assert got == roomy(kv, "reference", keep)
    assert stats.ladder.returned > 0
    assert stats.scheduler.recomputed_tokens == 0


@pytest.mark.parametrize("name", ["mistral", "qwen3_next", "deepseek_v2"])
def test_windows_states_and_latents_come_back(name: str) -> None:
    """Recurrent state shares no prefixes, and is the dearest to compute again."""
    big = zoo.build(name)
    want, _ = serve(big, memory="8MiB")
    got, stats = serve(big, memory=MODELS[name], tiers=SWAP)
    assert got == want
    assert stats.ladder.returned > 0
    assert stats.scheduler.recomputed_tokens == 0


def test_it_is_decided_by_what_was_measured() -> None:
    rates = Rates()
    assert not rates.swap_pays(1, 1000)
    rates.copied(1000, 1.0)
    assert not rates.swap_pays(1, 1000)
    rates.computed(100, 1.0)
    assert rates.swap_pays(499, 100)
    assert not rates.swap_pays(501, 100)
    rates.computed(1, 100.0)  # one token says nothing of a prefill
    assert rates.swap_pays(499, 100)
    for _ in range(40):
        rates.copied(10, 1.0)
    assert not rates.swap_pays(499, 100)


@pytest.mark.parametrize("pays", [False, True])
def test_auto_computes_again_where_that_is_cheaper(
    model: Any, monkeypatch: Any, pays: bool
) -> None:
    monkeypatch.setattr(Rates, "swap_pays", lambda *_: pays)
    got, stats = serve(model, memory=RECIPES["auto"], tiers="host:8MiB", share="prefix")
    assert got == roomy("auto", "reference")
    ladder = stats.ladder
    assert stats.scheduler.preemptions == ladder.swapped + ladder.recomputed > 0
    assert bool(ladder.swapped) is pays
    assert bool(ladder.swap_dearer) is not pays


def test_a_full_host_recomputes(model: Any) -> None:
    got, stats = serve(model, memory=RECIPES["auto"], tiers="host:70KB;swap=always")
    assert got == roomy("auto", "reference")
    assert stats.ladder.swap_no_room > 0 < stats.ladder.recomputed


def test_a_cancelled_one_leaves_nothing_on_the_host(model: Any) -> None:
    runner = open_runner(
        model, memory=RECIPES["auto"], tiers=SWAP, attention="reference", block_tokens=16
    )
    try:
        with Engine(runner) as engine:
            names = [engine.add_request(p, PARAMS) for p in prompts()]
            while not engine.stats().ladder.parked:
                engine.step()
            assert runner.below.used_bytes == engine.stats().ladder.parked_bytes > 0
            for name in names:
                engine.cancel(name)
            assert not engine.has_work
            assert runner.below.used_bytes == runner.usage().held_bytes == 0
            assert engine.stats().ladder.returned < engine.stats().ladder.swapped
    finally:
        runner.close()


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step moves one block each way and no more."""
    for name in ("STEP_S", "STEP_SHARE", "ALONE_S"):
        monkeypatch.setattr(f"quire.store.pace.{name}", 0.0)


@pytest.mark.parametrize(
    ("kv", "keep", "memory"),
    [("auto", None, "160KiB"), ("auto", "h2o:budget=0.5,every=16", "128KiB")],
)
@pytest.mark.usefixtures("no_time")
def test_a_swap_takes_as_many_steps_as_it_has_blocks(
    model: Any, kv: str, keep: str | None, memory: str
) -> None:
    got, stats = serve(model, kv=kv, keep=keep, memory=memory, tiers=SWAP)
    assert got == roomy(kv, "reference", keep)
    ladder = stats.ladder
    assert ladder.swapped == ladder.returned == stats.scheduler.preemptions > 0
    assert stats.scheduler.recomputed_tokens == 0
    assert stats.scheduler.stalls > 0


@pytest.mark.parametrize("way", ["out", "in"])
@pytest.mark.usefixtures("no_time")
def test_one_that_is_cancelled_half_way_leaves_nothing(model: Any, way: str) -> None:
    runner = open_runner(
        model, memory="160KiB", tiers=SWAP, attention="reference", block_tokens=16, share="prefix"
    )
    try:
        with Engine(runner, config=SchedulerConfig(step_tokens=64)) as engine:
            engine.core.checks.every = 1
            scheduler = engine.scheduler
            for p in prompts():
                engine.add_request(p, PARAMS)

            def moving() -> list[Any]:
                if way == "out":
                    return list(scheduler.ladder.leaving)
                return [s for s in scheduler.running if s.parked is not None]

            for _ in range(2000):
                if moving() or not engine.has_work:
                    break
                engine.step()
            (sample, *_) = moving()
            before = runner.below.used_bytes
            engine.cancel(sample.request.request_id)
            assert runner.below.used_bytes < before
            assert sample not in moving()
            while engine.has_work:
                engine.step()
            stats = engine.stats()
        assert stats.checks["violations"] == {}
        assert runner.below.used_bytes == runner.usage().held_bytes == 0
        assert stats.ladder.parked == stats.ladder.parked_bytes == 0
    finally:
        runner.close()


@pytest.mark.parametrize(
    ("tiers", "share", "why"),
    [
        ("host:1MiB;swap=often", "prefix", "swap is auto, always, off, not 'often'"),
        ("disk:1MiB@/nowhere;swap=auto", "prefix", "host tier and there is none"),
        ("host:1MiB;swap=off", "off", "add share='prefix'"),
        ("host:1MiB", "off", "add share='prefix'"),
    ],
)
def test_what_cannot_be_swapped_is_refused(model: Any, tiers: str, share: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        open_runner(model, memory="8MiB", tiers=tiers, share=share)
