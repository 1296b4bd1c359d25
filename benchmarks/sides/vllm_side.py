"""vLLM's side of `peers.py`, built for CPUs: its engine in this process, greedy. KV: auto or fp8.

Not run by us: vLLM publishes no CPU wheel where we get packages, and its build fetches sources of its own.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from serve import Side, serve

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


class VLLM(Side):
    name = "vLLM"

    def __init__(self, args: argparse.Namespace) -> None:
        import vllm

        self.version, self.args, self.engines = vllm.__version__, args, dict[str, Any]()
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(args.cache_gib))
        os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))

    def open(self, kv: str, prompts: list[list[int]], room: int) -> Texts:
        from vllm import EngineArgs, LLMEngine

        if kv not in self.engines:
            self.engines[kv] = LLMEngine.from_engine_args(
                EngineArgs(
                    model=str(self.args.model),
                    skip_tokenizer_init=True,
                    kv_cache_dtype=kv,
                    enable_prefix_caching=False,
                    max_num_batched_tokens=2048,
                )
            )
        shape = json.loads((self.args.model / "config.json").read_text())
        per_token = (
            2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
        )
        return Texts(self.engines[kv], prompts, room, per_token * (1 if "fp8" in kv else 2))


class Texts:
    count = 0

    def __init__(self, engine: Any, prompts: list[list[int]], room: int, per_token: int) -> None:
        from vllm import SamplingParams

        self.engine, self.tokens = engine, dict[str, list[int]]()
        self.held = per_token * sum(map(len, prompts))
        params = SamplingParams(temperature=0, max_tokens=room, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            Texts.count += 1
            self.tokens[str(Texts.count)] = []
            engine.add_request(str(Texts.count), {"prompt_token_ids": prompt}, params)
        while not all(self.tokens.values()):
            self._step()

    def _step(self) -> None:
        for out in self.engine.step():
            self.tokens[out.request_id] = list(out.outputs[0].token_ids)

    def steps(self, n: int) -> None:
        for _ in range(n):
            self._step()

    def texts(self) -> list[list[int]]:
        return list(self.tokens.values())

    def kv_bytes(self) -> int:
        return self.held

    def close(self) -> None:
        self.engine.abort_request(list(self.tokens))
        while self.engine.has_unfinished_requests():
            self.engine.step()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model", type=Path)
    p.add_argument("--threads", type=int, required=True)
    p.add_argument("--cache-gib", type=int, default=1)
    asked = p.parse_args()
    serve(lambda: VLLM(asked))
