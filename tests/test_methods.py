"""docs/methods.md: what is met, what is missed, and which signs come out as published."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest

from quire.codecs.recipe import parse_recipe
from tool import load_tool


def tool() -> ModuleType:
    return load_tool("methods")


def row(text: str, kv: str, per_cent: float, kl: float, *, injected: bool = False) -> Any:
    loss = math.log1p(per_cent / 100)
    figures = {"dnll": loss, "dnll_low": loss - 0.01, "dnll_high": loss + 0.01, "kl": kl}
    about = {"text": text, "injected": injected, "kv": kv, "tokens": 50_000, "length": 1024}
    return about | figures | {"agreement": 0.9, "bytes_per_token": 960.0, "table_bytes": 7}


def rows(*made: Any) -> Any:
    return {(r["text"], r["injected"], r["kv"]): r for r in made}


def test_bars_are_met_or_missed_and_signs_are_judged_by_loss_and_divergence() -> None:
    page = tool().page(
        rows(
            row("a.txt", "kvquant:bits=3", 1.5, 0.02),
            row("a.txt", "cq:form=8c8b", 60.0, 0.3),
            row("a.txt", "kvquant:bits=3,rope=after", 3.0, 0.05),
            row("a.txt", "kvquant:bits=3,fisher=false", 1.4, 0.01),
            row("a.txt", "kvquant:bits=3,outliers=matrix", 1.4, 0.03),
            row("b.txt", "kvquant:bits=3", 2.5, 0.02),
            row("a.txt", "kvquant:bits=3", 4.5, 0.02, injected=True),
        )
    )
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line[:1] == "|"}
    assert "+1.50 % (+0.49 to +2.52) | 2 % | met | +2.50 % | +4.50 %" in lines["`kvquant:bits=3`"]
    assert "| 50 % | **missed** |" in lines["`cq:form=8c8b`"]
    signs = {
        "keys before RoPE, not after": "| as published |",
        "levels weighted by Fisher information": "| **contradicted** |",
        "outliers of each vector, not of the matrix": "| mixed: KL alone says so |",
    }
    assert all(lines[what].endswith(verdict) for what, verdict in signs.items())
    assert "the first token in 16 bits" not in lines, "what was not measured is not judged"


def test_everything_that_is_scored_is_a_recipe_and_every_sign_is_scored() -> None:
    methods = tool()
    scored = {(which, hurt, r) for which, hurt, recipes in methods.BATCHES for r in recipes}
    for _, _, recipe in scored:
        parse_recipe(recipe)
    for sign in methods.SIGNS:
        assert {("first", False, r) for r in (sign.better, sign.worse)} <= scored
    assert len(scored) == sum(len(recipes) for _, _, recipes in methods.BATCHES)


@pytest.mark.parametrize(
    ("recipe", "settings", "named"),
    [
        ("cq:form=8c8b;window=128", "cq:form=8c8b", "cq:form=8c8b,file=x.st;window=128"),
        ("kvquant:bits=3,sink=0", "kvquant:bits=3", "kvquant:bits=3,sink=0,file=x.st"),
        ("kvarn", None, "kvarn:file=x.st"),
    ],
)
def test_a_recipe_is_learned_once_and_names_its_file(
    recipe: str, settings: str | None, named: str
) -> None:
    from pathlib import Path

    assert tool().learned(recipe) == settings
    assert tool().with_file(recipe, Path("x.st")) == named
