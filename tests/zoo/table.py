"""The entries of the zoo: one tiny configuration per family, in the order of the ways in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from zoo.core import CHUNK, NO_LIMIT, VOCAB, WINDOW, ZOO, Entry, Way, scatter_weights

# Seeds and gains are drawn so that the first 32 greedy tokens of `prompts()` hold 46 distinct ones
# or more and no choice is closer than 1e-3 sigma; what is absent has seed 0 and gain 1.6.
_SEEDS: dict[str, int] = dict(
    bloom=3,
    mpt=6,
    diffllama=1,
    recurrent_gemma=2,
    llama=2,
    mistral=5,
    qwen2=4,
    qwen3=2,
    gemma2=7,
    gemma3=2,
    phi3=2,
    gpt2=2,
    gpt_neox=3,
    mixtral=1,
    granite=5,
    cohere2=1,
    llama4=2,
    deepseek_v2=1,
    deepseek_v3=1,
    gemma3n=1,
    gemma4=2,
    phimoe=2,
    stablelm=1,
    phi3_longrope=2,
    llama_dynamic=3,
    falcon_new=1,
    gptj=2,
    codegen=6,
    gpt_neo=4,
    falcon_alibi=3,
    jamba=1,
    qwen3_next=2,
    mamba2=7,
    falcon_mamba=1,
    falcon_h1=2,
)
_GAINS: dict[str, float] = dict(
    mpt=2.2,
    gpt2=3.0,
    gpt_neox=3.0,
    falcon=2.2,
    falcon_new=2.2,
    gptj=3.0,
    codegen=3.0,
    falcon_alibi=3.0,
)
_EMBED: dict[str, float] = dict(gemma3n=0.03, gemma4=0.03)


_SPECIAL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def _plain(**kwargs: Any) -> dict[str, Any]:
    """The usual fields of a decoder; classes without `head_dim` take hidden_size 256 instead."""
    base: dict[str, Any] = dict(
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
    )
    made = {**_SPECIAL, **base, **kwargs}
    return {k: v for k, v in made.items() if v is not _DROP}


_DROP = object()
_WIDE: dict[str, Any] = {"hidden_size": 256, "head_dim": _DROP}
_LOCAL = ["sliding_attention", "full_attention"]
_NO_WINDOW = {"sliding_window": NO_LIMIT}
_MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _add(
    name: str,
    stem: str,
    *,
    way: Way = "packed",
    chunked: bool = True,
    controls: Mapping[str, Mapping[str, Any]] | None = None,
    regime_tokens: int | None = None,
    notes: str = "",
    config: str | None = None,
    model: str | None = None,
    **kwargs: Any,
) -> None:
    """Enter `model(config(**kwargs))`, both names in `transformers`, by default from `stem`."""

    def builder(*, no_sinks: bool = False, **overrides: Any) -> transformers.PreTrainedModel:
        made = getattr(transformers, config or f"{stem}Config")(**{**kwargs, **overrides})
        torch.manual_seed(0)
        cls = getattr(transformers, model or f"{stem}ForCausalLM")
        net = cls._from_config(made, dtype=torch.float32).eval()
        scatter_weights(
            net,
            seed=_SEEDS.get(name, 0),
            gain=_GAINS.get(name, 1.6),
            embed=_EMBED.get(name, 0.3),
        )
        if no_sinks:
            for weight_name, p in net.named_parameters():
                if weight_name.endswith(".sinks"):
                    p.data.fill_(float("-inf"))
        return net

    ZOO[name] = Entry(name, builder, way, chunked, controls or {}, regime_tokens, notes)


# --- Packed: through the attention interface ------------------------------------------------------

_add("llama", "Llama", **_plain())
_add(
    "mistral",
    "Mistral",
    controls={"window": _NO_WINDOW},
    notes="window on every layer",
    **_plain(sliding_window=WINDOW),
)
_add("qwen2", "Qwen2", **_plain(**_WIDE))
_add("qwen3", "Qwen3", notes="norms on q and k", **_plain())
_add(
    "gemma2",
    "Gemma2",
    controls={"window": _NO_WINDOW, "softcap": {"attn_logit_softcapping": None}},
    notes="softcap 2.0; window on every second layer",
    **_plain(
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=16,
        layer_types=_LOCAL * 2,
        num_hidden_layers=4,
    ),
)
_add(
    "gemma3",
    "Gemma3",
    config="Gemma3TextConfig",
    controls={"window": _NO_WINDOW},
    notes="local and global layers with rotary bases of their own",
    **_plain(
        sliding_window=WINDOW,
        query_pre_attn_scalar=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
)
_add("phi3", "Phi3", **_plain())
_add(
    "gpt2",
    "GPT2",
    model="GPT2LMHeadModel",
    notes="learned positions",
    n_embd=256,
    n_layer=3,
    n_head=4,
    n_positions=512,
    n_inner=96,
    **_SPECIAL,
)
_add(
    "gpt_neox",
    "GPTNeoX",
    notes="rotary on a quarter of the head",
    **_plain(**_WIDE, num_key_value_heads=_DROP),
)
_add("mixtral", "Mixtral", **_plain(**_MOE))
_add("olmo2", "Olmo2", notes="norms on the whole of q and k", **_plain(**_WIDE))
_add(
    "granite",
    "Granite",
    notes="its own scales",
    **_plain(**_WIDE, attention_multiplier=0.1, residual_multiplier=0.8, logits_scaling=2.0),
)
_add(
    "cohere2",
    "Cohere2",
    controls={"window": _NO_WINDOW},
    notes="interleaved rotary on window layers, none on full ones",
    **_plain(
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
)
_add(
    "gpt_oss",
    "GptOss",
    controls={"window": _NO_WINDOW, "sinks": {"no_sinks": True}},
    notes="a learned sink logit per head",
    **_plain(
        sliding_window=WINDOW,
        layer_types=_LOCAL * 2,
        num_hidden_layers=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **_MOE,
    ),
)
_add(
    "llama4",
    "Llama4",
    config="Llama4TextConfig",
    controls={"chunk": {"attention_chunk_size": NO_LIMIT}},
    notes="chunks of 8 never reach the kernel; every fourth layer full, unrotated, scaled",
    **_plain(
        attention_chunk_size=CHUNK,
        num_hidden_layers=4,
        intermediate_size_mlp=96,
        interleave_moe_layer_step=2,
        num_local_experts=2,
        num_experts_per_tok=1,
        floor_scale=8,
    ),
)
_MLA: dict[str, Any] = dict(
    num_key_value_heads=4,
    head_dim=_DROP,
    kv_lora_rank=64,
    qk_rope_head_dim=32,
    qk_nope_head_dim=64,
    v_head_dim=64,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
)
_add("deepseek_v2", "DeepseekV2", notes="latents", **_plain(**_MLA, q_lora_rank=None))
_add(
    "deepseek_v3",
    "DeepseekV3",
    notes="latents, low-rank queries, grouped experts",
    **_plain(**_MLA, q_lora_rank=48, n_group=2, topk_group=1),
)
_SHARED: dict[str, Any] = dict(
    sliding_window=WINDOW,
    num_hidden_layers=6,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    num_kv_shared_layers=3,
    hidden_size_per_layer_input=16,
    vocab_size_per_layer_input=VOCAB,
)
_add(
    "gemma3n",
    "Gemma3n",
    config="Gemma3nTextConfig",
    controls={"window": _NO_WINDOW},
    notes="layers 3-5 read the keys of layers 1, 1, 2",
    **_plain(
        **_SHARED,
        intermediate_size=[96] * 6,
        activation_sparsity_pattern=[0.0] * 6,
        laurel_rank=8,
        altup_num_inputs=2,
    ),
)
_add(
    "gemma4",
    "Gemma4",
    config="Gemma4TextConfig",
    controls={"window": _NO_WINDOW},
    notes="layers 3-5 read the keys of layers 1, 1, 2; head size differs per layer type",
    **_plain(**_SHARED, global_head_dim=32),
)
_add("phi", "Phi", notes="rotary on half of the head", **_plain(**_WIDE))
_add("cohere", "Cohere", notes="interleaved rotary", **_plain(**_WIDE))
_add(
    "qwen2_moe",
    "Qwen2Moe",
    controls={"window": _NO_WINDOW},
    notes="window in the configuration, not handed to the kernel",
    **_plain(
        **_WIDE,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
)
_add(
    "phimoe",
    "Phimoe",
    controls={"window": _NO_WINDOW},
    notes="window in the configuration, not handed to the kernel",
    **_plain(**_WIDE, sliding_window=WINDOW, **_MOE),
)
_add("stablelm", "StableLm", notes="rotary on a quarter of the head", **_plain(**_WIDE))
_add(
    "phi3_longrope",
    "Phi3",
    regime_tokens=16,
    notes="long rotary factors as soon as one position reaches 16",
    **_plain(
        **_WIDE,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 32,
            "long_factor": [1.0 + i / 4 for i in range(32)],
            "original_max_position_embeddings": 16,
        },
    ),
)
_add(
    "llama_dynamic",
    "Llama",
    regime_tokens=16,
    notes="dynamic NTK: frequencies follow the longest position of the forward beyond 16",
    **_plain(
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    ),
)

_add(
    "qwen2_5_vl",
    "Qwen2_5_VL",
    model="Qwen2_5_VLForConditionalGeneration",
    notes="composite, text only; three position rows (M-RoPE)",
    text_config=_plain(
        **_WIDE,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [8, 12, 12],
        },
    ),
    vision_config=dict(
        depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=256
    ),
    tie_word_embeddings=False,
)
_add(
    "gemma3_mm",
    "Gemma3",
    model="Gemma3ForConditionalGeneration",
    notes="composite, text only; image blocks would need an overlay mask",
    text_config=_plain(
        sliding_window=WINDOW,
        query_pre_attn_scalar=64,
        num_hidden_layers=4,
        layer_types=_LOCAL * 2,
    ),
    vision_config=dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    ),
    mm_tokens_per_image=4,
    tie_word_embeddings=False,
)

# --- Patched: outside the interface ---------------------------------------------------------------

_FALCON: dict[str, Any] = {
    **_SPECIAL,
    "hidden_size": 256,
    "ffn_hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_add(
    "falcon",
    "Falcon",
    way="patched",
    notes="one KV head",
    multi_query=True,
    new_decoder_architecture=False,
    parallel_attn=True,
    alibi=False,
    bias=False,
    **_FALCON,
)
_add(
    "falcon_new",
    "Falcon",
    way="patched",
    notes="hands the cache KV heads repeated for every query head",
    new_decoder_architecture=True,
    num_kv_heads=2,
    alibi=False,
    bias=False,
    **_FALCON,
)
_GPT: dict[str, Any] = {
    **_SPECIAL,
    "n_embd": 256,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "n_inner": 96,
    "rotary_dim": 16,
}
_add("gptj", "GPTJ", way="patched", **_GPT)
_add("codegen", "CodeGen", way="patched", **_GPT)
_add(
    "gpt_neo",
    "GPTNeo",
    way="patched",
    controls={"window": {"window_size": 128}},
    notes="unscaled scores; the window is a buffer of the module",
    hidden_size=256,
    intermediate_size=96,
    num_layers=4,
    num_heads=4,
    max_position_embeddings=128,
    window_size=WINDOW,
    attention_types=[[["global", "local"], 2]],
    **_SPECIAL,
)
_add(
    "falcon_alibi",
    "Falcon",
    way="dense",
    notes="the position bias hides in the mask",
    multi_query=False,
    new_decoder_architecture=False,
    alibi=True,
    bias=True,
    **_FALCON,
)

_add(
    "bloom",
    "Bloom",
    way="dense",
    notes="alibi in the mask; takes no position_ids",
    hidden_size=256,
    n_layer=3,
    n_head=4,
    **_SPECIAL,
)
_add(
    "mpt",
    "Mpt",
    way="dense",
    notes="alibi in the mask; takes no position_ids",
    d_model=256,
    n_heads=4,
    n_layers=3,
    expansion_ratio=1,
    max_seq_len=512,
    **_SPECIAL,
)
_add(
    "diffllama",
    "DiffLlama",
    way="dense",
    notes="rearranges values after the cache",
    **_plain(**_WIDE),
)
_add(
    "jetmoe",
    "JetMoe",
    way="dense",
    notes="repeats keys and values per expert after the cache",
    **_plain(head_dim=_DROP, num_attention_heads=_DROP, kv_channels=64, **_MOE),
)

# --- Rows: recurrent and hybrid -------------------------------------------------------------------

_add(
    "jamba",
    "Jamba",
    way="rows",
    chunked=False,
    notes="Mamba-1 and attention",
    **_plain(
        **_WIDE,
        num_hidden_layers=4,
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    ),
)
_add(
    "qwen3_next",
    "Qwen3Next",
    way="rows",
    notes="gated delta rule and attention",
    **_plain(
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
)
_MAMBA2: dict[str, Any] = dict(
    mamba_n_heads=8, mamba_d_head=64, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=16
)
_add(
    "bamba",
    "Bamba",
    way="rows",
    notes="Mamba-2 and attention",
    **_plain(**_WIDE, **_MAMBA2, attn_layer_indices=[1]),
)
_add(
    "mamba2",
    "Mamba2",
    way="rows",
    notes="no attention at all; the cache is called cache_params",
    hidden_size=128,
    num_heads=8,
    head_dim=32,
    state_size=16,
    n_groups=2,
    chunk_size=16,
    num_hidden_layers=3,
    **_SPECIAL,
)
_MAMBA1: dict[str, Any] = {
    **_SPECIAL,
    "hidden_size": 128,
    "state_size": 8,
    "num_hidden_layers": 3,
    "time_step_rank": 8,
}
_add("mamba", "Mamba", way="rows", chunked=False, notes="Mamba-1, no attention", **_MAMBA1)
_add(
    "falcon_mamba", "FalconMamba", way="rows", chunked=False, notes="Mamba-1 with norms", **_MAMBA1
)
_add(
    "falcon_h1",
    "FalconH1",
    way="rows",
    notes="Mamba-2 and attention side by side in every layer",
    **_plain(**_WIDE, **_MAMBA2, mamba_d_ssm=512),
)
_add(
    "lfm2",
    "Lfm2",
    way="rows",
    notes="short convolutions, no recurrent state",
    **_plain(**_WIDE, layer_types=["conv", "full_attention", "conv"], block_multiple_of=32),
)
_add(
    "granitemoehybrid",
    "GraniteMoeHybrid",
    way="rows",
    notes="Mamba-2, attention without positions, experts",
    **_plain(
        **_WIDE,
        **_MAMBA2,
        **_MOE,
        layer_types=["mamba", "attention", "mamba"],
        shared_intermediate_size=32,
        attention_multiplier=0.125,
    ),
)
_add(
    "zamba2",
    "Zamba2",
    way="rows",
    notes="one attention block shared by several layers",
    **_plain(
        head_dim=_DROP,
        num_hidden_layers=4,
        num_key_value_heads=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        n_mamba_heads=8,
        mamba_d_state=16,
        chunk_size=16,
        use_mem_rope=True,
        adapter_rank=8,
        use_mamba_kernels=False,
    ),
)

_add(
    "zamba",
    "Zamba",
    way="rows",
    chunked=False,
    notes="Mamba-1; one attention block shared by several layers, whose layer_idx lies",
    **_plain(
        head_dim=_DROP,
        num_hidden_layers=4,
        num_key_value_heads=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        n_mamba_heads=2,
        mamba_d_state=8,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    ),
)

# --- Refused --------------------------------------------------------------------------------------

_add(
    "bert",
    "Bert",
    way="refused",
    model="BertForMaskedLM",
    notes="an encoder: nothing to cache",
    **_plain(**_WIDE, num_key_value_heads=_DROP),
)
_add(
    "t5",
    "T5",
    way="refused",
    model="T5ForConditionalGeneration",
    notes="an encoder and a decoder",
    d_model=64,
    d_kv=16,
    d_ff=96,
    num_layers=2,
    num_heads=4,
    decoder_start_token_id=0,
    **{**_SPECIAL, "pad_token_id": 0},
)
_add(
    "deepseek_v32",
    "DeepseekV32",
    way="refused",
    notes="sparse attention: the indexer keeps keys of its own in the cache",
    **_plain(
        **{**_MLA, "head_dim": 32, "q_lora_rank": 48, "n_group": 1, "topk_group": 1},
        index_topk=16,
        index_head_dim=64,
        index_n_heads=2,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
)
_add(
    "recurrent_gemma",
    "RecurrentGemma",
    way="refused",
    notes="keeps its state on the modules",
    **_plain(**_WIDE, attention_window_size=WINDOW, lru_width=256),
)
_add(
    "rwkv",
    "Rwkv",
    way="refused",
    notes="state of its own, no cache object",
    hidden_size=64,
    num_hidden_layers=2,
    context_length=512,
    **_SPECIAL,
)
_add(
    "openai_gpt",
    "OpenAIGPT",
    way="refused",
    model="OpenAIGPTLMHeadModel",
    notes="takes no cache at all",
    n_embd=64,
    n_layer=2,
    n_head=4,
    n_positions=128,
    **_SPECIAL,
)
