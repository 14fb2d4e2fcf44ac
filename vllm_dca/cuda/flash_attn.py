"""Attention providers on flash-attention: vLLM's bundled builds, and the flash-attn package."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from vllm_dca.method.provider import (
    AttentionProvider,
    Needs,
    PagedSegments,
    UnusableProviderError,
)

# The most rows of queries that a thread block of any version takes.
LARGEST_TILE = 256


def bundled_with_vllm(
    flash_attn_varlen_func: Callable[..., Any],
    fa_version: int,
    needs: Needs,
    num_multiprocessors: int,
) -> AttentionProvider:
    """vLLM's own flash-attention.

    Args:
        flash_attn_varlen_func: vLLM's.
        fa_version: 2, 3 or 4, whichever vLLM would choose here.
        needs: what it has to serve.
        num_multiprocessors: of the GPU.

    Raises:
        UnusableProviderError: it cannot serve these needs.
    """
    check(needs, page_multiple=16, largest_head=512 if fa_version == 4 else 256)
    return functools.partial(_bundled, flash_attn_varlen_func, fa_version, num_multiprocessors)


def num_splits(
    fa_version: int, num_queries: int, num_heads: int, num_multiprocessors: int
) -> int:
    """Into how many parts flash-attention may cut the keys; 0 leaves it to choose.

    Where a KV head's keys and values are over 50 MiB, flash-attention 3 cuts non-causal calls
    even if the queries alone fill the GPU. Each part then has an fp32 output of its own, up to
    gigabytes that vLLM has not set aside.

    Flash-attention 4 is compiled where it first runs: a forward for parts, another for none,
    and what merges the parts again for each power of two of them. Warm-up's short prompts meet
    few, and a long prompt would wait for the others. Uncut there are three, by how many queries
    a segment has, which the warm-up meets (and in a step of more than 256 segments, which it
    does not meet, three more). The few queries of a prompt's last piece, or of the
    next turn of a conversation, then leave multiprocessors idle; answers' rows never come here.

    Args:
        fa_version: 2, 3 or 4.
        num_queries: of all segments.
        num_heads: query heads.
        num_multiprocessors: of the GPU.
    """
    fills = num_queries * num_heads >= LARGEST_TILE * num_multiprocessors
    return 1 if fills or fa_version == 4 else 0


def package(needs: Needs) -> AttentionProvider:
    """The flash-attn package, version 2 from 2.6 on.

    Raises:
        UnusableProviderError: it cannot serve these needs.
    """
    try:
        # flash-attn-4 installs a package of the same name without this module.
        from flash_attn.flash_attn_interface import flash_attn_varlen_func
    except ImportError as error:
        raise UnusableProviderError(f"flash-attn 2 is not installed ({error})") from error
    check(needs, page_multiple=256, largest_head=256)
    # Before 2.6, which brought soft caps, its log-sum-exps were padded: [segments, heads,
    # longest segment] (Dao-AILab/flash-attention, pull request 970).
    if "softcap" not in inspect.signature(flash_attn_varlen_func).parameters:
        raise UnusableProviderError(
            "this version of flash-attn lays its log-sum-exps out in another way; 2.6 or later "
            "works"
        )
    return functools.partial(_package, flash_attn_varlen_func)


def check(needs: Needs, page_multiple: int, largest_head: int) -> None:
    """What flash-attention asks of a model, whoever brings it along.

    Args:
        needs: of the layer.
        page_multiple: tokens that a page must be a multiple of.
        largest_head: entries that a head may have.

    Raises:
        UnusableProviderError: it cannot serve these needs.
    """
    if needs.dtype not in (torch.float16, torch.bfloat16):
        raise UnusableProviderError(
            f"it takes float16 and bfloat16, and the model {needs.dtype}"
        )
    if needs.cache_dtype != needs.dtype:
        raise UnusableProviderError(f"it cannot read a {needs.cache_dtype} cache")
    if needs.block_size % page_multiple:
        raise UnusableProviderError(
            f"it needs a --block-size that is a multiple of {page_multiple}, not "
            f"{needs.block_size}"
        )
    if needs.head_size % 8 or needs.head_size > largest_head:
        raise UnusableProviderError(
            f"it takes head sizes up to {largest_head} in steps of 8, not {needs.head_size}"
        )


def _bundled(
    flash_attn_varlen_func: Callable[..., Any],
    fa_version: int,
    num_multiprocessors: int,
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
    """For a cache of the query's dtype."""
    assert k_scale is None
    assert v_scale is None
    # Version 2 counts a KV head's query heads as queries where all segments have one, and its
    # log-sum-exps then lie in another order, [KV head, segment, query head], or not, by how it
    # splits the keys.
    max_seqlen_q = max(segments.max_seqlen_q, 2) if fa_version == 2 else segments.max_seqlen_q
    _, lse = flash_attn_varlen_func(
        q=query,
        k=key_cache,
        v=value_cache,
        out=output,
        cu_seqlens_q=segments.cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        seqused_k=segments.seqused_k,
        max_seqlen_k=segments.max_seqlen_k,
        block_table=segments.block_table,
        softmax_scale=softmax_scale,
        causal=segments.causal,
        softcap=soft_cap or 0.0,
        return_softmax_lse=True,
        fa_version=fa_version,
        num_splits=num_splits(fa_version, len(query), query.shape[1], num_multiprocessors),
    )
    return lse


def _package(
    flash_attn_varlen_func: Callable[..., Any],
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
    """For a cache of the query's dtype."""
    assert k_scale is None
    assert v_scale is None
    # It takes the number of keys from the differences of cu_seqlens_k, paged or not.
    answer, lse, _ = flash_attn_varlen_func(
        q=query,
        k=key_cache,
        v=value_cache,
        cu_seqlens_q=segments.cu_seqlens_q,
        cu_seqlens_k=segments.cu_seqlens_k,
        max_seqlen_q=max(segments.max_seqlen_q, 2),  # see `_bundled`
        max_seqlen_k=segments.max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=segments.causal,
        softcap=soft_cap or 0.0,
        return_attn_probs=True,
        block_table=segments.block_table,
    )
    output.copy_(answer)
    return lse
