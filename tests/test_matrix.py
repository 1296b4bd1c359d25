"""docs/matrix.md has a cell for every pair of what exists, and says what a run says."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from quire.codecs import available
from quire.retention import available as policies
from tool import load_tool

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "matrix.md"


def tool() -> ModuleType:
    return load_tool("matrix")


def test_no_cell_is_missing_or_untested() -> None:
    matrix = tool()
    page = matrix.read(PAGE.read_text(encoding="utf-8"))
    for variant in matrix.VARIANTS:
        for codec in matrix.codecs():
            assert ("attention × codec", variant, codec) in page
        for batching in matrix.BATCHING:
            assert ("attention × batching", variant, batching) in page
    for codec in matrix.codecs():
        for batching in matrix.BATCHING:
            assert ("codec × batching", codec, batching) in page
        if codec in matrix.stored_differently():
            for policy in matrix.policies():
                assert ("codec × policy", codec, policy) in page
                assert ("codec, prefixes shared × policy", codec, policy) in page
    for variant in matrix.VARIANTS:
        for policy in matrix.policies():
            assert ("attention × policy", variant, policy) in page
            assert ("attention, prefixes shared × policy", variant, policy) in page
    assert {p.partition("(")[0] for p in matrix.policies()} == set(policies())
    assert {"auto", "fp8", "int8", "int4", "kivi:residual=8,group=16"} <= set(
        matrix.stored_differently()
    )
    tried = {recipe.partition(":")[0] for recipe in matrix.codecs()}
    assert {*available(), "auto", "none"} <= tried
    known = ("yes", "no hit")
    assert all(text in known or text.startswith("refused: ") for text in page.values())
    never = {c for (section, _, c), text in page.items() if text == "no hit"}
    assert "h2o" in never
    assert not never & {"full", "window", "random", "keydiff", "tova"}


def test_only_what_is_named_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = tool()
    old = matrix.read(PAGE.read_text(encoding="utf-8"))
    tried: list[tuple[str, ...]] = []
    monkeypatch.setattr(matrix, "cell", lambda *a: tried.append(a) or "tried")
    for name in ("kept", "shared"):
        monkeypatch.setattr(matrix, name, lambda *a: tried.append(a) or "tried")
    new = matrix.read(matrix.write(matrix.tables(["tova"], old)))
    changed = {cell for cell in old if new[cell] != old[cell]}
    assert set(new) == set(old)
    assert {a[2] for a in tried} == {"tova"}
    assert changed == {cell for cell in old if "tova" in cell}
    tried.clear()
    matrix.tables(["tova"], {c: t for c, t in old.items() if "int4" not in c})
    assert {a[1] for a in tried if a[2] != "tova"} == {"int4"}  # what the page lacks is tried too


@pytest.mark.parametrize(
    ("name", "kv", "batching", "says"),
    [
        ("llama", "auto", "preempted", "yes"),
        ("deepseek_v3", "k=fp32,v=bf16", "continuous, chunked", "caches k_rope, latent"),
        ("mamba2", "bf16", "alone", "recurrent state only"),
        ("llama", "none", "generate, padded", "kv=none is a mode"),
    ],
)
def test_some_cells_again(name: str, kv: str, batching: str, says: str) -> None:
    assert says in tool().cell(name, kv, batching)


@pytest.mark.parametrize(
    ("name", "kv", "policy", "says"),
    [
        ("llama", "kivi:residual=8,group=16", "ada(h2o)", "yes"),
        ("llama", "int4", "duo", "yes"),
        ("deepseek_v3", "auto", "ada(h2o)", "one latent for all heads"),
        ("deepseek_v3", "auto", "duo", "one latent for all heads"),
        ("mistral", "auto", "tova", "no layer of this model keeps every token"),
        ("llama", "none", "h2o", "chooses among cached tokens"),
    ],
)
def test_some_policies_again(name: str, kv: str, policy: str, says: str) -> None:
    assert re.search(says, tool().kept(name, kv, policy))


def test_a_policy_that_says_something_else_in_a_batch_fails_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = tool()
    drops, covers = matrix.policies()["random"]
    monkeypatch.setattr(matrix, "policies", lambda: {"x": (covers, drops), "y": (drops, covers)})
    with pytest.raises(AssertionError, match="wrong text"):
        matrix.kept("llama", "auto", "x")  # what drops tokens does not say what transformers says
    assert matrix.kept("llama", "auto", "y") == "yes"


def test_a_wrong_text_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = tool()
    monkeypatch.setitem(matrix.BATCHING, "alone", lambda model, kv: [[0] * matrix.N_TOKENS] * 3)
    with pytest.raises(AssertionError, match="wrong text"):
        matrix.cell("llama", "auto", "alone")


@pytest.mark.slow
def test_the_page_is_what_a_run_writes() -> None:
    matrix = tool()
    assert matrix.write(matrix.tables()) == PAGE.read_text(encoding="utf-8")
