"""`quire claims` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quire.evaluate.claims import VERDICTS
from quire.evaluate.claims.drawing import drawing
from quire.evaluate.claims.page import page


def test_the_command_and_its_page(quire: Any, tmp_path: Path) -> None:
    file = tmp_path / "claims.md"
    done = quire("claims", "--only", "mla", "--only", "split", "--json", "--write", file)
    assert done.code == 0, done.err
    found = done.json
    assert [r["name"] for r in found["claims"]] == ["mla", "split"]
    for r in found["claims"]:
        assert set(r) >= {"name", "claim", "source", "ours", "verdict", "why"}
        assert r["verdict"] in VERDICTS
    assert file.read_text() == page(found, "claims.svg")
    assert (tmp_path / "claims.svg").read_text() == drawing(found["claims"])
    assert ">5.63×<" in drawing(found["claims"])  # 389,120 over 69,120 bytes
    assert drawing(found["claims"][1:]) == ""
    shown = quire("claims", "--only", "mla").out
    assert "arithmetic" in shown
    assert "82.2%" in shown
    refused = quire("claims", "--only", "nothing")
    assert refused.code == 2
    assert "known: projections" in refused.err
