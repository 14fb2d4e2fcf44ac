"""Keys and values in vLLM's paged cache, K and V side by side in the last axis."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_dca.method.device import WriteKV


def split_kv(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the keys and the values, in flash-attention's order of axes.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], any physical order.

    Returns:
        Two views, [num_blocks, block_size, num_kv_heads, head_size].
    """
    key_cache, value_cache = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    return key_cache, value_cache


def split_pages(kv_cache: torch.Tensor, block_size: int) -> torch.Tensor:
    """The same memory in smaller pages: page p is cut into pages p * n to p * n + n - 1.

    A slot keeps its number. Heads lie in each part as they would in a page of its own, so who
    writes and who reads a cache must both look at it this way.

    Args:
        kv_cache: see `split_kv`.
        block_size: what divides the cache's.

    Returns:
        [num_blocks * n, num_kv_heads, block_size, 2 * head_size]; the cache itself where its
        pages are of that size.
    """
    num_blocks, heads, size, width = kv_cache.shape
    if size == block_size:
        return kv_cache
    assert size % block_size == 0
    assert kv_cache.stride(0) == heads * size * width, "pages lie apart"
    part = heads * block_size * width
    return kv_cache.as_strided(
        (num_blocks * size // block_size, heads, block_size, width),
        (part, block_size * width, width, 1),
    )


def write_kv(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Store new tokens in their slots.

    Args:
        key: [num_tokens, num_kv_heads, head_size], rotated.
        value: like key.
        kv_cache: see `split_kv`.
        slot_mapping: [any number] int64, block * block_size + offset of each token; -1 for
            padding, which is not stored. Tokens past its end are padding too.
    """
    block_size = kv_cache.shape[2]
    real = (slot_mapping >= 0).nonzero().squeeze(-1)
    slots = slot_mapping[real]
    for cache, new in zip(split_kv(kv_cache), (key, value), strict=True):
        cache[slots // block_size, slots % block_size] = new[real]


Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def without_scales(write: Write) -> "WriteKV":
    """From a function like `write_kv`, for a cache of the model's dtype; no scales are used."""

    def store(
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        v_scale: torch.Tensor,
    ) -> None:
        write(key, value, kv_cache, slot_mapping)

    return store
