"""OpenVINO GenAI's side of `peers.py`: its continuous batching, greedy. KV: its cache's precision, u8, f16, bf16 ...

The model is exported once, into `FOLDER/openvino`, by optimum-intel, with its weights as they are. GenAI is given token
ids, so that no tokenizer is needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from serve import Side, serve


def exported(folder: Path) -> Path:
    """The model in OpenVINO's own form."""
    target = folder / "openvino"
    if not (target / "openvino_model.bin").exists():
        from optimum.intel import OVModelForCausalLM

        model = OVModelForCausalLM.from_pretrained(
            folder, export=True, load_in_8bit=False, compile=False
        )
        model.save_pretrained(target)
    return target


class OpenVINO(Side):
    name, version = "OpenVINO GenAI", genai.__version__

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder, self.args = exported(args.model), args
        self.pipelines: dict[str, Any] = {}
        able = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.version += f", computes in {'bf16' if 'BF16' in able else 'f32'}"

    def open(self, kv: str, prompts: list[list[int]], room: int) -> Texts:
        if kv not in self.pipelines:
            config = genai.SchedulerConfig()
            config.cache_size = self.args.cache_gib
            config.max_num_batched_tokens = self.args.batched_tokens
            config.enable_prefix_caching = False
            options = {"KV_CACHE_PRECISION": kv, "INFERENCE_NUM_THREADS": self.args.threads}
            self.pipelines[kv] = genai.ContinuousBatchingPipeline(
                self.folder, config, "CPU", options
            )
        return Texts(self.pipelines[kv], prompts, room)


class Texts:
    count = 0

    def __init__(self, pipeline: Any, prompts: list[list[int]], room: int) -> None:
        self.pipeline = pipeline
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = room, True, False
        config.set_eos_token_id(0)  # it wants one, and ignores it
        self.handles = []
        for prompt in prompts:
            Texts.count += 1
            ids = ov.Tensor(np.array([prompt], np.int64))
            self.handles.append(pipeline.add_request(Texts.count, ids, config))
        self.tokens: list[list[int]] = [[] for _ in prompts]
        while not all(self.tokens):
            self._step()

    def _step(self) -> None:
        self.pipeline.step()
        for text, handle in zip(self.tokens, self.handles, strict=True):
            if handle.can_read():
                for output in handle.read().values():
                    text.extend(output.generated_ids)

    def steps(self, n: int) -> None:
        for _ in range(n):
            self._step()

    def texts(self) -> list[list[int]]:
        return self.tokens

    def kv_bytes(self) -> int:
        seen = self.pipeline.get_metrics()
        return int(seen.kv_cache_size_in_bytes * seen.cache_usage / 100)

    def close(self) -> None:
        for handle in self.handles:
            handle.cancel()
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model", type=Path)
    p.add_argument("--threads", type=int, required=True)
    p.add_argument("--cache-gib", type=int, default=1)
    p.add_argument("--batched-tokens", type=int, default=2048, help="of a step, as in Quire")
    asked = p.parse_args()
    serve(lambda: OpenVINO(asked))
