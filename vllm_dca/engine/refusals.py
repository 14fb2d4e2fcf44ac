"""What is refused at start-up, in words that say what was given and what would work.

What shows only in a layer that is built is refused by `vllm_dca.engine.impl`
(REFUSED_IN_LAYERS) or by `vllm_dca.engine.remap` (REFUSED_AS_BUILT).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

from vllm_dca.engine.model_facts import has_sliding_layers, layer_types, rope_types
from vllm_dca.engine.settings import OPTIONS
from vllm_dca.engine.support import (
    DRAFTERS,
    KV_CACHE_DTYPES,
    cache_dtype_of,
    cache_name_of,
    drafter_of,
)
from vllm_dca.method.sparse_config import MODE_KEY, OFF


class Refusal(NamedTuple):
    """Something that DCA cannot serve.

    Attributes:
        area: its row in the table.
        what: how the table calls it.
        describe: what a configuration has of it, as a message names it, with what would work
            instead; empty if it has none.
    """

    area: str
    what: str
    describe: Callable[[VllmConfig], str]


def _if(condition: Callable[[VllmConfig], Any], message: str) -> Callable[[VllmConfig], str]:
    return lambda vllm_config: message if condition(vllm_config) else ""


def _if_model(has: str, message: str) -> Callable[[VllmConfig], str]:
    return _if(lambda vllm_config: getattr(vllm_config.model_config, has), message)


def _platform(vllm_config: VllmConfig) -> str:
    if current_platform.is_cpu() or current_platform.is_cuda():
        return ""
    return f"the {current_platform.device_name} platform (supported: CPU and CUDA)"


def _windows_only(vllm_config: VllmConfig) -> str:
    model = vllm_config.model_config
    if not has_sliding_layers(model) or "full_attention" in layer_types(model):
        return ""
    return (
        f"{model.hf_text_config.model_type} models of sliding-window layers only, which take "
        "any length as they are (where a model mixes both kinds, DCA serves the other layers)"
    )


def _mrope(vllm_config: VllmConfig) -> str:
    """An image's tokens do not advance by one position each, as chunks would have it."""
    model = vllm_config.model_config
    if not model.uses_mrope or model.multimodal_config is None:
        return ""
    kinds = ["image", "video"]
    if any(hasattr(model.hf_config, name) for name in ("thinker_config", "audio_config")):
        kinds.append("audio")
    multimodal, given = model.multimodal_config, " and ".join(kinds)
    if any(multimodal.get_limit_per_prompt(kind) for kind in kinds):
        none = ", ".join(f'"{kind}": 0' for kind in kinds)
        return (
            f"{given} inputs with M-RoPE (text works: pass --language-model-only, or "
            f"--limit-mm-per-prompt '{{{none}}}')"
        )
    # No limit is on those. A receiver of keys takes them unasked: see `startup.configure`.
    receives = vllm_config.ec_transfer_config
    if receives is not None and receives.is_ec_consumer:
        return f"{given} embeddings with M-RoPE (text works: remove --ec-transfer-config)"
    if multimodal.enable_mm_embeds and not multimodal.allow_missing_mm_embeddings:
        return f"{given} embeddings with M-RoPE (text works: remove --enable-mm-embeds)"
    return ""


def _mm_prefix(vllm_config: VllmConfig) -> str:
    """An image's tokens look at those after them, and DCA's kernels are causal."""
    model = vllm_config.model_config
    if not model.is_mm_prefix_lm:
        return ""
    works = "pass --language-model-only"
    if model.multimodal_config.enable_mm_embeds:
        works += ", without --enable-mm-embeds"
    return f"image inputs whose tokens attend to each other both ways (text works: {works})"


def _cache_dtype(vllm_config: VllmConfig) -> str:
    """Auto is what the checkpoint asks for, if it does."""
    model, dtype = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    own = resolve_kv_cache_dtype_string("auto", model)
    if own == "auto" and getattr(vllm_config.quant_config, "kv_cache_scheme", None) is not None:
        own = "fp8"  # vLLM's layers see to that.
    if dtype == "auto":
        dtype = own
    on_cpu = current_platform.is_cpu() and dtype.startswith("fp8")
    if dtype in KV_CACHE_DTYPES and not on_cpu:
        return ""
    if own == "auto":
        return f"--kv-cache-dtype {dtype} (use auto)"
    name = cache_name_of(model.dtype)
    works = f"--kv-cache-dtype {name}" if name else "--dtype bfloat16 --kv-cache-dtype bfloat16"
    given = "the checkpoint's KV cache in" if dtype == own else "--kv-cache-dtype"
    return f"{given} {dtype} (use {works})"


def _drafter(vllm_config: VllmConfig) -> str:
    speculative = vllm_config.speculative_config
    if speculative is None:
        return ""
    method = speculative.method
    if speculative.use_gemma4_mtp():
        # Its layers share the model's keys, of which they have none themselves.
        method = "Gemma 4's own multi-token predictor"
    elif method in DRAFTERS:
        return ""
    return f"speculative decoding by {method} (supported: {', '.join(DRAFTERS)})"


def _parallel_drafting(vllm_config: VllmConfig) -> str:
    """vLLM adds a request's drafts to its lengths on the device only, and prefills are planned
    from those that the host knows.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method not in DRAFTERS:
        return ""
    if not speculative.parallel_drafting:
        return ""
    return f"parallel drafting by {speculative.method} (draft one token after the other)"


def _drafter_backend(vllm_config: VllmConfig) -> str:
    """A drafter's positions go as far as the model's, and only DCA's tables do."""
    drafter = drafter_of(vllm_config)
    if drafter is None:
        return ""
    if drafter.attention_backend in (None, vllm_config.attention_config.backend):
        return ""
    return (
        f"drafting with {drafter.attention_backend.name}, the speculative config's "
        "attention_backend (without it the drafter runs DCA too)"
    )


