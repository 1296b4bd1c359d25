"""`duo`: a map says which heads keep every token; what each query reads, what goes back, and whose map it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

import find_heads
import zoo
from quire import attach, packaged
from quire.engine import Engine, SamplingParams
from quire.engine.runner import Item
from quire.errors import ConfigError
from quire.models.load import weights_digest
from quire.models.open import open_runner
from quire.models.runner import ModelRunner
from quire.retention import Keep, parse_keep
from quire.retention.duo import Policy
from quire.spec import Coord, Full, Sinks, Window
from retention.kept import prompts, run

SINKS, WINDOW = 2, 12
ORDER = [(1, 1), (0, 0), (2, 1), (0, 1), (1, 0), (2, 0)]
"""Of the small Llama: 3 layers of 2 heads."""
TEXTS = prompts((150, 171, 90), zoo.VOCAB)


@cache
def model(name: str = "llama") -> Any:
    return zoo.build(name)


def mapped(folder: Path, of: Any, order: Sequence[Coord] = ORDER, digest: str = "") -> str:
    """A map of a model as a policy, half of whose heads keep everything."""
    path = folder / f"{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps({"digest": digest or weights_digest(of), "heads": order}))
    return f"duo:sinks={SINKS},window={WINDOW},map={path}"


def heads(name: str) -> list[Coord]:
    """KV heads that read everything, from a runner without a policy."""
    runner = open_runner(model(name), memory="8MiB")
    try:
        return find_heads.heads_of(runner.bridge.layout)  # type: ignore[union-attr]
    finally:
        runner.close()


def dense(prompt: list[int], n_tokens: int, retrieval: set[Coord], sinks: int) -> list[int]:
    """transformers' own greedy text of the small Llama, with a mask of its own for every head."""

    def attend(module: Any, q: Any, k: Any, v: Any, _mask: Any, **more: Any) -> Any:
        share, n = q.shape[1] // k.shape[1], q.shape[2]
        i, j = torch.arange(n)[:, None], torch.arange(n)
        every = [(module.layer_idx, h // share) in retrieval for h in range(q.shape[1])]
        mask = (j <= i) & (torch.tensor(every)[:, None, None] | (j < sinks) | (i - j < WINDOW))
        scores = q @ k.repeat_interleave(share, 1).mT * more["scaling"]
        out = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v.repeat_interleave(share, 1)
        return out.transpose(1, 2), None

    AttentionInterface.register("by_head", attend)
    own = zoo.build("llama")
    own.set_attn_implementation("by_head")
    ids = list(prompt)
    for _ in range(n_tokens):
        with torch.no_grad():
            ids.append(int(own(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("sinks", [SINKS, 0])
@pytest.mark.parametrize("attention", ["auto", "reference"])
def test_heads_read_what_the_map_says(sinks: int, attention: str, tmp_path: Path) -> None:
    """Against a dense mask per head; chunks of the prompt end anywhere."""
    keep = mapped(tmp_path, model()).replace(f"sinks={SINKS}", f"sinks={sinks}")
    prompt = TEXTS[0][:50]
    got = run(model(), [(prompt, keep)], n_tokens=8, step_tokens=17, attention=attention)
    assert got.tokens[0] == dense(prompt, 8, set(ORDER[:3]), sinks)
    other = dense(prompt, 8, set(ORDER[3:]), sinks)
    assert got.tokens[0] != other, "the control: which heads keep all shows in the text"


def test_the_same_alone_in_a_batch_preempted_and_forked(tmp_path: Path) -> None:
    keep = mapped(tmp_path, model())
    [alone] = run(model(), [(TEXTS[0], keep)]).tokens
    [full] = run(model(), [(TEXTS[0], "full")]).tokens
    assert alone != full
    others = [(TEXTS[1][:60], "random:budget=0.5,window=4,boundary=3"), (TEXTS[2], "window:20")]
    beside = run(model(), [*others, (TEXTS[1], "full"), (TEXTS[0], keep)])
    assert beside.tokens[3] == alone
    assert beside.tokens[2] == run(model(), [(TEXTS[1], "full")]).tokens[0]
    tight = run(model(), [(TEXTS[2], "full"), (TEXTS[1], keep), (TEXTS[0], keep)], memory=760_000)
    assert tight.preemptions
    assert tight.tokens[2] == alone
    own = open_runner(model(), keep=keep, memory="32MiB", block_tokens=8)
    with Engine(own) as engine:
        params = SamplingParams(max_tokens=20, ignore_eos=True, n=2)
        [both] = engine.generate([TEXTS[0]], params)
        assert [list(o.token_ids) for o in both.outputs] == [alone, alone]
    own.close()


def test_the_models_own_generate(tmp_path: Path) -> None:
    keep, own = mapped(tmp_path, model()), zoo.build("llama")
    alone = [run(model(), [(t, keep)]).tokens[0] for t in (TEXTS[0], TEXTS[2])]
    width = len(TEXTS[0])
    pad = width - len(TEXTS[2])
    ids = torch.tensor([TEXTS[0], [0] * pad + TEXTS[2]])
    mask = torch.tensor([[1] * width, [0] * pad + [1] * len(TEXTS[2])])
    with attach(own, keep=keep, memory="32MiB", block_tokens=8):
        out = own.generate(
            ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0
        )
    assert out[:, width:].tolist() == alone


@pytest.mark.parametrize("kv", ["auto", "int4"])
def test_prefixes_are_shared_and_read_alike(kv: str, tmp_path: Path) -> None:
    """Blocks that left the window are cached under their names; a hit reads what a miss would have."""
    keep = mapped(tmp_path, model())
    longer = [TEXTS[0], TEXTS[0][:120] + TEXTS[1][:40]]
    texts, found = [], []
    for share in ("off", "prefix"):
        runner = open_runner(
            model(), keep=keep, kv=kv, memory="32MiB", block_tokens=16, share=share
        )
        with Engine(runner) as engine:
            params = SamplingParams(max_tokens=20, ignore_eos=True)
            both = [engine.generate([t], params)[0] for t in longer]
        runner.close()
        texts.append([list(o.outputs[0].token_ids) for o in both])
        found.append(both[1].figures.cached_tokens)
    assert texts[0] == texts[1]
    assert found[0] == 0
    assert found[1] >= 112


def test_maps_of_the_same_shape_do_not_share(tmp_path: Path) -> None:
    """A request whose map chooses other heads than the runner's gets chains of its own."""
    one = mapped(tmp_path, model())
    two = mapped(tmp_path, model(), [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)])
    runner = open_runner(model(), keep=one, memory="32MiB", block_tokens=8)
    try:
        with Engine(runner) as engine:
            params = SamplingParams(max_tokens=20, ignore_eos=True)
            name = engine.add_request(TEXTS[0], params, keep=two)
            out = []
            while engine.has_work:
                out += [d.output for d in engine.step() if d.request_id == name and d.output]
    finally:
        runner.close()
    assert list(out[0].outputs[0].token_ids) == run(model(), [(TEXTS[0], two)]).tokens[0]
    assert run(model(), [(TEXTS[0], one)]).tokens != run(model(), [(TEXTS[0], two)]).tokens


def held(of: Any, prompt: list[int], keep: str, **options: Any) -> tuple[int, int, float]:
    """Bytes in the pool at most on the way through a prompt in chunks, at its end, and per token of all heads."""
    runner = open_runner(of, memory="64MiB", keep=keep, **options)
    assert isinstance(runner, ModelRunner)
    peak = 0
    try:
        table = runner.open()
        for start in range(0, len(prompt), 64):
            stop = min(len(prompt), start + 64)
            table.append(stop - start)
            runner.forward([Item(table, prompt, start, stop, 0)])
            peak = max(peak, runner.usage().held_bytes)
            table.commit()
        end = runner.usage().held_bytes
        table.release()
        return peak, end, runner.rules(runner.keep).bytes_per_token
    finally:
        runner.close()


@pytest.mark.parametrize("kv", ["auto", "bf16", "int8", "int4", "kivi:residual=32"])
def test_streaming_heads_give_their_blocks_back(kv: str, tmp_path: Path) -> None:
    """At least 90 % of what is nominally dropped, and in the course of the prompt, not behind it."""
    [prompt] = prompts([960], zoo.VOCAB)
    of = zoo.build("llama")
    peak_full, full, each = held(of, prompt, "full", kv=kv)
    peak, some, _ = held(of, prompt, mapped(tmp_path, of), kv=kv)
    nominal = 0.5 * (960 - SINKS - WINDOW) * each
    assert each == pytest.approx(_body_bytes(of, kv))
    assert full - some >= 0.9 * nominal
    assert peak_full - peak >= 0.8 * nominal, "one chunk of 64 tokens is there in full"


def _body_bytes(of: Any, kv: str) -> float:
    """Per token, raw companions aside."""
    runner = open_runner(of, memory="8MiB", kv=kv)
    try:
        spec = runner.bridge.layout.spec  # type: ignore[union-attr]
        raws = {g.raw for g in spec}
        return sum(g.bytes_per_token for g in spec if g.name not in raws)
    finally:
        runner.close()


@pytest.mark.parametrize(
    "name", ["gpt2", "falcon", "gemma2", "gemma3", "gpt_oss", "gemma3n", "jamba", "llama4"]
)
def test_models_of_every_kind_with_heads(name: str, tmp_path: Path) -> None:
    """A request in a batch says what it says alone; where all heads keep all, what the model says."""
    order = heads(name)
    drops = mapped(tmp_path, model(name), order[::2] + order[1::2])
    covers = drops.replace("duo:", "duo:retrieval=1.0,")
    prompt = TEXTS[0][:100]
    requests = [(prompt, "full"), (prompt, covers), (TEXTS[2][:60], drops), (prompt, drops)]
    got = run(model(name), requests, n_tokens=10)
    assert got.tokens[1] == got.tokens[0]
    assert got.tokens[3] == run(model(name), [(prompt, drops)], n_tokens=10).tokens[0]
    assert got.tokens[3] != got.tokens[0], "the control: what is dropped shows in the text"


def test_a_window_over_everything_gives_what_full_gives(tmp_path: Path) -> None:
    wide = mapped(tmp_path, model()).replace(f"window={WINDOW}", "window=4000")
    got = run(model(), [(TEXTS[0], "full"), (TEXTS[0], wide)])
    assert got.tokens[0] == got.tokens[1]


def test_a_map_belongs_to_one_model(tmp_path: Path) -> None:
    of = model()
    for keep, says in (
        ("duo", r"no map is known of this model; make one with tools/find_heads.py.*duo:map=FILE"),
        (mapped(tmp_path, of, digest="0" * 64), "made for another model"),
        (f"duo:map={tmp_path / 'none'}", "cannot be read"),
        (mapped(tmp_path, of, ORDER[:-1]), "map says nothing of head 0 of layer 2"),
        (mapped(tmp_path, of, [(0,)]), "is no map that tools/find_heads.py wrote"),  # type: ignore[list-item]
    ):
        with pytest.raises(ConfigError, match=says) as e:
            open_runner(of, keep=keep, memory="8MiB")
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("deepseek_v3", "one latent for all heads.*use window:N or keydiff"),
        ("mistral", "no layer of this model keeps every token"),
        ("bloom", "wants the whole history"),
    ],
)
def test_models_without_such_heads_are_refused(name: str, says: str, tmp_path: Path) -> None:
    order = heads(name) if name == "bloom" else []
    with pytest.raises(ConfigError, match=says):
        open_runner(model(name), keep=mapped(tmp_path, model(name), order), memory="8MiB")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("duo:1.5", "retrieval=1.5 must be a number in 0..1"),
        ("duo:window=0", "window=0 must be an integer of at least 1"),
        ("duo:sinks=-1", "sinks=-1 must be"),
        ("duo:budget=0.2", "it takes retrieval, sinks, window, map"),
        ("ada(duo)", "spreads the budget of a policy that scores"),
        ("duo+window:40", "cannot be joined"),
    ],
)
def test_wrong_parameters_are_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as e:
        parse_keep(text)
    assert "\n" not in str(e.value)


