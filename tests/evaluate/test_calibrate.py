"""Calibration sees what the model's projections say, in bounded memory; its tables are read back at true positions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from models.driving import runner_for
from quire.codecs import cq
from quire.engine.runner import Item
from quire.errors import ConfigError, RequestError
from quire.evaluate import Scorer, evaluate
from quire.evaluate.calibration import calibrate
from quire.evaluate.inject import inject
from quire.models.moving import read_field
from quire.plan.layout import Layout

SMALL = {"length_tokens": 65, "tokens": 400}
FEW = "cq:form=2c2b"


@pytest.fixture(scope="module")
def made(llama: Any, text: list[int], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Recipe to the recipe that names its calibration of the tiny llama."""
    folder, out = tmp_path_factory.mktemp("made"), {}
    for i, codec in enumerate(
        (FEW, f"{FEW},rope=after", "kvquant:bits=3,tile=16", "kvquant:bits=3,tile=16,rope=after")
    ):
        path = folder / f"{i}.safetensors"
        calibrate(llama, codec, text, **SMALL).save(path)
        out[codec] = f"{codec},file={path}"
    return out


def fitted(monkeypatch: pytest.MonkeyPatch, model: Any, text: list[int], **how: Any) -> Any:
    """What `fit` is given, by (layer, field)."""
    seen: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor | None]] = {}
    whole = cq.Codec.fit

    def fit(self: Any, site: Any, x: Any, weight: Any, seed: int) -> Any:
        seen[site.layer, site.name] = (x, weight)
        return whole(self, site, x, weight, seed)

    with monkeypatch.context() as patch:
        patch.setattr(cq.Codec, "fit", fit)
        calibrate(model, how.pop("codec", FEW), text, **{**SMALL, **how})
    return seen


def projected(model: Any, text: list[int], names: tuple[str, str]) -> Iterator[tuple[Any, ...]]:
    """Per layer, of one window: what the modules that make keys and values say, and its squared gradients."""
    kept: list[torch.Tensor] = []

    def note(module: Any, args: Any, out: torch.Tensor) -> None:
        out.retain_grad()
        kept.append(out)

    modules = [getattr(x.self_attn, n) for x in model.model.layers for n in names]
    hooks = [m.register_forward_hook(note) for m in modules]
    ids = torch.tensor([text])
    logits = model(ids, use_cache=False).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").backward()
    model.zero_grad()
    for h in hooks:
        h.remove()
    config = model.config
    for pair in zip(kept[::2], kept[1::2], strict=True):
        yield tuple(
            x.view(1, len(text), config.num_key_value_heads, -1)[0].transpose(0, 1)[:, 1:]
            for t in pair
            for x in (t.detach(), t.grad**2)
        )


@pytest.mark.parametrize(
    ("name", "modules"), [("llama", ("k_proj", "v_proj")), ("qwen3", ("k_norm", "v_proj"))]
)
def test_keys_before_rope_values_and_gradients_are_those_of_the_projections(
    monkeypatch: pytest.MonkeyPatch, name: str, modules: tuple[str, str], text: list[int]
) -> None:
    model = zoo.build(name)
    seen = fitted(monkeypatch, model, text[:65], tokens=65, codec="cq:form=2c1b")
    for layer, (k, kg, v, vg) in enumerate(projected(zoo.build(name), text[:65], modules)):
        for field, x, g in (("k", k, kg), ("v", v, vg)):
            got, weight = seen[layer, field]
            torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(weight, g, rtol=2e-2, atol=2e-2 * float(g.mean()))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_keys_after_rope_and_no_gradients_where_none_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, llama: Any, text: list[int]
) -> None:
    before = fitted(monkeypatch, llama, text, codec=f"{FEW},fisher=false")
    after = fitted(monkeypatch, llama, text, codec=f"{FEW},fisher=false,rope=after")
    assert all(w is None for _, w in before.values())
    for (layer, field), (x, _) in before.items():
        y, _ = after[layer, field]
        if field == "v":
            torch.testing.assert_close(x, y)
        else:
            assert float((x - y).norm() / x.norm()) > 0.3
            torch.testing.assert_close(x.norm(dim=-1), y.norm(dim=-1), rtol=1e-4, atol=1e-4)


def test_less_memory_means_more_passes_and_the_same_tables(llama: Any, text: list[int]) -> None:
    said: list[str] = []
    whole = calibrate(llama, FEW, text, **SMALL)
    small = calibrate(
        llama, FEW, text, memory="1MiB", progress=lambda what, *_: said.append(what), **SMALL
    )
    passes = {what for what in said if what.startswith("reading")}
    assert len(passes) == len(zoo.build("llama").model.layers) > 1
    assert set(whole.tables) == set(small.tables)
    assert all(torch.equal(whole.tables[n], small.tables[n]) for n in whole.tables)
    assert whole.about == small.about
    other = calibrate(llama, FEW, text, seed=1, **SMALL)
    assert any(not torch.equal(whole.tables[n], other.tables[n]) for n in whole.tables)


