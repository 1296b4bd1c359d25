"""A tiny random model of every class in transformers' causal-LM auto mapping, from one recipe.

The recipe reads a configuration class, not a list of models: every field whose name says what it
measures (hidden size, heads, experts, state size, ...) gets a tiny value, every list as long as the
model is deep is cut to the new depth with each kind of layer kept, sub-configurations are shrunk in
turn. What one class wants differently stands in `SPECIAL`, what cannot be had in `EXCLUDED`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import zoo

N_LAYERS = 4
MAX_PARAMETERS = 20_000_000


class UnbuildableError(Exception):
    """This class has no tiny instance here; the message says why."""


def all_causal_types() -> list[str]:
    """Every model type of the causal-LM auto mapping, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def class_name(model_type: str) -> str:
    """The model class the mapping names for this type (the first when there are several)."""
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return named if isinstance(named, str) else named[0]


def build_any(model_type: str) -> transformers.PreTrainedModel:
    """A tiny random model of this type: eval, float32, the same weights at every call.

    A composite whose causal-LM class takes one of its parts (`Llama4ForCausalLM` takes the text
    configuration) is built from that part, as `AutoModelForCausalLM.from_config` does.

    Raises:
        UnbuildableError: with the reason.
    """
    if model_type in EXCLUDED:
        raise UnbuildableError(EXCLUDED[model_type])
    cls = getattr(transformers, class_name(model_type))
    config, special = CONFIG_MAPPING[model_type], SPECIAL.get(model_type, {})
    for name, sub in (getattr(config, "sub_configs", None) or {}).items():
        if cls.config_class is sub:
            config, special = sub, special.get(name, SPECIAL.get(sub.model_type, {}))
    try:
        with torch.device("meta"):
            n_parameters = sum(p.numel() for p in cls(tiny_config(config, special)).parameters())
        if n_parameters > MAX_PARAMETERS:
            raise UnbuildableError(f"the recipe leaves {n_parameters / 1e6:.0f} M parameters")
        torch.manual_seed(0)
        model: transformers.PreTrainedModel = cls(tiny_config(config, special)).eval().float()
    except ImportError as error:
        what = " ".join(str(error).split()).partition(" but it")[0]
        raise UnbuildableError(f"needs a package that is not installed: {what}") from error
    # No end token, no forced or forbidden ones: greedy means greedy.
    model.generation_config = transformers.GenerationConfig()
    _draw_weights(model)
    return model


# --- Weights that can tell right from wrong -------------------------------------------------------

N_TOKENS = 10
TEXTS = zoo.prompts()[:3]
_DRAWS = [  # seed, gain, embed
    *((seed, 1.6, 0.3) for seed in (1, 2, 3)),
    *((seed, 3.0, 1.0) for seed in (1, 2, 3)),
    *((seed, 5.0, 3.0) for seed in (1, 2, 3)),
]


