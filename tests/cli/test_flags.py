"""A line that is read plainly means what typer reads in it; all other lines are typer's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pytest
import typer
import typer.main
from hypothesis import given
from hypothesis import strategies as st

from quire.cli import plan
from quire.cli.flags import Flag, for_typer, read_plainly

Run = Callable[..., Any]


def command(
    text: Annotated[str | None, Flag("", "TEXT", "A text.")] = None,
    count: Annotated[int, Flag("--count", "N", "How many.", "Panel")] = 1,
    share: Annotated[float | None, Flag("--share", "X", "How much.")] = None,
    also: Annotated[list[str] | None, Flag("--also", "TEXT", "More.")] = None,
    loud: Annotated[bool, Flag("--loud", " ", "Loudly.")] = False,
) -> dict[str, Any]:
    """Hands back what it was given."""
    return {"text": text, "count": count, "share": share, "also": also or [], "loud": loud}


app = typer.Typer(add_completion=False)
app.command()(for_typer(command))
BY_TYPER = typer.main.get_command(app)

WORDS = st.sampled_from(
    [
        *("--count", "--share", "--also", "--loud", "--count=7", "--share=0.5", "--also="),
        *("--also=a=b", "--loud=1", "--other", "--cou", "-c", "-", "--"),
        *(
            "3",
            "-3",
            "+3",
            "1_0",
            " 4",
            "0.25",
            ".5",
            "1e3",
            "nan",
            "a",
            "a b",
            "",
            "é\n",
            "\u0663",
        ),
    ]
)


@given(st.lists(WORDS, max_size=7))
def test_it_reads_what_typer_reads(words: list[str]) -> None:
    plainly = read_plainly(command, words)
    if plainly is not None:
        read = BY_TYPER.main(list(words), prog_name="x", standalone_mode=False)
        assert command(**plainly) == read, words


@pytest.mark.parametrize(
    "words",
    [
        ["x", "--count", "3", "--share", "0.5", "--also", "a", "--loud", "--also=b"],
        ["--count=-3", "--share=2", ""],
        [],
    ],
)
def test_it_reads_every_plain_line(words: list[str]) -> None:
    plainly = read_plainly(command, words)
    assert plainly is not None
    assert command(**plainly) == BY_TYPER.main(words, prog_name="x", standalone_mode=False)


@pytest.mark.parametrize(
    "words",
    [
        ["a", "b"],
        ["--count"],
        ["--count", "x"],
        ["--share", "1e3"],
        ["--loud=1"],
        ["--help"],
        ["-h"],
        ["--", "a"],
        ["--cou", "3"],
    ],
)
def test_what_is_not_plain_is_left_to_typer(words: list[str]) -> None:
    assert read_plainly(command, words) is None


def test_typer_is_told_everything() -> None:
    (_, count, *_) = BY_TYPER.params
    assert count.opts == ["--count"]
    assert (count.metavar, count.help, count.default) == ("N", "How many.", 1)
    assert count.rich_help_panel == "Panel"
    assert BY_TYPER.help == "Hands back what it was given."


def test_both_ways_plan_alike(quire: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("plan", "llama-2-7b", "--device", "24GiB", "--kv", "auto", "--kv=int4", "--json")
    plainly = quire(*line)
    monkeypatch.setattr("quire.cli.flags.read_plainly", lambda *_: None)
    assert quire(*line) == plainly
    assert len(plainly.json["plans"]) == 2


def test_every_option_of_plan_has_a_plain_kind() -> None:
    given = {"": "x", "--users": "2", "--json": None, "--kv": "int4", "--price": "2.5"}
    words = [w for name, value in given.items() for w in (name, value) if w]
    assert read_plainly(plan.command, words) == {
        "model": "x",
        "users": 2,
        "json": True,
        "kv": ["int4"],
        "price": 2.5,
    }
