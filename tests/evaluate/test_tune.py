"""Tuning a tiny model: the choice fits the budget and beats what it says it beats, and a stopped run goes on."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from quire.cache import attach
from quire.engine.runner import Item
from quire.errors import CapacityError, RequestError
from quire.evaluate import evaluate
from quire.evaluate.choice import Candidate, Goal, Tuned
from quire.evaluate.decode import twin
from quire.evaluate.journal import Journal
from quire.evaluate.metrics import Estimate
from quire.evaluate.report import Row
from quire.evaluate.trial import Trial
from quire.evaluate.tune import _finish, _policy, tune
from quire.evaluate.tuned import summary, tuned_page, tuned_toml
from quire.models.load import weights_digest
from quire.models.open import open_runner

GOAL = Goal(0.4, 0.5, 96, 2, 64, 64, 128, 256)
CODECS = ("int8", "int4")


def run(model: Any, text: list[int], folder: Path, goal: Goal = GOAL, **options: Any) -> Tuned:
    return tune(
        model, None, text, goal, folder=folder, codecs=CODECS,
        **{"policies": (), "memory": 32 << 20, "block_tokens": 16} | options,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _few() -> Iterator[None]:
    """Fewer caches to open than a real search takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quire.evaluate.candidates.WINDOWS", ("", "sinks=4"))
        yield


@pytest.fixture(scope="module")
def found(llama: Any, text: list[int], tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return run(llama, text, tmp_path_factory.mktemp("maps"), policies=("keydiff",))


def test_the_choice_fits_and_has_the_least_loss_of_all_measured(found: Tuned) -> None:
    assert found.budget == int(0.4 * found.exact_bytes)
    assert 0 < found.chosen.n_bytes <= found.budget
    assert all(c.n_bytes <= c.peak_bytes <= found.budget for c in found.candidates)
    measured = [c for c in found.candidates if c.kl is not None]
    assert {c.kind for c in measured} >= {"map", "uniform"}
    least = min(measured, key=lambda c: c.kl.value)  # type: ignore[union-attr]
    assert least.config == found.chosen.config
    assert [c.why for c in measured if not c.why] == [""], (
        "one is chosen, and the others say why not"
    )
    too_large = dict(found.rejected)["auto"]
    assert "of the budget" in too_large
    why = dict(found.rejected)["keydiff"]
    assert "holds a prompt whole until tokens go: at its peak" in why, (
        "two users, one of them at his prompt"
    )
    assert found.held_tokens == 3 * 63, (
        "400 tokens: one window for layers, two to choose, three held out"
    )


def test_the_file_says_all_and_attach_takes_it(
    found: Tuned, llama: Any, text: list[int], tmp_path: Path
) -> None:
    file = tmp_path / "tuned.toml"
    file.write_text(tuned_toml(found, file.name, {"block_tokens": 16}))
    document = tomllib.loads(file.read_text())
    assert document["tune"]["meets_floor"] == found.meets
    assert document["tune"]["bytes"] == found.chosen.n_bytes
    assert document["tune"]["peak_bytes"] == found.chosen.peak_bytes <= found.budget
    large = document["tune"]["peak_bytes_in_large_steps"]
    assert large > found.chosen.peak_bytes, "a step's tokens are raw until they are sealed"
    assert len(document["tune"]["measured"]) == len(found.candidates)
    assert len(document["tune"]["rejected"]) == len(found.rejected)
    with attach(llama, config=file, memory=1 << 24) as attached:
        ids = torch.tensor([text[:40]])
        llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, pad_token_id=0)
        forms = {g.codec for g in attached.bridge.layout.spec if g.raw is not None}
    named = " ".join(found.chosen.recipes.values()) or found.chosen.kv
    assert forms
    assert all(
        part in named
        for form in forms
        for part in form.replace("=", ",").split(",")
        if part in CODECS
    )
    page = tuned_page(found, "tiny")
    assert page.count("<svg") == 3
    assert all(c.label in page for c in found.candidates)


def test_held_out_figures_are_those_of_evaluate_on_the_text_behind(
    found: Tuned, llama: Any, text: list[int]
) -> None:
    again = evaluate(
        llama, None, [found.chosen.config], text=text[3 * 64 :],
        length_tokens=64, memory=32 << 20, block_tokens=16,
    )  # fmt: skip
    by = {r.metric: r for r in again.rows}
    assert found.chosen.kl is not None
    assert by["kl"].value == found.chosen.kl.value
    assert by["kl"].tokens == found.held_tokens


def test_a_floor_that_nothing_meets_is_said(found: Tuned) -> None:
    strict = replace(found, goal=replace(found.goal, quality=1.0))
    assert not strict.meets
    assert "nothing that was measured meets the floor of 1" in summary(strict)[-1]
    assert "floor" not in summary(replace(found, goal=replace(found.goal, quality=1e-9)))[-1]


def test_a_model_of_16_bits_is_judged_in_float32_in_the_bytes_of_16(
    found: Tuned, llama: Any, text: list[int], tmp_path: Path
) -> None:
    half = copy.deepcopy(llama).bfloat16()
    trial = Trial(half, None, GOAL, tmp_path, False, 16, 32 << 20, 0, None, None)
    assert trial.judge is not half
    assert (trial.judge_dtype, half.dtype) == ("float32", torch.bfloat16)
    assert trial.bytes("auto") * 2 == found.exact_bytes, "of the model as it is served"
    assert weights_digest(trial.judge) == weights_digest(half), "maps and calibrations fit both"
    texts = trial.parts(text)[0]
    (agreement, judged), (_, served) = trial.floor(texts), trial.floor(texts, served=True)
    assert agreement == 1.0
    assert judged < 1e-9, "nothing rounds beside the cache"
    assert served > 1e-8
    exact = Trial(llama, None, GOAL, tmp_path, False, 16, 32 << 20, 0, None, None)
    assert exact.judge is llama


