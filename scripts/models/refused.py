"""Models that no start gets past."""

from typing import Any

from scripts.models.recipe import EXPERTS, HYBRID, HYBRID_PAGES, refused

REFUSED: dict[str, dict[str, Any]] = {
    "AXK1ForCausalLM": refused("AXK1ForCausalLM", "AXK1Config"),
    "BloomForCausalLM": refused("BloomForCausalLM", "BloomConfig", n_head=4),
    "Cohere2ForCausalLM": refused(
        "Cohere2ForCausalLM", "Cohere2Config", options=HYBRID_PAGES, **HYBRID
    ),
    "Cohere2MoeForCausalLM": refused(
        "Cohere2MoeForCausalLM", "Cohere2MoeConfig", options=HYBRID_PAGES, **HYBRID, **EXPERTS
    ),
    "DeepseekV2ForCausalLM": refused("DeepseekV2ForCausalLM", "DeepseekV2Config"),
    "DeepseekV32ForCausalLM": refused("DeepseekV32ForCausalLM", "DeepseekV32Config"),
    "DeepseekV4ForCausalLM": refused("DeepseekV4ForCausalLM", "DeepseekV4Config"),
    "GlmMoeDsaForCausalLM": refused("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig"),
    "HYV4ForCausalLM": refused("HYV4ForCausalLM", "HYV4Config"),
    "InklingForCausalLM": refused("InklingForCausalLM", "InklingTextConfig"),
    "LongcatFlashForCausalLM": refused("LongcatFlashForCausalLM", "LongcatFlashConfig"),
    "DeepseekV3ForCausalLM": refused("DeepseekV3ForCausalLM", "DeepseekV3Config"),
    "ExaoneMoeForCausalLM": refused(
        "ExaoneMoeForCausalLM", "ExaoneMoeConfig", options=HYBRID_PAGES, **HYBRID, **EXPERTS
    ),
    "Glm4MoeLiteForCausalLM": refused("Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig"),
    "GPT2LMHeadModel": refused("GPT2LMHeadModel", "GPT2Config", n_head=4, n_embd=64, n_layer=2),
    "GPTBigCodeForCausalLM": refused(
        "GPTBigCodeForCausalLM", "GPTBigCodeConfig", n_head=4, n_embd=64, n_layer=2
    ),
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
    "NemotronHForCausalLM": refused("NemotronHForCausalLM", "NemotronHConfig"),
    "OPTForCausalLM": refused("OPTForCausalLM", "OPTConfig", word_embed_proj_dim=64),
}
