"""llama.cpp's side of `peers.py`, through llama-cpp-python: greedy. KV: the type of its cache, f16, bf16, q8_0, q4_0.

The model is written once, into `FOLDER/model.gguf`, with its matrices in bfloat16 and its norms in float32.
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path
from typing import Any

import llama_cpp as ll
import numpy as np

from serve import Side, serve

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}
BYTES = {"f32": 4.0, "f16": 2.0, "q4_0": 18 / 32, "q8_0": 34 / 32, "bf16": 2.0}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def converted(folder: Path) -> Path:
    """The model as GGUF."""
    target = folder / "model.gguf"
    if target.exists():
        return target
    import gguf

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    w = gguf.GGUFWriter(folder / "model.part", "llama")
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_block_count(config["num_hidden_layers"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_dimension_count(config["head_dim"])
    w.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    w.add_vocab_size(config["vocab_size"])
    w.add_tokenizer_model("none")
    for name, (dtype, stored) in safetensors(folder / "model.safetensors").items():
        if dtype != "BF16":
            raise ValueError(f"{name} is {dtype}; only models in bfloat16 are converted")
        x = stored
        if ".q_proj" in name or ".k_proj" in name:
            x = interleaved(x, heads if ".q_proj" in name else kv_heads)
        if x.ndim == 1:
            w.add_tensor(gguf_name(name), (x.astype(np.uint32) << 16).view(np.float32))
        else:
            raw = np.ascontiguousarray(x).view(np.uint8)
            w.add_tensor(gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    (folder / "model.part").rename(target)
    return target


def safetensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """A file's tensors, 16-bit ones as uint16, mapped into memory."""
    data = np.memmap(path, np.uint8, "r")
    size = struct.unpack("<Q", data[:8].tobytes())[0]
    found = {}
    for name, entry in json.loads(data[8 : 8 + size].tobytes()).items():
        if name != "__metadata__":
            lo, hi = entry["data_offsets"]
            x = data[8 + size + lo : 8 + size + hi].view(np.uint16)
            found[name] = entry["dtype"], x.reshape(entry["shape"])
    return found


def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from halves to pairs: llama.cpp turns neighbours, transformers turns halves."""
    return x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


def gguf_name(name: str) -> str:
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in fixed:
        return f"{fixed[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


class LlamaCpp(Side):
    name, version = "llama.cpp", f"llama-cpp-python {ll.__version__}"

    def __init__(self, args: argparse.Namespace) -> None:
        self.threads = args.threads
        ll.llama_backend_init()
        self.model = ll.llama_model_load_from_file(
            str(converted(args.model)).encode(), ll.llama_model_default_params()
        )
        if not self.model:
            raise ValueError("llama.cpp cannot read the model")
        self.shape = json.loads((args.model / "config.json").read_text())

    def open(self, kv: str, prompts: list[list[int]], room: int) -> Texts:
        if kv not in TYPES:
            raise ValueError(f"unknown cache type {kv}; known: {', '.join(TYPES)}")
        params = ll.llama_context_default_params()
        params.n_ctx = sum(-(-(len(p) + room) // 256) * 256 for p in prompts)
        params.n_seq_max, params.kv_unified = len(prompts), False
        params.n_batch = 2048
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = TYPES[kv]
        params.flash_attn_type = 1
        per_token = 2 * self.shape["num_hidden_layers"] * self.shape["num_key_value_heads"]
        per_token *= self.shape["head_dim"] * BYTES[kv]
        return Texts(self.model, params, prompts, per_token, self.shape["vocab_size"])


class Texts:
    def __init__(
        self, model: Any, params: Any, prompts: list[list[int]], per_token: float, vocab: int
    ) -> None:
        self.context = ll.llama_init_from_model(model, params)
        if not self.context:
            raise ValueError("llama.cpp makes no such context")
        self.batch = ll.llama_batch_init(params.n_batch, 0, 1)
        self.at = [len(p) for p in prompts]
        self.per_token, self.vocab = per_token, vocab
        self.tokens: list[list[int]] = []
        for i, prompt in enumerate(prompts):
            for start in range(0, len(prompt), params.n_batch):
                part = prompt[start : start + params.n_batch]
                last = start + len(part) == len(prompt)
                ends = [last and j == len(part) - 1 for j in range(len(part))]
                self._decode([(t, start + j, i, ends[j]) for j, t in enumerate(part)])
            self.tokens.append([self._best(len(part) - 1)])

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        b = self.batch
        b.n_tokens = len(rows)
        for j, (token, pos, seq, wanted) in enumerate(rows):
            b.token[j], b.pos[j], b.n_seq_id[j], b.seq_id[j][0] = token, pos, 1, seq
            b.logits[j] = wanted
        if ll.llama_decode(self.context, b):
            raise ValueError("llama_decode failed")

    def _best(self, row: int) -> int:
        logits = ll.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def steps(self, n: int) -> None:
        for _ in range(n):
            self._decode(
                [
                    (t[-1], at, i, True)
                    for i, (t, at) in enumerate(zip(self.tokens, self.at, strict=True))
                ]
            )
            for i, text in enumerate(self.tokens):
                text.append(self._best(i))
                self.at[i] += 1

    def texts(self) -> list[list[int]]:
        return self.tokens

    def kv_bytes(self) -> int:
        return int(sum(self.at) * self.per_token)

    def close(self) -> None:
        ll.llama_batch_free(self.batch)
        ll.llama_free(self.context)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model", type=Path)
    p.add_argument("--threads", type=int, required=True)
    asked = p.parse_args()
    serve(lambda: LlamaCpp(asked))
