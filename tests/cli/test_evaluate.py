"""quire eval: the document's keys, and bad input in one line before weights are read."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire.cli.eval_input import split_recipes, split_tasks
from quire.errors import ConfigError

KEYS = {"kv", "keep", "task", "metric", "value", "low", "high", "bytes_per_token", "tokens"}
WORDS = "the cat sat on the mat and the dog lay by the door all day long; " * 6


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


def test_the_document(quire, tiny: Path, book: Path) -> None:
    arguments = ["eval", tiny, "--kv", "auto,fp16", "--task", "ppl,copy:asked=2", "--text", book]
    arguments += ["--length", "100", "--examples", "2", "--block-tokens", "8", "--memory", "8MiB"]
    done = quire(*arguments, "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    document = done.json
    assert document["model"] == str(tiny)
    assert len(document["digest"]) == 64
    rows = document["rows"]
    assert all(set(r) >= KEYS for r in rows)
    assert {(r["kv"], r["task"]) for r in rows} == {
        (kv, t) for kv in ("auto", "fp16") for t in ("ppl", "copy:asked=2")
    }
    exact = {r["metric"]: r["value"] for r in rows if (r["kv"], r["task"]) == ("auto", "ppl")}
    assert (exact["dnll"], exact["kl"], exact["agreement"]) == (0.0, 0.0, 1.0)
    half = {r["metric"]: r for r in rows if (r["kv"], r["task"]) == ("fp16", "ppl")}
    assert half["kl"]["value"] > 0
    # 100 tokens in 13 blocks of 8: 2 layers, k and v, 2 heads of 8 channels, float16
    assert half["kl"]["bytes_per_token"] == 13 * 8 * 2 * 2 * 2 * 8 * 2 / 100
    again = quire(*arguments, "--json").json
    for costs in (document.pop("costs"), again.pop("costs")):
        assert [c["kv"] for c in costs] == ["auto", "auto", "fp16"]
        assert all(c["tokens_per_s"] > 0 for c in costs)
        assert [c["capacity_tokens"] for c in costs] == [
            int((8 << 20) // c["bytes_per_token"]) for c in costs
        ]
    assert again == document, "to the last digit"


def test_the_table(quire, tiny: Path, book: Path) -> None:
    done = quire("eval", tiny, "--text", book, "--length", "64", "--memory", "8MiB", "--inject")
    assert done.code == 0, done.err
    assert done.out.split()[:5] == ["kv", "task", "metric", "length", "depth"]
    assert "perplexity" in done.out
    assert "outliers injected" in done.err
    assert "exact cache, bytes per token: ppl" in done.err


def test_recall_by_length_and_depth_without_a_text(quire, tiny: Path) -> None:
    done = quire(
        "eval", tiny, "--length", "200,256", "--examples", "5", "--memory", "8MiB",
        "--task", "copy:asked=2",
    )  # fmt: skip
    assert done.code == 0, done.err
    cells = [line.split() for line in done.out.splitlines()[1:]]
    assert {c[3] for c in cells} == {"200", "256"}
    assert {c[4] for c in cells} > {"all", "0.00"}
    assert sum(int(c[9]) for c in cells if c[4] != "all") == 20
    assert [c[9] for c in cells if c[4] == "all"] == ["10"] * 4
    assert all(float(c[10].replace(",", "")) > 0 for c in cells)


def test_without_text_or_task_recall_is_measured(quire, tiny: Path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        "quire.cli.evaluate._check_source", lambda _, tasks, *__: asked.append(tasks)
    )
    monkeypatch.setattr("quire.cli.evaluate._run", lambda *_, **options: asked.append(options))
    monkeypatch.setattr("quire.cli.evaluate._show", asked.append)
    done = quire("eval", tiny, "--memory", "8MiB")
    assert done.code == 0, done.err
    assert asked[0] == asked[1]["tasks"] == ["passkey", "kv", "token-kv"]
    done = quire("eval", tiny, "--memory", "8MiB", "--ask", "before", "--keep", "h2o:budget=0.5")
    assert done.code == 0, done.err
    assert asked[3] == ["passkey", "kv"], "one token is known before any goes"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--task", "copy", "--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--task", "copy", "--length", "1k"], "several as 512,1024"),
        (["--task", "ppl"], "task ppl needs a text to score; give --text FILE"),
        (
            ["--text", "BOOK", "--length", "999"],
            "--length 999 is beyond the model's context of 256",
        ),
        (["--text", "SHORT"], "fewer than one window of 100; give a longer text"),
        (["--text", "nowhere.txt"], "--text nowhere.txt: No such file"),
        (["--task", "niah"], "unknown task 'niah'; known: ppl, passkey"),
        (["--task", "kv:count=99,asked=8"], "and the length is 100"),
        (["--task", "copy", "--kv", "none"], "--kv none keeps no cache"),
        (["--task", "copy", "--kv", "int5"], "unknown codec 'int5'"),
        (["--task", "copy", "--keep", "h3o"], "unknown policy 'h3o'"),
        (["--task", "copy", "--examples", "0"], "--examples must be at least 1"),
        (["--task", "copy", "--memory", "lots"], "for example 8GiB"),
    ],
)
def test_refused_before_the_weights_are_read(
    quire, tiny: Path, book: Path, tmp_path: Path, monkeypatch, flags: list[str], says: str
) -> None:
    monkeypatch.setattr(
        "quire.models.load.load_model",
        lambda *_: pytest.fail("the weights were about to be loaded"),
    )
    short = tmp_path / "short.txt"
    short.write_text("too short")
    named = {"BOOK": str(book), "SHORT": str(short)}
    done = quire("eval", tiny, "--length", "100", *(named.get(f, f) for f in flags))
    assert done.code == 2, done.err
    assert done.out == ""
    assert done.err.startswith("quire: ")
    assert done.err.count("\n") == 1
    assert says in done.err


def test_a_model_without_a_tokenizer(quire, tiny: Path, book: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        (bare / file).write_bytes((tiny / file).read_bytes())
    done = quire("eval", bare, "--text", book, "--length", "64")
    assert done.code == 2
    assert "this model has no tokenizer" in done.err
    assert done.err.count("\n") == 1


def test_lists_of_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_recipes(["auto,bf16", "fp32"]) == ["auto", "bf16", "fp32"]
    assert split_recipes(["k=bf16,v=fp32,auto"]) == ["k=bf16,v=fp32", "auto"]
    assert split_recipes(["auto,k=bf16,v=fp32"]) == ["auto", "k=bf16,v=fp32"]
    assert split_recipes(["bf16;skip_layers=0,1,-1,fp32"]) == ["bf16;skip_layers=0,1,-1", "fp32"]
    with pytest.raises(ConfigError, match="unknown parameter 'bits=2'"):
        split_recipes(["bf16:bits=2,fp32"])
    assert split_tasks(["ppl,kv:count=4,asked=2", "copy"]) == ["ppl", "kv:count=4,asked=2", "copy"]


def test_a_killed_run_goes_on(quire, tiny: Path, tmp_path: Path) -> None:
    """A real process, really killed; what it had scored is not scored again and the rows are the same."""
    book, out = tmp_path / "long.txt", tmp_path / "rows.jsonl"
    book.write_text(WORDS * 10)
    part = Path(f"{out}.part")
    flags = [tiny, "--kv", "int8,int4", "--task", "ppl", "--text", book, "--length", "64"]
    flags += ["--memory", "8MiB", "--speed-tokens", "0"]
    command = [sys.executable, "-m", "quire.cli", "eval", *map(str, flags), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not part.exists() or part.read_bytes().count(b"\n") < 5:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert not out.exists()
    known = part.read_bytes().count(b'"cells"')
    other = quire("eval", *flags, "--out", out, "--seed", "3")
    assert other.code == 2
    assert "is of another run (seed differs)" in other.err
    done = quire("eval", *flags, "--out", out)
    assert done.code == 0, done.err
    assert f"going on with {part}, which has {known + 1} entries" in done.err.replace("\n", " ")
    assert not part.exists()
    whole = quire("eval", *flags, "--json").json
    assert [json.loads(line) for line in out.read_text().splitlines()] == whole["rows"]


def test_prompts_layers_and_a_report(quire, tiny: Path, book: Path, tmp_path: Path) -> None:
    prompts, report = tmp_path / "prompts.txt", tmp_path / "report.html"
    prompts.write_text("the cat sat on the mat and the dog\nthe door all day long and the mat\n")
    flags = ["--kv", "int4", "--memory", "8MiB", "--json"]
    done = quire("eval", tiny, *flags, "--prompts", prompts, "--answer-tokens", "40")
    assert done.code == 0, done.err
    assert {(r["task"], r["metric"]) for r in done.json["rows"]} == {
        ("prompts", m) for m in ("divergence", "same", "dnll", "kl", "agreement")
    }
    flags += ["--text", book, "--length", "64", "--layers", "--report", report]
    done = quire("eval", tiny, *flags)
    assert done.code == 0, done.err
    layers = done.json["layers"]
    assert {(x["layer"], x["field"]) for x in layers} == {(n, f) for n in (0, 1) for f in "kv"}
    assert "Sensitivity by layer" in report.read_text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--layers"], "--layers scores a text; give --text FILE"),
        (["--answer-tokens", "0"], "--answer-tokens must be at least 1"),
        (["--speed-tokens", "-1"], "--speed-tokens must be at least 0"),
        (["--out", "nowhere/a.jsonl"], "there is no folder nowhere; make it first"),
        (["--report", "."], "--report . is a folder"),
        (["--prompts", "EMPTY"], "holds no prompt"),
        (["--prompts", "LONG"], "at most 192 leave room for output"),
    ],
)
def test_more_that_is_refused(
    quire, tiny: Path, tmp_path: Path, flags: list[str], says: str
) -> None:
    empty, long = tmp_path / "empty.txt", tmp_path / "long.txt"
    empty.write_text("\n")
    long.write_text(WORDS)
    named = {"EMPTY": str(empty), "LONG": str(long)}
    done = quire("eval", tiny, *(named.get(f, f) for f in flags))
    assert done.code == 2, done.err
    assert done.err.count("\n") == 1
    assert says in done.err
