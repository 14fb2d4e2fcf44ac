"""Paged prefill in one launch: a program walks through all keys that its queries see.

Keys of the three regions lie one after the other. At each border a program turns its queries
and goes on with the same softmax, so that there are no partial results to write and to merge,
and no turned copies for other launches. Tokens stand in a tile with the query heads that share
a KV head, as in `vllm_dca.cuda.decode`: few tokens fill it, and each key is read once for all.
"""

import torch
import triton
import triton.language as tl

from vllm_dca.cuda.plan_prefill import PrefillWalk
from vllm_dca.cuda.tiles import (
    LOG2_E,
    add_sink,
    attend_keys,
    place_in,
    segment_at,
    tiles_of,
)
from vllm_dca.cuda.tuning import padded, prefill_tuning
from vllm_dca.cuda.turn import turn_into
from vllm_dca.method.rotary import QueryRotation


@triton.jit
def _queries(
    cu_seqlens_q, segment, tile, GROUP: tl.constexpr, QUERIES: tl.constexpr
):  # fmt: skip
    """A tile's queries: the batch's token of each, its row in the segment, and its head.

    Loaded again where they are wanted again: kept, they would take registers from the loop.
    """
    first_token, num_queries, first = place_in(cu_seqlens_q, segment, tile, GROUP, QUERIES)
    # Lanes past the last query do as that one does.
    place = tl.minimum(first + tl.arange(0, QUERIES), num_queries - 1)
    row = place // GROUP
    return (first_token + row).to(tl.int64), row, place % GROUP


# What changes from step to step must not make Triton compile the kernel again: prefills' pages
# come after those of decode rows, however many these are. Nor must the sizes, which are others
# when it is compiled before the server is ready.
CHANGING = ["block_table", "block_table_stride", "num_segments", "search_steps"]
CHANGING += ["chunk_len", "chunk_size", "inter_position"]


@triton.jit(do_not_specialize=CHANGING)
def _prefill_kernel(
    query,  # [num_tokens, num_heads, HEAD_SIZE], rotated to the offsets
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
    output,  # [num_tokens, num_heads, HEAD_SIZE]; turned queries until the answer is there
    output_stride_token,
    output_stride_head,
    cu_seqlens_q,  # [num_segments + 1] int32, see PrefillWalk
    requests,  # [num_segments] int32, likewise
    chunks,  # [num_segments] int32, likewise
    offsets,  # [num_segments] int32, likewise
    block_table,  # [num_requests, max_pages] int32
    block_table_stride,
    cos_sin,  # [rows, ROTARY_DIM] fp32
    k_scale,  # [1] fp32, of an FP8 cache
    v_scale,
    num_segments,
    search_steps,
    scale_log2,  # softmax_scale * log2(e)
    soft_cap_log2,  # soft_cap * log2(e); None for none
    sinks,  # [num_heads]; None for none
    chunk_len,
    chunk_size,
    inter_position,
    original_length,  # of the temperature; 0.0 for none
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    # The last of a request see most keys; they go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    segment, _, num_queries, first = segment_at(
        cu_seqlens_q, num_segments, search_steps, tile, GROUP, QUERIES
    )
    if first >= num_queries:
        return

    kv_head = tl.program_id(1)
    chunk_begins = tl.load(chunks + segment) * chunk_len
    segment_begins = chunk_begins + tl.load(offsets + segment)
    _, row, _ = _queries(cu_seqlens_q, segment, tile, GROUP, QUERIES)
    sees = segment_begins + row + 1
    d = tl.arange(0, HEAD_PADDED)
    factor = tl.zeros([QUERIES], tl.float32) + scale_log2
    if HAS_SCALE:
        factor *= tl.load(k_scale)
    if original_length > 0:
        growth = tl.log(sees.to(tl.float32) / original_length)
        temperature = tl.maximum(0.1 * growth + 1.0, 1.0)
        factor *= temperature * temperature
    keys_of_head = key_cache + kv_head.to(tl.int64) * key_stride_head
    values_of_head = value_cache + kv_head.to(tl.int64) * value_stride_head
    table = block_table + tl.load(requests + segment).to(tl.int64) * block_table_stride

    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, HEAD_PADDED], tl.float32)
    succ_begins = tl.maximum(chunk_begins - chunk_len, 0)
    end = segment_begins + tl.cdiv(tl.minimum(first + QUERIES, num_queries), GROUP)
    at = 0
    while at < end:
        to = tl.where(at < succ_begins, succ_begins, chunk_begins)
        to = tl.where(at < chunk_begins, to, end)
        tl.debug_barrier()
        token, row, head = _queries(cu_seqlens_q, segment, tile, GROUP, QUERIES)
        head += kv_head * GROUP
        offset = tl.load(offsets + segment) + row
        succ = tl.minimum(offset + chunk_len, chunk_size)
        turn = tl.where(at < succ_begins, inter_position, succ) - offset
        turn = tl.where(at < chunk_begins, turn, 0)
        target = output + token[:, None] * output_stride_token
        target += head[:, None] * output_stride_head
        turn_into(
            target,
            query + token[:, None] * query_stride_token + head[:, None] * query_stride_head,
            row >= 0,
            cos_sin,
            turn,
            HEAD_SIZE,
            HEAD_SIZE,
            HEAD_PADDED,
            ROTARY_DIM,
            IS_NEOX,
        )
        tl.debug_barrier()
        q = tl.load(target + d[None, :], mask=(d < HEAD_SIZE)[None, :], other=0.0)
        best, total, acc = attend_keys(
            best, total, acc, q, factor[:, None], soft_cap_log2, sees, at, to, keys_of_head,
            key_stride_page, key_stride_slot, values_of_head, value_stride_page,
            value_stride_slot, table, d, HEAD_SIZE, PAGE_SIZE, TILE,
        )  # fmt: skip
        at = to

    token, _, head = _queries(cu_seqlens_q, segment, tile, GROUP, QUERIES)
    if sinks is not None:
        sink = tl.load(sinks + kv_head * GROUP + head).to(tl.float32)
        best, total, acc = add_sink(best, total, acc, sink * LOG2_E)
    result = acc / total[:, None]
    if HAS_SCALE:
        result *= tl.load(v_scale)
    tl.debug_barrier()
    target = output + token[:, None] * output_stride_token
    target += (kv_head * GROUP + head)[:, None] * output_stride_head + d[None, :]
    tl.store(target, result.to(output.dtype.element_ty), mask=(d < HEAD_SIZE)[None, :])


