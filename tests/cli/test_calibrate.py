"""`quire calibrate`: a file that run, eval and plan take, and one line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FEW = ("--memory", "32MiB")
SMALL = ("--codec", "cq:form=2c2b", "--length", 65, "--tokens", 400)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    return path


@pytest.fixture
def made(quire, tiny: Path, text: Path, tmp_path: Path) -> str:
    """The recipe that names a fresh calibration of the tiny model."""
    done = quire("calibrate", tiny, *SMALL, "--text", text, "--out", tmp_path / "cq.safetensors")
    assert done.code == 0, done.err
    assert done.out == f"--kv cq:form=2c2b,file={tmp_path}/cq.safetensors\n"
    assert "bytes of tables from 390 tokens" in " ".join(done.err.split())
    return done.out.split()[1]


def test_what_it_writes_is_what_run_and_eval_read(quire, tiny: Path, made: str, text: Path) -> None:
    ran = quire("run", "--model", tiny, "--kv", made, "a" * 80, "--max-tokens", 4, *FEW, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["kv"] == made
    found = quire(
        *("eval", tiny, "--kv", f"{made},int8", "--text", text, "--length", 128, *FEW, "--json"),
    )
    assert found.code == 0, found.err
    kl = {r["kv"]: r["value"] for r in found.json["rows"] if r["metric"] == "kl"}
    assert 0 < kl["int8"] < kl[made]


def test_the_document_says_what_it_was_made_of(
    quire, tiny: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "kq.safetensors"
    done = quire(
        *("calibrate", tiny, "--codec", "kvquant:bits=2,sink=4", "--text", text, "--out", out),
        *("--length", 65, "--tokens", 400, "--inject", "--json"),
    )
    assert done.code == 0, done.err
    assert done.json["codec"] == "kvquant:bits=2"
    assert done.json["kv"] == f"kvquant:bits=2,sink=4,file={out}"
    assert (done.json["tokens"], done.json["injected"]) == ("390", "true")
    assert done.json["table_bytes"] > 0
    assert json.loads(done.out) == done.json


def test_a_plan_needs_no_calibration(quire, tiny: Path) -> None:
    done = quire("plan", tiny / "config.json", "--kv", "cq:form=8c8b", "--context", 256, "--json")
    assert done.code == 0, done.err
    assert (
        done.json["bytes_per_token"] == 2 * 2 * 2 * 2
    )  # layers, KV heads, k and v, half a cache line


def test_another_models_calibration_is_refused(quire, tiny_twin: Path, made: str) -> None:
    done = quire("run", "--model", tiny_twin, "--kv", made, "a", *FEW)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "was calibrated on another model" in done.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--codec", "int4", "--text", "TEXT", "--out", "OUT"), "int4 learns nothing from a text"),
        (("--codec", "cq", "--out", "OUT"), "give --text FILE"),
        (("--codec", "cq", "--text", "TEXT"), "give --out FILE.safetensors"),
        (("--codec", "cq", "--text", "none.txt", "--out", "OUT"), "No such file or directory"),
        (("--text", "TEXT", "--out", "/nowhere/x"), "name a file in a folder that can be"),
        (("--text", "TEXT", "--out", "OUT", "--tokens", 2), "--tokens must be at least 3"),
        (("--text", "TEXT", "--out", "OUT", "--length", 0), "--length must be at least 3"),
        (("--text", "TEXT", "--out", "OUT", "--seed", -1), "--seed must be at least 0"),
        (("--text", "TEXT", "--out", "OUT", "--memory", "x"), "memory"),
        (("--text", "TEXT", "--out", "OUT"), "256 centres want 8,192 tokens"),
        (("--text", "TEXT", "--out", "OUT", "--length", 5000), "to the context's 256"),
    ],
)
def test_bad_input_is_one_line(
    quire, tiny: Path, text: Path, tmp_path: Path, arguments: tuple[object, ...], says: str
) -> None:
    places = {"TEXT": text, "OUT": tmp_path / "out.safetensors"}
    done = quire("calibrate", tiny, *(places.get(a, a) for a in arguments))  # type: ignore[call-overload]
    assert done.code == 2
    assert done.err.count("\n") == 1, done.err
    assert says in done.err
    assert not places["OUT"].exists()


@pytest.mark.parametrize("command", [("run", "a"), ("eval",), ("bench", "decode")])
def test_a_codec_that_has_not_learned_is_refused_before_weights_are_read(
    quire, tiny: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("the weights were about to be loaded")

    monkeypatch.setattr("quire.models.load.load_model", load)
    where = (tiny,) if command[0] == "eval" else ("--model", tiny)
    done = quire(*command, *where, "--kv", "k=kvquant:bits=3,v=int4")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert (
        "needs a calibration of this model: quire calibrate MODEL --codec kvquant:bits=3"
        in done.err
    )
