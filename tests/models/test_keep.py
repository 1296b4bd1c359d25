"""A policy in generate(), in the engine and in a conversation: one request keeps the same tokens wherever it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quire
import zoo
from quire.engine import Engine, SamplingParams
from quire.engine.conversation import Conversation
from quire.errors import CapacityError, ConfigError, RequestError
from quire.models.open import open_runner
from quire.models.turn import find_turner
from quire.store.snapshot import read_snapshot

KEEPS = [
    "h2o:budget=40,sinks=2,window=8,boundary=4,every=8",
    "keydiff:budget=0.4,sinks=2,window=8,boundary=4,every=8",
    "ada(h2o:budget=40,sinks=2,window=8,boundary=4,every=8):floor=0.1",
    "window:20",
    "sinks:3+window:20",
]
NEW = 24
PROMPTS = zoo.prompts(lengths=(70, 41, 90))


@pytest.fixture(scope="module")
def model() -> Any:
    return zoo.build("llama")


def params(n: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=NEW, ignore_eos=True, n=n, temperature=0.0)


def outputs(model: Any, keep: str, **options: Any) -> tuple[list[list[int]], Engine]:
    options = {"memory": "8MiB", "block_tokens": 4} | options
    runner = open_runner(model, keep=keep, **options)
    engine = Engine(runner)
    try:
        found = [o.token_ids for o in engine.generate(PROMPTS, params())]
        assert runner.usage().held_bytes == 0
        return found, engine
    finally:
        engine.close()
        runner.close()


@pytest.mark.parametrize("keep", KEEPS)
def test_alone_in_a_batch_preempted_and_in_generate(model: Any, keep: str) -> None:
    want, _ = outputs(model, keep)
    assert want != outputs(model, "full")[0], "or nothing was dropped"
    runner = open_runner(model, keep=keep, memory="8MiB", block_tokens=4)
    alone = [Engine(runner).generate(p, params())[0].token_ids for p in PROMPTS]
    runner.close()
    assert alone == want
    for memory in range(80_000, 1_200_000, 60_000):  # 120 tokens in full take 368,640
        try:
            tight, engine = outputs(model, keep, memory=memory)
        except CapacityError:  # one of them does not fit alone
            continue
        assert tight == want
        if engine.stats().scheduler.preemptions:
            break
    else:
        assert keep.endswith("window:20"), "no arena was small enough to preempt anybody"
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    with quire.attach(model, keep=keep, memory="8MiB", block_tokens=4):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0
        )
    assert out[:, width:].tolist() == want


def test_requests_of_different_policies_share_a_batch(model: Any) -> None:
    want = {keep: outputs(model, keep)[0] for keep in (*KEEPS, "full")}
    runner = open_runner(model, memory="8MiB", block_tokens=4)
    engine = Engine(runner)
    names = {}
    for keep in want:
        for i, p in enumerate(PROMPTS):
            names[engine.add_request(p, params(), keep=keep)] = (keep, i)
    got = {}
    while engine.has_work:
        for delta in engine.step():
            if delta.output is not None:
                got[names[delta.request_id]] = delta.output.token_ids
    assert got == {(keep, i): t for keep, all_of in want.items() for i, t in enumerate(all_of)}
    with pytest.raises(RequestError, match="unknown policy 'h3o'"):
        engine.add_request(PROMPTS[0], params(), keep="h3o")
    engine.close()
    runner.close()


@pytest.mark.parametrize("keep", KEEPS)
def test_a_prefix_hit_keeps_what_a_miss_keeps(model: Any, keep: str) -> None:
    want, _ = outputs(model, keep)
    runner = open_runner(model, keep=keep, memory="8MiB", block_tokens=4, share="prefix")
    engine = Engine(runner)
    for _ in range(2):
        outs = engine.generate(PROMPTS, params())
        assert [o.token_ids for o in outs] == want
    found = [o.figures.cached_tokens for o in outs]
    if "h2o" in keep:
        assert found == [0, 0, 0], "every query of the prompt is asked"
    else:
        assert all(0 < n < len(p) for n, p in zip(found, PROMPTS, strict=True))
    engine.close()
    runner.close()


@pytest.mark.parametrize("keep", KEEPS)
def test_samples_fork_with_what_was_seen(model: Any, keep: str) -> None:
    want, _ = outputs(model, keep)
    runner = open_runner(model, keep=keep, memory="8MiB", block_tokens=4)
    engine = Engine(runner)
    out = engine.generate(PROMPTS[0], params(n=3))[0]
    assert len({tuple(c.token_ids) for c in out.outputs}) == 1
    assert out.outputs[0].token_ids == want[0]
    engine.close()
    runner.close()


@pytest.mark.parametrize("keep", KEEPS)
def test_a_conversation_drops_at_the_end_of_each_turn(model: Any, keep: str) -> None:
    runner = open_runner(model, keep=keep, memory="8MiB", block_tokens=4)
    talk = Conversation(runner)
    tokens: list[int] = []
    for turn in PROMPTS:
        tokens += turn
        for delta in talk.stream(tokens, params()):
            tokens += delta.token_ids
        assert len(tokens) > talk.table.length > len(tokens) - 3
    assert talk.table.held_bytes() < 3072 * len(tokens) * 0.7
    talk.close()
    runner.close()


@pytest.mark.parametrize("keep", [*KEEPS, "kvzip:budget=0.5,sinks=1,window=4,boundary=2"])
def test_generate_finds_as_much_as_leaves_the_queries(model: Any, keep: str) -> None:
    """A padded batch, twice: all rows go on at one column, and keep what they keep when they find nothing."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    got, found = [], 0
    for share in ("off", "prefix"):
        options = {"keep": keep, "share": share, "memory": "8MiB", "block_tokens": 4}
        with quire.attach(model, **options) as attached:
            for _ in range(1 + (share == "prefix")):
                more = {"attention_mask": mask, "max_new_tokens": NEW, "pad_token_id": 0}
                got.append(model.generate(ids, **more).tolist())
            if share == "prefix":
                found = attached.bridge.sharing.stats.hit_tokens
            assert attached.bridge.store.usage().held_bytes == 0
    assert all(text == got[0] for text in got)
    assert (found == 0) == ("h2o" in keep)


