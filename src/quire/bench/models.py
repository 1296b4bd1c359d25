"""A Llama of a given size with random weights, so that nobody needs a download to measure speed."""

from __future__ import annotations

from typing import Any

from quire.errors import ConfigError
from quire.models.load import Loaded

__all__ = ["SIZES", "check_size", "random_llama"]

SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(layers=2, hidden=128, heads=2, kv_heads=1, intermediate=256, vocab=512),
    "55m": dict(layers=8, hidden=512, heads=8, kv_heads=2, intermediate=1408, vocab=32000),
    "1.1b": dict(layers=22, hidden=2048, heads=32, kv_heads=4, intermediate=5632, vocab=32000),
}
"""The largest is the shape of KV-cache comparisons on CPUs: 22,528 bytes of cache a token in 16 bits."""


def check_size(size: str) -> dict[str, int]:
    """The shape of that name. Raises ConfigError."""
    if size not in SIZES:
        raise ConfigError(f"unknown size --random {size!r}; known: {', '.join(SIZES)}")
    return SIZES[size]


def random_llama(size: str, *, context: int, dtype: str = "bfloat16", seed: int = 0) -> Loaded:
    """Makes one, on the CPU.

    Args:
        size: one of `SIZES`.
        context: its longest sequence in tokens.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = check_size(size)
    config = LlamaConfig(
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        vocab_size=shape["vocab"],
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(getattr(torch, dtype))  # never a second copy in float32
    try:
        model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return Loaded(model.eval(), None, f"random-{size}")
