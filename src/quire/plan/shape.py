"""From a config.json to what the cache will hold: the same layers that the engine finds by running the model.

`read_shape(config).layers` is what `quire.models.probe` returns for the model made from that config (tests hold them
to each other), so that both go through `build_layout` and bytes are counted in one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.errors import ConfigError
from quire.plan.checked import CHECKED
from quire.plan.fields import (
    CHUNK,
    CONTEXT,
    DECODER_LAYERS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    MALFORMED,
    WINDOW,
    Fields,
)
from quire.plan.kinds import CHUNKED, INDEXED, NOTHING, STATE, WINDOWED, read_kinds
from quire.plan.layout import KVLayer, StateLayer
from quire.plan.recurrent import state_fields
from quire.spec import DTYPE_BYTES, Chunked, Field, Full, Span, Window

MOST_LAYERS = 100_000

HEAD_DIMS = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text"), 256),
    **dict.fromkeys(("qwen3_next", "recurrent_gemma"), 256),
    **dict.fromkeys(("qwen3", "llama4_text", "glm4"), 128),
    "gpt_oss": 64,
}
"""Families whose heads are not the hidden size shared out, and their width where the config is silent."""

LATENT = frozenset({"deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "minicpm3"})
"""Families that cache latents: a config without their rank is incomplete."""

_ALL_HEADS = frozenset(
    {
        *("gpt2", "gpt_neox", "gptj", "gpt_neo", "codegen", "bloom", "opt", "qwen", "xglm", "mpt"),
        *("phi-msft", "baichuan", "gpt_neox_japanese", "biogpt", "openai-gpt", "deepseek", "olmo"),
    }
)
"""Families that know no sharing of heads: nothing is missing when their config names no KV heads."""


@dataclass(frozen=True)
class ModelShape:
    """What a config says about a model's cache.

    Args:
        name: as the user wrote it.
        kind: the model type.
        dtype: what it computes in.
        layers: what stores something, as the engine's probe returns it.
        n_layers: of the decoder, storing or not.
        shared: layers that read another's keys and values, to their owner.
        cross: cross attention of an encoder-decoder: layers that hold keys and values per encoder token, computed once.
        encoder_tokens: how many the encoder makes, where that is fixed.
        hidden, heads: of the decoder; `heads` counts query heads of its widest layer.
        max_context: what it was trained for; None where the config sets no limit.
        image_tokens: cached tokens per image, where the config says.
        assumed: what the config lacked and what stands in for it.
        config: all of it.
    """

    name: str
    kind: str
    dtype: str
    layers: tuple[KVLayer | StateLayer, ...]
    n_layers: int
    hidden: int
    heads: int
    shared: Mapping[int, int] = field(default_factory=dict)
    cross: tuple[KVLayer, ...] = ()
    encoder_tokens: int | None = None
    max_context: int | None = None
    image_tokens: int | None = None
    assumed: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kv_heads(self) -> int:
        """Most KV heads of any layer: beyond so many ranks, tensor parallelism copies the cache."""
        return max((x.heads for x in self.layers if isinstance(x, KVLayer)), default=1)


def read_shape(
    config: Mapping[str, Any], name: str = "config", *, dtype: str | None = None
) -> ModelShape:
    """Reads a config.json.

    Args:
        config: the parsed file; of a composite, the whole of it.
        name: for messages.
        dtype: what the model will compute in; by default what the config says.

    Raises:
        ConfigError: something that decides bytes is missing or contradicts itself; which field it is.
    """
    f = Fields(config, name)
    try:
        return _read(f, name, dtype)
    except ConfigError:
        raise
    except MALFORMED as e:
        raise f.senseless(e) from e


def _read(f: Fields, name: str, dtype: str | None) -> ModelShape:
    """`read_shape` of fields that hold what their names say."""
    seq2seq = bool(f.whole.get("is_encoder_decoder"))
    n_layers = _n_layers(f)
    hidden = f.need("its hidden size", *HIDDEN)
    kinds = read_kinds(f, n_layers)
    if f.kind not in CHECKED:
        f.assume(
            f"{f.kind} is not a model type that this planner was checked with: its fields are read as others' are"
        )
    dtype = dtype or _dtype(f)
    layers: list[KVLayer | StateLayer] = []
    for i, keeps in enumerate(kinds.keeps):
        if i in kinds.shared:
            continue
        for kept in keeps:
            if kept == STATE:
                layers.append(StateLayer(i, state_fields(f, dtype)))
            elif kept != NOTHING:
                layers.append(_attention(f, i, kept, hidden, dtype))
    if not layers:
        raise ConfigError(
            f"{name}: none of its {n_layers} layers stores anything; the config is wrong"
        )
    _check(f, layers)
    cross = _cross(f, hidden, dtype, n_layers) if seq2seq else ()
    return ModelShape(
        name=name,
        kind=f.kind,
        dtype=dtype,
        layers=tuple(layers),
        n_layers=n_layers,
        hidden=hidden,
        heads=f.count(*HEADS) or 1,
        shared=kinds.shared,
        cross=cross,
        encoder_tokens=f.count("max_source_positions") if seq2seq else None,
        max_context=f.count(*CONTEXT),
        image_tokens=_image_tokens(f),
        assumed=tuple(f.assumed),
        config=f.whole,
    )


def _check(f: Fields, layers: Sequence[KVLayer | StateLayer]) -> None:
    """Raises ConfigError where fields that make no sense together give a layer nothing, or less, to store."""
    for x in layers:
        for part in x.fields:
            sizes = (getattr(x, "heads", 1), *part.shape)
            if any(not isinstance(n, int) or n < 1 for n in sizes):
                raise ConfigError(
                    f"{f.name}: layer {x.layer} would store {part.name} of shape {list(sizes)}; a size in the config "
                    f"of this {f.kind} is wrong"
                )


def _n_layers(f: Fields) -> int:
    listed = f.get("layers_block_type")
    if listed and f.count(*LAYERS) is None:
        return len(listed)
    found = f.need("its number of layers", *DECODER_LAYERS, *LAYERS)
    if found > MOST_LAYERS:
        raise ConfigError(
            f"{f.name}: {f.last} is {found:,}, which no model has; {MOST_LAYERS:,} at most"
        )
    return 2 * found if f.kind == "longcat_flash" else found  # two attentions in each of its layers


def _dtype(f: Fields) -> str:
    found = str(f.outer("torch_dtype", "dtype") or "").removeprefix("torch.")
    if found in ("float32", "float16", "bfloat16", "float64"):
        return found
    if found and found != "auto" and found not in DTYPE_BYTES:
        raise ConfigError(
            f"{f.name}: unknown dtype {found!r}; known: float32, float16, bfloat16, float64"
        )
    f.assume("no dtype in the config: bfloat16 is assumed (--dtype says otherwise)")
    return "bfloat16"


# -- one attention layer -----------------------------------------------------------------------------------------


def _attention(f: Fields, i: int, kept: str, hidden: int, dtype: str) -> KVLayer:
    """Heads, fields and span of a layer."""
    span = _span(f, kept)
    latent = f.count("kv_lora_rank")
    if latent is None and f.kind in LATENT:
        raise ConfigError(
            f"{f.name}: a {f.kind} caches latents, and kv_lora_rank (512 in DeepSeek-V2 and V3) is missing; add it"
        )
    if latent is not None:
        rope = f.need("the rotated part of its keys", "qk_rope_head_dim")
        fields = (Field("latent", (latent,), dtype), Field("k_rope", (rope,), dtype))
        return KVLayer(i, 1, fields + _index(f, kept, dtype), span)
    own = _own(f, i, kept)
    heads = _kv_heads(f, i, own)
    k = _head_dim(f, hidden, own)
    v = own.get("v_head_dim") or f.count("v_head_dim") or k
    if kept == INDEXED:
        f.assume("keys of the indexers, one short vector per token and layer, are not counted")
    return KVLayer(i, heads, (Field("k", (k,), dtype), Field("v", (int(v),), dtype)), span)


def _index(f: Fields, kept: str, dtype: str) -> tuple[Field, ...]:
    """Keys of a sparse layer's indexer, one short vector per token."""
    if kept != INDEXED:
        return ()
    f.assume("keys of the indexers are counted in the cache's own codec")
    return (Field("index", (f.need("the indexer's width", "index_head_dim"),), dtype),)