SMALL = "sinks=2,window=8,boundary=4,every=8"
SAVED = [
    ("auto", KEEPS[0]),
    ("auto", f"kvzip:budget=0.4,{SMALL}"),
    ("auto", f"pyramid(ada(expected:budget=0.4,{SMALL}))"),
    ("int8", f"ada(h2o:budget=0.4,{SMALL}):floor=0.0"),
]


@pytest.mark.parametrize(("kv", "keep"), SAVED)
def test_a_saved_conversation_goes_on_as_if_it_had_not_stopped(
    model: Any, kv: str, keep: str, tmp_path: Path
) -> None:
    options = {"keep": keep, "kv": kv, "memory": "8MiB", "block_tokens": 16}
    texts = []
    for saves in (False, True):
        runner, tokens = open_runner(model, **options), []
        talk = Conversation(runner)
        for i, turn in enumerate(PROMPTS):
            tokens += turn
            for delta in talk.stream(tokens, SamplingParams(max_tokens=11, ignore_eos=True)):
                tokens += delta.token_ids
            if saves:
                talk.save(tmp_path / f"{i}")
                talk.close()
                runner.close()
                runner = open_runner(model, **options)
                talk = Conversation(runner)
                talk.restore(read_snapshot(tmp_path / f"{i}"))
        talk.close()
        assert runner.usage().held_bytes == 0
        runner.close()
        texts.append(tokens)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("keep", [keep for kv, keep in SAVED if kv == "auto"])
def test_a_saved_cache_of_generate_goes_on(model: Any, keep: str, tmp_path: Path) -> None:
    ids, options = torch.tensor([PROMPTS[0]]), {"keep": keep, "memory": "8MiB", "block_tokens": 4}
    more = {"max_new_tokens": 11, "pad_token_id": 0, "min_new_tokens": 11}
    texts = []
    with quire.attach(model, **options) as attached:
        cache = attached.cache()
        first = model.generate(ids, past_key_values=cache, **more)
        cache.save(tmp_path)
        texts.append(model.generate(first, past_key_values=cache, **more).tolist())
        del cache
    with quire.attach(model, **options) as attached:
        cache = attached.load(tmp_path)
        texts.append(model.generate(first, past_key_values=cache, **more).tolist())
        del cache
    assert texts[0] == texts[1]


def test_what_cannot_go_with_it_says_so(model: Any, tmp_path: Path) -> None:
    keep, ids = KEEPS[0], torch.tensor([PROMPTS[0]])
    with quire.attach(model, keep=keep, memory="8MiB", block_tokens=4) as attached:
        cache = attached.cache()
        model.generate(ids, past_key_values=cache, max_new_tokens=NEW, pad_token_id=0)
        cache.save(tmp_path)
        with pytest.raises(RequestError, match="assisted decoding goes with keep='full'"):
            model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=4, pad_token_id=0)
    with (
        quire.attach(model, keep=KEEPS[1], memory="8MiB", block_tokens=4) as other,
        pytest.raises(ConfigError, match=r"another (policy|model)"),
    ):
        other.load(tmp_path)
    with quire.attach(model, keep=keep, memory="8MiB", block_tokens=4):
        out = model.generate(ids, num_beams=3, max_new_tokens=NEW, pad_token_id=0)
        assert out.shape[1] > ids.shape[1]


@pytest.mark.parametrize(
    ("name", "keep", "words"),
    [
        ("deepseek_v3", "ada(h2o:0.5)", "heads cannot have budgets of their own"),
        ("deepseek_v3", "sinks:4+window:20", "cannot be turned back"),
        ("mistral", "h2o:0.5", "no layer of this model keeps every token"),
        ("bloom", "h2o:0.5", "way 'dense'"),
    ],
)
def test_models_that_cannot_are_refused(name: str, keep: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_runner(zoo.build(name), keep=keep, memory="8MiB")


@pytest.mark.parametrize("name", ["llama", "gemma4", "gpt_oss", "qwen3_next", "mistral"])
def test_a_models_rope_is_found_by_asking(name: str) -> None:
    """And it is the one that transformers' own module computes."""
    model = zoo.build(name)
    runner: Any = open_runner(model, memory="8MiB")
    turner = find_turner(runner.bridge)
    layers = [layer for layer, _ in runner.bridge.layers()]
    assert list(turner.ropes) == layers
    ropes = [turner.ropes[layer] for layer in layers]
    assert any(rope is not None for rope in ropes)
    x = torch.randn(3, 64)
    for rope in filter(None, ropes):
        back = rope.turn(rope.turn(x, torch.tensor([9, 2, 4])), torch.tensor([-9, -2, -4]))
        assert torch.allclose(back, x, atol=1e-5)
    runner.close()
