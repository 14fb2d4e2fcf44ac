"""What is checked and settled once, in the process that the user started."""

import dataclasses
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.transformers_utils.config import iter_rope_parameters
from vllm.v1.kv_cache_interface import KVCacheSpecKind

from vllm_dca.config import DcaSettings, resolve_settings, validate_options

# vLLM's logger is set up for its own package only.
logger = init_logger("vllm.plugins.dca")

OPTIONS = "dca"
# By name; the backend refuses those that do not go with the model's dtype or the device.
KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")
# Speculation whose drafts come from no attention layers of their own.
DRAFTERS_WITHOUT_LAYERS = ("ngram",)
# Models with sliding-window layers beside full ones, by model_type. In others the full ones may
# have no rotary positions (Cohere 2), or there may be none: nothing in the model tells.
HYBRID_MODELS = ("gemma3_text",)
# Models whose config says which layers have no rotary positions.
NOPE_MODELS = ("smollm3",)
CHECKPOINT_CONFIG = "dual_chunk_attention_config"


def cache_dtype_of(kv_cache_dtype: str, model_dtype: torch.dtype) -> torch.dtype:
    """What the KV cache holds, by its name in vLLM."""
    dtypes = {
        "auto": model_dtype,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "fp8": torch.float8_e4m3fn,
        "fp8_e4m3": torch.float8_e4m3fn,
        "fp8_e5m2": torch.float8_e5m2,
    }
    return dtypes[kv_cache_dtype]


def settings_of(vllm_config: VllmConfig) -> DcaSettings:
    """The settings that `configure` settled, in any process."""
    additional = vllm_config.additional_config
    try:
        return DcaSettings(**additional[OPTIONS])
    except (KeyError, TypeError) as error:
        raise RuntimeError(
            "DCA runs, but was not configured: the engine's config was not made by "
            "EngineArgs.create_engine_config."
        ) from error


def configure(vllm_config: VllmConfig) -> None:
    """Check that DCA can serve this configuration and settle the chunk sizes.

    The settings go into `additional_config`, which travels to every process and is hashed
    into the compile cache's key. The checkpoint's own config is taken away: vLLM's models
    still pass it to backends and rotary embeddings that no longer know it.

    Raises:
        ValueError, NotImplementedError: what was given, what is needed, what would work.
    """
    _check_supported(vllm_config)
    model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
    if _has_sliding_layers(model_config):
        _keep_sliding_layers(vllm_config)
    options = validate_options(vllm_config.additional_config.get(OPTIONS, {}))
    checkpoint = _take_checkpoint_config(vllm_config)
    window = model_config.get_and_verify_max_len(None)
    settings = resolve_settings(options, checkpoint, window, cache_config.block_size)
    # A new dictionary: the old one is the user's EngineArgs, which may be used again.
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        OPTIONS: settings.to_dict(),
    }

    geometry = settings.geometry
    logger.info(
        "DCA: chunk_size %d, local_size %d (chunks of %d tokens), %s, %s; up to %d tokens, "
        "%.1f times the model's %d.",
        settings.chunk_size,
        settings.local_size,
        geometry.chunk_len,
        settings.source,
        "no temperature"
        if settings.original_max_position_embeddings is None
        else f"temperature from {settings.original_max_position_embeddings} tokens",
        model_config.max_model_len,
        model_config.max_model_len / window,
        window,
    )
    if settings.chunk_size > window:
        logger.warning(
            "DCA: chunk_size %d is over the model's window of %d tokens, so queries take "
            "positions it was not trained on. Choose at most %d unless you mean it.",
            settings.chunk_size,
            window,
            window,
        )
    if checkpoint and checkpoint.get("sparse_attention_enabled"):
        logger.warning(
            "DCA: the checkpoint asks for sparse prefill, which is not supported yet; "
            "attention runs dense: same answers or better, more time on long prompts."
        )


def _check_supported(vllm_config: VllmConfig) -> None:
    model = vllm_config.model_config
    hf_config = model.hf_text_config
    ropes = [rope["rope_type"] for rope in iter_rope_parameters(hf_config)]
    cache_dtype = vllm_config.cache_config.cache_dtype
    speculative = vllm_config.speculative_config
    method = None if speculative is None else speculative.method
    refused = {
        f"the {current_platform.device_name} platform (the CPU and CUDA are)": not (
            current_platform.is_cpu() or current_platform.is_cuda()
        ),
        "multi-head latent attention (MLA)": model.use_mla,
        "encoder-decoder models": model.is_encoder_decoder,
        "models without attention": model.is_attention_free,
        "encoder-only models": model.attn_type == "encoder_only",
        "M-RoPE": model.uses_mrope,
        f"sliding-window layers in a {hf_config.model_type} model (in "
        f"{', '.join(HYBRID_MODELS)} it does)": (
            _has_sliding_layers(model)
            and not (
                hf_config.model_type in HYBRID_MODELS
                and "full_attention" in hf_config.layer_types
            )
        ),
        f"layers without rotary positions in a {hf_config.model_type} model (in "
        f"{', '.join(NOPE_MODELS)} it does)": (
            bool(getattr(hf_config, "no_rope_layers", None))
            and hf_config.model_type not in NOPE_MODELS
        ),
        "LongRoPE": "longrope" in ropes or "su" in ropes,
        "models without rotary positions (ALiBi, learned positions)": not ropes,
        f"--kv-cache-dtype {cache_dtype} (auto does)": (
            cache_dtype not in KV_CACHE_DTYPES
            or (current_platform.is_cpu() and cache_dtype.startswith("fp8"))
        ),
        "a backend per kind of layer (attention_config.backend_per_kind)": bool(
            vllm_config.attention_config.backend_per_kind
        ),
        f"speculative decoding by {method} (by {', '.join(DRAFTERS_WITHOUT_LAYERS)} it does)": (
            method is not None and method not in DRAFTERS_WITHOUT_LAYERS
        ),
        "decode context parallelism": (
            vllm_config.parallel_config.decode_context_parallel_size > 1
        ),
        "prefill context parallelism": (
            vllm_config.parallel_config.prefill_context_parallel_size > 1
        ),
    }
    if any(refused.values()):
        raise NotImplementedError(
            "--attention-backend dca does not support "
            f"{', '.join(name for name, present in refused.items() if present)}. "
            "Leave out what was named, or use another attention backend."
        )


def _has_sliding_layers(model_config: ModelConfig) -> bool:
    kinds = getattr(model_config.hf_text_config, "layer_types", None)
    slides = model_config.get_sliding_window() is not None
    return slides and (kinds is None or "sliding_attention" in kinds)


def _keep_sliding_layers(vllm_config: VllmConfig) -> None:
    """Full attention is DCA's; layers with a window keep a backend of vLLM's choice."""
    attention = vllm_config.attention_config
    vllm_config.attention_config = dataclasses.replace(
        attention,
        backend=None,
        backend_per_kind={KVCacheSpecKind.FULL_ATTENTION.value: attention.backend},
    )


def _take_checkpoint_config(vllm_config: VllmConfig) -> dict[str, Any] | None:
    """Remove and return the checkpoint's config; null would not do, vLLM tests hasattr."""
    model_config = vllm_config.model_config
    checkpoint = None
    for hf_config in (model_config.hf_config, model_config.hf_text_config):
        if hasattr(hf_config, CHECKPOINT_CONFIG):
            checkpoint = getattr(hf_config, CHECKPOINT_CONFIG)
            delattr(hf_config, CHECKPOINT_CONFIG)
    return checkpoint