def _adaptive_verification(vllm_config: VllmConfig) -> str:
    """It replays CUDA graphs of decodes of unequal lengths, and DCA's are of equal ones. vLLM
    does not do it for drafters without layers, whatever is asked.
    """
    drafter = drafter_of(vllm_config)
    if drafter is None or not drafter.enable_adaptive_verification:
        return ""
    return (
        "adaptive verification of drafts, the speculative config's "
        "enable_adaptive_verification (without it all drafts are verified)"
    )


def _drafter_cache_dtype(vllm_config: VllmConfig) -> str:
    """A drafter without one of its own uses the model's, which `_cache_dtype` checks."""
    drafter = drafter_of(vllm_config)
    if drafter is None or drafter.kv_cache_dtype is None:
        return ""
    name, dtype = drafter.kv_cache_dtype, vllm_config.model_config.dtype
    if name in KV_CACHE_DTYPES:
        cache_dtype = cache_dtype_of(name, dtype)
        is_fp8 = cache_dtype.itemsize == 1
        if cache_dtype == dtype or (is_fp8 and not current_platform.is_cpu()):
            return ""
    return (
        f"the speculative config's kv_cache_dtype {name} (without it the drafter's KV cache is "
        "as its model's)"
    )


def _sparse(vllm_config: VllmConfig) -> str:
    """Its kernels are compiled for tensor cores only."""
    options = vllm_config.additional_config.get(OPTIONS)
    asked = isinstance(options, Mapping) and options.get(MODE_KEY, OFF) != OFF
    if not asked or not current_platform.is_cuda():
        return ""
    if vllm_config.model_config.dtype != torch.float32:
        return ""
    return f'sparse prefill in float32 on CUDA (use --dtype bfloat16 or "{MODE_KEY}": "{OFF}")'


REFUSALS: Sequence[Refusal] = (
    Refusal("platform", "others", _platform),
    Refusal(
        "models",
        "no RoPE (ALiBi, learned positions)",
        _if(
            lambda config: not rope_types(config.model_config),
            "models without rotary positions (ALiBi, learned positions)",
        ),
    ),
    Refusal("models", "images and videos with M-RoPE", _mrope),
    Refusal("models", "images attended both ways", _mm_prefix),
    Refusal("models", "MLA", _if_model("use_mla", "multi-head latent attention (MLA)")),
    Refusal(
        "models",
        "encoders",
        _if(
            lambda config: config.model_config.attn_type == "encoder_only",
            "encoder-only models",
        ),
    ),
    Refusal(
        "models", "cross attention", _if_model("is_encoder_decoder", "encoder-decoder models")
    ),
    Refusal(
        "models", "no attention", _if_model("is_attention_free", "models without attention")
    ),
    Refusal("models", "diffusion", _if_model("is_diffusion", "diffusion models")),
    Refusal("models", "sliding windows in all layers", _windows_only),
    Refusal("dtypes", "other quantised KV caches, FP8 on the CPU", _cache_dtype),
    Refusal("dtypes", "such a KV cache for the drafter alone", _drafter_cache_dtype),
    Refusal(
        "engine",
        "a backend per kind of layer",
        _if(
            lambda config: config.attention_config.backend_per_kind,
            "a backend per kind of layer, attention_config.backend_per_kind (without it layers "
            "with a window keep vLLM's)",
        ),
    ),
    Refusal("engine", "speculative decoding by other methods", _drafter),
    Refusal("engine", "parallel drafting (P-EAGLE, PARD)", _parallel_drafting),
    Refusal("engine", "adaptive verification of drafts", _adaptive_verification),
    Refusal("engine", "another attention backend for the drafter", _drafter_backend),
    Refusal("engine", "sparse prefill in fp32 on CUDA", _sparse),
    Refusal(
        "engine",
        "decode context parallelism",
        _if(
            lambda config: config.parallel_config.decode_context_parallel_size > 1,
            "--decode-context-parallel-size (use --tensor-parallel-size)",
        ),
    ),
    Refusal(
        "engine",
        "prefill context parallelism",
        _if(
            lambda config: config.parallel_config.prefill_context_parallel_size > 1,
            "--prefill-context-parallel-size (use --tensor-parallel-size)",
        ),
    ),
    Refusal(
        "engine",
        "dual-batch overlap",
        _if(lambda config: config.parallel_config.use_ubatching, "--enable-dbo"),
    ),
)

# An argument of a layer's attention: how the table and the messages call it.
REFUSED_IN_LAYERS = {
    "alibi_slopes": "ALiBi slopes",
    "sliding_window": "a sliding window that only a layer's code names",
    "kv_sharing_target_layer_name": "KV sharing between layers",
    "attention_chunk_size": "chunked-local attention",
    "chunk_lookback": "attention to a chunk and some before it",
}
# What `remap` and the backend refuse as a model is built, by its row in the table.
REFUSED_AS_BUILT = {
    "models": (
        "no rotary positions in the layers that see the whole text",
        "rotations that cannot be followed",
        "layers that bring an attention of their own",
        "values of another size than keys",
    ),
    "RoPE scaling": ("what other rotary modules compute",),
    "engine": ("sparse prefill with soft caps or attention sinks",),
}
# What vLLM asks a backend for, and gets the answer no.
REFUSED_BY_VLLM = ("batch invariance",)


def refusals(vllm_config: VllmConfig) -> list[str]:
    """What this configuration has that DCA cannot serve."""
    return [what for refusal in REFUSALS if (what := refusal.describe(vllm_config))]
