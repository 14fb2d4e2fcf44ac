"""The KV cache's block size, which vLLM may settle only after the model is loaded."""

import math

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import AttentionSpec

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


def page_parts(spec: AttentionSpec, chunk_len: int, vllm_config: VllmConfig) -> tuple[int, int]:
    """Tokens a page as DCA reads it, and how many such pages one of vLLM's is.

    Args:
        spec: of a group of layers; its block size is tokens a page of vLLM's.
        chunk_len: s, tokens.
        vllm_config: of the engine.

    Raises:
        ValueError: they do not divide the chunks, or pages cannot be split.
    """
    block_size, parts = spec.block_size, 1
    if current_platform.is_cpu():
        # See DcaBackend.get_supported_kernel_block_sizes.
        block_size = math.gcd(chunk_len, block_size)
        parts = spec.block_size // block_size
        if parts > 1:
            check_pages_split(spec, block_size, vllm_config)
    if chunk_len % block_size:
        raise ValueError(
            f"DCA's chunk length {chunk_len} is not a multiple of the KV cache's block size "
            f"{block_size}, which vLLM changed after start-up checks. Choose chunk_size - "
            "local_size among its multiples."
        )
    return block_size, parts


def check_pages_split(spec: AttentionSpec, part: int, vllm_config: VllmConfig) -> None:
    """Parts of all pages lie equally far apart only where the pages have nothing between them.

    Args:
        spec: of the KV cache; its layout is settled.
        part: tokens a page as DCA reads it.

    Raises:
        ValueError: another layer's pages lie between, or what fills them up.
    """
    layout = vllm_config.cache_config.get_resolved_kv_cache_layout()
    if layout.is_layer_compact and spec.page_size_bytes == spec.unpadded_page_size_bytes:
        return
    between, remedy = "padding", ""
    if not layout.is_layer_compact:
        between = f"other layers' pages, by the KV cache's layout {layout.name},"
        remedy = ", or VLLM_KV_CACHE_LAYOUT=LBHNC"
    raise ValueError(
        f"DCA reads the KV cache's pages of {spec.block_size} tokens in parts of {part}, which "
        f"divide its chunks, and cannot with {between} between pages. Choose chunk_size - "
        f"local_size among the multiples of {spec.block_size}{remedy}."
    )
