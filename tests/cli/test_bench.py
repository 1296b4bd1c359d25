"""`quire bench`: the document's keys, several recipes in one run, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from quire.kernels import native
from quire.models.compiled import Compiled

KEYS = {
    *("case", "ctx", "batch", "out", "kv", "keep", "tokens_per_s", "seconds", "kv_bytes_per_token"),
    *("weight_bytes_per_step", "stream_gb_per_s", "floor_tokens_per_s", "hardware", "commit"),
}
SMALL = ("--ctx", 12, "--batch", 2, "--out", 3, "--repeats", 1, "--memory", "16MiB")


@pytest.fixture(autouse=True)
def _short_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    from quire.bench.machine import Stream

    monkeypatch.setattr("quire.bench.measure.Stream", lambda _: Stream(1 << 16))


@pytest.mark.parametrize("case", ["decode", "prefill", "concurrent", "shared-prefix"])
def test_document(quire: Callable[..., Any], case: str) -> None:
    done = quire("bench", case, "--random", "tiny", *SMALL, "--json")
    assert done.code == 0, done.err
    assert done.json.keys() >= KEYS
    assert (done.json["case"], done.json["ctx"], done.json["batch"]) == (case, 12, 2)
    assert done.json["tokens_per_s"] > 0
    assert ("share_of_product" in done.json) == (case == "prefill")
    if case == "prefill":
        assert done.json["share_of_product"]["median"] > 0
    assert done.json["kv_bytes_per_token"] == 2 * 2 * 64 * 2


def test_recipes_share_a_run(quire: Callable[..., Any], tiny: Any) -> None:
    done = quire(
        "bench", "decode", "--model", tiny, *SMALL, "--kv", "fp32", "--kv", "bf16", "--json"
    )
    assert done.code == 0, done.err
    assert [r["kv"] for r in done.json["runs"]] == ["fp32", "bf16"]
    wide, narrow = (r["kv_bytes_per_token"] for r in done.json["runs"])
    assert wide == 2 * narrow


def test_for_people(quire: Callable[..., Any]) -> None:
    done = quire("bench", "decode", "--random", "tiny", *SMALL)
    assert done.out.startswith("decode 2 x 12 + 3, kv auto: ")
    assert "of the floor" in done.out
    assert "memory reads" in done.err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("nothing",), "unknown case 'nothing'; known: decode"),
        (("decode", "--out", 1), "--out must be at least 2"),
        (("decode", "--batch", 0), "--batch must be at least 1"),
        (("decode", "--repeats", 0), "--repeats must be at least 1"),
        (("decode", "--random", "7b"), "known: tiny, 55m, 1.1b"),
        (("decode", "--random", "tiny", "--model", "x"), "drop one of them"),
        (("decode", "--random", "tiny", "--dtype", "int3"), "unknown dtype 'int3'"),
        (("decode", "--ctx", 10**7), "ask for fewer"),
        (("decode", "--kv", "nothing"), "nothing"),
        (("decode", "--keep", "nothing"), "nothing"),
        (("decode", "--weights", "nothing"), "known: auto, plain, prepacked, int8, int4"),
        (("decode", "--attention", "nothing"), "unknown attention backend"),
        (("prefill", "--compile"), "--compile is for decode steps, and prefill makes none here"),
        (("serve", "http://127.0.0.1:1", "--compile"), "and serve makes none here"),
        (("decode", "--compile", "--attention", "reference"), "take another one, or drop it"),
        (("decode", "--random", "tiny", "--memory", "1KiB"), "too small"),
    ],
)
def test_refusals(quire: Callable[..., Any], words: tuple[object, ...], part: str) -> None:
    done = quire("bench", *words)
    assert done.code == 2, done.err
    assert done.out == ""
    assert done.err.startswith("quire: ")
    assert done.err.count("\n") == 1, "one line"
    assert part in done.err


@pytest.mark.skipif(native.load() is None, reason="the CPU kernels were not built here")
def test_compiled_sides(quire: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measured side runs compiled, over the one packed model; the reference beside them stays eager."""
    made, layers = [], []

    def compile_nothing(runner: Any) -> None:
        made.append(type(runner.bridge.backend).__name__)
        compiled = Compiled(runner.bridge)
        layers.append(len(compiled.linears))
        compiled.restore()

    monkeypatch.setattr("quire.models.compiled.check_compile", lambda: None)
    monkeypatch.setattr("quire.models.open.check_compile", lambda: None)
    monkeypatch.setattr("quire.models.open.compile_runner", compile_nothing)
    words = ("--random", "tiny", *SMALL, "--kv", "bf16", "--kv", "int8", "--weights", "prepacked")
    done = quire("bench", "decode", *words, "--compile", "--json")
    assert done.code == 0, done.err
    assert [r["compiled"] for r in done.json["runs"]] == [True, True]
    assert len(made) == 2
    assert "ReferenceBackend" not in made
    assert layers == [2 * 7 + 1] * 2


def test_an_interrupt_is_quiet(quire: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quire.bench.measure.run", stop)
    done = quire("bench", "decode", "--random", "tiny", *SMALL)
    assert (done.code, done.out) == (130, "")
    assert done.err.splitlines()[-1] == "quire: interrupted; nothing is reported"
