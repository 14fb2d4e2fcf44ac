"""The CPU's attention provider, on torch's flash attention with log-sum-exp.

torch has no paged or variable-length attention on the CPU, so pages are gathered and the
segments taken one by one; each call runs over all heads and threads.
"""

import torch

from vllm_dca.merge import Partial, merge_partials


def attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vllm_dca.providers.AttentionProvider`."""
    block_size = key_cache.shape[1]
    output = torch.empty_like(query)
    lse = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32)
    starts = cu_seqlens_q.tolist()
    for segment, num_keys in enumerate(seqused_k.tolist()):
        rows = slice(starts[segment], starts[segment + 1])
        pages = block_table[segment, : -(-num_keys // block_size)]
        # [1, num_kv_heads, num_keys, head_size]
        key, value = (
            cache.index_select(0, pages).flatten(0, 1)[:num_keys].transpose(0, 1)[None]
            for cache in (key_cache, value_cache)
        )
        attend = _causal if causal else _full
        output[rows], lse[:, rows] = attend(query[rows], key, value, softmax_scale)
    return output, lse


def _full(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(0, 1)[None], key, value, 0.0, causal, scale=scale
    )
    return output[0].transpose(0, 1), lse[0]


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    # torch aligns the mask to the first key, so what every query sees goes first.
    seen = key.shape[2] - query.shape[0]
    new = _full(query, key[:, :, seen:], value[:, :, seen:], scale, causal=True)
    if seen == 0:
        return new
    cached = _full(query, key[:, :, :seen], value[:, :, :seen], scale)
    return merge_partials([Partial(*new), Partial(*cached)])
