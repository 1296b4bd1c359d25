"""`quest`: which blocks are read, by whom and from when on, held to a dense mask; and that all stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch

import quire
import zoo
from models.driving import runner_for
from quire.attention import sparse
from quire.attention.cpu import CpuBackend
from quire.attention.reference import ReferenceBackend, TorchBackend
from quire.engine import Engine, SamplingParams
from quire.engine.conversation import Conversation
from quire.engine.schedule import SchedulerConfig
from quire.errors import CapacityError, ConfigError, RequestError
from quire.kernels import native
from quire.models.reader import Reader
from quire.retention import parse_keep
from quire.spec import Residual
from retention.kept import prompts

LENGTHS = (150, 171, 90)
TEXTS = prompts(LENGTHS, zoo.VOCAB)
KEEP = "quest:budget=40,skip=1"
KVS = ("fp32", "int8", "kivi:residual=16,group=16", "int4;sinks=20;window=24")
needs_kernels = pytest.mark.skipif(native.load() is None, reason="no compiled kernels here")


@cache
def model(name: str = "llama") -> Any:
    return zoo.build(name)


def texts(
    keep: str,
    asked: list[list[int]],
    *,
    requests: str | None = None,
    n_tokens: int = 16,
    one_by_one: bool = False,
    **options: Any,
) -> tuple[list[list[int]], Any]:
    """What an engine says, and its counters; `requests` is what they ask for beside the runner's own."""
    runner = runner_for(model(), keep=keep, **{"attention": "reference", **options})
    params = SamplingParams(max_tokens=n_tokens, ignore_eos=True)
    try:
        with Engine(runner, config=SchedulerConfig(step_tokens=48)) as engine:
            groups = [[t] for t in asked] if one_by_one else [asked]
            out = [o for g in groups for o in engine.generate(g, params, keep=requests)]
            stats = engine.stats().scheduler
            assert runner.usage().held_bytes == 0
    finally:
        runner.close()
    said = [list(o.outputs[0].token_ids) for o in out]
    return said, (stats, [o.figures.cached_tokens for o in out])


