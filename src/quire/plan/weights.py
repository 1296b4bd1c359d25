"""How many parameters a model has and what they weigh: from the shape, a published total, or the files themselves.

Parameters follow from the shape up to norms and small biases. A mixture of experts counts all of them for memory and
the chosen ones for a token's arithmetic. Where a config does not give the width of an expert the count is refused,
not guessed.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from quire.errors import ConfigError
from quire.plan.fields import MALFORMED, Fields
from quire.plan.layout import KVLayer, StateLayer
from quire.plan.shape import ModelShape
from quire.spec import DTYPE_BYTES

BITS = {
    **{name: 8.0 * n for name, n in DTYPE_BYTES.items() if "float" in name and "8" not in name},
    "fp8": 8.0,
    "int8": 8.0,
    "int4": 4.25,
    "nf4": 4.5,
    "mxfp4": 4.25,
}
"""Bits per parameter of linear layers, scales included: int4 has a 16-bit scale and zero per 128, nf4 a 32-bit scale
per 64, mxfp4 an 8-bit scale per 32. Embeddings and the head stay in 16 bits under all below 16."""

_PLAIN_MLP = frozenset(
    {
        *("gpt2", "gpt_neox", "gptj", "gpt_neo", "codegen", "bloom", "opt", "falcon", "phi", "mpt"),
        *("phi-msft", "gpt_bigcode", "starcoder2", "nemotron", "persimmon", "xglm", "whisper"),
        *("arcee", "apertus", "nanochat", "jais2", "nemotron_h"),
        *("biogpt", "gpt_neox_japanese", "bart", "mbart", "marian", "pegasus", "t5", "fuyu"),
    }
)
"""Two matrices in a feed-forward block instead of three."""

_UNTIED = frozenset(
    {"llama", "mistral", "mixtral", "qwen3_moe", "deepseek_v3", "phi3", "gpt_oss", "olmo2"}
)
_EXPERT_WIDTH = frozenset(
    {"qwen3_moe", "qwen2_moe", "qwen3_next", "deepseek", "kimi_k2", *("deepseek_v2", "deepseek_v3")}
)
"""Families whose experts are not as wide as `intermediate_size`."""


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters.

    Args:
        total: all of them.
        active: those that one token passes through.
        embedding: embeddings and head, in `total` too.
        source: where the count comes from, in words.
    """

    total: int
    active: int
    embedding: int
    source: str


def count_parameters(shape: ModelShape) -> Parameters:
    """Parameters by the shape.

    Raises:
        ConfigError: the config does not give what the count needs.
    """
    f = Fields(shape.config, shape.name)
    try:
        return _count(f, shape)
    except ConfigError:
        raise
    except MALFORMED as e:
        raise f.senseless(e) from e


def _count(f: Fields, shape: ModelShape) -> Parameters:
    """`count_parameters` of fields that hold what their names say."""
    embedding = embedding_of(shape)
    if not embedding:
        f.need("its vocabulary, which the weights depend on", "vocab_size")
    stores = {x.layer: x for x in shape.layers if isinstance(x, KVLayer)}
    states = {x.layer: x for x in shape.layers if isinstance(x, StateLayer)}
    total = active = 0
    for i in range(shape.n_layers):
        mixer = 0
        owner = stores.get(shape.shared.get(i, i))
        if owner is not None:
            mixer += _attention(f, shape, owner, reads=i in shape.shared)
        if i in states:
            mixer += _state(f, states[i], shape.hidden)
        if shape.cross:
            mixer *= 2
        every, used = _feed_forward(f, i, shape)
        total += mixer + every + 2 * shape.hidden
        active += mixer + used + 2 * shape.hidden
    if shape.cross:  # an encoder as deep, without cross attention; its tokens pass through it once
        total += sum(
            _attention(f, shape, x) + _feed_forward(f, x.layer, shape)[0] for x in shape.cross
        )
    return Parameters(embedding + total, embedding + active, embedding, "counted from the config")


def embedding_of(shape: ModelShape) -> int:
    """Parameters of embeddings and head; 0 where the config names no vocabulary."""
    f = Fields(shape.config, shape.name)
    vocab = f.count("vocab_size")
    if vocab is None:
        return 0
    tied = f.outer("tie_word_embeddings")
    if tied is None:
        tied = f.kind not in _UNTIED
    width = f.count("word_embed_proj_dim") or shape.hidden
    embedding = vocab * width * (1 if tied else 2)
    if f.kind in ("gpt2", "opt", "gpt_bigcode", "gpt_neo") and shape.max_context:
        embedding += shape.max_context * shape.hidden
    return embedding


def _attention(f: Fields, shape: ModelShape, x: KVLayer, *, reads: bool = False) -> int:
    hidden, heads = shape.hidden, shape.heads
    sizes = {field.name: field.shape[0] for field in x.fields}
    if "latent" in sizes:
        nope = f.need("the unrotated part of its keys", "qk_nope_head_dim")
        v = f.need("the width of its values", "v_head_dim")
        rank, rope = sizes["latent"], sizes["k_rope"]
        low = f.count("q_lora_rank")
        q = heads * (nope + rope)
        made = (hidden * low + low * q) if low else hidden * q
        return made + hidden * (rank + rope) + rank * heads * (nope + v) + heads * v * hidden
    k, v = sizes["k"], sizes["v"]
    own = 0 if reads else hidden * x.heads * (k + v)
    return own + hidden * heads * (k + v)


