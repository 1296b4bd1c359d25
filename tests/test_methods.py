"""docs/methods.md: what is met, what is missed, and which signs come out as published."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from quire.codecs.recipe import load_codec, parse_recipe
from quire.errors import ConfigError
from quire.ops.rotate import hadamard
from quire.spec import Field, Site
from tool import load_tool


def tool() -> ModuleType:
    return load_tool("methods")


def made() -> ModuleType:
    return load_tool("methods_page")


def row(
    text: str, kv: str, per_cent: float, kl: float, *, injected: bool = False, tokens: int = 50_000
) -> Any:
    loss = math.log1p(per_cent / 100)
    figures = {"dnll": loss, "dnll_low": loss - 0.01, "dnll_high": loss + 0.01, "kl": kl}
    about = {"text": text, "injected": injected, "kv": kv, "tokens": tokens, "length": 1024}
    return about | figures | {"agreement": 0.9, "bytes_per_token": 960.0, "table_bytes": 7}


RECALL = """## `kv:asked=3`, asked after

| policy | 50% kept | 25% kept |
| --- | ---: | ---: |
| `ada(snapkv)` | 84.0% (0.51) | **57.3%** (0.27) |
| `snapkv` | 82.7% (0.53) | 46.7% (0.28) |
| `ada(expected)` | 66.7% (0.51) | *30.7%* (0.27) |
| `expected` | 85.3% (0.53) | 53.3% (0.28) |

## `needle:asked=3`, asked after

| `ada(snapkv)` | 84.0% (0.51) | 37.3% (0.27) |
| `snapkv` | 82.7% (0.53) | 46.7% (0.28) |
| `ada(expected)` | 66.7% (0.51) | 30.7% (0.27) |
| `expected` | 85.3% (0.53) | 53.3% (0.28) |
"""


def test_bars_are_met_or_missed_and_signs_are_judged_by_loss_and_divergence() -> None:
    page = made().page(
        [
            row("a.txt", "kvquant:bits=3", 1.5, 0.02),
            row("a.txt", "cq:form=8c8b", 60.0, 0.3),
            row("a.txt", "kvquant:bits=3,rope=after", 3.0, 0.05),
            row("a.txt", "kvquant:bits=3,fisher=false", 1.4, 0.01),
            row("a.txt", "kvquant:bits=3,outliers=matrix", 1.4, 0.03),
            row("b.txt", "kvquant:bits=3", 2.5, 0.02),
            row("a.txt", "kvquant:bits=3", 4.5, 0.02, injected=True),
            row("a.txt", "kvquant:bits=2", 9.0, 0.02),
            row("a.txt", "kvquant:bits=2,qnorm=false", 9.5, 0.03, tokens=4092),
            row("a.txt", "kvquant:bits=2", 11.0, 0.04, tokens=4092),
            row("b.txt", "kvquant:bits=2", 11.0, 0.04, tokens=4092),
            row("a.txt", "kvquant:bits=3", 7.0, 0.04, tokens=99_999) | {"length": 4096},
        ],
        made().read_recall(RECALL),
    )
    lines: dict[str, str] = {}
    for line in page.splitlines():
        if line[:1] == "|":
            lines.setdefault(line.split("|")[1].strip(), line)
    assert "+1.50 % (+0.49 to +2.52) | 2 % | met | +2.50 % | +4.50 %" in lines["`kvquant:bits=3`"]
    assert "## Windows of 4,096 tokens\n" in page, "longer windows stand by themselves"
    assert "| `kvquant:bits=3` | 960 | +7.00 % (+5.94 to +8.08) | 0.0400 | 99,999 |" in page
    assert "| 50 % | **missed** |" in lines["`cq:form=8c8b`"]
    signs = {
        "keys before RoPE, not after": "| as published |",
        "levels weighted by Fisher information": "| **contradicted** |",
        "outliers of each vector, not of the matrix": "| mixed: KL alone says so |",
    }
    assert all(lines[what].endswith(verdict) for what, verdict in signs.items())
    assert "the first token in 16 bits" not in lines, "what was not measured is not judged"
    assert (
        "+9.00 % (+7.92 to +10.10) | 10 % | met | +11.00 % of 4,092 |" in lines["`kvquant:bits=2`"]
    )
    assert lines["Q-Norm at 2 bits"].endswith("| 4,092 | **contradicted** |"), "on the same tokens"
    assert lines["budgets by head, of SnapKV's scores"].endswith(
        "57.3, 46.7 | 37.3, 46.7 | mixed |"
    )
    assert lines["budgets by head, of expected attention's"].endswith("| **contradicted** |")
    claim = next(line for line in page.splitlines() if "LLaMA-7B | arXiv 2401" in line)
    assert claim.endswith("| `kvquant:bits=3` | 960 | +1.50 % | 0.0200 | +4.50 % | 0.0200 |")


def test_the_page_is_what_the_figures_in_the_repository_say() -> None:
    docs = Path(__file__).resolve().parents[1] / "docs"
    rows = [json.loads(x) for x in (docs / "methods.jsonl").read_text().splitlines()]
    recall = made().read_recall((docs / "retention-quality.md").read_text())
    assert made().page(rows, recall) == (docs / "methods.md").read_text(), (
        "python tools/methods.py --write docs/methods.md"
    )


def test_new_figures_join_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = tool()
    monkeypatch.setattr(methods, "FIGURES", tmp_path / "f.jsonl")
    methods.add_rows([row("a", "int4", 1.0, 0.1), row("a", "int4", 1.0, 0.1, tokens=9)])
    methods.add_rows([row("a", "int4", 2.0, 0.1) | {"nll": 1.0}, row("a", "int8", 1.0, 0.1)])
    found = methods.read_rows(tmp_path / "f.jsonl")
    assert [(r["kv"], r["tokens"]) for r in found] == [
        ("int4", 50_000),
        ("int4", 9),
        ("int8", 50_000),
    ]
    assert math.expm1(found[0]["dnll"]) == pytest.approx(0.02)
    assert "nll" not in found[0]


def test_what_the_repository_knows_need_not_be_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many tokens in as long windows: fewer are no answer, and other windows another question."""
    methods = tool()
    monkeypatch.setattr(methods, "BATCHES", (("first", False, ("int4", "int8")),))
    rows = [row("a", "int4", 1.0, 0.1), row("a", "int8", 1.0, 0.1, tokens=4092)]
    assert methods.known_to(rows, 1024, 51_200) == rows[:1]
    assert methods.known_to(rows, 1024, 4096) == rows[1:]
    assert methods.known_to(rows, 2048, 51_200) == []
    args = (tmp_path, tmp_path / "no", [tmp_path / "a"], 51_200, 1024, 0.0, None)
    assert methods.run(*args, rows), (
        "nothing is missing, so that no model is loaded and no text read"
    )
    with pytest.raises(FileNotFoundError):
        methods.run(*args, rows[:1])


