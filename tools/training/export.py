"""Writes a model as the folder that the package carries."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.corpus import BOS, BOS_ID, EOS, EOS_ID

LIMIT_BYTES = 14_000_000
# The model knows no roles: a conversation is its turns, one per line; a reply begins a line of its own.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{{ '' if loop.last and not add_generation_prompt else '\\n' }}{% endfor %}"
)


def export(
    model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path, facts: dict[str, object]
) -> str:
    """Writes bf16 weights, configuration, tokenizer and `digest.json`.

    Args:
        facts: what `digest.json` says beside the digest (tokens trained, seed)
    Returns: the SHA-256 of the weights' file
    Raises:
        ValueError: the weights are larger than a package should carry
    """
    folder.mkdir(parents=True, exist_ok=True)
    rounded = LlamaForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict({k: v.to(torch.bfloat16) for k, v in model.state_dict().items()})
    rounded.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID, do_sample=False
    )
    rounded.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    inline_chat_template(folder)
    weights = folder / "model.safetensors"
    weights.chmod(0o644)
    if weights.stat().st_size > LIMIT_BYTES:
        raise ValueError(f"{weights.name} is {weights.stat().st_size} bytes, over {LIMIT_BYTES}")
    with safe_open(weights, "pt") as opened:
        parameters = sum(opened.get_tensor(k).numel() for k in opened.keys())  # noqa: SIM118
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    record = {"sha256": digest, "parameters": parameters, **facts}
    (folder / "digest.json").write_text(json.dumps(record, indent=2) + "\n")
    return digest


def inline_chat_template(folder: Path) -> None:
    """Moves the template into `tokenizer_config.json`, where every reader looks for it."""
    apart = folder / "chat_template.jinja"
    if not apart.exists():
        return
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings["chat_template"] = apart.read_text()
    config.write_text(json.dumps(settings, indent=2) + "\n")
    apart.unlink()
