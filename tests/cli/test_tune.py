"""quire tune: a file that other commands take, and bad input in one line before weights are read."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire.cli.options import RunOptions

WORDS = "the cat sat on the mat and the dog lay by the door all day long; " * 9


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text(WORDS)
    return file


def test_the_file_is_taken_by_run(
    quire, tiny: Path, book: Path, tmp_path: Path, monkeypatch
) -> None:
    out, report = tmp_path / "tuned.toml", tmp_path / "tuned.html"
    flags = ["--memory", "60%", "--text", book, "--context", "200", "--kv", "int4"]
    flags += ["--max-tokens", "128", "--block-tokens", "16", "--length", "64", "--keep", "none"]
    done = quire("tune", tiny, *flags, "--quality", "1", "--out", out, "--report", report)
    assert done.code == 1, "a tiny random model's near-ties do not all stay"
    assert "nothing that was measured meets the floor of 1" in done.out
    assert "top-1 agreement" in done.out
    assert f"quire run --config {out}" in done.err.replace("\n", " ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["book.txt", "tuned.html", "tuned.toml"]
    document = tomllib.loads(out.read_text())
    assert (document["model"], document["block_tokens"]) == (str(tiny), 16)
    assert not document["tune"]["meets_floor"]
    assert document["tune"]["bytes"] <= document["tune"]["budget_bytes"]
    monkeypatch.chdir("/")  # a map is found beside the file, wherever one stands
    ran = quire(
        "run",
        "the cat sat on the mat",
        "--config",
        out,
        "--max-tokens",
        "30",
        "--json",
        "--memory",
        "8MiB",
    )
    assert ran.code == 0, ran.err
    kv = document["kv"]
    assert ran.json["kv"] == (
        f"map:{tmp_path / kv.removeprefix('map:')}" if "map" in document else kv
    )


def test_a_map_in_a_config_lies_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "tuned.toml"
    file.write_text(
        'kv = "map:tuned.toml"\n[map]\nlayers = 1\nheads = 1\nkv = "int8"\n[tune]\nx = 1\n'
    )
    assert RunOptions.resolve("run", {"config": str(file)}).kv == f"map:{file}"
    file.write_text('kv = "map:/a/b.toml"\n')
    assert RunOptions.resolve("run", {"config": str(file)}).kv == "map:/a/b.toml"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "give --text FILE, or --prompts FILE"),
        (["--text", "BOOK", "--prompts", "BOOK"], "give --text FILE, or --prompts FILE"),
        (["--text", "BOOK", "--memory", "1.5"], "a share of the exact cache lies in (0, 1]"),
        (["--text", "BOOK", "--memory", "lots"], "is not a size"),
        (["--text", "BOOK", "--memory", "0"], "must be above zero"),
        (["--text", "BOOK", "--quality", "99"], "--quality is an agreement above 0 and at most 1"),
        (["--text", "BOOK", "--context", "9999"], "is beyond the model's context of 256"),
        (["--text", "BOOK", "--users", "0"], "--users must be at least 1"),
        (["--text", "BOOK", "--budget-minutes", "0"], "--budget-minutes must be above 0"),
        (["--text", "BOOK", "--keep", "h2o:budget=0.1"], "the budget follows from --memory"),
        (["--text", "BOOK", "--keep", "h3o"], "unknown policy 'h3o'"),
        (["--text", "BOOK", "--kv", "int5"], "unknown codec 'int5'"),
        (["--text", "nowhere.txt"], "--text nowhere.txt: No such file"),
        (["--text", "BOOK", "--out", "nowhere/x.toml"], "there is no folder nowhere"),
    ],
)
def test_refused_before_the_weights_are_read(
    quire, tiny: Path, book: Path, monkeypatch, flags: list[str], says: str
) -> None:
    monkeypatch.setattr(
        "quire.models.load.load_model",
        lambda *_: pytest.fail("the weights were about to be loaded"),
    )
    done = quire("tune", tiny, "--context", "64", *(str(book) if f == "BOOK" else f for f in flags))
    assert done.code == 2, done.err
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert says in done.err


def test_a_budget_below_one_block(quire, tiny: Path, book: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned.toml"
    flags = ["--memory", "100B", "--text", book, "--context", "64", "--kv", "int8", "--out", out]
    done = quire("tune", tiny, *flags, "--keep", "none")
    assert done.code == 2
    assert "100 bytes hold no form of 1 x 64 tokens" in done.err
    assert done.err.count("\n") == 1
    assert not out.exists()
