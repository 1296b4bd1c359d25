"""--trace tells what the steps really did."""

from __future__ import annotations

from pathlib import Path

from quire.cli.trace import _numbers, spans_text


def test_every_step_says_what_it_computed_read_and_holds(quire, tiny: Path) -> None:
    args = ("run", "hello", "--model", tiny, "--max-tokens", 6, "--block-tokens", 4, "--trace")
    document = quire(*args, "--json").json
    rows = document["trace"]
    assert [r["phase"] for r in rows] == ["prefill"] + ["decode"] * 5
    tokens = document["requests"][0]["token_ids"]
    block_bytes = document["groups"][0]["block_bytes"]
    for i, row in enumerate(rows):
        stop = 5 + i
        start = stop - 1 if i else 0
        assert row["step"] == i + 1
        assert row["computed"] == [start, stop]
        assert row["input"] == (tokens[i - 1 : i] if i else row["input"])
        assert row["cached_before"]["full0"] == ([[0, start]] if start else [])
        assert row["cached_after"]["full0"] == [[0, stop]]
        assert row["read"]["full0"] == [[0, stop]]
        assert len(row["blocks"]["full0"]) == -(-stop // 4)
        assert row["kv_bytes"] == -(-stop // 4) * block_bytes
    done = quire(*args)
    table = [line.split() for line in done.err.split("\n") if " decode " in line]
    assert [line[0] for line in table] == ["2", "3", "4", "5", "6"]
    assert "8:9" in done.err
    assert "0:8→0:9" in done.err
    assert done.out == document["requests"][0]["text"] + "\n"


def test_without_a_cache_everything_is_computed_and_nothing_read(quire, tiny: Path) -> None:
    args = ("run", "hello", "--model", tiny, "--max-tokens", 3, "--kv", "none", "--trace")
    document = quire(*args, "--json").json
    assert [r["computed"] for r in document["trace"]] == [[0, 5], [0, 6], [0, 7]]
    assert all(r["read"] == {} and r["kv_bytes"] == 0 for r in document["trace"])
    assert "no cache: every step computes the whole sequence" in quire(*args).err


def test_a_window_drops_what_it_no_longer_needs(quire, tmp_path: Path) -> None:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=6,
        max_position_embeddings=64,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}')
    base = ("run", "--prompts", file, "--model", tmp_path, "--max-tokens", 8, "--block-tokens", 2)
    rows = quire(*base, "--trace", "--json").json["trace"]
    last = rows[-1]
    assert last["computed"] == [16, 17]
    assert last["read"]["window0"] == [[11, 17]], "six positions, the query's own among them"
    assert last["cached_before"]["window0"][0][0] > 0
    assert -1 in last["blocks"]["window0"]


def test_block_lists_are_short() -> None:
    assert _numbers([0, 1, 2, 7, -1, -1, 9]) == "0-2 7 · 9"
    assert _numbers([3]) == "3"
    assert spans_text([(0, 4), (20, 32)]) == "0:4,20:32"
    assert spans_text([]) == "–"
