"""What a model recalls and how well it predicts, with the full cache, teacher-forced."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from training.tasks import Example


def recalled(model: LlamaForCausalLM, example: Example) -> list[bool]:
    """Per answer, whether every token of it is the most likely one.

    That is exact match under greedy decoding: a wrong token ends the count, and before it the
    forced context is the one the model would have written.
    """
    with torch.no_grad():
        logits = model(torch.from_numpy(example.ids)[None], use_cache=False).logits[0]
    best = logits.argmax(-1).numpy()
    return [
        bool((best[start - 1 : stop - 1] == example.ids[start:stop]).all())
        for start, stop in example.answers
    ]


def recall(model: LlamaForCausalLM, examples: Sequence[Example]) -> tuple[int, int]:
    """Answers right and answers asked."""
    results = [r for example in examples for r in recalled(model, example)]
    return sum(results), len(results)


def mean_loss(
    model: LlamaForCausalLM, ids: np.ndarray, window_tokens: int, windows: int, bos: int
) -> float:
    """Mean loss in nats per token over the first non-overlapping windows, each after `<s>`."""
    inner = window_tokens - 1
    windows = min(windows, len(ids) // inner)
    if not windows:
        raise ValueError(f"the text is shorter than one window of {window_tokens} tokens")
    total = 0.0
    for n in range(windows):
        x = torch.from_numpy(np.concatenate([[bos], ids[n * inner : (n + 1) * inner]]))[None]
        with torch.no_grad():
            logits = model(x, use_cache=False).logits[0, :-1].float()
        total += float(cross_entropy(logits, x[0, 1:], reduction="sum"))
    return total / (windows * inner)
