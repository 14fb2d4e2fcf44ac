"""What is supported: the models whose answers were checked, and the engine's features.

`vllm_dca.engine.refusals` refuses the rest at start-up; both make the table of
docs/supported.md.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig
    from vllm.config.cache import CacheDType

# Whose answers were checked against Hugging Face's own code, by model_type: docs/models.md.
PROVED_MODELS = (
    "PanguEmbedded",
    "apertus",
    "arcee",
    "chatglm",
    "cohere",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone",
    "exaone4",
    "falcon_h1",
    "flex_olmo",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granite_swa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hy_v3",
    "hyperclovax",
    "internlm2",
    "jais2",
    "laguna",
    "llama",
    "mellum",
    "mimo",
    "minicpm",
    "ministral3",
    "mistral",
    "mixtral",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "orion",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_5_vl_text",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl_text",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "telechat",
)
ROPE_TYPES = (
    *("none", "linear", "dynamic NTK", "YaRN", "llama3", "LongRoPE"),
    "proportional (Gemma 4)",
)
# By name; the backend refuses those that do not go with the model's dtype or the device.
KV_CACHE_DTYPES: dict["CacheDType", torch.dtype | None] = {
    "auto": None,  # the model's
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
# Speculation whose drafts come from no attention layers of their own.
DRAFTERS_WITHOUT_LAYERS = ("ngram", "medusa")
# Speculation whose drafters' attention layers are DCA's too, with the model's chunk sizes.
DRAFTERS_WITH_LAYERS = ("draft_model", "eagle", "eagle3", "mtp")
DRAFTERS = (*DRAFTERS_WITHOUT_LAYERS, *DRAFTERS_WITH_LAYERS)


def drafter_of(vllm_config: "VllmConfig") -> "SpeculativeConfig | None":
    """The speculative config, if the drafter has attention layers; else None."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method not in DRAFTERS_WITH_LAYERS:
        return None
    return speculative


def cache_name_of(dtype: torch.dtype) -> str | None:
    """The name in vLLM of a KV cache in a dtype; float32 has none."""
    return next((name for name, each in KV_CACHE_DTYPES.items() if each == dtype), None)


def cache_dtype_of(kv_cache_dtype: "CacheDType", model_dtype: torch.dtype) -> torch.dtype:
    """What the KV cache holds, by its name in vLLM, which refuses those that are not here."""
    return KV_CACHE_DTYPES.get(kv_cache_dtype) or model_dtype
