"""Models whose layers all see the whole text."""

from typing import Any

from scripts.models.recipe import EXPERTS, TEXT_ONLY, of

DECODERS: dict[str, dict[str, Any]] = {
    "ApertusForCausalLM": of("ApertusConfig", "bfloat16"),
    "ArceeForCausalLM": of("ArceeConfig"),
    "CohereForCausalLM": of("CohereConfig", tie_word_embeddings=True),
    "DbrxForCausalLM": of(
        "DbrxConfig",
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    ),
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
    "FalconForCausalLM": of(
        "FalconConfig", new_decoder_architecture=True, num_kv_heads=2, alibi=False
    ),
    "FlexOlmoForCausalLM": of("FlexOlmoConfig", **{**EXPERTS, "moe_intermediate_size": 128}),
    "GemmaForCausalLM": of("GemmaConfig"),
    "Glm4ForCausalLM": of("Glm4Config"),
    "Glm4MoeForCausalLM": of(
        "Glm4MoeConfig",
        **EXPERTS,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
    ),
    "GlmForCausalLM": of("GlmConfig"),
    "GPTJForCausalLM": of(
        "GPTJConfig", n_head=4, n_embd=64, n_layer=2, n_positions=128, rotary_dim=16
    ),
    "GPTNeoXForCausalLM": of("GPTNeoXConfig", num_key_value_heads=4),  # it has no groups
    "GraniteForCausalLM": of("GraniteConfig"),
    "GraniteMoeForCausalLM": of("GraniteMoeConfig", **EXPERTS),
    "GraniteMoeSharedForCausalLM": of(
        "GraniteMoeSharedConfig", **EXPERTS, shared_intermediate_size=32
    ),
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
    "LlamaForCausalLM": of("LlamaConfig"),
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
    "OlmoForCausalLM": of("OlmoConfig"),
    "Olmo2ForCausalLM": of("Olmo2Config"),
    "OlmoeForCausalLM": of("OlmoeConfig", **{**EXPERTS, "norm_topk_prob": False}),
    "PhiForCausalLM": of("PhiConfig", partial_rotary_factor=0.5),
    "Phi3ForCausalLM": of("Phi3Config"),
    "PhiMoEForCausalLM": of(
        "PhimoeConfig", num_local_experts=4, num_experts_per_tok=2, intermediate_size=64
    ),
    "Qwen2ForCausalLM": of("Qwen2Config"),
    "Qwen2MoeForCausalLM": of("Qwen2MoeConfig"),
    "Qwen3ForCausalLM": of("Qwen3Config"),
    "Qwen3MoeForCausalLM": of("Qwen3MoeConfig"),
    "SeedOssForCausalLM": of("SeedOssConfig"),
    "SmolLM3ForCausalLM": of("SmolLM3Config", no_rope_layers=[1, 0]),
    "StableLmForCausalLM": of("StableLmConfig", partial_rotary_factor=0.25),
    "Starcoder2ForCausalLM": of("Starcoder2Config"),
    # Multimodal models, of which the language model is served.
    "Qwen2_5_VLForConditionalGeneration": of(
        "Qwen2_5_VLConfig",
        options=TEXT_ONLY,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    ),
    "Qwen3VLForConditionalGeneration": of("Qwen3VLConfig", options=TEXT_ONLY),
}

# By the numbers of a model that computes the same: scripts/models/renamed.py.
DECODERS |= {
    "ChatGLMForConditionalGeneration": of(
        "GlmConfig", architecture="ChatGLMForConditionalGeneration", attention_bias=True
    ),
    "ChatGLMModel": of("GlmConfig", architecture="ChatGLMModel", attention_bias=True),
    "ExaoneForCausalLM": of("LlamaConfig", architecture="ExaoneForCausalLM"),
    "InternLM2ForCausalLM": of("LlamaConfig", architecture="InternLM2ForCausalLM"),
    "MiMoForCausalLM": of("Qwen2Config", architecture="MiMoForCausalLM"),
    "MiniCPMForCausalLM": of(
        "GraniteConfig",
        architecture="MiniCPMForCausalLM",
        embedding_multiplier=12.0,
        attention_multiplier=0.25,  # of heads of 16
        residual_multiplier=0.9,
        logits_scaling=2.0,
    ),
    "OrionForCausalLM": of(
        "StableLmConfig", architecture="OrionForCausalLM", partial_rotary_factor=1.0
    ),
    "PanguEmbeddedForCausalLM": of(
        "LlamaConfig", architecture="PanguEmbeddedForCausalLM", attention_bias=True
    ),
    "Rnj1ForCausalLM": of(
        "Gemma3TextConfig",
        architecture="Rnj1ForCausalLM",
        layer_types=["full_attention"] * 2,
        initializer_range=0.5,
    ),
    "TeleChat2ForCausalLM": of(
        "LlamaConfig",
        architecture="TeleChat2ForCausalLM",
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
    ),
}
