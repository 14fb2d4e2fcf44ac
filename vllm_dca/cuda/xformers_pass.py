"""An attention provider on xformers: a pass's keys are gathered from their pages first.

xformers' flash operator runs torch's own flash-attention where there is no flash-attn package.
That takes no pages, so every layer copies the keys and values of a pass: work in proportion to
the keys, beside a product of queries and keys.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from vllm_dca.cuda.flash_attn import check
from vllm_dca.method.provider import (
    AttentionProvider,
    Needs,
    PagedSegments,
    UnusableProviderError,
)


def provider(needs: Needs) -> AttentionProvider:
    """The best of xformers' operators that return a partial result over segments.

    Raises:
        UnusableProviderError: it cannot serve these needs.
    """
    # Before the import, which takes seconds.
    check(needs, page_multiple=1, largest_head=256)
    if needs.capability < (8, 0):
        raise UnusableProviderError(
            f"its operators that return partial results need compute capability 8.0, and this "
            f"is {needs.capability}"
        )
    if needs.has_soft_cap:
        raise UnusableProviderError(
            "its operators put no soft cap on scores; flash-attention's and triton do"
        )
    if torch.version.cuda is None:
        raise UnusableProviderError("it wants a torch for CUDA")
    try:
        from xformers.ops import fmha
    except ImportError as error:  # of a flash-attn that is too new for it, too
        raise UnusableProviderError(f"xformers cannot be imported ({error})") from error
    operator = _operator(fmha, needs)
    return functools.partial(_attention, fmha, operator, WeakKeyDictionary())


def _operator(fmha: ModuleType, needs: Needs) -> Any:
    """The first that takes what a pass would give it; xformers has them in this order too."""
    device = torch.device("cuda")
    tensor = torch.empty(1, 1, 1, 1, needs.head_size, dtype=needs.dtype, device=device)
    reasons = []
    for operator in (fmha.flash3.FwOp, fmha.flash.FwOp):
        found = [
            reason
            for causal in (True, False)
            for reason in operator.not_supported_reasons(
                fmha.Inputs(
                    *[tensor] * 3,
                    attn_bias=_mask(fmha, causal, [1], [1], device),
                    scale=1.0,
                    is_partial=True,
                )
            )
        ]
        if not found:
            return operator
        reasons.append(f"{operator.NAME} says: {'; '.join(dict.fromkeys(found))}")
    raise UnusableProviderError(
        f"none of xformers' operators can; {', and '.join(reasons)}. `python -m xformers.info` "
        "says for which torch and CUDA it was built"
    )


class Gathered(NamedTuple):
    """Where a pass finds its keys; the same for all layers of a step.

    Attributes:
        page: [total_k] int64, of each key, segment after segment.
        slot: [total_k] int64, in the page.
        mask: xformers', of the segments.
    """

    page: torch.Tensor
    slot: torch.Tensor
    mask: Any


def _mask(
    fmha: ModuleType, causal: bool, query_lens: list[int], key_lens: list[int], device: Any
) -> Any:
    biases = fmha.attn_bias
    kind = biases.BlockDiagonalCausalFromBottomRightMask if causal else biases.BlockDiagonalMask
    return kind.from_seqlens(query_lens, key_lens, device=device)


def gather(fmha: ModuleType, segments: PagedSegments, block_size: int) -> Gathered:
    """Work out on the device where the keys are; nothing waits for it."""
    device = segments.block_table.device
    total = int(segments.key_lens.sum())
    segment = torch.repeat_interleave(segments.seqused_k, output_size=total)
    position = torch.arange(total, device=device) - segments.cu_seqlens_k[segment]
    return Gathered(
        segments.block_table[segment, position // block_size].long(),
        position % block_size,
        _mask(
            fmha,
            segments.causal,
            segments.query_lens.tolist(),
            segments.key_lens.tolist(),
            device,
        ),
    )


def _attention(
    fmha: ModuleType,
    operator: Any,
    step: "WeakKeyDictionary[PagedSegments, Gathered]",
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
    """For scores without a cap and a cache of the query's dtype."""
    assert soft_cap is None
    assert k_scale is None
    assert v_scale is None
    num_heads, num_kv_heads = query.shape[1], key_cache.shape[2]
    if segments not in step:
        step[segments] = gather(fmha, segments, key_cache.shape[1])
    page, slot, mask = step[segments]
    # [1, tokens, KV heads, query heads of each, head_size]; a key's head stands for its group.
    group = num_heads // num_kv_heads
    key, value = (
        cache[page, slot][None, :, :, None].expand(-1, -1, -1, group, -1)
        for cache in (key_cache, value_cache)
    )
    answer, lse = fmha.memory_efficient_attention_partial(
        query.unflatten(1, (num_kv_heads, group))[None],
        key,
        value,
        attn_bias=mask,
        scale=softmax_scale,
        op=operator,
    )
    output.copy_(answer[0].flatten(1, 2))
    return lse[0].flatten(0, 1)
