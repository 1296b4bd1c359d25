"""What cannot work is refused with one line that says what would, exit code 2, before weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes to the weights has refused too late."""

    def load(*_: object, **__: object) -> None:
        pytest.fail("the weights were about to be loaded")

    monkeypatch.setattr("quire.cli.prepare.load_model", load)


def refused(done, *parts: str) -> None:
    assert done.code == 2, done.err
    assert done.out == ""
    assert done.err.startswith("quire: ")
    assert done.err.count("\n") == 1, "one line"
    for part in parts:
        assert part in done.err


def changed(tiny: Path, to: Path, config: object = None, *, without: str = "") -> Path:
    folder = shutil.copytree(tiny, to)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if without:
        (folder / without).unlink()
    return folder


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--kv", "int5"], "unknown codec 'int5'; known: auto, bf16"),
        (["--kv", "k=bf16,z=fp32"], "unknown field 'z'; fields are k, v"),
        (["--kv", "bf16:bits=2"], "unknown parameter 'bits=2'"),
        (["--kv", "bf16;skip_layers=9"], "skip_layers must lie within -2..1"),
        (["--keep", "h3o"], "unknown policy 'h3o'; known: "),
        (["--attention", "flash"], "unknown attention backend 'flash'; known: auto"),
        (["--memory", "lots"], "for example 8GiB"),
        (["--memory", "1000TiB"], "is more than the"),
        (["--memory", "1KiB"], "too small for one request"),
        (["--memory", "20KB"], "149 tokens need 40,960 bytes of cache and --memory 20KB gives"),
        (["--block-tokens", "0"], "block_tokens must be at least 1, not 0"),
        (["--dtype", "int4"], "unknown dtype 'int4'; known: auto, float32"),
        (["--device", "tpu"], "unknown device 'tpu'; known: cpu, cuda"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1, not 0"),
        (["--temperature", "-1"], "must be a number between 0 and 100"),
        (["--top-p", "0.5"], "add --temperature"),
        (["--top-k", "5"], "add --temperature"),
        (["--temperature", "1", "--top-p", "0"], "above 0 and at most 1"),
        (["--stop", ""], "non-empty"),
        (["--kv", "none", "--memory", "1GiB"], "--memory describes a cache"),
        (["--kv", "none", "--block-tokens", "8"], "--block-tokens describes a cache"),
        (["--kv", "none", "--compare", "none"], "drop --kv none"),
        (["--compare", "bf16"], "unknown --compare 'bf16'; known: none"),
        (["--compare", "none", "--trace"], "choose one of them"),
        (["--compare", "none", "--quiet"], "drop one of them"),
        (["second", "--compare", "none"], "takes one prompt, not 2"),
        (["--trace", "--quiet"], "drop one of them"),
        (["--bogus"], "No such option: --bogus; see quire run --help"),
        (["--max-tokens", "many"], "--max-tokens"),
        (["--prompts", "/nowhere/prompts.txt"], "No such file"),
        (["--config", "/nowhere/q.toml"], "No such file"),
        (["-", "-"], "stdin can be read once"),
        (["half \udcff"], "prompt 2: the text is not Unicode"),
    ],
)
def test_a_flag_that_cannot_work(quire, tiny: Path, flags: list[str], says: str) -> None:
    refused(quire("run", "a prompt of some words", "--model", tiny, *flags), says)


def test_no_cuda_here(quire, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(quire("run", "a", "--model", tiny, "--device", "cuda"), "device 'cpu' works")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no prompt: give one as an argument, --prompts FILE, or -"),
        ([""], "the prompt is empty"),
        (["words", " \n"], "prompt 2: the prompt is empty"),
        (["x" * 256], "the prompt has 256 tokens and the context 256; at most 255"),
        (["words", "x" * 300], "prompt 2: the prompt has 300 tokens"),
    ],
)
def test_a_prompt_that_cannot_run(quire, tiny: Path, arguments: list[str], says: str) -> None:
    refused(quire("run", *arguments, "--model", tiny), says)