def by_hand(
    step: Any, layer: int, q: torch.Tensor, scale: float, keep: Any
) -> dict[int, torch.Tensor]:
    """Single queries' attention in float64 under a dense mask of our own making: token to `[H_q, D]`."""
    reads = step.of_layer(layer)[2]
    plain = ReferenceBackend()
    out = {}
    for token in sorted({f for r in reads if r.queries == 1 for f in r.firsts}):
        ks, vs, seen = [], [], []
        for r in (r for r in reads if r.queries == 1 and token in r.firsts):
            i = r.firsts.index(token)
            k, v = (
                x[i].double().clone()
                for x in plain._keys_and_values(step, layer, r, ("k",), "v", q.dtype)
            )
            pos, at = r.kpos[i], int(r.qpos[i, 0])
            mask = r.mask()
            ok = (pos >= 0) & (pos <= at) if mask is None else mask[i, 0].clone()
            ok = ok.expand(k.shape[0], -1).clone()
            size, table = r.group.block_tokens, r.rows[i].table
            mine = not isinstance(r.group.span, Residual) and table.keeper is not None
            if mine and at >= table.keeper.prompt_tokens and layer >= keep.skip:
                end = at if r.limit is None else r.limit.start(at)
                whole = end // size
                budget = keep.budget.tokens or max(1, round(keep.budget.share * (at + 1)))
                n = max(1, -(-(budget - (at + 1 - whole * size)) // size))
                for h in range(k.shape[0]):
                    worth = {}
                    for b in range(whole):
                        keys = k[h][(pos >= b * size) & (pos < (b + 1) * size)]
                        low, high = keys.amin(0), keys.amax(0)
                        share = q.shape[1] // k.shape[0]
                        worth[b] = [
                            float(torch.maximum(x * low, x * high).sum()) * scale
                            for x in q[token, h * share : (h + 1) * share].double()
                        ]
                    if not worth:
                        continue
                    every = torch.tensor(list(worth.values()), dtype=torch.float64)
                    best = every.softmax(0).log().amax(1)
                    order = sorted(range(whole), key=lambda b: -float(best[b]))[:n]
                    for b in set(range(whole)) - set(order):
                        ok[h] &= (pos < b * size) | (pos >= (b + 1) * size)
            ks.append(k)
            vs.append(v)
            seen.append(ok)
        k, v, ok = torch.cat(ks, 1), torch.cat(vs, 1), torch.cat(seen, 1)
        share = q.shape[1] // k.shape[0]
        k, v, ok = (x.repeat_interleave(share, 0) for x in (k, v, ok))
        s = torch.einsum("hd,hnd->hn", q[token].double(), k) * scale
        p = s.masked_fill(~ok, float("-inf")).softmax(-1)
        out[token] = torch.einsum("hn,hnd->hd", p, v)
    return out


@contextmanager
def checked(backend: Any, keep: str, tolerance: float) -> Iterator[dict[str, int]]:
    """Every call of a backend is held to `by_hand`."""
    plain, policy, count = type(backend).run, parse_keep(keep).policy, {"queries": 0, "sparse": 0}

    def run(self: Any, step: Any, layer: int, q: torch.Tensor, **options: Any) -> torch.Tensor:
        got = plain(self, step, layer, q, **options)
        for token, want in by_hand(step, layer, q, options["scale"], policy).items():
            error = float((got[token].double() - want).norm() / want.norm())
            assert error < tolerance, f"layer {layer}, token {token}: {error}"
            count["queries"] += 1
        singles = [r for r in step.of_layer(layer)[2] if r.queries == 1]
        count["sparse"] += len(sparse.picked(step, layer, singles))
        return got

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(backend), "run", run)
        yield count


@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize(
    "backend", ["reference", "torch", pytest.param("cpu", marks=needs_kernels)]
)
def test_what_is_read_is_what_a_dense_mask_of_the_bounds_says(backend: str, kv: str) -> None:
    kind = {"reference": ReferenceBackend, "torch": TorchBackend, "cpu": CpuBackend}[backend]
    lossy = 2e-2 if backend == "cpu" and kv != "fp32" else 1e-4
    with checked(kind(), KEEP, lossy) as count:
        size = 8 if kv == "fp32" else 16
        texts(
            KEEP, [t[:100] for t in TEXTS], kv=kv, attention=backend, block_tokens=size, n_tokens=5
        )
    assert count["sparse"] >= 8
    assert count["queries"] >= 24


@pytest.mark.parametrize("kv", KVS)
def test_a_bound_is_above_every_key_of_its_block(kv: str) -> None:
    """The fields beside each whole block are the least and the largest of its keys as they are read."""
    found = []
    plain = sparse.bounds

    def bounds(step: Any, layer: int, read: Any, q: torch.Tensor, n: int) -> torch.Tensor:
        got = plain(step, layer, read, q, n)
        k = ReferenceBackend()._gather(step, layer, read, "k", torch.float32)
        size, whole = read.group.block_tokens, read.slots[1] // read.group.block_tokens
        blocks = k[:, :, : whole * size].unflatten(2, (whole, size))
        grouped = q.view(len(q), k.shape[1], -1, 1, q.shape[-1]).float()
        exact = (grouped.unsqueeze(3) * blocks.unsqueeze(2)).sum(-1).amax(-1)
        gap = got - exact[..., :n]
        assert float(gap.min()) > -1e-4
        low, high = step.bounds_of(layer, read, n).chunk(2, -1)
        assert torch.allclose(low, blocks[:, :, :n].amin(3), atol=1e-6)
        assert torch.allclose(high, blocks[:, :, :n].amax(3), atol=1e-6)
        found.append(n)
        return got

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "bounds", bounds)
        texts(KEEP, [TEXTS[0]], kv=kv, block_tokens=16, n_tokens=20)
    assert len(found) >= 2 * 15
    assert max(found) > min(found), "generated tokens fill blocks, too"


@cache
def alone(keep: str = KEEP) -> list[list[int]]:
    return [texts(keep, [t])[0][0] for t in TEXTS]


@pytest.mark.parametrize("attention", ["reference", pytest.param("cpu", marks=needs_kernels)])
@pytest.mark.parametrize("keep", ["quest:budget=400,skip=0", "quest:budget=1.0,skip=0"])
def test_a_budget_that_covers_all_reads_all(keep: str, attention: str) -> None:
    full = texts("full", TEXTS, attention=attention)[0]
    assert texts(keep, TEXTS, attention=attention)[0] == full
    assert alone() != full, "the control: what is passed over shows in the text"
    assert texts("quest:budget=40,skip=3", TEXTS)[0] == full, "all layers of this model are skipped"


def test_preempted_while_it_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was generated is computed anew one by one, so that each query reads what it has read before."""
    plain, again = Reader.until, []

    def until(self: Reader, start: int, stop: int) -> int:
        if start >= self.prompt_tokens and stop - start > 1:
            again.append(start)
        return plain(self, start, stop)

    monkeypatch.setattr(Reader, "until", until)
    few = [TEXTS[2], TEXTS[2][5:]]
    want = [texts(KEEP, [t], n_tokens=40)[0][0] for t in few]
    assert not again
    for memory in range(680_000, 1_000_000, 60_000):
        try:
            said, _ = texts(KEEP, few, n_tokens=40, memory=memory)
        except CapacityError:  # one of them does not fit alone
            continue
        assert said == want
        if len(again) > 5:
            break
    assert len(again) > 5, "no arena was of the size that preempts somebody who has said something"


def test_the_same_in_a_batch_and_after_a_hit() -> None:
    assert texts(KEEP, TEXTS)[0] == alone()
    twice, (_, cached) = texts(KEEP, [*TEXTS, *TEXTS], one_by_one=True, share="prefix")
    assert twice == [*alone(), *alone()]
    assert cached[3:] == [144, 168, 88]


def test_what_read_less_is_found_by_nobody() -> None:
    """A prompt that goes on where a quest request ended finds that one's prompt, and none of what it generated."""
    longer = [*TEXTS[0], *alone()[0][:12], 5, 6]
    runner = runner_for(model(), keep=KEEP, attention="reference", share="prefix")
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    with Engine(runner) as engine:
        engine.generate(TEXTS[0], params)
        [out] = engine.generate(longer, params, keep="full")
    runner.close()
    assert out.figures.cached_tokens == 144
    assert list(out.outputs[0].token_ids) == texts("full", [longer])[0][0]


