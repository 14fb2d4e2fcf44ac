"""What is supported: the models whose answers were checked, and the engine's features.

`vllm_dca.engine.refusals` refuses the rest at start-up; both make the table of
docs/supported.md.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.config.cache import CacheDType

# Checked against Hugging Face's own code, by model_type.
PROVED_MODELS = {
    "cohere": "Cohere",
    "gemma": "Gemma",
    "gemma3_text": "Gemma 3, whose sliding-window layers keep vLLM's own attention",
    "glm": "GLM",
    "glm4": "GLM-4",
    "granite": "Granite",
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "nemotron": "Nemotron",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "phi": "Phi",
    "phi3": "Phi-3",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "qwen3_next": "Qwen3-Next, whose linear-attention layers stay as they are",
    "smollm3": "SmolLM3",
    "stablelm": "StableLM",
    "starcoder2": "StarCoder2",
}
# Models with sliding-window layers beside full ones, by model_type. In others the full ones may
# have no rotary positions (Cohere 2), or there may be none: nothing in the model tells.
HYBRID_MODELS = ("gemma3_text",)
# Models whose config says which layers have no rotary positions.
NOPE_MODELS = ("smollm3",)
ROPE_TYPES = ("none", "linear", "dynamic NTK", "YaRN", "llama3")
# By name; the backend refuses those that do not go with the model's dtype or the device.
KV_CACHE_DTYPES: dict["CacheDType", torch.dtype | None] = {
    "auto": None,  # the model's
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
# Compute capabilities whose blocks may have 99 KiB of shared memory (CUDA programming guide).
SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))
# Speculation whose drafts come from no attention layers of their own.
DRAFTERS_WITHOUT_LAYERS = ("ngram",)
# Speculation whose drafters' attention layers are DCA's too, with the model's chunk sizes.
DRAFTERS_WITH_LAYERS = ("draft_model", "eagle", "eagle3")
DRAFTERS = (*DRAFTERS_WITHOUT_LAYERS, *DRAFTERS_WITH_LAYERS)


def cache_dtype_of(kv_cache_dtype: "CacheDType", model_dtype: torch.dtype) -> torch.dtype:
    """What the KV cache holds, by its name in vLLM."""
    return KV_CACHE_DTYPES[kv_cache_dtype] or model_dtype