def _state(f: Fields, x: StateLayer, hidden: int) -> int:
    """A recurrent mixer: projections in and out, the convolution, and for Mamba its steps."""
    shapes = {field.name: field.shape for field in x.fields}
    conv = shapes.get("conv0", (0, 0))
    state = shapes.get("rec0")
    if state is None:  # a short convolution between two projections
        return 4 * hidden * hidden + conv[0] * conv[1]
    if f.get("linear_num_value_heads") is not None:
        values = state[0] * state[2]
        return hidden * (conv[0] + 2 * values + 2 * state[0]) + conv[0] * conv[1]
    if len(state) == 3 and f.kind != "zamba":
        inner = state[0] * state[1]
        return hidden * (conv[0] + 2 * inner + state[0]) + conv[0] * conv[1]
    inner = conv[0]
    size = state[-1]
    steps = f.count("mamba_dt_rank", "time_step_rank") or -(-hidden // 16)
    mixing = inner * (steps + 2 * size) + steps * inner + inner * (size + 2)
    return 3 * hidden * inner + inner * conv[1] + mixing


def _feed_forward(f: Fields, i: int, shape: ModelShape) -> tuple[int, int]:
    """Parameters of a layer's feed-forward part: all, and those that a token uses."""
    alone = f.kind == "nemotron_h" and i in {x.layer for x in shape.layers}
    if alone or f.kind in ("mamba", "mamba2", "falcon_mamba"):
        return 0, 0
    hidden = shape.hidden
    matrices = 2 if f.kind in _PLAIN_MLP and not f.get("is_gated_act") else 3
    experts = f.count("n_routed_experts", "num_local_experts", "num_experts")
    dense = matrices * hidden * _width(f, i, hidden)
    if experts is None or experts < 2 or not _has_experts(f, i):
        return dense, dense
    names = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
    listed = f.get(*names)
    used = int(listed[i]) if isinstance(listed, list) else f.need("experts per token", *names)
    width = f.count("moe_intermediate_size")
    if width is None:
        if f.kind in _EXPERT_WIDTH:
            raise ConfigError(
                f"{f.name}: moe_intermediate_size is missing, without which its experts cannot be weighed"
            )
        width = f.need("the width of an expert", "intermediate_size", "ffn_hidden_size")
    one = matrices * hidden * width
    shared = int(f.get("shared_expert_intermediate_size", "shared_intermediate_size") or 0)
    shared = shared or (f.get("n_shared_experts") or 0) * width
    if f.kind == "llama4_text":
        shared = width
    always = matrices * hidden * shared + hidden * experts
    return experts * one + always, used * one + always


def _width(f: Fields, i: int, hidden: int) -> int:
    if f.kind == "llama4_text" and f.count("intermediate_size_mlp"):
        return f.need("the width", "intermediate_size_mlp")
    found = f.get("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size")
    found = found or f.get("decoder_ffn_dim", "dense_intermediate_size")
    if isinstance(found, list):
        return int(found[i])
    if found is not None:
        return int(found) // (2 if f.kind == "qwen" else 1)  # Qwen 1 names both halves together
    ratio = f.get("expansion_ratio", "mlp_ratio") or 4
    return int(ratio * hidden)


def _has_experts(f: Fields, i: int) -> bool:
    kinds = f.get("mlp_layer_types")
    if kinds is not None:
        return bool(kinds[i] != "dense")
    if f.get("first_k_dense_replace") is not None and i < f.get("first_k_dense_replace"):
        return False
    if i in (f.get("mlp_only_layers") or ()):
        return False
    if f.count("expert_layer_period") is not None:
        return bool(i % f.get("expert_layer_period") == (f.get("expert_layer_offset") or 0))
    listed = f.get("moe_layers")
    if listed is not None:
        return i in listed
    step = f.count("interleave_moe_layer_step", "decoder_sparse_step", "moe_layer_freq") or 1
    return bool((i + 1) % step == 0)


# -- bytes -------------------------------------------------------------------------------------------------------


def weight_bytes(count: Parameters, form: str) -> int:
    """Bytes of the weights in one of the forms of `BITS`. Raises ConfigError for another."""
    if form not in BITS:
        raise ConfigError(f"unknown form of weights {form!r}; known: {', '.join(BITS)}, or a size")
    wide = max(BITS[form], 16.0)
    return int(((count.total - count.embedding) * BITS[form] + count.embedding * wide) / 8)


def form_of(shape: ModelShape) -> str:
    """The form that the config says its weights have: its dtype, or what quantised them."""
    f = Fields(shape.config, shape.name)
    how = f.outer("quantization_config", "compression_config")
    if not isinstance(how, dict):
        return shape.dtype
    method = str(how.get("quant_method", "")).lower()
    if method in ("fp8", "mxfp4"):
        return method
    if how.get("load_in_4bit") or method == "bnb_4bit":
        return "nf4"
    bits = how.get("bits") or (8 if how.get("load_in_8bit") else None)
    if bits in (4, 8):
        return f"int{bits}"
    raise ConfigError(
        f"{shape.name}: the weights' quantisation {method or how} is not known; say what they take, as in "
        "--weights int4 or --weights 40GiB"
    )


def file_bytes(folder: Path) -> int | None:
    """Bytes of all tensors in a folder's safetensors files, by their headers; None where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    total = 0
    for path in files:
        with path.open("rb") as f:
            (n,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(n))
        total += sum(
            x["data_offsets"][1] - x["data_offsets"][0]
            for k, x in header.items()
            if k != "__metadata__"
        )
    return total
