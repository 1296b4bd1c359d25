"""What a model folder says before it is loaded, and what loading gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from quire.errors import ConfigError
from quire.models import load
from quire.models.load import check_source, load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=77,
        eos_token_id=[3, 4],
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="3KB")
    assert len(list(path.glob("*.safetensors"))) > 2, "shards, so that one can be missing"
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "m")


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_is_read_without_its_weights(folder: Path) -> None:
    source = check_source(folder, dtype="bf16", device="cpu")
    assert source.folder == folder
    assert source.architecture == "LlamaForCausalLM"
    assert (source.dtype, source.device) == ("bfloat16", "cpu")
    assert source.max_context_tokens == 77
    assert source.tokenizer is None


def test_loading_gives_a_model_that_can_run(folder: Path) -> None:
    found = load_model(str(folder))
    assert type(found.model).__name__ == "LlamaForCausalLM"
    assert found.model.dtype is torch.bfloat16, "auto: as the file has it"
    assert not found.model.training
    assert (found.name, found.tokenizer) == (str(folder), None)
    assert found.eos_token_ids == (3, 4)
    assert found.missing == ()


@pytest.mark.parametrize("dtype", ["float32", "fp16", "float64", "torch.bfloat16"])
def test_any_dtype(folder: Path, dtype: str) -> None:
    wanted = {"fp16": "float16", "torch.bfloat16": "bfloat16"}.get(dtype, dtype)
    assert load_model(folder, dtype=dtype, device="cpu").model.dtype is getattr(torch, wanted)
    source = check_source(folder)
    assert load_model(source, dtype=dtype).model.dtype is getattr(torch, wanted)


def test_the_digest_tells_weights_and_dtypes_apart(folder: Path, copy: Path) -> None:
    first = load_model(folder).digest
    assert load_model(copy).digest == first
    assert load_model(folder, dtype="float32").digest != first
    other = load_model(copy)
    with torch.no_grad():
        other.model.model.norm.weight[0] += 1
    assert other.digest != first


def test_a_missing_shard_is_named(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=rf"1 of \d+ weight files are missing \({shard.name}"):
        check_source(copy)


def test_a_short_shard_is_named(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=rf"{shard.name} is damaged or was cut off"):
        check_source(copy)


def test_an_index_that_is_none(copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"index\.json cannot be read"):
        check_source(copy)


def test_weights_that_the_file_lacks_are_told(copy: Path) -> None:
    edit(copy, num_hidden_layers=3)
    found = load_model(copy)
    assert any("layers.2" in name for name in found.missing)


def test_weights_of_another_shape_are_refused_in_one_line(copy: Path) -> None:
    edit(copy, hidden_size=24, head_dim=8)
    with pytest.raises(ConfigError, match="its weights cannot be loaded") as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]}, "no causal language"),
        ({"model_type": "distilbert"}, "no causal language"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "no causal language"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "llama .LlamaForSequenceClass"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "own", "auto_map": {"AutoModelForCausalLM": "x.Y"}}, "its own repository"),
        ({"model_type": "own"}, "knows no model_type 'own'"),
    ],
)
def test_what_writes_no_text_is_refused(copy: Path, config: dict[str, object], says: str) -> None:
    if "architectures" not in config:
        config = {"architectures": None} | config
    edit(copy, **config)
    with pytest.raises(ConfigError, match=says):
        check_source(copy)


def test_a_decoder_that_may_be_an_encoder_runs_as_a_decoder(copy: Path) -> None:
    edit(copy, model_type="bert", architectures=["BertLMHeadModel"], is_decoder=True)
    assert check_source(copy).architecture == "BertLMHeadModel"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["adapter_config.json"], "holds an adapter, not a model"),
        (["model.gguf"], "GGUF files are not read"),
        ([], "holds no config.json"),
    ],
)
def test_folders_of_other_things(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=says):
        check_source(tmp_path)


def test_config_that_is_not_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        check_source(copy)


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "a/b/c", "~/nowhere", "..", " "])
def test_names_that_are_no_hub_ids_are_not_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import HfApi

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no folder|holds no config"):
        check_source(name)


def test_without_a_name_it_is_the_packaged_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from quire import packaged

    monkeypatch.setattr(packaged, "path", lambda: folder)
    assert check_source().name == load.PACKAGED
    assert check_source().folder == folder
    monkeypatch.setattr(packaged, "path", lambda: tmp_path)
    with pytest.raises(ConfigError, match="no packaged model; name one"):
        check_source()


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("tpu", "unknown device 'tpu'; known: cpu, cuda"),
        ("cuda:x", "unknown device"),
        ("cuda", "no CUDA device"),
    ],
)
def test_devices(folder: Path, device: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=says):
        check_source(folder, device=device)


def test_a_device_that_is_one_too_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_source(folder, device="cuda:1").device == "cuda:1"
    with pytest.raises(ConfigError, match="the last is cuda:1"):
        check_source(folder, device="cuda:2")


def test_weights_begin_on_a_cache_line(tmp_path: Path) -> None:
    """A header of odd length shifts every tensor of a mapped file; torch's expert products want them aligned."""
    import struct

    import zoo

    zoo.build("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    padding = (
        5 + (-(8 + size + 5)) % 4 + 4
    )  # still a multiple of the element, no longer of 16 bytes
    header = raw[8 : 8 + size] + b" " * padding
    file.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + size :])
    loaded = load_model(check_source(str(tmp_path)))
    assert all(p.data_ptr() % 64 == 0 for p in loaded.model.parameters())
