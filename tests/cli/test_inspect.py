"""`quire inspect --attention` as a user runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quire.cli.inspect import SHADES, strip

PROMPT = "the cat sat on the mat <b>and</b> the cat"


def test_terminal_page_and_document(quire: Any, tiny: Path, tmp_path: Path) -> None:
    page = tmp_path / "look.html"
    done = quire("inspect", "--attention", PROMPT, "--model", tiny, "--json", "--html", page)
    assert done.code == 0, done.err
    found = done.json
    n = len(found["tokens"])
    assert found["chosen"] == n - 1
    for head in found["heads"]:
        assert len(head["received"]) == n
        assert abs(sum(head["reads"]) - 1) < 1e-3
    best = found["chosen_reads"]
    assert [r["share"] for r in best] == sorted((r["share"] for r in best), reverse=True)
    text = page.read_text(encoding="utf-8")
    assert "<b>" not in text, "a prompt is text, not markup"
    assert text.count("<tr>") == len(found["heads"]) + 1
    assert "://" not in text.replace("http://www.w3.org", ""), "nothing is loaded from elsewhere"
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    shown = quire("inspect", "--attention", f"@{file}", "--model", tiny, "--token", "3")
    assert shown.code == 0, shown.err
    assert "heaviest fifth" in shown.out
    assert "Token 3" in shown.out


def test_bad_input_is_one_line(quire: Any, tiny: Path, tmp_path: Path) -> None:
    for flags, words in (
        (["--attention", "@" + str(tmp_path / "none.txt")], "No such file"),
        (["--attention", PROMPT, "--token", "4000"], "is not one of the prompt's"),
        (["--attention", PROMPT, "--kv", "none"], "unknown codec 'none'"),
        (["--attention", PROMPT, "--kv", "int3"], "unknown codec 'int3'"),
        (
            ["--attention", PROMPT, "--html", str(tmp_path / "no" / "x.html")],
            "folder does not exist",
        ),
        (["--attention", "x" * 5000], "it takes from 2 to"),
    ):
        done = quire("inspect", *flags, "--model", tiny)
        assert done.code == 2, done.err
        assert done.out == ""
        assert done.err.count("\n") == 1
        assert words in done.err


def test_a_strip_keeps_every_peak() -> None:
    values = [0.001] * 100
    values[57] = 0.9
    drawn = strip(values, 20)
    assert len(drawn) == 20
    assert drawn.index(SHADES[-1]) == 57 * 20 // 100
    assert strip([0.0] * 5, 5) == " " * 5
