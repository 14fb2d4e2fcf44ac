"""How each text model of vLLM's registry is built here, or why it cannot be."""

import functools
from typing import Any

from tests.helpers.checkpoints import MOE


@functools.cache
def architectures() -> tuple[str, ...]:
    """vLLM's text-generation models, those that it leaves to transformers, some multimodal."""
    from vllm.model_executor.models import registry

    multimodal = "TransformersMultiModal"
    others = registry._TRANSFORMERS_SUPPORTED_MODELS.items()
    return (
        *registry._TEXT_GENERATION_MODELS,
        *(name for name, (_, served_by) in others if not served_by.startswith(multimodal)),
        *MULTIMODAL,
    )


def of(
    config: str,
    dtype: str = "float32",
    options: dict[str, Any] | None = None,
    refused: str = "",
    architecture: str = "",
    **changes: Any,
) -> dict[str, Any]:
    """A recipe as `scripts.models.proof.prove` takes it."""
    return {
        "config": config,
        "dtype": dtype,
        "options": options or {},
        "refused": refused,
        "architecture": architecture,
        "changes": changes,
    }


def refused(
    architecture: str, config: str, options: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """Of a model that no start gets past."""
    return of(config, options=options, refused=architecture, **changes)


# Full layers between layers with a window of less than a chunk.
HYBRID = {
    "num_hidden_layers": 3,
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# vLLM's kernel for windows on a CPU wants heads of 32.
WIDE = {**HYBRID, "head_dim": 32}
FEW = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "head_dim": 64,
    "initializer_range": 0.1,
}
# vLLM's Mamba-2 on a CPU keeps no state in the middle of a prompt.
UNCACHED = {"enable_prefix_caching": False}
HYBRID_PAGES = {"block_size": 32, "num_gpu_blocks_override": 300}
EXPERTS = {**MOE, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_token": 2}
NO_PAGES: dict[str, Any] = {}  # Pages of linear-attention layers are of a size of their own.

FULL_MROPE = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
    "mrope_section": [12, 10, 10],
    "mrope_interleaved": True,
}
TEXT_ONLY = {"language_model_only": True}
MULTIMODAL = (
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)

RECIPES: dict[str, dict[str, Any]] = {
    "AfmoeForCausalLM": of(
        "AfmoeConfig",
        options=HYBRID_PAGES,
        score_func="sigmoid",
        n_group=1,
        topk_group=1,
        route_norm=True,
        num_expert_groups=1,
        num_limited_groups=1,
        **HYBRID,
        **EXPERTS,
    ),
    "ApertusForCausalLM": of("ApertusConfig", "bfloat16"),
    "ArceeForCausalLM": of("ArceeConfig"),
    "AXK1ForCausalLM": refused("AXK1ForCausalLM", "AXK1Config"),
    "BloomForCausalLM": refused("BloomForCausalLM", "BloomConfig", n_head=4),
    "CohereForCausalLM": of("CohereConfig", tie_word_embeddings=True),
    "Cohere2ForCausalLM": refused(
        "Cohere2ForCausalLM", "Cohere2Config", options=HYBRID_PAGES, **HYBRID
    ),
    "Cohere2MoeForCausalLM": refused(
        "Cohere2MoeForCausalLM", "Cohere2MoeConfig", options=HYBRID_PAGES, **HYBRID, **EXPERTS
    ),
    "CwmForCausalLM": of("CwmConfig", options=HYBRID_PAGES, **HYBRID),
    "DbrxForCausalLM": of(
        "DbrxConfig",
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "DeepseekV2ForCausalLM": refused("DeepseekV2ForCausalLM", "DeepseekV2Config"),
    "DeepseekV32ForCausalLM": refused("DeepseekV32ForCausalLM", "DeepseekV32Config"),
    "DeepseekV4ForCausalLM": refused("DeepseekV4ForCausalLM", "DeepseekV4Config"),
    "GlmMoeDsaForCausalLM": refused("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig"),
    "HYV4ForCausalLM": refused("HYV4ForCausalLM", "HYV4Config"),
    "InklingForCausalLM": refused("InklingForCausalLM", "InklingTextConfig"),
    "LongcatFlashForCausalLM": refused("LongcatFlashForCausalLM", "LongcatFlashConfig"),
    "DeepseekV3ForCausalLM": refused("DeepseekV3ForCausalLM", "DeepseekV3Config"),
    "Ernie4_5ForCausalLM": of("Ernie4_5Config"),
    "Ernie4_5_MoeForCausalLM": of(
        "Ernie4_5_MoeConfig",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=32,
        moe_layer_start_index=0,
        moe_layer_interval=1,
        moe_num_shared_experts=1,
    ),
    "Exaone4ForCausalLM": of(
        "Exaone4Config",
        sliding_window=None,
        sliding_window_pattern=None,
        layer_types=["full_attention"] * 2,
    ),
    "ExaoneMoeForCausalLM": refused(
        "ExaoneMoeForCausalLM", "ExaoneMoeConfig", options=HYBRID_PAGES, **HYBRID, **EXPERTS
    ),
    "FalconForCausalLM": of(
        "FalconConfig", new_decoder_architecture=True, num_kv_heads=2, alibi=False
    ),
    "FalconH1ForCausalLM": of(
        "FalconH1Config",
        options=UNCACHED,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_chunk_size=256,
    ),
    "FlexOlmoForCausalLM": of("FlexOlmoConfig", **{**EXPERTS, "moe_intermediate_size": 128}),
    "GemmaForCausalLM": of("GemmaConfig"),
    "Gemma2ForCausalLM": of(
        "Gemma2Config",
        options=HYBRID_PAGES,
        query_pre_attn_scalar=32,
        tie_word_embeddings=True,
        **WIDE,
    ),
    "Gemma3ForCausalLM": of(
        "Gemma3TextConfig", options=HYBRID_PAGES, **{**WIDE, "initializer_range": 0.5}
    ),
    "Gemma3nForCausalLM": of(
        "Gemma3nTextConfig",
        options=HYBRID_PAGES,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=256,
        hidden_size_per_layer_input=16,
        altup_num_inputs=2,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 3,
        tie_word_embeddings=True,
        **WIDE,
    ),
    "Gemma4ForCausalLM": of(
        "Gemma4TextConfig",
        options=HYBRID_PAGES,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=256,
        hidden_size_per_layer_input=16,
        global_head_dim=32,
        tie_word_embeddings=True,
        **WIDE,
    ),
    "Glm4ForCausalLM": of("Glm4Config"),
    "Glm4MoeForCausalLM": of(
        "Glm4MoeConfig",
        **EXPERTS,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
    ),
    "Glm4MoeLiteForCausalLM": refused("Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig"),
    "GlmForCausalLM": of("GlmConfig"),
    "GptOssForCausalLM": of("GptOssConfig", options=HYBRID_PAGES, **WIDE, **EXPERTS),
    "GPT2LMHeadModel": refused("GPT2LMHeadModel", "GPT2Config", n_head=4, n_embd=64, n_layer=2),
    "GPTBigCodeForCausalLM": refused(
        "GPTBigCodeForCausalLM", "GPTBigCodeConfig", n_head=4, n_embd=64, n_layer=2
    ),
    "GPTJForCausalLM": of(
        "GPTJConfig", n_head=4, n_embd=64, n_layer=2, n_positions=128, rotary_dim=16
    ),
    "GPTNeoXForCausalLM": of("GPTNeoXConfig", **FEW),
    "GraniteForCausalLM": of("GraniteConfig"),
    "GraniteMoeForCausalLM": of("GraniteMoeConfig", **EXPERTS),
    "GraniteMoeHybridForCausalLM": of(
        "GraniteMoeHybridConfig",
        options=UNCACHED,
        layer_types=["mamba", "attention"],
        position_embedding_type="rope",
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_chunk_size=256,
        shared_intermediate_size=32,
        **FEW,
        **EXPERTS,
    ),
    "GraniteMoeSharedForCausalLM": of(
        "GraniteMoeSharedConfig", **EXPERTS, shared_intermediate_size=32
    ),
    "GraniteMoeSWAForCausalLM": of(
        "GraniteMoeSWAConfig",
        options=HYBRID_PAGES,
        **HYBRID,
        **FEW,
        **EXPERTS,
        shared_intermediate_size=32,
    ),
    "GraniteSWAForCausalLM": of("GraniteSWAConfig", options=HYBRID_PAGES, **HYBRID, **FEW),
    "HrmTextForCausalLM": of("HrmTextConfig"),
    "HunYuanDenseV1ForCausalLM": of("HunYuanDenseV1Config"),
    "HunYuanMoEV1ForCausalLM": of("HunYuanMoEV1Config", **{**EXPERTS, "moe_topk": 2}),
    "HYV3ForCausalLM": of(
        "HYV3Config",
        first_k_dense_replace=1,
        expert_hidden_dim=32,
        route_norm=True,
        qk_norm=True,
        num_shared_experts=1,
        **EXPERTS,
    ),
    "HyperCLOVAXForCausalLM": of("HyperCLOVAXConfig"),
    "Jais2ForCausalLM": of("Jais2Config"),
    "JambaForCausalLM": refused(
        "JambaForCausalLM",
        "JambaConfig",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        **EXPERTS,
    ),
    "KimiLinearForCausalLM": refused(
        "KimiLinearForCausalLM", "KimiLinearConfig", options={"enable_prefix_caching": True}
    ),
    "LagunaForCausalLM": of(
        # vLLM's router on a CPU knows softmax only.
        "LagunaConfig",
        options=HYBRID_PAGES,
        mlp_layer_types=["dense"] * 3,
        **WIDE,
    ),
    "Lfm2ForCausalLM": of(
        "Lfm2Config",
        layer_types=["conv", "full_attention"],
        conv_L_cache=3,
        conv_dim=64,
        block_dim=64,
        block_ff_dim=128,
        block_auto_adjust_ff_dim=False,
    ),
    "Lfm2MoeForCausalLM": of(
        "Lfm2MoeConfig",
        options=NO_PAGES,
        layer_types=["conv", "full_attention"],
        conv_L_cache=3,
        num_dense_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **EXPERTS,
    ),
    "LlamaForCausalLM": of("LlamaConfig"),
    "Llama4ForCausalLM": refused(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        no_rope_layers=[1, 0],
        attention_chunk_size=64,
        intermediate_size_mlp=64,
        **EXPERTS,
    ),
    "MambaForCausalLM": refused("MambaForCausalLM", "MambaConfig"),
    "Mamba2ForCausalLM": refused("Mamba2ForCausalLM", "Mamba2Config", num_heads=4, head_dim=32),
    "FalconMambaForCausalLM": refused("FalconMambaForCausalLM", "FalconMambaConfig"),
    "MellumForCausalLM": of("MellumConfig", options=HYBRID_PAGES, **HYBRID, **FEW, **EXPERTS),
    # Its layers are Qwen2's, and transformers has no name for the rest.
    "MiMoForCausalLM": of("Qwen2Config", architecture="MiMoForCausalLM"),
    "MiMoV2FlashForCausalLM": of(
        "MiMoV2FlashConfig",
        options=HYBRID_PAGES,
        hybrid_layer_pattern=[1, 0, 1],
        moe_layer_freq=[0, 1, 1],
        layernorm_epsilon=1e-5,
        sliding_window_size=40,
        v_head_dim=32,
        swa_head_dim=32,
        swa_v_head_dim=32,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        add_swa_attention_sink_bias=False,
        mlp_layer_types=["dense", "sparse", "sparse"],
        **WIDE,
        **EXPERTS,
    ),
    "MiniCPM3ForCausalLM": of("MiniCPM3Config"),
    "MiniMaxM2ForCausalLM": of(
        "MiniMaxM2Config",
        rotary_dim=16,
        scoring_func="sigmoid",
        use_routing_bias=True,
        **EXPERTS,
    ),
    "Ministral3ForCausalLM": of("Ministral3Config"),
    "MistralForCausalLM": of("MistralConfig", sliding_window=None),
    "MixtralForCausalLM": of("MixtralConfig", num_local_experts=4, sliding_window=None),
    "NemotronForCausalLM": of("NemotronConfig"),
    "NemotronHForCausalLM": refused("NemotronHForCausalLM", "NemotronHConfig"),
    "OlmoForCausalLM": of("OlmoConfig"),
    "Olmo2ForCausalLM": of("Olmo2Config"),
    "Olmo3ForCausalLM": of("Olmo3Config", options=HYBRID_PAGES, **HYBRID, **FEW),
    "OlmoeForCausalLM": of("OlmoeConfig", **{**EXPERTS, "norm_topk_prob": False}),
    "OlmoHybridForCausalLM": of("OlmoHybridConfig", "bfloat16", options=NO_PAGES, **LINEAR),
    "OPTForCausalLM": refused("OPTForCausalLM", "OPTConfig", word_embed_proj_dim=64),
    "PhiForCausalLM": of("PhiConfig", partial_rotary_factor=0.5),
    "Phi3ForCausalLM": of("Phi3Config"),
    "PhiMoEForCausalLM": of(
        "PhimoeConfig", num_local_experts=4, num_experts_per_tok=2, intermediate_size=64
    ),
    "Qwen2ForCausalLM": of("Qwen2Config"),
    "Qwen2MoeForCausalLM": of("Qwen2MoeConfig"),
    "Qwen3ForCausalLM": of("Qwen3Config"),
    "Qwen3MoeForCausalLM": of("Qwen3MoeConfig"),
    "Qwen3NextForCausalLM": of(
        "Qwen3NextConfig",
        "bfloat16",
        options=NO_PAGES,
        partial_rotary_factor=1.0,
        shared_expert_intermediate_size=32,
        **LINEAR,
        **MOE,
    ),
    "Qwen3_5ForCausalLM": of("Qwen3_5TextConfig", "bfloat16", options=NO_PAGES, **LINEAR),
    "Qwen3_5MoeForCausalLM": of(
        "Qwen3_5MoeTextConfig",
        "bfloat16",
        options=NO_PAGES,
        shared_expert_intermediate_size=32,
        **LINEAR,
        **MOE,
    ),
    "Qwen4ExpForCausalLM": of(
        "Qwen4ExpTextConfig",
        "bfloat16",
        output_gate_type="sigmoid",
        shared_expert_intermediate_size=32,
        **LINEAR,
        **MOE,
    ),
    "SeedOssForCausalLM": of("SeedOssConfig"),
    "SmolLM3ForCausalLM": of("SmolLM3Config", no_rope_layers=[1, 0]),
    "StableLmForCausalLM": of("StableLmConfig", partial_rotary_factor=0.25),
    "Starcoder2ForCausalLM": of("Starcoder2Config"),
    "VaultGemmaForCausalLM": of(
        "VaultGemmaConfig",
        options=HYBRID_PAGES,
        query_pre_attn_scalar=32,
        tie_word_embeddings=True,
        **WIDE,
    ),
    "Zamba2ForCausalLM": of(
        "Zamba2Config",
        options=UNCACHED,
        use_mem_rope=True,
        layers_block_type=["mamba", "hybrid"],
        mamba_d_state=16,
        n_mamba_heads=4,
        chunk_size=256,
    ),
    # Multimodal models, of which the language model is served.
    "Qwen2_5_VLForConditionalGeneration": of(
        "Qwen2_5_VLConfig",
        options=TEXT_ONLY,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    ),
    "Qwen3VLForConditionalGeneration": of("Qwen3VLConfig", options=TEXT_ONLY),
    "Qwen3_5ForConditionalGeneration": of(
        "Qwen3_5Config", "bfloat16", options=TEXT_ONLY, rope_parameters=FULL_MROPE, **LINEAR
    ),
    "Qwen3_5MoeForConditionalGeneration": of(
        "Qwen3_5MoeConfig",
        "bfloat16",
        options=TEXT_ONLY,
        rope_parameters=FULL_MROPE,
        **LINEAR,
        **MOE,
    ),
}

# Why what has a recipe, or has a name in transformers, cannot be proved.
_BUILT_IN = "transformers' code for it has its attention built in"
_OFF = "vLLM and transformers disagree within the window, without DCA"
_PART = "vLLM's rotary operator on a CPU turns one head only of queries in this shape"
UNTESTED = {
    "Lfm2ForCausalLM": _PART,
    "Lfm2MoeForCausalLM": _PART,
    "DeepseekV4ForCausalLM": "transformers' config class makes none so small",
    "KimiLinearForCausalLM": "vLLM's own checks stop its start on a CPU",
    "PhiMoEForCausalLM": "transformers' code for it does not run",
    "Qwen4ExpForCausalLM": "its config class makes none without an indexer of keys",
    "Zamba2ForCausalLM": "vLLM takes no config so small",
    "DbrxForCausalLM": "vLLM cannot load the experts that transformers saves",
    "FalconForCausalLM": _BUILT_IN,
    "GPTJForCausalLM": _BUILT_IN,
    "MiMoV2FlashForCausalLM": _OFF,
    "MiniMaxM2ForCausalLM": "vLLM's router of experts on a CPU knows softmax only",
    "OlmoHybridForCausalLM": "vLLM has no CPU kernel for its linear layers",
}
