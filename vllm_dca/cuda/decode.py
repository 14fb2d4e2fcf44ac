"""Paged split-KV decode: every row attends its inter, succ and intra pages in one pass.

A row is one new token, of a request that may have several (speculative verification). Rows
are cut into splits of equal length, as many as keep the device busy whatever the mix of
lengths; the plan is made on the device from the lengths there, once a step for all layers, so
that a captured CUDA graph replays for any lengths, and nothing waits for the host.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_dca.cuda.plan_decode import MAX_TILE, DecodePlan
from vllm_dca.cuda.reduce import reduce_splits
from vllm_dca.cuda.turn import rotary_pairs, turned_by
from vllm_dca.method.rotary import QueryRotation

LOG2_E = 1.4426950408889634
# Query heads that one program takes; more share a KV head only in MQA. With 64, heads of 256 in
# fp32 want more shared memory than an A100 has, and other kernels spill.
HEADS_PER_PROGRAM = 32
MIN_DOT_SIZE = 16  # of any side of Triton's matrix product


@triton.jit
def _attend_region(
    best, total, acc,  # [HEADS], [HEADS], [HEADS, HEAD_PADDED] fp32
    query,  # [HEADS, HEAD_PADDED], turned for this region
    factor,  # on the dot products, log2(e) included
    lo, hi,  # keys
    cache, stride_page, stride_slot,  # of this KV head
    table,  # [pages] of this request
    d,
    HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    for base in range(lo, hi, TILE):
        key = base + tl.arange(0, TILE)
        valid = key < hi
        page = tl.load(table + key // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
        slot = cache + page * stride_page + (key % PAGE_SIZE) * stride_slot
        k_inside = valid[None, :] & (d < HEAD_SIZE)[:, None]
        k = tl.load(slot[None, :] + d[:, None], mask=k_inside, other=0.0)
        scores = tl.dot(query, k.to(query.dtype), input_precision="ieee") * factor
        scores = tl.where(valid[None, :], scores, float("-inf"))

        new_best = tl.maximum(best, tl.max(scores, 1))
        keep = tl.exp2(best - new_best)
        weights = tl.exp2(scores - new_best[:, None])
        v_inside = valid[:, None] & (d < HEAD_SIZE)[None, :]
        v = tl.load(slot[:, None] + HEAD_SIZE + d[None, :], mask=v_inside, other=0.0)
        acc = acc * keep[:, None]
        acc += tl.dot(weights.to(query.dtype), v.to(query.dtype), input_precision="ieee")
        total = total * keep + tl.sum(weights, 1)
        best = new_best
    return best, total, acc


# As long as the longest request, which a warm-up does not have.
@triton.jit(do_not_specialize=["block_table_stride"])
def _split_kernel(
    query,  # [num_rows, num_heads, HEAD_SIZE], rotated to the offsets
    query_stride_row,
    query_stride_head,
    kv_cache,  # [num_pages, num_kv_heads, PAGE_SIZE, 2 * HEAD_SIZE], any strides but the last
    cache_stride_page,
    cache_stride_head,
    cache_stride_slot,
    block_table,  # [num_requests, max_pages] int32
    block_table_stride,
    slot_row,  # [num_slots] int32: the row that a slot works for, or -1
    first_slot,  # [num_rows + 1] int32
    row_request,  # [num_rows] int32
    row_keys,  # [num_rows] int32: keys that the row sees
    split_len,  # [1] int32: keys a slot
    cos_sin,  # [rows, ROTARY_DIM] fp32
    part_output,  # [num_slots, num_heads, HEAD_SIZE] fp32
    part_lse,  # [num_slots, num_heads] fp32, base 2
    k_scale,  # [1] fp32, of an FP8 cache
    scale_log2,  # softmax_scale * log2(e)
    chunk_len,
    chunk_size,
    inter_position,
    original_length,  # of the temperature; 0.0 for none
    num_heads,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    slot = tl.program_id(0)
    row = tl.load(slot_row + slot)
    if row < 0:
        return
    kv_head = tl.program_id(1)
    in_group = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    head = kv_head * GROUP + in_group
    d = tl.arange(0, HEAD_PADDED)
    inside = (in_group < GROUP)[:, None] & (d < HEAD_SIZE)[None, :]

    # Keys of this slot, and of the regions.
    keys = tl.load(row_keys + row)
    length = tl.load(split_len)
    start = (slot - tl.load(first_slot + row)) * length
    end = tl.minimum(keys, start + length)
    position = keys - 1
    offset = position % chunk_len
    intra_start = position - offset
    succ_start = tl.maximum(intra_start - chunk_len, 0)

    factor = scale_log2
    if HAS_SCALE:
        factor *= tl.load(k_scale)
    if original_length > 0:
        growth = tl.log(keys.to(tl.float32) / original_length)
        temperature = tl.maximum(0.1 * growth + 1.0, 1.0)
        factor *= temperature * temperature

    partner, column, sign, rotates = rotary_pairs(d, ROTARY_DIM, IS_NEOX)
    source = query + row.to(tl.int64) * query_stride_row + head[:, None] * query_stride_head
    q = tl.load(source + d[None, :], mask=inside, other=0.0)
    q_paired = tl.load(source + partner[None, :], mask=inside, other=0.0).to(tl.float32)

    request = tl.load(row_request + row)
    table = block_table + request.to(tl.int64) * block_table_stride
    cache = kv_cache + kv_head.to(tl.int64) * cache_stride_head
    best = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, HEAD_PADDED], tl.float32)
    for region in tl.static_range(3):
        if region == 0:  # inter
            lo, hi = start, tl.minimum(end, succ_start)
            turn = inter_position - offset
        elif region == 1:  # succ
            lo, hi = tl.maximum(start, succ_start), tl.minimum(end, intra_start)
            turn = tl.minimum(offset + chunk_len, chunk_size) - offset
        else:  # intra
            lo, hi = tl.maximum(start, intra_start), end
            turn = 0
        if lo < hi:
            turned = q
            if region < 2:
                turned = turned_by(
                    q.to(tl.float32), q_paired, cos_sin, turn, column, sign, rotates, ROTARY_DIM
                ).to(q.dtype)
            best, total, acc = _attend_region(
                best, total, acc, turned, factor, lo, hi, cache, cache_stride_page,
                cache_stride_slot, table, d, HEAD_SIZE, HEAD_PADDED, PAGE_SIZE, TILE,
            )  # fmt: skip

    at = slot.to(tl.int64) * num_heads + head
    tl.store(part_lse + at, best + tl.log2(total), mask=in_group < GROUP)
    target = part_output + at[:, None] * HEAD_SIZE + d[None, :]
    tl.store(target, acc / total[:, None], mask=inside)


def decode_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    *,
    plan: DecodePlan,
    rotation: QueryRotation,
    softmax_scale: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Attend from each row to all keys up to its own, in two launches.

    Args:
        query: [num_rows, num_heads, head_size], rotated to their offsets; last axis dense.
        kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_size], any physical order with
            the last axis dense; of the query's dtype, or FP8.
        output: [num_rows, num_heads, head_size], written.
        plan: made once for all layers from the batch's lengths.
        rotation: how this layer turns queries.
        softmax_scale: factor on the dot products.
        k_scale: [1] fp32, what FP8 keys are multiplied by; None for a cache that is not FP8.
        v_scale: like k_scale, for the values.
    """
    _, num_heads, head_size = query.shape
    num_kv_heads, page_size = kv_cache.shape[1:3]
    group = num_heads // num_kv_heads
    heads = min(max(triton.next_power_of_2(group), MIN_DOT_SIZE), HEADS_PER_PROGRAM)
    head_padded = max(MIN_DOT_SIZE, triton.next_power_of_2(head_size))
    num_slots = len(plan.slot_row)
    tuning = tune(head_size, query.dtype, kv_cache.dtype)
    part_output = query.new_empty(num_slots, num_heads, head_size, dtype=torch.float32)
    part_lse = query.new_empty(num_slots, num_heads, dtype=torch.float32)
    _split_kernel[(num_slots, num_kv_heads, triton.cdiv(group, heads))](
        query,
        query.stride(0),
        query.stride(1),
        kv_cache,
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        plan.block_table,
        plan.block_table.stride(0),
        plan.slot_row,
        plan.first_slot,
        plan.row_request,
        plan.row_keys,
        plan.split_len,
        rotation.cos_sin,
        part_output,
        part_lse,
        k_scale,
        softmax_scale * LOG2_E,
        plan.geometry.chunk_len,
        plan.geometry.chunk_size,
        plan.geometry.inter_position,
        float(plan.original_max_position_embeddings or 0),
        num_heads,
        GROUP=group,
        HEADS=heads,
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        ROTARY_DIM=rotation.cos_sin.shape[-1],
        IS_NEOX=rotation.is_neox,
        PAGE_SIZE=page_size,
        TILE=tuning.tile,
        HAS_SCALE=k_scale is not None,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )
    reduce_splits(part_output, part_lse, plan.first_slot, v_scale, output)


class Tuning(NamedTuple):
    """How a program is laid out. scripts/bench/compile_kernels.py shows that none spills."""

    tile: int  # keys read at a time
    num_warps: int
    num_stages: int = 3  # fewer, and Triton does not fetch pages ahead of their use


def tune(head_size: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> Tuning:
    """Up to 32 KiB of keys and values at a time; less where registers run short."""
    head_padded = triton.next_power_of_2(head_size)
    if cache_dtype != dtype:
        return Tuning(min(32, MAX_TILE), 8)
    tile = (1 << 15) // (2 * head_padded * dtype.itemsize)
    if head_size != head_padded:
        tile = min(tile, 32)
    wide = dtype == torch.float32 or head_padded >= 256
    return Tuning(max(16, min(tile, MAX_TILE)), 8 if wide else 4)