def test_what_is_served_stands_beside_what_judges(found: Tuned) -> None:
    assert found.served is None
    assert found.judged_in == "float32"
    noisy = Estimate(0.75, 0.7, 0.8), Estimate(0.002, 0.001, 0.003)
    both = replace(found, served=noisy, goal=replace(found.goal, quality=0.76))
    assert both.meets == (found.chosen.agreement.value >= 0.76)  # type: ignore[union-attr]
    assert "the model's own rounding included: agreement 0.7500 (0.7000 to 0.8000)" in "\n".join(
        summary(both)
    )
    facts = tomllib.loads(tuned_toml(both, "x.toml", {}))["tune"]
    assert facts["served_agreement"] == [0.75, 0.7, 0.8]
    assert facts["served_kl"] == [0.002, 0.001, 0.003]
    assert facts["judged_in"] == "float32"


@pytest.mark.parametrize(("held_out", "label"), [((0.3, 0.1), "int4"), ((0.1, 0.3), "map 1")])
def test_a_choice_that_is_worse_than_the_uniform_recipe_on_held_out_text_is_given_up(
    held_out: tuple[float, float], label: str
) -> None:
    """By the paired interval, whatever the text that chose has said."""
    mapped = Candidate("map:x", "full", "map", 9, 9, "[map]", number=1, kl=Estimate(0.1, 0.1, 0.1))
    uniform = Candidate("int4", "full", "uniform", 9, 9, kl=Estimate(0.2, 0.2, 0.2))
    spread = np.linspace(-0.01, 0.01, 128)

    def rows(configs: list[Any], texts: list[Any], part: str) -> Any:
        assert [kv for kv, _ in configs] == ["map:x", "int4"]
        figures = [
            Row(kv, keep, "ppl", metric, value, None, None, 1.0, 128, 65)
            for (kv, keep), value in zip(configs, held_out, strict=True)
            for metric in ("kl", "agreement")
        ]
        return figures, [{}, *({"kl": value + spread} for value in held_out)]

    model = torch.nn.Linear(1, 1)
    trial: Any = SimpleNamespace(
        model=model, judge=model, judge_dtype="float32", tokenizer=None, goal=GOAL, seed=0,
        injected=False, window_s=1.0, left=lambda: 1.0, rows=rows, step_bytes=lambda kv: 9,
    )  # fmt: skip
    rejected: list[tuple[str, str]] = []
    found = _finish(trial, [mapped, uniform], (), (1.0, 0.0), [0, 1], (10, 20), rejected)
    assert found.chosen.label == label
    given_up = ("map 1", "worse than the best uniform recipe on held-out text")
    assert (given_up in rejected) == (found.gain is None) == (label == "int4")


def test_a_stopped_search_goes_on_and_finds_the_same(
    found: Tuned, llama: Any, text: list[int], tmp_path: Path
) -> None:
    calls = 0

    def stop(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt

    with Journal(tmp_path / "part", {}) as journal, pytest.raises(KeyboardInterrupt):
        run(llama, text, tmp_path / "maps", journal=journal, progress=stop)
    with Journal(tmp_path / "part", {}) as journal:
        assert journal.resumed
        again = run(llama, text, tmp_path / "maps", journal=journal)
    assert again.layers == found.layers
    assert [c.kl for c in again.candidates] == [c.kl for c in found.candidates]
    assert again.chosen.kl == found.chosen.kl


def test_an_injected_model_is_tuned_and_the_map_is_for_its_own_weights(
    llama: Any, text: list[int], tmp_path: Path
) -> None:
    found = run(llama, text, tmp_path, injected=True)
    assert found.injected
    mapped = next(c for c in found.candidates if c.map)
    assert f'digest = "{weights_digest(llama)}"' in mapped.map


def test_a_budget_that_holds_nothing_and_a_text_too_short(
    llama: Any, text: list[int], tmp_path: Path
) -> None:
    with pytest.raises(CapacityError, match="5 bytes hold no form of 2 x 96 tokens: the smallest"):
        run(llama, text, tmp_path, replace(GOAL, memory=5))
    with pytest.raises(RequestError, match="fewer than three windows of 64"):
        run(llama, text[:150], tmp_path)


def test_a_policy_has_the_greatest_share_whose_peak_fits(
    llama: Any, text: list[int], tmp_path: Path
) -> None:
    """Of ten users one is at his prompt, whole and with the copy of what stays; the engine's pools say the same."""
    goal = replace(GOAL, users=10, memory=0.6, context=384)
    trial = Trial(llama, None, goal, tmp_path, False, 16, 32 << 20, 0, None, None)
    budget, exact = trial.budget()
    found, why = _policy(trial, "keydiff", budget)
    assert found is not None, why
    steady, peak = trial.held(found.keep)
    assert (found.n_bytes, found.peak_bytes) == (steady, peak)
    assert peak <= budget < trial.held(f"keydiff:budget={share_of(found) + 0.05:g}")[1]
    runner = open_runner(twin(llama), keep=found.keep, memory=1 << 24, block_tokens=16)
    one = peak - steady // goal.users * (goal.users - 1)
    assert one > exact // goal.users, "a prompt and the copy"
    tokens = text[: goal.context]
    table = runner.open(prompt_tokens=len(tokens))
    table.append(len(tokens))
    runner.forward([Item(table, tokens, 0, len(tokens), 1)])
    table.commit()
    table.append(1)  # what is to go goes now
    assert table.held_bytes() <= steady // goal.users
    table.release()
    runner.bridge.close()  # type: ignore[union-attr]


def share_of(found: Candidate) -> float:
    return float(found.keep.partition("=")[2])
