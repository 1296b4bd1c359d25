"""quire run: what it writes, and that its figures are those of the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

KEYS = {
    "model",
    "way",
    "kv",
    "keep",
    "requests",
    "tokens_per_s",
    "kv_bytes_per_token",
    "kv_bytes_peak",
    "kv_bytes_end",
    "waste",
}
REQUEST_KEYS = {"prompt_tokens", "cached_tokens", "token_ids", "text", "finish_reason", "ttft_s"}
BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4  # layers, k and v, heads, head_dim, float32


def test_text_goes_to_stdout_and_figures_to_stderr(quire, tiny: Path, greedy) -> None:
    done = quire("run", "hello world", "--model", tiny, "--max-tokens", 40)
    assert done.code == 0
    want = quire("run", "hello world", "--model", tiny, "--max-tokens", 40, "--json").json
    assert want["requests"][0]["token_ids"] == greedy("hello world", 40)
    assert done.out == want["requests"][0]["text"] + "\n"
    for name in ("way into the model", "packed", "time to first token", "tokens per second"):
        assert name in done.err
    assert f"{BYTES_PER_TOKEN:,} B" in done.err
    assert all(line == line.rstrip() and len(line) <= 80 for line in done.err.split("\n"))


def test_the_document_has_the_contract_s_keys(quire, tiny: Path, greedy) -> None:
    done = quire("run", "abc", "--model", tiny, "--max-tokens", 50, "--json")
    assert done.code == 0
    assert done.err == ""
    document = done.json
    assert set(document) >= KEYS
    request = document["requests"][0]
    assert set(request) >= REQUEST_KEYS
    assert document["way"] == "packed"
    assert (document["kv"], document["keep"]) == ("auto", "full")
    assert document["model"] == str(tiny)
    assert request["token_ids"] == greedy("abc", 50)
    assert request["prompt_tokens"] == 3
    assert request["cached_tokens"] == 0
    assert request["finish_reason"] == "length"
    assert 0 < request["ttft_s"] < 60
    cached = 3 + 50 - 1  # the last token is never put into the cache
    assert document["kv_bytes_per_token"] == BYTES_PER_TOKEN
    assert document["kv_bytes_end"] == document["kv_bytes_peak"] == 64 * BYTES_PER_TOKEN
    assert document["waste"] == pytest.approx(1 - cached / 64)


def test_smaller_blocks_waste_less(quire, tiny: Path) -> None:
    done = quire(*("run", "abc", "--model", tiny, "--max-tokens", 8, "--json"), "--block-tokens", 4)
    assert done.json["kv_bytes_end"] == 12 * BYTES_PER_TOKEN
    assert done.json["waste"] == pytest.approx(2 / 12)


def test_without_a_cache_the_tokens_are_the_same(quire, tiny: Path, greedy) -> None:
    document = quire(
        "run", "abc", "--model", tiny, "--max-tokens", 30, "--kv", "none", "--json"
    ).json
    assert document["requests"][0]["token_ids"] == greedy("abc", 30)
    assert document["way"] is None
    assert (document["kv_bytes_per_token"], document["kv_bytes_peak"]) == (0, 0)


def test_a_plain_codec_halves_the_bytes(quire, tiny: Path) -> None:
    document = quire(
        "run", "abc", "--model", tiny, "--max-tokens", 4, "--kv", "bf16", "--json"
    ).json
    assert document["kv"] == "bf16"
    assert document["kv_bytes_per_token"] == BYTES_PER_TOKEN / 2


def test_dtype_is_what_the_model_computes_in(quire, tiny: Path) -> None:
    document = quire(
        "run", "abc", "--model", tiny, "--max-tokens", 4, "--dtype", "bfloat16", "--json"
    ).json
    assert document["dtype"] == "bfloat16"
    assert document["kv_bytes_per_token"] == BYTES_PER_TOKEN / 2


def test_prompts_run_as_one_batch_and_get_what_they_get_alone(quire, tiny: Path, greedy) -> None:
    texts = ["first", "the second one", "3"]
    document = quire("run", *texts, "--model", tiny, "--max-tokens", 20, "--json").json
    assert [r["token_ids"] for r in document["requests"]] == [greedy(t, 20) for t in texts]
    assert document["steps"] <= 22, "20 steps or little more: together, not one after the other"
    held = sum(r["kv_bytes_end"] for r in document["requests"])
    assert document["kv_bytes_peak"] == held
    done = quire("run", *texts, "--model", tiny, "--max-tokens", 20)
    for i, (text, request) in enumerate(zip(texts, document["requests"], strict=True), 1):
        assert f"[{i}] {text}\n{request['text']}\n" in done.out
    assert "requests" in done.err


def test_a_json_line_sets_its_own_limits(quire, tiny: Path, greedy, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "one", "max_tokens": 3}\n\n{"prompt": [5, 6, 7]}\n'
        + json.dumps({"prompt": "two", "stop": "zz", "temperature": 0.9, "seed": 3, "top_k": 4})
    )
    document = quire("run", "--prompts", file, "--model", tiny, "--max-tokens", 6, "--json").json
    one, ids, two = document["requests"]
    assert one["token_ids"] == greedy("one", 3)
    assert (ids["prompt_tokens"], len(ids["token_ids"])) == (3, 6)
    assert two["seed"] == 3


def test_a_line_of_text_is_a_prompt(quire, tiny: Path, greedy, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo words\r\n\n")
    args = ("--model", tiny, "--max-tokens", 5, "--json")
    document = quire("run", "zero", "--prompts", file, *args).json
    texts = ["zero", "one", "two words"]
    assert [r["token_ids"] for r in document["requests"]] == [greedy(t, 5) for t in texts]


def test_a_dash_reads_stdin(quire, tiny: Path, greedy) -> None:
    args = ("--model", tiny, "--max-tokens", 5, "--json")
    document = quire("run", "-", *args, stdin="two\nlines\n").json
    assert document["requests"][0]["token_ids"] == greedy("two\nlines", 5)
    document = quire("run", "--prompts", "-", *args, stdin="two\nlines\n").json
    assert [r["token_ids"] for r in document["requests"]] == [greedy("two", 5), greedy("lines", 5)]


def test_a_stop_string_ends_the_text_before_it(quire, tiny: Path, greedy) -> None:
    base = ("run", "abc", "--model", tiny, "--max-tokens", 30)
    whole = quire(*base, "--json").json["requests"][0]["text"]
    stop = whole[9:11]
    request = quire(*base, "--stop", stop, "--json").json["requests"][0]
    assert request["finish_reason"] == "stop"
    assert request["stop_reason"] == stop
    assert request["text"] == whole[: whole.index(stop)]
    assert stop in quire(*base, "--stop", stop).err


def test_a_seed_fixes_the_draws(quire, tiny: Path) -> None:
    def ids(*more: object) -> list[int]:
        args = ("run", "abc", "--model", tiny, "--max-tokens", 12, "--temperature", 1.5, "--json")
        tokens: list[int] = quire(*args, *more).json["requests"][0]["token_ids"]
        return tokens

    assert ids("--seed", 1) == ids("--seed", 1)
    assert ids("--seed", 1) != ids("--seed", 2)
    assert ids("--seed", 1) != ids("--seed", 1, "--top-k", 1)


def test_ignore_eos_goes_on(quire, tiny: Path, tmp_path: Path) -> None:
    """A model whose every token is an end."""
    import shutil

    folder = shutil.copytree(tiny, tmp_path / "ends")
    path = folder / "generation_config.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"eos_token_id": list(range(258))}))
    base = ("run", "abc", "--model", folder, "--max-tokens", 6, "--json")
    assert quire(*base).json["requests"][0]["finish_reason"] == "stop"
    request = quire(*base, "--ignore-eos").json["requests"][0]
    assert (request["finish_reason"], len(request["token_ids"])) == ("length", 6)


def test_quiet_says_nothing(quire, tiny: Path) -> None:
    done = quire("run", "abc", "--model", tiny, "--max-tokens", 4, "--quiet")
    assert (done.code, done.err) == (0, "")
    assert done.out


def test_output_is_limited_by_the_context(quire, tiny: Path) -> None:
    request = quire("run", "a" * 250, "--model", tiny, "--json").json["requests"][0]
    assert len(request["token_ids"]) == 6


def test_options_come_from_a_file_and_flags_win(
    quire, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "q.toml"
    file.write_text(
        f'model = "{tiny}"\nmax-tokens = 3\n[run]\nkv = "bf16"\njson = true\n[chat]\nsystem = "x"\n'
    )
    document = quire("run", "abc", "--config", file).json
    assert len(document["requests"][0]["token_ids"]) == 3
    assert document["kv"] == "bf16"
    document = quire("run", "abc", "--config", file, "--kv", "fp32", "--max-tokens", 5).json
    assert (document["kv"], len(document["requests"][0]["token_ids"])) == ("fp32", 5)


def test_the_environment_names_a_default_model(
    quire, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUIRE_MODEL", str(tiny))
    assert quire("run", "abc", "--max-tokens", 2, "--json").json["model"] == str(tiny)


def test_the_published_text_of_stories260k(quire: Callable[..., object], shared: Path) -> None:
    folder = shared / "models" / "stories260K"
    case = json.loads((folder / "reference.json").read_text())["cases"][0]
    done = quire(
        *("run", case["prompt"], "--model", folder, "--max-tokens", 40, "--json", "--ignore-eos")
    )
    assert done.json["requests"][0]["token_ids"] == case["greedy_ids"][:40]
