"""What requests give up when memory runs short: only where they say so, only then, and exactly what they name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engine.test_swap import PARAMS, prompts
from quire.engine import Engine, SamplingParams, SchedulerConfig
from quire.errors import RequestError
from quire.models.open import open_runner
from tiny_model import chaotic_model

YIELDS = {
    "evict": "keydiff:budget=0.4,sinks=2,window=4,every=16",
    "recode": "kv=int8",
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Any:
    return chaotic_model()


def yielding(
    model: Any, kind: str, allowed: set[int], **options: Any
) -> tuple[list[list[int]], Any]:
    given = {"attention": "reference", "block_tokens": 16, "weights": "plain", **options}
    runner = open_runner(model, **given)
    try:
        with Engine(runner, config=SchedulerConfig(step_tokens=64)) as engine:
            engine.core.checks.every = 1
            names = [
                engine.add_request(p, PARAMS, yields=YIELDS[kind] if at in allowed else None)
                for at, p in enumerate(prompts())
            ]
            done: dict[str, list[int]] = {}
            while engine.has_work:
                for delta in engine.step():
                    if delta.output is not None:
                        done[delta.request_id] = delta.output.token_ids
            stats = engine.stats()
        assert runner.usage().held_bytes == 0
        assert stats.checks["violations"] == {}
        return [done[n] for n in names], stats
    finally:
        runner.close()


@pytest.mark.parametrize("kind", YIELDS)
def test_only_those_who_allow_it_and_only_for_want_of_memory(model: Any, kind: str) -> None:
    want, _ = yielding(model, kind, set(), memory="8MiB")
    got, stats = yielding(model, kind, {1, 3}, memory="8MiB")
    assert got == want
    assert stats.ladder.yielded == stats.ladder.recoded == 0
    got, stats = yielding(model, kind, {1, 3}, memory="200KiB")
    counts = {"evict": stats.ladder.yielded, "recode": stats.ladder.recoded}
    assert counts.pop(kind) > 0 < stats.ladder.yielded_bytes
    assert set(counts.values()) == {0}
    same = [a == b for a, b in zip(got, want, strict=True)]
    assert all(same[at] for at in (0, 2, 4))
    assert all(len(x) == PARAMS.max_tokens for x in got)


def test_recoded_blocks_are_those_of_the_codec(model: Any) -> None:
    """Older positions read as decode(encode(x)), the newest as they were; the request goes on."""
    runner = open_runner(model, memory="8MiB", block_tokens=16, weights="plain")
    try:
        with Engine(runner) as engine:
            engine.add_request(
                prompts()[2] * 2, SamplingParams(max_tokens=40, ignore_eos=True), yields="kv=int8"
            )
            for _ in range(12):
                engine.step()
            (sample,) = engine.scheduler.running
            table, bridge = sample.table, runner.bridge
            n = table.length
            fields = [(layer, name) for layer, names in bridge.layers() for name in names]

            def read() -> dict[Any, torch.Tensor]:
                table.append(1)
                found = {at: bridge.read_prefix(table, n, *at).clone() for at in fields}
                table.unreserve()
                return found

            before, held = read(), table.held_bytes()
            assert sample.request.yields.apply(table)
            assert not sample.request.yields.apply(table), "there is nothing left to gain"
            assert table.held_bytes() < 0.55 * held
            body, raw = (c.group for c in table.chains)
            start = raw.span.start(n)
            assert 0 < start < n
            after = read()
            for (layer, name), x in before.items():
                codec = bridge.layout.codecs_of(body)[name]
                site = next(s for s in bridge.layout.sites_of(body) if s.name == name)
                blocks = x[:, : n // 16 * 16].unflatten(1, (-1, 16)).transpose(0, 1)
                pos = torch.arange(len(blocks) * 16).view(-1, 1, 16)
                kept = {
                    f.name.partition(".")[2]: getattr(torch, f.dtype) for f in codec.stored(site)
                }
                parts = {p: y.to(kept[p]) for p, y in codec.encode(site, blocks, pos).items()}
                want = codec.decode(site, parts, pos, torch.float32).transpose(0, 1).flatten(1, 2)
                got = after[layer, name]
                assert torch.equal(got[:, :start], want[:, :start])
                assert torch.equal(got[:, start:], x[:, start:])
                assert not torch.equal(got, x)
            while engine.has_work:
                engine.step()
            assert engine.stats().checks["violations"] == {}
        assert runner.usage().held_bytes == 0
    finally:
        runner.close()


@pytest.mark.parametrize(
    ("yields", "keep", "why"),
    [
        ("h2o:budget=0.5", None, "use keydiff"),
        ("kv=nonsense", None, "nonsense"),
        ("kv=auto", None, "no smaller"),
        ("window:64", None, "use keydiff"),
        ("nonsense", None, "nonsense"),
        ("keydiff:budget=0.5", "keydiff:budget=0.5", "keep everything"),
    ],
)
def test_what_cannot_yield_is_refused(model: Any, yields: str, keep: Any, why: str) -> None:
    runner = open_runner(model, memory="8MiB", weights="plain")
    try:
        with Engine(runner) as engine, pytest.raises(RequestError, match=why):
            engine.add_request([1, 2, 3], PARAMS, keep=keep, yields=yields)
    finally:
        runner.close()


def test_what_is_coded_is_not_coded_again(model: Any) -> None:
    runner = open_runner(model, kv="int8", memory="8MiB", weights="plain")
    try:
        with Engine(runner) as engine, pytest.raises(RequestError, match="open it with kv='auto'"):
            engine.add_request([1, 2, 3], PARAMS, yields="kv=int4")
    finally:
        runner.close()