def test_the_share_is_counted_in_heads_and_windows_stay() -> None:
    policy = Policy(retrieval=0.5, sinks=2, window=5).ranked(ORDER)
    assert policy.retrieval_heads == frozenset(ORDER[:3])
    assert policy.span(1, 1, Full()) == Full()
    assert policy.span(2, 0, Full()) == Sinks(2, 5)
    assert policy.span(2, 0, Window(3)) == Window(3)
    assert Policy(sinks=0, window=5).ranked(ORDER).span(2, 0, Full()) == Window(5)
    assert not Policy(retrieval=0).ranked(ORDER).retrieval_heads


def test_sinks_at_their_true_distance_end_where_positions_do(tmp_path: Path) -> None:
    keep = mapped(tmp_path, model()).replace("duo:", "duo:retrieval=0.0,")
    runner = open_runner(model(), keep=keep, memory="8MiB")
    assert isinstance(runner, ModelRunner)
    try:
        assert not runner.rules(runner.keep).endless
        assert runner.context_tokens(runner.keep) == runner.max_context_tokens
    finally:
        runner.close()


# -- the map of the packaged model, and how maps are found ------------------------------------------------------------


def test_the_packaged_model_has_a_map() -> None:
    from transformers import AutoModelForCausalLM

    of = AutoModelForCausalLM.from_pretrained(packaged.path(), dtype=torch.bfloat16).eval()
    runner = open_runner(of, keep="duo", memory="64MiB")
    policy = runner.rules(runner.keep).policy  # type: ignore[union-attr]
    assert sorted(policy.order) == [(layer, head) for layer in range(6) for head in range(2)]
    assert len(policy.retrieval_heads) == 6
    runner.close()


