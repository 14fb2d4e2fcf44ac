"""Attention providers: who computes one pass of attention over paged keys and values.

A provider is a function with the contract of flash-attention's variable-length forward. It
knows nothing of chunks; `vllm_dca.prefill` puts DCA together from three calls of it.
"""

from typing import Protocol

import torch


class AttentionProvider(Protocol):
    """Softmax attention of a batch of segments over their pages, with the log-sum-exp."""

    def __call__(
        self,
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
        """Attend; every segment has at least one query and one key.

        Args:
            query: [total_q, num_heads, head_size], segment after segment.
            key_cache: [num_blocks, block_size, num_kv_heads, head_size], any strides with
                the last axis dense; num_heads is a multiple of num_kv_heads.
            value_cache: like key_cache.
            cu_seqlens_q: [num_segments + 1] int32, first query of each segment.
            seqused_k: [num_segments] int32, keys of each segment. Nothing past them is read.
            block_table: [num_segments, max_blocks] int32, pages of each segment.
            max_seqlen_q: longest segment in queries.
            max_seqlen_k: longest segment in keys.
            softmax_scale: factor on the dot products.
            causal: the last query sees the last key, each one before it one key less.

        Returns:
            The output, [total_q, num_heads, head_size] in the query's dtype, and the
            natural-log log-sum-exp of the scaled scores, [num_heads, total_q] fp32.
        """
        ...