def _span(f: Fields, kept: str) -> Span:
    if kept == CHUNKED:
        return Chunked(f.need("the length of its chunks", *CHUNK))
    if kept == WINDOWED:
        return Window(f.need("the length of its windows", *WINDOW))
    return Full()


def _own(f: Fields, i: int, kept: str) -> Mapping[str, Any]:
    """What is different in this layer."""
    per_layer = f.get("per_layer_config") or {}
    own = dict(per_layer.get(str(i)) or per_layer.get(i) or {})
    if f.kind == "mimo_v2_flash" and kept == WINDOWED:
        f.need("the KV heads of its window layers", "swa_num_key_value_heads")
    if kept == WINDOWED:
        names = {"swa_num_key_value_heads": "num_key_value_heads", "swa_head_dim": "head_dim"}
        names |= {"swa_v_head_dim": "v_head_dim"}
    else:
        names = {"num_global_key_value_heads": "num_key_value_heads", "global_head_dim": "head_dim"}
    return {names[n]: f.get(n) for n in names if f.get(n) is not None} | own


def _kv_heads(f: Fields, i: int, own: Mapping[str, Any]) -> int:
    if own.get("num_key_value_heads"):
        return int(own["num_key_value_heads"])
    blocks = f.get("block_configs")
    if blocks:  # DeciLM: query heads per KV head, layer by layer
        group = (blocks[i].get("attention") or {}).get("n_heads_in_group")
        return _query_heads(f) // int(group) if group else _query_heads(f)
    listed = f.get(*KV_HEADS, "num_key_value_heads_per_layer")
    if isinstance(listed, list):
        return int(listed[i])
    old_falcon = f.kind == "falcon" and not f.get("new_decoder_architecture")
    if old_falcon or f.kind == "gpt_bigcode":
        return 1 if f.get("multi_query") is not False else _query_heads(f)
    section = f.get("attn_config")
    if isinstance(section, Mapping):  # MPT
        if section.get("attn_type") == "multiquery_attention":
            return 1
        return int(section.get("kv_n_heads") or _query_heads(f))
    found = f.count(*KV_HEADS)
    if found is not None:
        return found
    heads = _query_heads(f)
    if f.kind not in _ALL_HEADS and not f.whole.get("is_encoder_decoder"):
        f.assume(
            f"num_key_value_heads is missing: all {heads} heads are assumed to keep keys and values"
        )
    return heads