def test_an_empty_stdin(quire, tiny: Path) -> None:
    refused(quire("run", "-", "--model", tiny, stdin="\n"), "the prompt is empty")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("\n \n", "holds no prompt"),
        ('{"prompt": "a"}\n\n{"prompt": \n', "line 3: not JSON"),
        ('{"prompt": "a"}\n["b"]\n', "line 2: must be an object with a prompt"),
        ('{"promt": "a"}', "line 1: must be an object with a prompt"),
        ('{"prompt": "a", "max_token": 5}', "line 1: unknown key 'max_token'; known: prompt, max_"),
        ('{"prompt": 5}', "line 1: prompt must be a string or a list of token ids"),
        ('{"prompt": ""}', "line 1: the prompt is empty"),
        ('{"prompt": "a", "top_p": 7, "temperature": 1}', "line 1: top_p=7 must be"),
        ('{"prompt": "a", "max_tokens": 0}', "line 1: max_tokens must be at least 1"),
        ('{"prompt": [1, 999]}', "line 1: token ids must lie within 0..257"),
    ],
)
def test_a_prompts_file_that_cannot_be_read(
    quire, tiny: Path, tmp_path: Path, content: str, says: str
) -> None:
    file = tmp_path / "prompts"
    file.write_text(content)
    refused(quire("run", "--prompts", file, "--model", tiny), says, "prompts")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("max_tokns = 3", "max_tokns is unknown; known: attention, "),
        ("[run]\nmax_tokens = '3'", "[run] max_tokens = '3' must be a number"),
        ("temperature = true", "must be a number"),
        ("stop = [1]", "must be a list of strings"),
        ("run = 3", "run must be a table"),
        ("[runn]\nkv = 'bf16'", "runn is unknown"),
        ("kv = ", "not TOML"),
        ("kv = 'int5'", "unknown codec 'int5'"),
        ("system = 'be nice'", "system is unknown"),
    ],
)
def test_a_config_file_that_cannot_be_used(
    quire, tiny: Path, tmp_path: Path, content: str, says: str
) -> None:
    file = tmp_path / "q.toml"
    file.write_text(content)
    refused(quire("run", "a", "--model", tiny, "--config", file), says)


def test_no_such_model(quire, tmp_path: Path) -> None:
    refused(quire("run", "a", "--model", tmp_path / "none"), "there is no folder", "hub id")
    refused(quire("chat", "--model", tmp_path / "none"), "there is no folder")


def test_no_model_without_a_hub(quire, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that may be a hub id, and a hub that does not answer: one line, and soon."""
    from huggingface_hub import HfApi

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    refused(
        quire("run", "a", "--model", "nobody/no-such-model"),
        "there is no folder nobody/no-such-model, and the hub gives no such model (Name or service",
    )


@pytest.mark.parametrize(
    ("config", "without", "says"),
    [
        (None, "config.json", "holds no config.json"),
        (None, "model.safetensors", "holds no weights: no model.safetensors"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "", "no causal language"),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, "", "no causal language"),
        ({"model_type": "bert"}, "", "no causal language model"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "", "encoder-decoder"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "", "no causal language model"),
        ({"model_type": "nonesuch"}, "", "knows no model_type 'nonesuch'"),
        ([], "", "names no model_type"),
    ],
)
def test_a_folder_that_is_no_causal_model(
    quire, tiny: Path, tmp_path: Path, config: object, without: str, says: str
) -> None:
    folder = changed(tiny, tmp_path / "m", config, without=without)
    refused(quire("run", "a", "--model", folder), says, str(folder))


def test_weights_that_were_cut_off(quire, tiny: Path, tmp_path: Path) -> None:
    folder = changed(tiny, tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(quire("run", "a", "--model", folder), "model.safetensors is damaged or was cut off")


def test_a_text_prompt_needs_a_tokenizer(quire, tiny: Path, tmp_path: Path) -> None:
    folder = changed(tiny, tmp_path / "m", without="tokenizer.json")
    refused(quire("run", "a", "--model", folder), "this model has no tokenizer", '"prompt": [1, 2]')
    refused(quire("chat", "--model", folder, stdin=""), "has no tokenizer")


def test_a_command_that_is_none(quire) -> None:
    refused(quire("walk"), "No such command 'walk'", "quire --help")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--session", "/nowhere/s"], "there is no folder /nowhere"),
        (["--session", "/"], "not a file"),
        (["--session", "s", "--kv", "none"], "drop one of them"),
        (["--max-tokens", "0"], "at least 1"),
    ],
)
def test_a_chat_that_cannot_begin(quire, tiny: Path, flags: list[str], says: str) -> None:
    refused(quire("chat", "--model", tiny, *flags, stdin=""), says)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--kv", "kivi"], "a head_dim that is a multiple of 16 works, or codec fp8"),
        (["--kv", "k=kivi:group=16,v=int8"], "codec kivi cannot serve k of 8 channels"),
        (["--kv", "int4:group=32"], "groups of 32 channels do not divide k's 8; use group=head"),
        (["--kv", "int8", "--block-tokens", "8"], "take a multiple of 16, as 16"),
        (["--kv", "kivi:bits=3"], "bits=3 is not served; known: 2, 4"),
        (["--kv", "bf16;sinks=4"], "none does here; drop them"),
        (["--kv", "kivi;window=64"], "kivi keeps 128 recent tokens raw by itself; give a wider"),
    ],
)
def test_what_a_codec_cannot_serve_is_refused_before_the_weights(
    quire, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], says: str
) -> None:
    """tiny's heads have 8 channels."""
    refused(quire("run", "a", "--model", tiny, *flags), says)

    def load(*_: object, **__: object) -> None:
        pytest.fail("the weights were about to be loaded")

    monkeypatch.setattr("quire.models.load.load_model", load)
    text = tmp_path / "text.txt"
    text.write_text("a b c d " * 200)
    refused(quire("eval", tiny, *flags, "--text", text, "--length", "64"), says)