def first_error(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Largest error of the first new logits, in sigmas; always comparable, whatever text follows.

    Args:
        got: logits of each text's first new token, `[vocab]` each.
        expected: the reference's logits, `[n_tokens, vocab]` each.
    """
    pairs = zip(got, expected, strict=True)
    return max(float((g.float() - e[0]).abs().max() / e[0].std()) for g, e in pairs)


def _draw_weights(model: transformers.PreTrainedModel) -> None:
    """Redraw the weights until transformers' own text wanders and has no near tie, or keep the best.

    Raises:
        UnbuildableError: when transformers itself cannot generate.
    """
    best, kept = (-1, -1.0), _DRAWS[0]
    for seed, gain, embed in _DRAWS:
        zoo.scatter_weights(model, seed=seed, gain=gain, embed=embed)
        try:
            tokens, logits = zoo.reference(model, TEXTS, N_TOKENS)
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            raise UnbuildableError(f"transformers itself cannot generate with it: {why}") from error
        distinct, margin = len({t for text in tokens for t in text}), zoo.smallest_margin(logits)
        found = (min(distinct, 12), min(margin, 2e-3))
        if margin >= 1e-3 and found > best:
            best, kept = found, (seed, gain, embed)
        if best == (12, 2e-3):
            return
    zoo.scatter_weights(model, seed=kept[0], gain=kept[1], embed=kept[2])


# --- The recipe -----------------------------------------------------------------------------------

_VALUES: dict[str, int] = {}


def _each(value: int, *fields: str) -> None:
    _VALUES.update(dict.fromkeys(fields, value))


_each(zoo.VOCAB, "vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size")
_each(zoo.VOCAB, "decoder_vocab_size", "shape_vocab_size", "pronunciation_vocab_size")
_each(64, "hidden_size", "d_model", "n_embd", "embedding_size", "embedding_dim", "emb_dim", "dim")
_each(64, "word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "lru_width")
_each(64, "hidden_size_global", "attention_hidden_size", "out_hidden_size", "backbone_hidden_size")
_each(64, "pronunciation_embed_dim", "shape_embed_dim", "dim_model_base", "mm_embed_dim")
_each(64, "adapter_out_dim", "adapter_in_dim", "adapter_input_size", "audio_embed_dim")
_each(96, "intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dff")
_each(96, "ffn_hidden_size", "dim_ff", "d_inner", "feed_forward_size", "intermediate_size_mlp")
_each(96, "dense_intermediate_size", "prompt_mid_dim", "classifier_proj_size")
_each(32, "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size")
_each(32, "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size", "router_hidden_size")
_each(32, "shared_experts_intermediate_size", "downsample_hidden_size")
_each(N_LAYERS, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_each(N_LAYERS, "decoder_layers", "num_decoder_layers")
_each(N_LAYERS, "encoder_layers", "num_encoder_layers")  # caches count these
_each(1, "depth", "conf_num_hidden_layers")
_each(2, "layer_group_size", "n_layers_per_attn_res_block")
_each(4, "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_each(4, "decoder_attention_heads", "encoder_attention_heads", "conf_num_attention_heads")
_each(4, "num_encoder_attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads")
_each(2, "num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads")
_each(16, "head_dim", "dim_head", "d_head", "kv_channels", "swa_head_dim", "global_head_dim")
_each(16, "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "attention_head_size")
_each(4, "linear_num_value_heads", "linear_num_heads")
_each(2, "linear_num_key_heads")
_each(16, "qk_nope_head_dim", "v_head_dim", "query_pre_attn_scalar")
_each(8, "qk_rope_head_dim", "rotary_dim")
_each(24, "qk_head_dim", "kv_lora_rank")
_each(32, "q_lora_rank", "o_lora_rank", "hc_lowrank")
_each(512, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length")
_each(512, "max_target_positions", "max_source_positions", "rel_extent")
_each(zoo.WINDOW, "sliding_window", "window_size", "attention_window_size", "sliding_window_size")
_each(zoo.CHUNK, "attention_chunk_size")
_each(18, "local_attention")  # ModernBERT counts both sides
_each(4, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_each(2, "num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "zero_expert_num")
_each(1, "n_group", "topk_group", "n_shared_experts", "num_shared_experts")
_each(1, "moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers", "o_groups")
_each(0, "num_mtp_layers", "num_nextn_predict_layers")
_each(8, "mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "mamba_dt_rank", "time_step_rank")
_each(8, "mamba_d_state", "state_size", "ssm_state_size", "laurel_rank", "adapter_rank", "d_rel")
_each(16, "mamba_d_head", "mamba_head_dim", "gated_norm_rank")
_each(1, "mamba_n_groups", "n_groups", "mamba_ngroups")
_each(16, "mamba_chunk_size", "chunk_size")
_each(128, "mamba_d_ssm")
_each(16, "index_head_dim")
_each(2, "index_n_heads", "hc_mult", "hc_count", "altup_num_inputs")
# Thresholds: below the length of the texts, or the feature is there and never acts.
_each(8, "index_topk", "floor_scale", "log_scaling_n_floor")
_each(zoo.WINDOW, "keep_window_size")
_each(4, "index_block_size")
_each(2, "index_topk_blocks")
_each(8, "hidden_size_per_layer_input", "prompt_length", "prompt_types", "segment_types")
_each(32, "ngram_vocab_size_base", "block_multiple_of")
_each(2, "heads_per_ngram", "split_ngram_parts", "num_kv_shared_layers")
_each(1, "num_codebooks")
_each(32, "image_size")
_each(16, "patch_size", "num_position_embeddings", "position_embedding_size", "mm_posemb_size")


# Fields whose default None means "derive it", and windows that are off by default.
_ALWAYS = {
    "head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "num_key_value_heads",
    "sliding_window",
    "vocab_size",
}


def tiny_config(config: type[Any], special: Mapping[str, Any]) -> Any:
    """A tiny instance of this configuration class.

    Args:
        config: a configuration class.
        special: values that win over the recipe; a mapping for a sub-configuration is passed on.
    """
    default = config()
    fields = {f.name for f in dataclasses.fields(config)}
    kwargs: dict[str, Any] = {}
    for name in fields & set(_VALUES):
        if _there(default, name) or name in _ALWAYS:
            kwargs[name] = _VALUES[name]
    if "qk_rope_head_dim" in fields:  # latent attention: one head size, no groups
        kwargs.pop("head_dim", None)
        kwargs["num_key_value_heads"] = _VALUES["num_attention_heads"]
    kwargs.update({name: _cut(values) for name, values in _per_layer(default, fields)})
    if "use_sliding_window" in fields:  # and the kinds of layers follow from it
        kwargs.update(use_sliding_window=True, max_window_layers=2)
        kwargs.pop("layer_types", None)
    for field in dataclasses.fields(config):
        if field.name in {"bos_token_id", "eos_token_id"} and "None" in str(field.type):
            kwargs[field.name] = None
    if _there(default, "pad_token_id") is not None:
        kwargs["pad_token_id"] = 0
    if "is_decoder" in fields:
        kwargs["is_decoder"] = True
    if "tie_word_embeddings" in fields:
        kwargs["tie_word_embeddings"] = False
    for name in getattr(config, "sub_configs", None) or {}:
        sub = _there(default, name)
        if dataclasses.is_dataclass(sub) and special.get(name) is not DROP:
            kwargs[name] = tiny_config(type(sub), special.get(name, {}))
    taken = {k for k in special if isinstance(special[k], Mapping) and k in kwargs}
    kwargs.update({k: v for k, v in special.items() if k not in taken})
    return config(**{k: v for k, v in kwargs.items() if v is not DROP})


DROP = object()


def _there(default: Any, name: str) -> Any:
    try:
        return getattr(default, name, None)
    except AttributeError:
        return None
    except Exception:  # noqa: BLE001 - a field that differs per layer cannot be read as one value
        return -1


def _per_layer(default: Any, fields: set[str]) -> list[tuple[str, list[Any]]]:
    depth = _there(default, "num_hidden_layers")
    found = ((name, _there(default, name)) for name in sorted(fields))
    return [(n, list(v)) for n, v in found if isinstance(v, (list, tuple)) and len(v) == depth]


def _cut(values: list[Any]) -> list[Any]:
    """`N_LAYERS` values with every kind among them, in turn, the plain ones last."""
    kinds = [v for i, v in enumerate(values) if v not in values[:i]]
    kinds.sort(key=lambda kind: kind == "full_attention")
    return (kinds * N_LAYERS)[: max(N_LAYERS, len(kinds))]


_DRAFT = "a draft head: it reads the cache of another model"
_CODEBOOKS = "audio codebooks, which its own generate() delays against each other"
EXCLUDED: dict[str, str] = {
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "musicgen": _CODEBOOKS,
    "musicgen_melody": _CODEBOOKS,
}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 101},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": dict.fromkeys(["sliding_attention", "full_attention"], _ROPE),
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "doge": {"sliding_window": DROP},  # which would keep its dynamic mask from ever acting
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 24},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"num_hidden_layers": 1, "num_layers_per_stack": DROP},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "head_dim": 8, "qk_head_dim": DROP},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"] * 2},
    "mllama": {"text_config": {"cross_attention_layers": [2]}},
    "moshi": {
        "audio_vocab_size": 32,
        "audio_encoder_config": DROP,
        "depth_decoder_config": {"audio_vocab_size": 32},
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": DROP, "attention_head_dim": DROP},
    "zaya": {"num_experts_per_tok": 1},
}
