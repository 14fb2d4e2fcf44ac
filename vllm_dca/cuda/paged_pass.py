"""An attention provider for cards, head sizes and caches that flash-attention leaves.

A plain flash-attention forward over pages, one launch a pass. It runs wherever Triton does,
takes any head size and page size, fp32, and FP8 caches.
"""

import torch
import triton
import triton.language as tl

from vllm_dca.cuda.tiles import LOG2_E, attend_keys, segment_at, tiles_of
from vllm_dca.cuda.tuning import padded, prefill_tuning
from vllm_dca.method.provider import PagedSegments

LN_2 = tl.constexpr(0.6931471805599453)


# What changes from step to step must not make Triton compile the kernel again.
@triton.jit(
    do_not_specialize=["lse_stride", "block_table_stride", "num_segments", "search_steps"]
)
def _attention_kernel(
    query,  # [total_q, num_heads, HEAD_SIZE]
    query_stride_token,
    query_stride_head,
    key_cache,  # [num_pages, PAGE_SIZE, num_kv_heads, HEAD_SIZE], and its strides but the last
    key_stride_page,
    key_stride_slot,
    key_stride_head,
    value_cache,
    value_stride_page,
    value_stride_slot,
    value_stride_head,
    output,  # [total_q, num_heads, HEAD_SIZE]
    output_stride_token,
    output_stride_head,
    lse,  # [num_heads, total_q] fp32
    lse_stride,
    cu_seqlens_q,  # [num_segments + 1] int32
    seqused_k,  # [num_segments] int32
    block_table,  # [num_segments, max_pages] int32
    block_table_stride,
    k_scale,  # [1] fp32, of an FP8 cache
    v_scale,
    num_segments,
    search_steps,
    scale_log2,  # softmax_scale * log2(e)
    soft_cap_log2,  # soft_cap * log2(e); None for none
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    segment, first_row, num_rows, first = segment_at(
        cu_seqlens_q, num_segments, search_steps, tl.program_id(0), 1, ROWS
    )
    if first >= num_rows:
        return
    row = first + tl.arange(0, ROWS)
    row_inside = row < num_rows
    num_keys = tl.load(seqused_k + segment)

    head = tl.program_id(1)
    d = tl.arange(0, HEAD_PADDED)
    inside = row_inside[:, None] & (d < HEAD_SIZE)[None, :]
    token = (first_row + row).to(tl.int64)
    source = query + token[:, None] * query_stride_token + head * query_stride_head + d[None, :]
    q = tl.load(source, mask=inside, other=0.0)

    factor = scale_log2
    if HAS_SCALE:
        factor *= tl.load(k_scale)
    kv_head = tl.cast(head // GROUP, tl.int64)
    keys_of_head = key_cache + kv_head * key_stride_head
    values_of_head = value_cache + kv_head * value_stride_head
    table = block_table + tl.cast(segment, tl.int64) * block_table_stride

    # Rows past the segment's end see what is there, so that nothing is divided by zero.
    sees = row + num_keys - num_rows + 1 if CAUSAL else tl.zeros_like(row) + num_keys
    end = tl.minimum(tl.max(tl.where(row_inside, sees, 0), 0), num_keys)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    best, total, acc = attend_keys(
        best, total, acc, q, factor, soft_cap_log2, sees, 0, end, keys_of_head, key_stride_page,
        key_stride_slot, values_of_head, value_stride_page, value_stride_slot, table, d,
        HEAD_SIZE, PAGE_SIZE, TILE,
    )  # fmt: skip

    result = acc / total[:, None]
    if HAS_SCALE:
        result *= tl.load(v_scale)
    target = output + token[:, None] * output_stride_token + head * output_stride_head
    target += d[None, :]
    tl.store(target, result.to(output.dtype.element_ty), mask=inside)
    at = lse + tl.cast(head, tl.int64) * lse_stride + token
    tl.store(at, (best + tl.log2(total)) * LN_2, mask=row_inside)


def attention(
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
    """See `vllm_dca.method.provider.AttentionProvider`."""
    total_q, num_heads, head_size = query.shape
    page_size, num_kv_heads = key_cache.shape[1:3]
    num_segments = len(segments.seqused_k)
    lse = query.new_empty(num_heads, total_q, dtype=torch.float32)
    tuning = prefill_tuning(head_size, query.dtype)
    tiles = tiles_of(total_q, num_segments, 1, tuning.queries)
    _attention_kernel[(tiles, num_heads)](
        query,
        *query.stride()[:2],
        key_cache,
        *key_cache.stride()[:3],
        value_cache,
        *value_cache.stride()[:3],
        output,
        *output.stride()[:2],
        lse,
        lse.stride(0),
        segments.cu_seqlens_q,
        segments.seqused_k,
        segments.block_table,
        segments.block_table.stride(0),
        k_scale,
        v_scale,
        num_segments,
        num_segments.bit_length(),
        softmax_scale * LOG2_E.value,
        None if soft_cap is None else soft_cap * LOG2_E.value,
        CAUSAL=segments.causal,
        GROUP=num_heads // num_kv_heads,
        HEAD_SIZE=head_size,
        HEAD_PADDED=padded(head_size),
        PAGE_SIZE=page_size,
        ROWS=tuning.queries,
        TILE=tuning.tile,
        HAS_SCALE=k_scale is not None,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        maxnreg=tuning.registers,
    )
    return lse