def _query_heads(f: Fields) -> int:
    return f.need("its number of attention heads", *HEADS)


def _head_dim(f: Fields, hidden: int, own: Mapping[str, Any]) -> int:
    if own.get("head_dim"):
        return int(own["head_dim"])
    if f.kind.startswith("zamba") and f.get("attention_head_dim") is None:
        hidden = f.count("attention_hidden_size") or 2 * hidden
    else:
        found = f.count(*HEAD_DIM)
        if found is not None:
            return found
        if f.kind in HEAD_DIMS:
            f.assume(f"head_dim is missing: {HEAD_DIMS[f.kind]}, as is usual for {f.kind}")
            return HEAD_DIMS[f.kind]
    heads = _query_heads(f)
    if hidden % heads:
        raise ConfigError(
            f"{f.name}: head_dim is missing and cannot be worked out: {heads} heads do not divide a hidden size of "
            f"{hidden}"
        )
    return hidden // heads


# -- encoders and images -----------------------------------------------------------------------------------------


def _cross(f: Fields, hidden: int, dtype: str, n_layers: int) -> tuple[KVLayer, ...]:
    """Keys and values of the encoder's output, kept by every decoder layer."""
    heads, dim = _query_heads(f), _head_dim(f, hidden, {})
    fields = (Field("k", (dim,), dtype), Field("v", (dim,), dtype))
    return tuple(KVLayer(i, heads, fields) for i in range(n_layers))


def _image_tokens(f: Fields) -> int | None:
    """Tokens of one image, where the config fixes it."""
    for name in ("mm_tokens_per_image", "image_seq_length", "image_seq_len", "num_image_tokens"):
        found = f.whole.get(name)
        if isinstance(found, int) and found > 0:
            return found
    vision = f.whole.get("vision_config")
    if isinstance(vision, Mapping) and f.whole.get("model_type") in ("llava", "paligemma"):
        size, patch = vision.get("image_size"), vision.get("patch_size")
        if isinstance(size, int) and isinstance(patch, int):
            return (size // patch) ** 2
    return None