def test_policies_of_other_kinds_share_its_store() -> None:
    others = ["full", "window:20", "h2o:budget=0.4,sinks=2,window=4,boundary=3,every=8"]
    for other in others:
        want = texts(other, TEXTS)[0]
        assert texts(KEEP, TEXTS, requests=other)[0] == want
    few = "quest:budget=20,skip=0"
    assert texts(KEEP, TEXTS, requests=few)[0] == alone(few)
    runner = runner_for(model(), keep=KEEP, attention="cpu" if native.load() else "torch")
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    with Engine(runner) as engine:
        names = {engine.add_request(TEXTS[0], params, keep=k): k for k in (KEEP, *others)}
        said = {}
        while engine.has_work:
            for delta in engine.step():
                if delta.output is not None:
                    said[names[delta.request_id]] = list(delta.output.outputs[0].token_ids)
    runner.close()
    assert said == {KEEP: alone()[0]} | {k: texts(k, TEXTS[:1])[0][0] for k in others}


def test_memory_is_not_freed_but_takes_a_little_more() -> None:
    found = []
    for keep in ("full", KEEP):
        runner = runner_for(model(), keep=keep, block_tokens=32)
        found.append(runner.bytes_per_token)
        runner.close()
    assert found[1] == found[0] * 33 / 32


def test_in_generate_and_with_samples_and_in_a_conversation() -> None:
    want = alone()
    width = max(LENGTHS)
    ids = torch.tensor([[0] * (width - len(t)) + t for t in TEXTS])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in TEXTS])
    with quire.attach(
        model(), keep=KEEP, memory="32MiB", block_tokens=8, attention="reference"
    ) as attached:
        out = model().generate(
            ids, attention_mask=mask, max_new_tokens=16, min_new_tokens=16, pad_token_id=0
        )
        assert out[:, width:].tolist() == want
        cache = attached.cache()
        assisted = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 4, "pad_token_id": 0}
        with pytest.raises(RequestError, match="assisted decoding goes with keep='full'"):
            model().generate(ids[1:2], past_key_values=cache, **assisted)
    with quire.attach(
        model(), keep=KEEP, memory="32MiB", block_tokens=8, attention="reference", share="prefix"
    ):
        for _ in range(2):  # the second finds the prompts of the first, and nothing else
            out = model().generate(
                ids, attention_mask=mask, max_new_tokens=16, min_new_tokens=16, pad_token_id=0
            )
            assert out[:, width:].tolist() == want
    runner = runner_for(model(), keep=KEEP, attention="reference")
    params = SamplingParams(max_tokens=16, ignore_eos=True, n=2, temperature=0.0)
    with Engine(runner) as engine:
        [sampled] = engine.generate(TEXTS[0], params)
        assert [list(o.token_ids) for o in sampled.outputs] == [want[0]] * 2
    talk = Conversation(runner)
    tokens = list(TEXTS[0])
    for turn in (TEXTS[2][:20], []):
        for delta in talk.stream(tokens, SamplingParams(max_tokens=16, ignore_eos=True)):
            tokens += delta.token_ids
        assert len(turn) == 0 or tokens[150:] == want[0]
        tokens += turn
    assert talk.table.keeper.prompt_tokens == 150 + 16 + 20
    talk.close()
    runner.close()


@pytest.mark.parametrize(
    ("name", "keep", "says"),
    [
        ("deepseek_v3", KEEP, "keeps latents"),
        ("mistral", KEEP, "no layer of this model keeps every token"),
        ("bloom", KEEP, "way 'dense'"),
    ],
)
def test_models_that_cannot_are_refused(name: str, keep: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        runner_for(model(name), keep=keep)


def test_a_cache_opened_without_bounds_refuses_it() -> None:
    with pytest.raises(RequestError, match="opened without them; open it with keep='quest"):
        texts("full", TEXTS[:1], requests=KEEP)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("quest:budget=64MiB", "no bytes are saved"),
        ("quest:skip=-1", "skip=-1 must be"),
        ("quest:budget=0", "is no budget"),
        ("quest:window=3", "it takes budget, skip"),
        ("ada(quest)", "spreads the budget of a policy that scores"),
        ("quest+window:20", "cannot be joined"),
    ],
)
def test_wrong_texts(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_keep(text)