def test_injected_outliers_and_offsets_are_learned_too(
    monkeypatch: pytest.MonkeyPatch, text: list[int], tmp_path: Path
) -> None:
    """The file is of the injected model, which the judge meets; the model itself is left as it was."""
    model = zoo.build("llama")
    plain = fitted(monkeypatch, model, text, codec=f"{FEW},rope=after")
    seen = fitted(monkeypatch, model, text, codec=f"{FEW},rope=after", injected=True)
    with inject(model) as outliers:
        for layer, offset in outliers.offsets.items():
            moved = seen[layer, "k"][0].mean(1) - plain[layer, "k"][0].mean(1)
            quiet = (moved - offset).abs() < 0.05 * offset.norm() + 1e-3
            assert float(quiet.float().mean()) > 0.8  # all but the channels that grew
    path = tmp_path / "cq.safetensors"
    calibrate(model, FEW, text, injected=True, **SMALL).save(path)
    kv = f"{FEW},file={path}"
    found = evaluate(model, None, [(kv, "full")], text=text, length_tokens=100, injected=True)
    assert {r.kv for r in found.rows} == {kv}
    with pytest.raises(ConfigError, match="was calibrated on another model"):
        evaluate(model, None, [(kv, "full")], text=text, length_tokens=100)


# -- read back ---------------------------------------------------------------------------------------------------


def rotated(x: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """RoPE of halves with base 10,000, in complex numbers: `x [..., D]`."""
    half = x.shape[-1] // 2
    turn = torch.outer(pos.double(), 10000.0 ** (-torch.arange(half).double() / half))
    y = torch.complex(x[..., :half].double(), x[..., half:].double())
    y = y * torch.polar(torch.ones_like(turn), turn)
    return torch.cat([y.real, y.imag], -1).float()


def first_keys(model: Any, text: list[int]) -> torch.Tensor:
    """`[heads, n, D]`: keys of the first layer before RoPE, which depend on no cache."""
    kept: list[torch.Tensor] = []
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda m, a, out: kept.append(out)
    )
    with torch.inference_mode():
        model(torch.tensor([text]), use_cache=False)
    hook.remove()
    heads = model.config.num_key_value_heads
    return kept[0].view(len(text), heads, -1).transpose(0, 1).clone()


