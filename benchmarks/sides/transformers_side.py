"""transformers' side of `peers.py`: its model's own forward, greedy. KV: dynamic, static, quanto or hqq."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache, StaticCache

from serve import Side, serve


class Transformers(Side):
    name, version = "transformers", transformers.__version__

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()

    def open(self, kv: str, prompts: list[list[int]], room: int) -> Texts:
        config = self.model.config
        if kv == "dynamic":
            cache: Any = DynamicCache(config=config)
        elif kv == "static":
            cache = StaticCache(config=config, max_cache_len=len(prompts[0]) + room)
        else:
            cache = QuantizedCache(kv, config=config)
        return Texts(self.model, cache, prompts)

    @torch.inference_mode()
    def judge(self, prompts: list[list[int]], texts: list[list[int]]) -> list[list[float]]:
        """How far each token of a text lies below the best one there, in standard deviations of the logits."""
        gaps = []
        for prompt, text in zip(prompts, texts, strict=True):
            ids = torch.tensor([prompt + text])
            logits = self.model(ids, use_cache=False, logits_to_keep=len(text) + 1).logits[0, :-1]
            logits = logits.float()
            chosen = logits.gather(1, torch.tensor(text)[:, None])[:, 0]
            gaps.append(((logits.amax(1) - chosen) / logits.std(1)).tolist())
        return gaps


class Texts:
    def __init__(self, model: Any, cache: Any, prompts: list[list[int]]) -> None:
        self.model, self.cache = model, cache
        self.columns: list[torch.Tensor] = []
        self._step(torch.tensor(prompts))

    @torch.inference_mode()
    def _step(self, ids: torch.Tensor) -> None:
        out = self.model(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self.columns.append(out.logits[:, -1].argmax(-1, keepdim=True))

    def steps(self, n: int) -> None:
        for _ in range(n):
            self._step(self.columns[-1])

    def texts(self) -> list[list[int]]:
        texts: list[list[int]] = torch.cat(self.columns, 1).tolist()
        return texts

    def kv_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in _tensors(self.cache.layers, set()))

    def close(self) -> None:
        self.cache = None


def _tensors(thing: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor within lists, tuples and the caches' attributes, once."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for x in thing:
            yield from _tensors(x, seen)
    elif type(thing).__module__.startswith("transformers.cache_utils"):
        for x in vars(thing).values():
            yield from _tensors(x, seen)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model")
    p.add_argument("--threads", type=int, required=True)
    asked = p.parse_args()
    serve(lambda: Transformers(asked))
