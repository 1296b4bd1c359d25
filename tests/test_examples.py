"""The examples run, say what they claim, and stay short."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_one_page(capsys: pytest.CaptureFixture[str]) -> None:
    source = EXAMPLES / "one_page.py"
    assert len(source.read_text(encoding="utf-8").splitlines()) <= 150
    runpy.run_path(str(source), run_name="__main__")
    said = capsys.readouterr().out
    assert "equal, and everything given back" in said
    cached, recomputed = said.splitlines()[:2]
    assert cached.split()[1:] == recomputed.split()[1:]
    assert len(set(cached.split())) > 10


def test_one_page_notices_a_wrong_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spoil what is written: the example's own assertion falls."""
    page = runpy.run_path(str(EXAMPLES / "one_page.py"))
    write = page["Step"].write

    def spoiled(step: object, layer: int, values: dict[str, object]) -> None:
        write(step, layer, {name: x * 1.5 for name, x in values.items()})  # type: ignore[operator]

    monkeypatch.setattr(page["Step"], "write", spoiled)
    with pytest.raises(AssertionError, match="changed a token"):
        page["main"]()
