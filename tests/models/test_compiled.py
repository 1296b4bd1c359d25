"""Compiled decode steps: the eager texts, nothing compiled on the way; refused where they would not be right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import zoo
from models.driving import engine_texts
from quire.errors import ConfigError
from quire.kernels import build, native
from quire.models.compiled import check_compile
from quire.models.open import open_runner

TEXTS = zoo.prompts()[:3]


def has_compiler() -> bool:
    try:
        build.compiler()
    except build.BuildError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
ours = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch.*", "ignore::UserWarning:torch.*"
)


def runner(model: Any, **options: Any) -> Any:
    return open_runner(model, memory="32MiB", **options)


@ours
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(torch.float32, "plain"), (torch.bfloat16, "auto")],
    ids=["fp32", "packed"],
)
def test_texts_are_the_eager_ones(dtype: torch.dtype, weights: str) -> None:
    if dtype == torch.bfloat16 and native.load() is None:
        pytest.skip("the CPU kernels were not built here")
    torch._dynamo.reset()
    want = engine_texts(runner(zoo.build("llama").to(dtype), weights=weights), TEXTS)
    model = zoo.build("llama").to(dtype)
    compiled = runner(model, weights=weights, compile=True)
    counters.clear()
    calls = []
    quick = compiled.bridge.compiled.model
    compiled.bridge.compiled.model = lambda **inputs: calls.append(1) or quick(**inputs)
    got = engine_texts(compiled, TEXTS)
    assert len(calls) > 10
    assert not counters["stats"]["unique_graphs"]  # none was made on the way
    if dtype == torch.float32:
        assert got == want
    else:
        same = sum(
            a == b for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)
        )
        assert same / sum(map(len, want)) > 0.5  # fused code rounds less often
    compiled.close()
    assert not any({"forward", "quire_compiled"} & vars(m).keys() for m in model.modules())


def test_without_a_compiler_it_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"compile: no C\+\+ compiler was found.*leave it out"):
        check_compile()
    with pytest.raises(ConfigError, match=r"compile: no C\+\+ compiler was found"):
        runner(zoo.build("llama"), compile=True)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("llama", {"kv": "none"}, "kv='none' has none"),
        ("deepseek_v3", {}, "does not go with latent attention"),
        ("mamba", {}, "every layer has attention of its own"),
        ("llama", {"way": "dense"}, "joined the packed way"),
    ],
)
def test_models_that_it_would_get_wrong_are_refused(
    name: str, options: dict[str, Any], reason: str
) -> None:
    model = zoo.build(name)
    with pytest.raises(ConfigError, match=reason):
        runner(model, compile=True, **options)
    assert model.config._attn_implementation != "quire"  # given back whole


@needs_compiler
def test_code_that_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        def broken(**inputs: Any) -> Any:
            raise RuntimeError("a graph\nbreaks")

        return broken

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(
        ConfigError, match=r"cannot be compiled .RuntimeError: a graph breaks.*leave it out"
    ):
        runner(zoo.build("llama"), compile=True)


@needs_compiler
def test_other_results_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, **kwargs: Any) -> Any:
        def call(**inputs: Any) -> Any:
            inputs["input_ids"] = inputs["input_ids"] + 1
            return model(**inputs)

        return call

    monkeypatch.setattr(torch, "compile", wrong)
    with pytest.raises(ConfigError, match="compile: logits differ by"):
        runner(zoo.build("llama"), compile=True)
