"""Quire's side of `peers.py`: its engine, greedy, over the model of a folder. KV: a recipe."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import quire
from quire.engine import Engine, SamplingParams
from quire.evaluate.decode import twin
from quire.models.open import open_runner
from quire.models.prepack import prepack
from serve import Side, serve


class Quire(Side):
    name, version = "Quire", quire.__version__

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        self.memory = args.memory
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
        self.packed = prepack(self.model, args.weights)  # once: the twins share them
        self.runners: dict[str, Any] = {}

    def open(self, kv: str, prompts: list[list[int]], room: int) -> Texts:
        if kv not in self.runners:
            model = twin(self.model)
            self.runners[kv] = open_runner(model, kv=kv, memory=self.memory, weights="plain")
        return Texts(self.runners[kv], prompts)


class Texts:
    """An engine in the middle of decoding a batch."""

    def __init__(self, runner: Any, prompts: list[list[int]]) -> None:
        self.runner, self.tokens = runner, dict[str, list[int]]()
        self.engine = Engine(runner, eos_token_ids=())
        params = SamplingParams(max_tokens=None, ignore_eos=True)
        self.ids = [self.engine.add_request(list(p), params, on_delta=self._note) for p in prompts]
        while len(self.tokens) < len(prompts):
            self.engine.step()

    def _note(self, delta: Any) -> None:
        self.tokens.setdefault(str(delta.request_id), []).extend(delta.token_ids)

    def steps(self, n: int) -> None:
        for _ in range(n):
            self.engine.step()

    def texts(self) -> list[list[int]]:
        return [self.tokens[str(i)] for i in self.ids]

    def kv_bytes(self) -> int:
        return sum(t.held_bytes() for t in self.runner.bridge.store.tables)

    def close(self) -> None:
        self.engine.close()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model")
    p.add_argument("--threads", type=int, required=True)
    p.add_argument("--memory", default="1GiB")
    p.add_argument("--weights", default="auto")
    asked = p.parse_args()
    serve(lambda: Quire(asked))
