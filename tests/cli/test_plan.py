"""`quire plan` on the command line: no torch, one document, one line of refusal, and pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if {name, name.split(".")[0]} & set(sys.argv[1].split(",")):
            raise ImportError("blocked by the test: " + name)
sys.meta_path.insert(0, Refuse())
from quire.cli import invoke
sys.exit(invoke(sys.argv[2:]))
"""
HEAVY = ("torch", "transformers", "numpy", "huggingface_hub")
SLOW = ("typer", "click", "pydantic", "rich", "importlib.metadata")
"""Each takes longer to be imported than a plan takes."""


def run_without(refused: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in an interpreter that cannot import these."""
    return subprocess.run(
        [sys.executable, "-c", BLOCK, ",".join(refused), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "COLUMNS": "80"},
    )


@pytest.mark.parametrize("model", [["llama-3.1-8b"], []])
def test_it_needs_neither_torch_nor_numpy_nor_the_other_commands(model: list[str]) -> None:
    done = run_without(HEAVY + SLOW, "plan", *model, "--device", "h100", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes_per_token"] == (131_072 if model else 3072)
    assert found["context"] == (131_072 if model else 4096)
    assert found["max_users"] > 0


def test_its_help_and_its_tables_need_no_torch() -> None:
    assert "Usage: quire plan" in run_without(HEAVY, "plan", "--help").stdout
    assert "most users" in run_without(HEAVY, "plan", "gpt2", "--device", "8GiB").stdout


def test_the_table_says_what_the_document_says(quire: Run) -> None:
    arguments = ("plan", "llama-2-7b", "--device", "24GiB", "--context", 4096, "--users", 8)
    found, shown = quire(*arguments, "--json").json, quire(*arguments)
    assert found["kv_bytes"] == 8 * 2 * (1 << 30)
    assert found["fits"] is False
    assert shown.code == 0
    for text in ("512 KiB", "2 GiB", "16 GiB", "12.55 GiB", "no", "llama-2-7b, 8 users"):
        assert text in shown.out
    assert "would help" in shown.out
    assert "8 users" in shown.out
    assert "more than the 2,048 that llama-2-7b was made for" in shown.err


def test_several_recipes_are_several_plans(quire: Run) -> None:
    done = quire("plan", "llama-2-7b", "--kv", "auto", "--kv", "int4", "--json")
    plans = done.json["plans"]
    assert [p["kv"] for p in plans] == ["auto", "int4"]
    assert plans[0]["bytes_per_token"] > 3 * plans[1]["bytes_per_token"]
    assert "int4" in quire("plan", "llama-2-7b", "--kv", "auto", "--kv", "int4").out


def test_a_folder_is_weighed_by_its_files(quire: Run, tiny: Path) -> None:
    found = quire("plan", tiny, "--json").json
    from safetensors.torch import load_file

    weights = load_file(tiny / "model.safetensors")
    assert found["weight_bytes"] == sum(x.numel() * x.element_size() for x in weights.values())
    assert found["weight_form"] == "its files"
    assert found["bytes_per_token"] == 2 * 2 * 8 * 2 * 4
    assert found["context"] == 256
    assert quire("plan", tiny / "config.json", "--json").json["kv_bytes"] == found["kv_bytes"]
    half = quire("plan", tiny, "--dtype", "bf16", "--json").json
    assert half["bytes_per_token"] == found["bytes_per_token"] / 2


def test_without_a_model_it_is_the_packaged_one(quire: Run) -> None:
    found = quire("plan", "--json").json
    assert found["model"] == "packaged"
    assert found["bytes_per_token"] == 3072


def test_a_configuration_that_the_hub_names_with_its_owner(quire: Run) -> None:
    found = quire("plan", "meta-llama/Llama-2-7b-hf", "--json").json
    assert found["bytes_per_token"] == 524_288
    assert any("the catalogue's row of that name" in note for note in found["assumed"])
    assert quire("plan", "llama-2-7b", "--json").json["assumed"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lama-2-7b"], "no model of the catalogue; near it: llama-2-7b"),
        (["none/config.json"], "no such file or folder"),
        (["llama-2-7b", "--kv", "int5"], "unknown codec 'int5'; known: auto"),
        (["llama-2-7b", "--kv", "none"], "unknown codec 'none'"),
        (["deepseek-v3", "--keep", "ada(h2o)"], "one latent for all heads"),
        (["mistral-7b-v0.1", "--keep", "h2o"], "no layer of this model keeps every token"),
        (["llama-2-7b", "--keep", "h3o"], "h3o.*known"),
        (["llama-2-7b", "--device", "h1000"], "unknown device 'h1000'; known: .*h100"),
        (["llama-2-7b", "--context", "0"], "--context must be at least 1, not 0"),
        (["llama-2-7b", "--tp", "0"], "--tp must be at least 1, not 0"),
        (["llama-2-7b", "--reserve", "1.5"], r"--reserve is a share .* not 1.5"),
        (["llama-2-7b", "--weights", "int3"], "unknown --weights 'int3'; known: .*int4"),
        (["llama-2-7b", "--price", "2"], "--price is that of a device: add --device"),
        (["llama-2-7b", "--device", "h100", "--price", "-1"], "--price must be above zero"),
        (["llama-2-7b", "--images", "1"], "does not say how many tokens an image takes"),
        (["llama-2-7b", "--lengths", "none.csv"], "--lengths none.csv: No such file"),
        (["llama-2-7b", "--plot", "x.bmp"], "must end in .png, .svg, .html"),
        (["deepseek-v3", "--kv", "kivi:bits=2"], "codec kivi cannot serve latent"),
        (["qwen3-30b-a3b", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["chatglm3-6b", "--block-tokens", "24", "--kv", "int4"], "take a multiple of 16"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    quire: Run, arguments: list[str], words: str
) -> None:
    import re

    done = quire("plan", *arguments)
    assert done.code == 2
    assert done.out == ""
    assert re.search(words, done.err), done.err
    assert len(done.err.strip().splitlines()) == 1


def test_a_config_without_what_weights_need_asks_for_them(quire: Run, tmp_path: Path) -> None:
    config = {"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    config |= {"num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151_936}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert quire("plan", file, "--json").json["weight_bytes"] is None
    done = quire("plan", file, "--device", "h100")
    assert done.code == 2
    assert "give --weights" in done.err
    assert quire("plan", file, "--device", "h100", "--weights", "57GiB").code == 0
    file.write_text("[]")
    assert "holds no config" in quire("plan", file).err
    file.write_text("{")
    assert "not JSON" in quire("plan", file).err


def test_the_list_names_models_devices_and_sources(quire: Run) -> None:
    done = quire("plan", "--list", "--json")
    assert len(done.json["models"]) >= 60
    assert {"a100-40", "a100-80", "h100"} <= set(done.json["devices"])
    shown = quire("plan", "--list").out
    assert "llama-3.1-405b" in shown
    assert "NVIDIA data sheet" in shown


def test_money(quire: Run) -> None:
    done = quire(
        "plan", "llama-2-7b", "--device", "a100-80", "--context", 4096, "--price", 2, "--json"
    )
    found = done.json["price"]
    assert found["users"] == done.json["max_users"]
    assert found["per_user_hour"] == 2 / found["users"]
    assert found["per_million_tokens"] > 0


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_pictures(quire: Run, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plan{suffix}"
    done = quire("plan", "gemma-3-12b-it", "--device", "h100", "--users", 8, "--plot", file)
    assert done.code == 0, done.err
    data = file.read_bytes()
    assert data.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".html": b"<!doctype"}[suffix])
    assert len(data) > 10_000
    if suffix == ".html":
        text = data.decode()
        assert "http" not in text.replace("http://www.w3.org", "").replace(
            "http://purl", ""
        ).replace("https://matplotlib.org", "").replace("http://creativecommons.org", "")
        assert "kv_bytes_per_user" in text


def test_curves_hold_what_the_planner_says() -> None:
    from quire.cli.plan_plot import curves
    from quire.plan.catalogue import known_model
    from quire.plan.demand import Demand, Setup
    from quire.plan.shape import read_shape
    from quire.spec import KVConfig

    row = known_model("deepseek-v2-lite")
    assert row is not None
    setup = Setup(read_shape(row["config"]), KVConfig("int8"))
    found = curves([setup], 4096)
    assert list(found) == ["int8", "auto", "int4"]  # kivi serves no latents
    for tokens, n_bytes in found["int8"]:
        assert n_bytes == Demand(setup).sequence_bytes(tokens)
    assert found["int8"][-1][0] == 8 * 4096


@pytest.mark.parametrize(
    ("device", "ranks", "label"),
    [("h100", 4, "4 x h100: 320 GiB"), ("l4", 1, "l4: 24 GiB"), ("8GiB", 1, "8GiB")],
)
def test_the_lines_of_a_picture_say_what_they_are(device: str, ranks: int, label: str) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from quire.cli.plan import _setup
    from quire.cli.plan_plot import _fill
    from quire.plan.answer import answer
    from quire.spec import KVConfig

    setup = replace(_setup("gpt2", KVConfig(), device, None, None), ranks=ranks)
    axes = Figure().add_subplot()
    _fill(axes, [setup], answer(setup, context=400_000))
    labels = [line.get_label() for line in axes.lines]
    assert label in labels
    assert not any("trained context" in str(x) for x in labels)  # far to the left of the curves
    assert axes.xaxis.get_major_formatter()(1 << 20) == "1M"
    axes.clear()
    _fill(axes, [setup], answer(setup, context=1024))
    assert "trained context 1,024" in [line.get_label() for line in axes.lines]


def test_without_matplotlib_it_says_what_to_install(
    quire: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = quire("plan", "gpt2", "--plot", tmp_path / "x.png")
    assert done.code == 2
    assert "pip install 'quire[plot]'" in done.err


# -- a run that cannot fit is refused before its weights are read --------------------------------------------------


def test_run_says_how_many_tokens_and_which_codec_would_fit(quire: Run, tiny: Path) -> None:
    done = quire(
        "run", "Once upon a time", "--model", tiny, "--max-tokens", 180, "--memory", "36KB"
    )
    assert done.code == 2
    assert "need 57,344 bytes of cache and --memory 36KB gives" in done.err, done.err
    said = int(done.err.partition("ask for at most ")[2].partition(" ")[0])
    codec = done.err.partition("--kv ")[2].partition(" would fit")[0]
    assert len(done.err.strip().splitlines()) == 1
    common = ("run", "Once upon a time", "--model", tiny, "--memory", "36KB", "--ignore-eos")
    most = (
        said - len("Once upon a time") + 1
    )  # a token a character; the last one sampled is not cached
    assert quire(*common, "--max-tokens", most).code == 0
    assert quire(*common, "--max-tokens", most + 1).code == 2
    assert quire(*common, "--max-tokens", 180, "--kv", codec).code == 0


def test_run_refuses_weights_that_the_machine_cannot_hold(
    quire: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quire.models import memory

    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000)
    done = quire("run", "x", "--model", tiny, "--memory", "1MiB")
    assert done.code == 2
    assert "its weights take" in done.err
    assert "cpu has 10,000 free" in done.err
