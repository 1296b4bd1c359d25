"""Scores from outside: what a press is given, which tokens stay for it, what is freed, and what is refused."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import drive_presses
import quire
import zoo
from models.driving import runner_for
from quire.engine import Engine, SamplingParams
from quire.errors import ConfigError, RequestError
from quire.models.hidden import attentions
from quire.retention import Keep, outside, parse_keep
from quire.spec import Coord
from retention import presses
from retention.kept import prompts, run
from retention.test_freeing import held, tiny_whole

LENGTHS = (160, 171, 90)
TEXTS = prompts(LENGTHS, zoo.VOCAB)
MADE: dict[str, Any] = {
    "norm": presses.Norm,
    "expecting": presses.Expecting,
    "windowed": presses.Windowed,
    "marking": presses.Marking,
    "drawing": presses.Drawing,
}
LOOKS = ("expecting", "windowed")
"""At hidden states."""


@cache
def model(name: str = "llama") -> Any:
    return zoo.build(name)


@cache
def keep(name: str, budget: float = 0.25) -> Keep:
    return outside(MADE[name](), budget, sinks=0, window=0)


def given(text: list[int]) -> dict[int, tuple[Any, ...]]:
    """Layer to what one call of transformers' own forward gives a press: hidden states, keys, values, kwargs."""
    calls: dict[int, dict[str, Any]] = {}
    hooks = [
        m.register_forward_pre_hook(
            lambda _m, _a, kw, n=n: calls.__setitem__(n, dict(kw)), with_kwargs=True
        )
        for n, m in attentions(model()).items()
    ]
    found = DynamicCache()
    with torch.no_grad():
        model()(torch.tensor([text]), past_key_values=found)
    for h in hooks:
        h.remove()
    return {
        n: (kw["hidden_states"], found.layers[n].keys, found.layers[n].values, kw)
        for n, kw in calls.items()
    }


def by_hand(name: str, text: list[int], share: float) -> dict[Coord, tuple[int, ...]]:
    """The best of a press's scores per layer and head, with nothing of ours: what kvpress keeps."""
    press = MADE[name]()
    if hasattr(press, "compression_ratio"):
        press.compression_ratio = 1 - share
    n_kept, out = int(len(text) * share), {}
    modules = attentions(model())
    for layer, (hidden, k, v, kwargs) in given(text).items():
        m = modules[layer]
        if not hasattr(m, "rotary_emb"):
            object.__setattr__(m, "rotary_emb", model().model.rotary_emb)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(layer)
            scores = press.score(m, hidden, k, v, None, kwargs)
        vars(m).pop("rotary_emb", None)
        for h, row in enumerate(scores[0]):
            out[layer, h] = tuple(sorted(row.topk(n_kept).indices.tolist()))
    return out


@cache
def alone(name: str) -> Any:
    return run(model(), [(TEXTS[0], keep(name))], attention="reference")


@pytest.mark.parametrize("name", MADE)
def test_the_best_of_its_scores_stay_and_nothing_goes_later(name: str) -> None:
    found = alone(name).seen.of(LENGTHS[0])
    assert list(found) == [160]
    assert found[160] == by_hand(name, TEXTS[0], 0.25)
    assert len(set(found[160].values())) > 1 or name == "marking"


@pytest.mark.parametrize("name", ["norm", "windowed", "drawing"])
def test_the_same_in_a_batch_preempted_and_after_a_hit(name: str) -> None:
    want = alone(name)
    others = [(TEXTS[1][:60], "random"), (TEXTS[2], "window:20")]
    beside = run(model(), [(TEXTS[0], keep(name)), *others], attention="reference")
    requests = [(TEXTS[2], "full"), (TEXTS[1], keep(name)), (TEXTS[0], keep(name))]
    tight = run(model(), requests, attention="reference", memory=760_000)
    assert tight.preemptions
    first = TEXTS[0][:120] + TEXTS[1][:20]
    hit = run(
        model(),
        [(first, "full"), (TEXTS[0], keep(name)), (first, "full")],
        attention="reference",
        one_by_one=True,
        share="prefix",
    )
    for got, at in ((beside, 0), (tight, 2), (hit, 1)):
        assert got.tokens[at] == want.tokens[0]
        assert got.seen.of(LENGTHS[0]) == want.seen.of(LENGTHS[0])
    assert hit.cached[1] == (0 if name in LOOKS else 120)
    assert hit.cached[2] >= 120