def as_read(runner: Any, keys: torch.Tensor, size: int) -> torch.Tensor:
    """Keys before RoPE through the codec, block by whole block, and turned to their positions."""
    layout = runner.bridge.layout
    group = next(g for g in layout.spec if g.raw is not None)
    codec = layout.codecs_of(group)["k"]
    site = next(s for s in layout.sites_of(group, 0) if s.name == "k")
    out = []
    for first in range(0, keys.shape[1] // size * size, size):
        pos, x = torch.arange(first, first + size), keys[None, :, first : first + size]
        before = codec.needs == "unrotated"
        x = x if before else rotated(x, pos)
        back = codec.decode(site, codec.encode(site, x, pos), pos, torch.float32)[0]
        out.append(rotated(back, pos) if before else back)
    return torch.cat(out, 1)


def forwarded(runner: Any, text: list[int], prompt: int) -> Any:
    """A table of the whole text; the policy drops tokens at the prompt's end and later."""
    table, at = runner.open(prompt_tokens=prompt), 0
    while at < len(text):
        stop = runner.cut(table, at, min(len(text), at + 16))
        table.append(stop - at)
        runner.forward([Item(table, text, at, stop, 0)])
        table.commit()
        at = stop
    return table


KEEPS = (
    "full",
    "random:budget=0.5,sinks=1,window=8,boundary=1,every=16",
    "ada(random:budget=0.5,sinks=1,window=8)",
)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("codec", [FEW, f"{FEW},rope=after", "kvquant:bits=3,tile=16"])
def test_keys_are_read_at_their_true_positions(
    made: dict[str, str], llama: Any, text: list[int], codec: str, keep: str
) -> None:
    """Also where tokens were dropped, each head its own: they keep the positions that they were written at."""
    from quire.attention import Row, Step

    size, model = 16, zoo.build("llama")
    runner = runner_for(model, kv=made[codec], keep=keep, block_tokens=size)
    table = forwarded(runner, text[:150], 100)
    want = as_read(runner, first_keys(zoo.build("llama"), text[:150]), size)
    layout, checked, dropped = runner.bridge.layout, 0, 0
    table.append(1)
    step = Step(runner.bridge.store, layout, [Row(table, 150, 151)])
    for read in (r for r in step.of_layer(0)[2] if r.mode == "body"):
        chain = next(c for c in table.chains if c.group is read.group)
        true = chain.true_positions(0)[: len(read.group.heads(0))]
        n = true.shape[1]
        dropped += int(true[:, -1].max()) + 1 - n
        stored = read_field(runner.bridge.store, layout, chain, 0, "k", n)
        seen = step.gather(0, read, "k", torch.float32)[0]
        for i, head in enumerate(read.group.heads(0)):
            at = torch.from_numpy(true[i].copy())
            raw = 1 if "kvquant" in codec else 0  # the first token's codes are read by nobody
            near = torch.isclose(stored[i, raw:], want[head, at[raw:]], rtol=1e-3, atol=1e-3)
            assert float(near.float().mean()) > 0.995  # numbers between two codes may take either
            low = n - seen.shape[1]  # slots of raw sinks come first and are not gathered
            torch.testing.assert_close(seen[i], stored[i, low:], rtol=1e-4, atol=1e-4)
            checked += n
    assert checked >= 100
    assert (dropped > 20) is (keep != "full")
    runner.close()


def test_keys_turned_to_wrong_positions_are_seen(
    made: dict[str, str], llama: Any, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A codec whose keys come back a few positions off loses far more: the judge reads what the cache gives."""
    recipe = made["kvquant:bits=3,tile=16"]

    def loss() -> float:
        rows = evaluate(llama, None, [(recipe, "full")], text=text, length_tokens=200).rows
        return next(r.value for r in rows if r.metric == "kl")

    right, whole = loss(), Layout.decode

    def late(self: Any, group: Any, site: Any, stored: Any, pos: Any, dtype: Any) -> Any:
        return whole(self, group, site, stored, pos // 2, dtype)

    monkeypatch.setattr(Layout, "decode", late)
    assert 0 < right < 0.5 * loss()


@pytest.mark.parametrize("codec", ["kvquant:bits=3,tile=16", FEW])
def test_what_is_read_does_not_depend_on_chunks(
    made: dict[str, str], llama: Any, text: list[int], codec: str
) -> None:
    # in float64: rounding that differs with the chunk must not decide between two codes
    runner = runner_for(zoo.build("llama").double(), kv=made[codec], block_tokens=16)
    logprobs = []
    for chunk in (7, 64):
        parts = Scorer(runner, chunk_tokens=chunk).score(text[:120])
        logprobs.append(torch.cat([p.logprobs for p in parts]))
    torch.testing.assert_close(*logprobs, rtol=1e-4, atol=1e-4)
    runner.close()


# -- refused -----------------------------------------------------------------------------------------------------


def refusal(call: Any, kind: type[Exception] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llama_dynamic", "its RoPE (dynamic) turns keys by the length of the whole sequence"),
        ("phi3_longrope", "its RoPE (longrope) turns keys by the length of the whole sequence"),
        ("gpt2", "no RoPE of this model explains"),
        ("deepseek_v3", "cannot serve latent"),
        ("mamba2", "caches no keys and values"),
    ],
)
def test_models_whose_keys_cannot_be_turned_back_are_refused(name: str, says: str) -> None:
    text = zoo.prompts(lengths=(60,))[0]
    line = refusal(lambda: calibrate(zoo.build(name), FEW, text, length_tokens=30))
    assert says in line
    if "RoPE" in says:
        assert line.endswith("; use rope=after")


def test_attaching_asks_the_same(made: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from quire.codecs.calibrated import Calibrated

    monkeypatch.setattr(Calibrated, "bound", lambda self, digest, device: self)
    monkeypatch.setattr(Calibrated, "check_site", lambda self, site: None)
    line = refusal(lambda: runner_for(zoo.build("llama_dynamic"), kv=made[FEW], block_tokens=16))
    assert line.startswith("codec cq needs keys before RoPE, and of this model: its RoPE (dynamic)")


def test_what_calibration_cannot_do_is_one_line(llama: Any, text: list[int], made: Any) -> None:
    assert "learns nothing from a text and needs no calibration; cq, kvquant do" in refusal(
        lambda: calibrate(llama, "int4", text)
    )
    short = refusal(lambda: calibrate(llama, FEW, text[:20], length_tokens=65), RequestError)
    assert "the text has 20 tokens, fewer than one window of 65" in short
    assert "4 centres want 128 tokens" in refusal(
        lambda: calibrate(llama, FEW, text[:65], length_tokens=65)
    )
    assert "a window of 1 tokens does not do" in refusal(
        lambda: calibrate(llama, FEW, text, length_tokens=1), RequestError
    )
    assert "no tokenizer" in refusal(lambda: calibrate(llama, FEW, "words"), RequestError)
    assert "calibrated on another model" in refusal(
        lambda: runner_for(zoo.build("mistral"), kv=made[FEW], block_tokens=16)
    )