def walk_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    *,
    plan: PrefillWalk,
    rotation: QueryRotation,
    softmax_scale: float,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """See `vllm_dca.method.device.PrefillAttention`; one launch.

    Needs the last axes dense, and the output of the query's dtype and in memory of its own: it
    holds turned queries until the answer is there.
    """
    assert output.dtype == query.dtype
    num_tokens, num_heads, head_size = query.shape
    page_size, num_kv_heads = key_cache.shape[1:3]
    group = num_heads // num_kv_heads
    num_segments = len(plan.request)
    head_padded = padded(head_size)
    tuning = prefill_tuning(head_size, query.dtype)
    tiles = tiles_of(num_tokens, num_segments, group, tuning.queries)
    _prefill_kernel[(tiles, num_kv_heads)](
        query,
        *query.stride()[:2],
        key_cache,
        *key_cache.stride()[:3],
        value_cache,
        *value_cache.stride()[:3],
        output,
        *output.stride()[:2],
        plan.cu_seqlens_q,
        plan.request,
        plan.chunk,
        plan.offset,
        plan.block_table,
        plan.block_table.stride(0),
        rotation.cos_sin,
        k_scale,
        v_scale,
        num_segments,
        num_segments.bit_length(),
        softmax_scale * LOG2_E.value,
        None if soft_cap is None else soft_cap * LOG2_E.value,
        sinks,
        plan.geometry.chunk_len,
        plan.geometry.chunk_size,
        plan.geometry.inter_position,
        float(plan.original_max_position_embeddings or 0),
        GROUP=group,
        QUERIES=tuning.queries,
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        ROTARY_DIM=rotation.cos_sin.shape[-1],
        IS_NEOX=rotation.is_neox,
        PAGE_SIZE=page_size,
        TILE=tuning.tile,
        HAS_SCALE=k_scale is not None,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        # Three programs of small heads fit; in fp32 the compiler would spill.
        maxnreg=168 if head_padded <= 64 and query.dtype.itemsize == 2 else tuning.registers,
    )
