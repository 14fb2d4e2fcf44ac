"""Attention providers: who computes one pass of attention over paged keys and values.

A provider is a function with the contract of flash-attention's variable-length forward. It
knows nothing of chunks; `vllm_dca.method.prefill` puts DCA together from three calls of it.
(What takes all of DCA at once is a `vllm_dca.method.device.Prefill`.)
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_dca.method.geometry import IntArray


# Compared by identity: a provider may keep what it works out of one for all layers of a step.
@dataclass(eq=False)
class PagedSegments:
    """Runs of queries and the pages that each reads, in the terms of flash-attention.

    Every segment has at least one query and one key. The lengths are given twice, on the
    device and on the host, so that no provider has to wait for a copy.

    Attributes:
        query_lens: [num_segments] int64 on the host, queries of each segment.
        key_lens: [num_segments] int64 on the host, keys of each segment.
        cu_seqlens_q: [num_segments + 1] int32, first query of each segment.
        cu_seqlens_k: [num_segments + 1] int32, running sum of key_lens.
        seqused_k: [num_segments] int32, key_lens. Nothing past them is read.
        block_table: [num_segments, max_blocks] int32, pages of each segment; entries past its
            keys are valid page numbers that mean nothing.
        causal: whether the last query sees the last key and each one before it one key less;
            else all see all.
    """

    query_lens: IntArray
    key_lens: IntArray
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    seqused_k: torch.Tensor
    block_table: torch.Tensor
    causal: bool

    def __post_init__(self) -> None:
        self.max_seqlen_q = int(self.query_lens.max())
        self.max_seqlen_k = int(self.key_lens.max())


@dataclass(frozen=True)
class Needs:
    """What a provider has to serve.

    Attributes:
        head_size: entries of a head.
        dtype: of queries and output.
        cache_dtype: of keys and values; another than dtype only for FP8.
        block_size: tokens a page.
        capability: compute capability; (0, 0) on the CPU.
        has_soft_cap: whether scores have a cap.
    """

    head_size: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    block_size: int
    capability: tuple[int, int]
    has_soft_cap: bool = False


class UnusableProviderError(Exception):
    """A provider cannot serve the needs; the message completes "it cannot, because"."""


class AttentionProvider(Protocol):
    """Softmax attention of a batch of segments over their pages, with the log-sum-exp."""

    def __call__(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        output: torch.Tensor,
        *,
        segments: PagedSegments,
        softmax_scale: float,
        soft_cap: float | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [total_q, num_heads, head_size], segment after segment.
            key_cache: [num_blocks, block_size, num_kv_heads, head_size], any strides with
                the last axis dense; num_heads is a multiple of num_kv_heads.
            value_cache: like key_cache.
            output: [total_q, num_heads, head_size], written.
            segments: which query reads what.
            softmax_scale: factor on the dot products.
            soft_cap: scaled scores become soft_cap * tanh(score / soft_cap); only given where
                `Needs` said so.
            k_scale: [1] fp32, what FP8 keys are multiplied by; None for a cache of the
                query's dtype.
            v_scale: like k_scale, for the values.

        Returns:
            Natural-log log-sum-exp of the scaled and capped scores, [num_heads, total_q] fp32.
        """
        ...