class _Additive:
    """Heads that cost what they cost, whoever else is gone; two of them more together."""

    def __init__(self) -> None:
        self.heads = sorted(ORDER)

    def loss(self, streaming: Sequence[Coord]) -> float:
        gone = set(streaming)
        cost = sum(len(ORDER) - ORDER.index(c) for c in gone)
        return cost + 100.0 * (ORDER[0] in gone and ORDER[5] in gone)


def test_removal_ranks_heads_by_what_their_going_costs() -> None:
    plain = _Additive()
    assert find_heads.by_removal(plain) == ORDER  # type: ignore[arg-type]
    assert find_heads.by_removal(plain, at_once=6) == ORDER  # type: ignore[arg-type]


def deaf(but: Coord) -> Any:
    """The small Llama, in which one KV head's output alone reaches the rest of the model."""
    of = zoo.build("llama")
    share = of.config.num_attention_heads // of.config.num_key_value_heads
    with torch.no_grad():
        for n, layer in enumerate(of.model.layers):
            w = layer.self_attn.o_proj.weight
            d = w.shape[1] // of.config.num_attention_heads
            for h in range(of.config.num_key_value_heads):
                if (n, h) != but:
                    w[:, h * share * d : (h + 1) * share * d] = 0
    return of


def samples() -> list[Any]:
    import numpy as np

    from quire.evaluate.tasks import Answer, Example

    texts = prompts((60, 60, 60), zoo.VOCAB, seed=3)
    return [Example(np.array(t), (Answer(50, 60, 0.1),), 50) for t in texts]