def test_the_trial_of_oscar_is_kivi_of_rotated_and_evened_keys() -> None:
    """By hand; and it is gone from the registry afterwards."""
    trial = load_tool("oscar_trial")
    x = torch.randn(32, 64) * torch.logspace(-2, 2, 32).unsqueeze(1)
    pos = torch.arange(32)
    with trial.registered():
        codec = load_codec("oscar")
        for name in ("k", "v"):
            site = Site(Field(name, (64,), "float32"), 32)
            parts = codec.encode(site, x, pos)
            y = hadamard(x)
            norm = y.norm(dim=-1, keepdim=True).half() if name == "k" else torch.ones(())
            inner = load_codec("kivi")
            want = inner.decode(site, inner.encode(site, y / norm.float(), pos), pos, torch.float32)
            back = codec.decode(site, parts, pos, torch.float32)
            torch.testing.assert_close(back, hadamard(want * norm.float()))
            assert ("norm" in parts) == (name == "k")
    with pytest.raises(ConfigError, match="unknown codec 'oscar'"):
        load_codec("oscar")


def test_everything_that_is_scored_is_a_recipe_and_every_sign_is_scored() -> None:
    methods = tool()
    scored = {(which, hurt, r) for which, hurt, recipes in methods.BATCHES for r in recipes}
    with load_tool("oscar_trial").registered():
        for _, _, recipe in scored:
            parse_recipe(recipe)
    for sign in made().SIGNS:
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


def test_wide_products_round_once_and_leave_other_numbers_alone() -> None:
    wide = load_tool("wide_products")._widened(torch.nn.functional.linear)
    x, w = torch.randn(3, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    found = wide(x, w, bias=w[:, 0])
    want = torch.nn.functional.linear(x.float(), w.float(), w[:, 0].float()).bfloat16()
    assert torch.equal(found, want)
    assert wide(x.double(), w.double()).dtype == torch.float64
    before = torch.nn.functional.linear
    with load_tool("wide_products").wide_products():
        assert torch.nn.functional.linear(x, w).dtype == torch.bfloat16
    assert torch.nn.functional.linear is before
