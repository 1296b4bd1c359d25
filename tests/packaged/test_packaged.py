"""The packaged model as an installed package carries it."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenizer

from quire import packaged
from quire.cli.dialogue import Dialogue


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(packaged.path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return AutoTokenizer.from_pretrained(packaged.path())


def test_the_folder_is_small_and_whole() -> None:
    names = {p.name for p in packaged.path().iterdir()}
    assert names >= {
        "config.json",
        "digest.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    weights = packaged.path() / "model.safetensors"
    assert weights.stat().st_size <= 14_000_000
    assert packaged.digest() == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_finding_it_needs_no_torch() -> None:
    code = (
        "import sys; from quire import packaged; packaged.digest(); print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


def test_the_architecture_is_the_documented_one(model: LlamaForCausalLM) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (256, 6, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.max_position_embeddings == 4096
    assert config.vocab_size <= 4096
    assert 4e6 <= model.num_parameters() <= 7e6
    assert model.num_parameters() == json.loads(
        (packaged.path() / "digest.json").read_text()
    )["parameters"]  # fmt: skip
    saved = json.loads((packaged.path() / "config.json").read_text())
    assert saved["dtype"] == "bfloat16"


def test_text_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    text = 'def f(x):\n\treturn f"{x}: 12345 – naïve ✓"\n'
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids[1:]) == text


def test_turns_are_lines(tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "a = 12 ;"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<s>a = 12 ;\nb"
    said = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert said == "<s>a = 12 ;\nb\n", "the reply begins a line of its own"


def test_the_next_turn_goes_on_from_what_is_cached(tokenizer: Tokenizer) -> None:
    talk = Dialogue(tokenizer)
    asked = talk.ask("a = 12 ; a ?")
    reply = tokenizer.encode(" 12 ;", add_special_tokens=False)
    talk.answered(" 12 ;", reply, [tokenizer.eos_token_id])
    again = talk.ask("b ?")
    assert again[: len(asked) + len(reply)] == asked + reply, "nothing of it is computed twice"