@pytest.mark.parametrize("method", ["removal", "gates"])
@pytest.mark.parametrize("head", [(1, 0), (2, 1)])
def test_the_one_head_that_is_heard_comes_first(method: str, head: Coord) -> None:
    of = deaf(head)
    reader = find_heads.Reader(of, SINKS, WINDOW, samples())
    try:
        every = reader.heads
        assert every == sorted(ORDER)
        if method == "removal":
            order = find_heads.by_removal(reader)
        curve = reader.curve([head, *(c for c in every if c != head)])
        assert curve[0] > 1e-4
        assert max(curve[1:]) < 1e-10, "only this head's going is heard"
    finally:
        reader.close()
    if method == "gates":
        order = find_heads.by_gates(of, every, samples(), SINKS, WINDOW, steps=60)
        assert of.config._attn_implementation != "find_heads"
    assert order[0] == head
    assert sorted(order) == every


def test_losses_are_distances_of_final_hidden_states() -> None:
    """Against the dense mask, through the model's own code."""
    of = zoo.build("llama")
    [sample, *_] = samples()
    reader = find_heads.Reader(of, SINKS, WINDOW, [sample])
    try:
        got = reader.loss(ORDER[2:])
    finally:
        reader.close()

    def attend(module: Any, q: Any, k: Any, v: Any, _mask: Any, **more: Any) -> Any:
        share, n = q.shape[1] // k.shape[1], q.shape[2]
        i = torch.arange(n)
        near = (i[:, None] - i < WINDOW) | (i < SINKS)
        masks = [
            near if few and (module.layer_idx, h) not in ORDER[:2] else near | True
            for h in range(k.shape[1])
        ]
        mask = (torch.stack(masks) & (i <= i[:, None])).repeat_interleave(share, 0)
        scores = q @ k.repeat_interleave(share, 1).mT * more["scaling"]
        out = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v.repeat_interleave(share, 1)
        return out.transpose(1, 2), None

    AttentionInterface.register("by_head", attend)
    of.set_attn_implementation("by_head")
    states = []
    for streams in (False, True):
        few = streams
        with torch.no_grad():
            states.append(of.model(torch.tensor(sample.tokens)[None]).last_hidden_state[0, 49:59])
    want = (states[1] - states[0]).square().sum() / states[0].square().sum()
    assert got == pytest.approx(float(want), rel=1e-4)


def test_latents_cannot_be_ranked() -> None:
    runner = open_runner(model("deepseek_v3"), memory="8MiB")
    try:
        with pytest.raises(ConfigError, match="nothing to rank"):
            find_heads.heads_of(runner.bridge.layout)  # type: ignore[union-attr]
    finally:
        runner.close()


def test_a_keep_of_another_text_is_another_policy(tmp_path: Path) -> None:
    keep = parse_keep(mapped(tmp_path, model()))
    assert keep.spans
    assert keep.bound(lambda: weights_digest(model())) == Keep(keep.text, keep.policy.ranked(ORDER))
