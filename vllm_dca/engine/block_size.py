"""The KV cache's block size, which vLLM may settle only after the model is loaded."""

from vllm.config import VllmConfig
from vllm.platforms import current_platform

# What vLLM takes on the CPU unless told otherwise: 0.32 when it is configured, 0.33 when the
# model is there. Until then 0.33's config says what a GPU would take.
CPU_BLOCK_SIZE = 128


def block_size_of(vllm_config: VllmConfig) -> int:
    """Tokens a page, as the engine will have them.

    For models with linear-attention layers vLLM raises it later, on both minors.
    """
    cache_config = vllm_config.cache_config
    if current_platform.is_cpu() and not cache_config.user_specified_block_size:
        return CPU_BLOCK_SIZE
    return cache_config.block_size
