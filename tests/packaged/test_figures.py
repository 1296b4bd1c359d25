"""The figures as tables, by a small report worked out by hand."""

from pathlib import Path

import pytest

from training import figures

REPORT = {
    "digest": {
        "sha256": "abc",
        "parameters": 4951296,
        "trained_tokens": 9500000,
        "budgets": [[0, 12000000], [5304320, 9500000]],
        "seed": 0,
    },
    "python": "3.11.7",
    "torch": "2.13.0",
    "recall": {"passkey 512": {"right": 49, "asked": 50, "share": 0.98}},
    "text": {
        "moby.txt": {"tokens": 2047, "loss": 3.0, "perplexity": 20.0855, "bits_per_byte": 1.5}
    },
    "first_position_mass": [[0.25, 0.5]],
    "channels": [{"key_largest_over_median": 3.14159, "value_largest_over_median": 2.0}],
    "continuations": {"def f": "a | b\n"},
    "missed": ["passkey 2048"],
}


def test_tables_by_hand() -> None:
    text = figures.render(REPORT)
    assert "(budget 12,000,000, then 9,500,000 from token 5,304,320)" in text
    assert "Bars missed: passkey 2048." in text
    assert "| passkey 512 | 49 | 50 | 98.0 % |" in text
    assert "| moby.txt | 2,047 | 20.09 | 1.500 |" in text
    assert "| 0 | 0.25, 0.50 | 3.14 | 2.00 |" in text
    assert r"| `'def f'` | `'a \| b\n'` |" in text
    assert "Every bar is reached." in figures.render({**REPORT, "missed": []})


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    document = tmp_path / "model.md"
    document.write_text(f"before\n{figures.BEGIN}\nold\n{figures.END}\nafter\n")
    figures.write(REPORT, document)
    once = document.read_text()
    assert once.startswith(f"before\n{figures.BEGIN}\n\nWeights `abc`")
    assert once.endswith(f"{figures.END}\nafter\n")
    assert "old" not in once
    figures.write(REPORT, document)
    assert document.read_text() == once


def test_a_document_without_marks_is_refused(tmp_path: Path) -> None:
    document = tmp_path / "model.md"
    document.write_text(figures.END + figures.BEGIN)
    with pytest.raises(ValueError, match="in this order"):
        figures.write(REPORT, document)
    assert document.read_text() == figures.END + figures.BEGIN
