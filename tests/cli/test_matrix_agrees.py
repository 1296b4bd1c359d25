"""`quire run` refuses what docs/matrix.md refuses, with the same words, and runs what it runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import zoo
from quire.codecs import parse_recipe
from quire.codecs.calibrated import Calibrated

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {"latent (MLA)": "deepseek_v3", "recurrent only": "mamba2", "grouped-query": "llama"}


def refusals() -> dict[tuple[str, str], str]:
    """(attention, codec) to the reason, empty where the page says yes."""
    text = (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8")
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    table = text.split("## attention × codec")[1].split("## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    codecs = [c.strip().strip("`") for c in lines[0].strip("|").split("|")][1:]
    out = {}
    for line in lines[2:]:
        variant, *cells = (c.strip() for c in line.strip("|").split("|"))
        for codec, cell in zip(codecs, cells, strict=True):
            number = re.search(r"\[(\d+)\]", cell)
            out[variant, codec] = reasons[number[1]] if number else ""
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Path]:
    made = {}
    for variant, name in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        zoo.build(name).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
        made[variant] = folder
    return made


def learns(kv: str) -> bool:
    """Whether a recipe names no file that it needs: the page's cells have calibrations of their own."""
    if kv == "none":
        return False
    return any(isinstance(c, Calibrated) for c in parse_recipe(kv).loaded())


@pytest.mark.parametrize("variant", sorted(FAMILIES))
def test_run_agrees_with_the_page(
    variant: str, folders: dict[str, Path], quire: Callable[..., Any]
) -> None:
    said = refusals()
    codecs = [c for v, c in said if v == variant and not learns(c)]
    assert len(codecs) >= 6
    chosen = [c for c in codecs if said[variant, c]][:1] + [
        c for c in codecs if not said[variant, c]
    ][-2:]
    for codec in chosen:
        done = quire("run", "ab", "--model", folders[variant], "--kv", codec, "--max-tokens", 2)
        reason = said[variant, codec]
        if reason:
            assert done.code == 2
            assert reason in " ".join(done.err.split())
        else:
            assert done.code == 0, (codec, done.err)


def test_page_has_both_kinds() -> None:
    said = refusals()
    assert any(said.values())
    assert not all(said.values())
