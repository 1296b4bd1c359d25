"""A journal gives back what it was given, bit for bit, and a run that stopped goes on where it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.errors import ConfigError
from quire.evaluate import Reading, Scorer, evaluate
from quire.evaluate.journal import Journal

OPTIONS: dict[str, Any] = {"length_tokens": 64, "memory": 16 << 20, "block_tokens": 16}


def test_bit_for_bit(tmp_path: Path) -> None:
    file = tmp_path / "a.part"
    values = {
        "nll": np.array([1 / 3, -0.0, np.inf, 5e-324]),
        "agreement": np.array([True, False]),
    }
    with Journal(file, {"seed": 1}) as journal:
        journal.put_text("x", [(values, Reading(1, 2, 3, 4, 5, 6, 7, 8)), ({}, Reading())])
        journal.put("size", [1, 2])
    with Journal(file, {"seed": 1}) as journal:
        assert journal.resumed == 2
        assert journal.get("size") == [1, 2]
        assert journal.text("y") is None
        (found, reading), (nothing, zero) = journal.text("x") or []
        assert (reading, nothing, zero) == (Reading(1, 2, 3, 4, 5, 6, 7, 8), {}, Reading())
        for name, x in values.items():
            assert found[name].dtype == x.dtype
            assert found[name].tobytes() == x.tobytes()
        journal.done()
    assert not file.exists()


def test_half_a_line_is_cut_off_and_written_anew(tmp_path: Path) -> None:
    file = tmp_path / "a.part"
    with Journal(file, {}) as journal:
        journal.put("one", 1)
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"at": "two", "val')
    with Journal(file, {}) as journal:
        assert (journal.get("one"), journal.get("two"), journal.resumed) == (1, None, 1)
        journal.put("two", 2)
    assert file.read_bytes().startswith(whole + b'{"at": "two", "value": 2}\n')


def test_another_question_and_another_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.part"
    Journal(file, {"seed": 1, "kv": ["int8"]}).__exit__()
    with pytest.raises(ConfigError, match=r"of another run \(seed differs\)"):
        Journal(file, {"seed": 2, "kv": ["int8"]})
    file.write_text("a book\n")
    with pytest.raises(ConfigError, match="is no journal of a run"):
        Journal(file, {})
    with pytest.raises(ConfigError, match="No such file"):
        Journal(tmp_path / "nowhere" / "a.part", {})


def test_a_run_that_stopped_goes_on_where_it_was(
    llama: Any, tokenizer: Any, text: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [("int8", "full"), ("auto", "window:16")]
    tasks = ("ppl", "copy:asked=2")

    def run(journal: Journal | None, stop_at: int = 99) -> Any:
        done = 0

        def progress(*_: Any) -> None:
            nonlocal done
            done += 1
            if done == stop_at:
                raise KeyboardInterrupt

        return evaluate(
            llama, tokenizer, configs, tasks, text, examples=3,
            journal=journal, progress=progress, **OPTIONS,
        )  # fmt: skip

    whole = run(None)
    scored = 0
    own = Scorer.score

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal scored
        scored += 1
        return own(self, *args, **options)

    monkeypatch.setattr(Scorer, "score", counted)
    for stop_at in (2, 8):  # in the text, and in the task behind it
        with Journal(tmp_path / "a.part", {}) as journal, pytest.raises(KeyboardInterrupt):
            run(journal, stop_at)
    assert scored == 8 * 3
    with Journal(tmp_path / "a.part", {}) as journal:
        assert journal.resumed == 8
        found = run(journal)
    assert scored == 9 * 3, "six windows and three examples, each once for three caches"
    assert replace(found, about={}) == replace(whole, about={}), "to the last digit"