def test_generate_in_a_padded_batch() -> None:
    """Hidden states and position embeddings of the right tokens reach it past the padding."""
    want = [
        run(model(), [(t, keep("windowed"))], attention="reference").tokens[0] for t in TEXTS[:2]
    ]
    width = max(LENGTHS[:2])
    ids = torch.tensor([[0] * (width - len(t)) + list(t) for t in TEXTS[:2]])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in TEXTS[:2]])
    with quire.attach(
        model(), keep=keep("windowed"), memory="32MiB", block_tokens=8, attention="reference"
    ):
        out = model().generate(
            ids, attention_mask=mask, max_new_tokens=20, min_new_tokens=20, pad_token_id=0
        )
    assert out[:, width:].tolist() == want
    assert not any(m._forward_pre_hooks for m in attentions(model()).values())
    assert not any("rotary_emb" in vars(m) for m in attentions(model()).values())


@pytest.mark.parametrize("name", ["norm", "expecting", "windowed"])
@pytest.mark.parametrize("kv", ["bf16", "int8", "int4", "kivi:residual=32"])
def test_every_codec_frees_what_goes(name: str, kv: str) -> None:
    [prompt] = prompts([480], zoo.VOCAB)
    some, rules = held(model(), prompt, outside(MADE[name](), 0.3), kv=kv)
    assert tiny_whole(kv) - some >= 0.9 * (480 - rules.kept_tokens(480)) * rules.bytes_per_token


def test_a_lossy_codec_shows_the_newest_tokens_too() -> None:
    """Raw ones behind the codes: a press sees as many keys as hidden states, and they are the prompt's."""
    shown: dict[int, tuple[Any, ...]] = {}

    class Noting(presses.Windowed):
        def score(self, module: Any, hidden: Any, keys: Any, *rest: Any) -> Any:
            shown[module.layer_idx] = (hidden, keys)
            return super().score(module, hidden, keys, *rest)

    text = TEXTS[0][:155]  # nine blocks and eleven tokens
    held(model(), text, outside(Noting(), 0.3), kv="int8", block_tokens=16)
    for layer, (hidden, keys, _, _) in given(text).items():
        got_hidden, got_keys = shown[layer]
        assert float((got_hidden - hidden).norm() / hidden.norm()) < 0.03
        assert got_keys.shape == keys.shape
        error = (got_keys - keys).norm(dim=-1) / keys.norm(dim=-1)
        assert float(error.max()) < 0.05
        assert float(error[:, :, :144].max()) > 1e-3
        assert layer or float(error[:, :, 144:].max()) < 1e-5, "the newest are raw"


def test_budgets_of_its_own_and_wrapped() -> None:
    assert outside(presses.Expecting(compression_ratio=0.6)).policy.budget.share == pytest.approx(
        0.4
    )
    assert outside(presses.Norm()).policy.budget.share == 0.25
    keep = "ada(press:retention.presses.Sloping,budget=0.4,sinks=2,window=4):floor=0"
    out = run(model(), [(TEXTS[0], keep)], keep=keep)
    sizes = {len(x) for x in out.seen.of(160)[160].values()}
    assert len(sizes) > 1, "heads have budgets of their own"


def test_by_name_with_parameters() -> None:
    text = "press:retention.presses.Windowed,window=4,budget=0.25,sinks=0"
    policy = parse_keep(text).policy.bound(lambda: "")
    assert policy.window == 4, "ours comes first"
    text = "press:retention.presses.Expecting,ahead=8,budget=0.25,sinks=0,window=0"
    assert parse_keep(text).policy.bound(lambda: "").scorer == presses.Expecting(8)
    got = run(model(), [(TEXTS[0], text)], keep=text, attention="reference")
    want = outside(presses.Expecting(8), 0.25, sinks=0, window=0)
    assert got.seen == run(model(), [(TEXTS[0], want)], attention="reference").seen


def test_a_request_loads_no_code() -> None:
    runner = runner_for(model(), keep="press:retention.presses.Norm,budget=0.5")
    engine = Engine(runner)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    engine.generate(TEXTS[2], params, keep="press:retention.presses.Norm,budget=0.3,sinks=0")
    for other in (
        "press:retention.presses.Expecting,budget=0.5",
        "press:retention.presses.Norm,size=3",
        "ada(press:retention.presses.Expecting)",
    ):
        with pytest.raises(RequestError, match="a request loads no code from outside"):
            engine.generate(TEXTS[2], params, keep=other)
    engine.generate(TEXTS[2], params, keep=outside(presses.Expecting()))
    engine.close()
    runner.close()


def test_a_prompt_that_it_cannot_score_stays_whole(caplog: pytest.LogCaptureFixture) -> None:
    short = TEXTS[0][:14]
    with caplog.at_level(logging.WARNING, "quire"):
        got = run(model(), [(short, keep("windowed")), (TEXTS[0], keep("windowed"))])
    assert got.tokens[0] == run(model(), [(short, "full")]).tokens[0]
    assert list(got.seen.kept) == [(160, 160)], "the other one's tokens went"
    assert "Windowed cannot score 14 tokens (AssertionError: too short a text)" in caplog.text


