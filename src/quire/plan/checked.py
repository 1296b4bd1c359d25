"""Model types whose configs are known to be read as their models run; of others a plan says that it assumes so.

The tests make a model of each that transformers has and hold what it caches to what is read from its config; the rest
are those of the catalogue, whose bytes the tests hold to published figures.
"""

__all__ = ["CHECKED"]

_TYPES = """
afmoe apertus arcee aria_text axk1 axk2 baichuan bailing_hybrid bamba bart beam bert bert-generation big_bird
bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom camembert chatglm codegen cohere cohere2 cohere2_moe
cohere_compass_text cpmant ctrl cwm data2vec-text dbrx deepseek deepseek_v2 deepseek_v3 deepseek_v32 diffllama dots1
dots3_note_text electra emu3_text_model ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba
flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text git glm glm4 glm4_moe
glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa
granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3
hy_v4 hyperclovax internlm2 internlm3 iquestcoder jais2 jamba jetmoe kimi_k2 kimi_linear kolibri1 laguna lfm2
lfm2_moe lfm3 llama llama4_text longcat_flash mamba mamba2 marian mbart megatron-bert mellum minicpm minicpm3
minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral mllama_text_model modernbert-decoder moshi mpt
mvp nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt pegasus persimmon phi phi-msft phi3
phi4_multimodal phimoe plbart prophetnet qwen qwen2 qwen2_5_vl_text qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text
qwen3_moe qwen3_next qwen4_exp_text recurrent_gemma rembert roberta roberta-prelayernorm roc_bert roformer rwkv5
seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma whisper xglm xlm-roberta xlm-roberta-xl xmod youtu
zamba zamba2
"""

CHECKED = frozenset(_TYPES.split())
