"""A tiny model folder that the tests make themselves: two layers, a byte-level tokenizer, a chat template if wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONTEXT = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(
    folder: Path, *, seed: int = 0, template: str | None = None, context: int = CONTEXT
) -> Path:
    """A random Llama of two layers that writes printable characters, with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {c: i for i, c in enumerate(alphabet, 2)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0.0, 0.3 if "embed" in name else 2.0 / p.shape[-1] ** 0.5)
        for token, i in vocab.items():
            if not (token.isascii() and token.isalpha() and len(token) == 1):
                model.lm_head.weight[i] = 0.0
    model.save_pretrained(folder)
    return folder


def chaotic_model(window: int | None = None) -> Any:
    """A Llama of two layers, or a Mistral with that window, whose weights are large: small errors change its words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    torch.set_num_threads(1)
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }
    if window is None:
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    return MistralForCausalLM(MistralConfig(**sizes, sliding_window=window)).eval()