def test_a_further_turn_stays_whole() -> None:
    from quire.engine.conversation import Conversation

    runner = runner_for(model(), keep=keep("norm"))
    talk = Conversation(runner)
    tokens: list[int] = []
    held_bytes = []
    for turn in (TEXTS[0], TEXTS[2]):
        tokens += turn
        for delta in talk.stream(tokens, SamplingParams(max_tokens=8, ignore_eos=True)):
            tokens += delta.token_ids
        held_bytes.append(talk.table.held_bytes())
    per_token = runner.bytes_per_token
    assert held_bytes[0] < (40 + 8 + 8) * per_token
    assert held_bytes[1] - held_bytes[0] >= 80 * per_token
    talk.close()
    runner.close()


def test_a_package_that_wraps_all_attention_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As kvpress does when it is imported: attention gets its dropout by place, everything else by name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain, calls = ALL_ATTENTION_FUNCTIONS["quire"], []

    def wrapper(module: Any, q: Any, k: Any, v: Any, mask: Any, dropout: Any, **kwargs: Any) -> Any:
        calls.append(dropout)
        return plain(module, q, k, v, mask, dropout, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "quire", wrapper)
    runner = runner_for(model(), keep=keep("norm"))
    assert runner.bridge.way == "packed"
    assert calls
    runner.close()


@pytest.mark.parametrize(
    ("press", "says"),
    [
        (presses.Rotating(), "Rotating has a compress of its own"),
        (presses.Silent(), r"Silent has no score\("),
    ],
)
def test_more_or_less_than_a_score_is_refused(press: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        outside(press)


@pytest.mark.parametrize(
    ("name", "press", "says"),
    [
        ("llama", presses.Observing(), "Observing wants attention weights.*h2o, tova and snapkv"),
        ("llama", presses.Wrong(), r"Wrong scores \(1, 2, 320\) tokens with \(1, 2, 320, 64\)"),
        ("llama", presses.Failing(), "Failing cannot score this model.*no such thing"),
        ("llama", presses.Needing(), "Needing cannot take this model.*no filters for this model"),
        ("deepseek_v3", presses.Norm(), "keeps latents"),
        ("gptj", presses.Norm(), "has an attention of its own"),
        ("mistral", presses.Norm(), "no layer of this model keeps every token"),
    ],
)
def test_what_cannot_be_driven_is_refused_at_start(name: str, press: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as e:
        runner_for(model(name), keep=outside(press))
    assert "\n" not in str(e.value)
    assert not any("rotary_emb" in vars(m) for m in attentions(model(name)).values())


def test_a_class_of_that_name_adds_nothing() -> None:
    assert outside(presses.Plain()).policy.scorer


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("press", "names no class; press:kvpress.SnapKVPress,budget=0.25 does"),
        ("press:Norm", "names no class"),
        ("press:no_such_package.Norm", "no package no_such_package is installed here"),
        ("press:os.getpid", "getpid is no class; write press:PACKAGE.CLASS"),
        ("press:retention.presses.Norm,compression_ratio=0.5", "from budget="),
        ("press:retention.presses.Norm,every=5", "cannot be made"),
        ("press:retention.presses.Norm,budget=10", "is below the 36 that are protected"),
        ("press:retention.presses.Norm,sinks=-1", "sinks=-1 must be"),
        ("press:retention.presses.Norm,a=1,a=2", "given twice"),
        ("press:retention.presses.None_", "cannot be loaded"),
        ("press:retention.presses.Rotating", "has a compress of its own"),
    ],
)
def test_texts_that_are_wrong(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as e:
        parse_keep(text).bound(lambda: "")
    assert "\n" not in str(e.value)


def test_nothing_is_imported_before_it_is_bound(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "loud_press.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert parse_keep("press:loud_press.Norm").policy.imports
    with pytest.raises(SystemExit):
        parse_keep("press:loud_press.Norm").bound(lambda: "")


def test_the_tool_that_tries_every_press() -> None:
    """On classes of our own: driven, or refused with the reason; classes to derive from are no presses."""
    module = SimpleNamespace(
        __all__=["BasePress", "Rotating", "NormPress", "RotatingPress", "WrapPress"],
        NormPress=type("NormPress", (presses.Norm,), {}),
        RotatingPress=presses.Rotating,
        WrapPress=presses.Wrapping,
        SnapKVPress=presses.Norm,
    )
    assert drive_presses.names(module) == ["NormPress", "RotatingPress", "WrapPress"]
    rows = [drive_presses.drive(module, n, model(), TEXTS[0]) for n in drive_presses.names(module)]
    assert [r.outcome for r in rows] == ["driven", "refused", "driven"]
    assert 0.25 <= rows[0].held <= 0.25 + 33 / 160
    assert "its own hooks fail" in rows[0].same
    assert rows[1].why.startswith("has a compress of its own")
