"""Paged decode: as many programs as fit the device, each with an equal share of all keys.

A row is one new token, of a request that may have several (speculative verification, a short
prefill). Rows of a request times the query heads of a KV head stand in one tile, so that the
cache is read once for all of them. A program walks through its share, which may begin in one
request and end in another, and turns its queries at each border of a region.
`vllm_dca.cuda.plan_decode` makes the plan, once a step for all layers; nothing waits for the
host.
"""

import torch
import triton
import triton.language as tl

from vllm_dca.cuda import plan_decode
from vllm_dca.cuda.plan_decode import DecodePlan, pack_at, share_of
from vllm_dca.cuda.reduce import reduce_pieces
from vllm_dca.cuda.tiles import LOG2_E, add_sink, attend_keys
from vllm_dca.cuda.tuning import decode_tuning, padded
from vllm_dca.cuda.turn import turn_into
from vllm_dca.method.rotary import QueryRotation

# What changes from step to step must not make Triton compile the kernel again: rows speculated
# make any number of blocks.
CHANGING = ["block_table_stride", "num_rows", "num_packs", "sequences", "blocks"]


@triton.jit(do_not_specialize=CHANGING)
def _decode_kernel(
    query,  # [num_rows, num_heads, HEAD_SIZE], rotated to the offsets
    query_stride_row,
    query_stride_head,
    kv_cache,  # [num_pages, num_kv_heads, PAGE_SIZE, 2 * HEAD_SIZE], any strides but the last
    cache_stride_page,
    cache_stride_head,
    cache_stride_slot,
    block_table,  # [num_requests, max_pages] int32
    block_table_stride,
    row_keys,  # [num_rows] int32, see DecodePlan
    packs,  # [num_packs, 4] int32, likewise
    first_unit,  # [num_packs + 1] int32, likewise
    cos_sin,  # [rows, ROTARY_DIM] fp32
    output,  # [num_rows, num_heads, HEAD_SIZE]
    output_stride_row,
    output_stride_head,
    part_output,  # [2 * num_programs, QUERIES, HEAD_SIZE] fp32
    part_lse,  # [2 * num_programs, QUERIES] fp32, base 2
    turned,  # [num_programs, QUERIES, HEAD_PADDED]
    k_scale,  # [1] fp32, of an FP8 cache
    v_scale,
    scale_log2,  # softmax_scale * log2(e)
    soft_cap_log2,  # soft_cap * log2(e); None for none
    sinks,  # [num_heads]; None for none
    chunk_len,
    chunk_size,
    inter_position,
    original_length,  # of the temperature; 0.0 for none
    num_rows,
    num_packs,
    num_heads,
    sequences,  # that a pack's keys are read for: KV heads, times blocks
    blocks,  # of QUERIES, that a pack's rows times GROUP are cut into
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
    PACK_COST: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    SEARCH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    m = tl.arange(0, QUERIES)
    d = tl.arange(0, HEAD_PADDED)
    # Rows that pad the batch.
    nothing = tl.zeros([HEAD_PADDED], output.dtype.element_ty)
    for padding in range(program, num_rows, num_programs):
        if tl.load(row_keys + padding) == 0:
            for which in range(num_heads):
                goal = output + tl.cast(padding, tl.int64) * output_stride_row
                goal += which * output_stride_head + d
                tl.store(goal, nothing, mask=d < HEAD_SIZE)

    units, share = share_of(first_unit, num_packs, sequences, num_programs, MIN_SHARE)
    unit = program * share
    stop = tl.minimum(unit + share, units)
    if unit >= stop:
        return
    pack = pack_at(first_unit, num_packs, sequences, unit, SEARCH)
    turned = turned + program * QUERIES * HEAD_PADDED
    score_factor = scale_log2
    value_factor = 1.0
    if HAS_SCALE:
        score_factor *= tl.load(k_scale)
        value_factor = tl.load(v_scale)

    while unit < stop:
        first = tl.load(first_unit + pack)
        length = tl.load(first_unit + pack + 1) - first
        request = tl.load(packs + 4 * pack).to(tl.int64)
        first_row = tl.load(packs + 4 * pack + 1)
        rows = tl.load(packs + 4 * pack + 2)
        keys = tl.load(packs + 4 * pack + 3)
        begins = first.to(tl.int64) * sequences
        sequence = ((unit - begins) // tl.maximum(length, 1)).to(tl.int32)
        from_unit = (unit - begins).to(tl.int32) - sequence * length
        to_unit = tl.minimum(length, (from_unit + (stop - unit)).to(tl.int32))
        lo = tl.maximum(from_unit - PACK_COST, 0) * UNIT
        hi = tl.minimum(tl.maximum(to_unit - PACK_COST, 0) * UNIT, keys)

        # Which row and head each of the tile's queries is, and where its row stands.
        kv_head = sequence // blocks
        place = sequence % blocks * QUERIES + m
        row_in_pack = place // GROUP
        head = kv_head * GROUP + place % GROUP
        real = row_in_pack < rows
        row = (first_row + row_in_pack).to(tl.int64)
        sees = tl.where(real, keys - (rows - 1 - row_in_pack), 0)
        position = tl.maximum(sees - 1, 0)
        chunk = position // chunk_len
        offset = position - chunk * chunk_len
        factor = tl.zeros([QUERIES], tl.float32) + score_factor
        if original_length > 0:
            growth = tl.log(tl.maximum(sees, 1).to(tl.float32) / original_length)
            temperature = tl.maximum(0.1 * growth + 1.0, 1.0)
            factor *= temperature * temperature

        inside = real[:, None] & (d < HEAD_SIZE)[None, :]
        cache = kv_cache + kv_head.to(tl.int64) * cache_stride_head
        table = block_table + request * block_table_stride
        best = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        acc = tl.zeros([QUERIES, HEAD_PADDED], tl.float32)
        # Up to here all keys are of all rows' inter region; from here on, chunk by chunk.
        last_inter = tl.maximum(keys - rows, 0) // chunk_len - 1
        at = lo
        while at < hi:
            key_chunk = at // chunk_len
            border = tl.where(key_chunk < last_inter, last_inter, key_chunk + 1) * chunk_len
            to = tl.minimum(border, hi)
            succ = tl.minimum(offset + chunk_len, chunk_size)
            target = tl.where(chunk - key_chunk > 1, inter_position, succ)
            turn = tl.where(chunk > key_chunk, target - offset, 0)
            tl.debug_barrier()
            turn_into(
                turned + m[:, None] * HEAD_PADDED,
                query + row[:, None] * query_stride_row + head[:, None] * query_stride_head,
                real,
                cos_sin,
                turn,
                HEAD_PADDED,
                HEAD_SIZE,
                HEAD_PADDED,
                ROTARY_DIM,
                IS_NEOX,
            )
            tl.debug_barrier()
            q = tl.load(turned + m[:, None] * HEAD_PADDED + d[None, :])
            best, total, acc = attend_keys(
                best, total, acc, q, factor[:, None], soft_cap_log2, sees, at, to, cache,
                cache_stride_page, cache_stride_slot, cache + HEAD_SIZE, cache_stride_page,
                cache_stride_slot, table, d, HEAD_SIZE, PAGE_SIZE, TILE,
            )  # fmt: skip
            at = to

        if lo < hi:
            if sinks is not None:
                # Of a sequence's pieces one has the first keys. Once they are summed: beside a
                # large sink their weights would lose digits in half precision.
                sink = tl.load(sinks + head, mask=real & (lo == 0), other=float("-inf"))
                best, total, acc = add_sink(best, total, acc, sink.to(tl.float32) * LOG2_E)
            result = acc / tl.where(total > 0, total, 1.0)[:, None]
            if (lo == 0) & (hi == keys):
                whole = output + row[:, None] * output_stride_row
                whole += head[:, None] * output_stride_head + d[None, :]
                answer = (result * value_factor).to(output.dtype.element_ty)
                tl.store(whole, answer, mask=inside)
            else:
                # Of what others share in, only a program's last piece has the first keys.
                slot = 2 * tl.cast(program, tl.int64) + tl.where(lo == 0, 1, 0)
                tl.store(part_lse + slot * QUERIES + m, best + tl.log2(total))
                part = part_output + (slot * QUERIES + m)[:, None] * HEAD_SIZE + d[None, :]
                tl.store(part, result, mask=inside)
        unit += to_unit - from_unit
        next_pack = tl.load(first_unit + pack + 1).to(tl.int64) * sequences
        pack += (unit == next_pack).to(tl.int32)


def decode_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    *,
    plan: DecodePlan,
    rotation: QueryRotation,
    softmax_scale: float,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """See `vllm_dca.method.device.DecodeAttention`; two launches.

    Needs the query's last axis dense. A row without keys gets zeros.
    """
    num_rows, num_heads, head_size = query.shape
    num_kv_heads, page_size = kv_cache.shape[1:3]
    group = num_heads // num_kv_heads
    tuning = decode_tuning(head_size, query.dtype, kv_cache.dtype, plan.pack_rows * group)
    blocks = triton.cdiv(plan.pack_rows * group, tuning.queries)
    parts = 2 * plan.num_programs, tuning.queries
    part_output = query.new_empty(*parts, head_size, dtype=torch.float32)
    part_lse = query.new_empty(parts, dtype=torch.float32)
    head_padded = padded(head_size)
    turned = query.new_empty(plan.num_programs, tuning.queries, head_padded)
    num_packs = len(plan.packs)
    _decode_kernel[(plan.num_programs,)](
        query,
        query.stride(0),
        query.stride(1),
        kv_cache,
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        plan.block_table,
        plan.block_table.stride(0),
        plan.row_keys,
        plan.packs,
        plan.first_unit,
        rotation.cos_sin,
        output,
        output.stride(0),
        output.stride(1),
        part_output,
        part_lse,
        turned,
        k_scale,
        v_scale,
        softmax_scale * LOG2_E.value,
        None if soft_cap is None else soft_cap * LOG2_E.value,
        sinks,
        plan.geometry.chunk_len,
        plan.geometry.chunk_size,
        plan.geometry.inter_position,
        float(plan.original_max_position_embeddings or 0),
        num_rows,
        num_packs,
        num_heads,
        num_kv_heads * blocks,
        blocks,
        GROUP=group,
        QUERIES=tuning.queries,
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        ROTARY_DIM=rotation.cos_sin.shape[-1],
        IS_NEOX=rotation.is_neox,
        PAGE_SIZE=page_size,
        TILE=tuning.tile,
        UNIT=plan_decode.UNIT,
        PACK_COST=plan_decode.PACK_COST,
        MIN_SHARE=plan_decode.MIN_SHARE,
        SEARCH=plan_decode.SEARCH,
        HAS_SCALE=k_scale is not None,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        maxnreg=tuning.registers,
    )
    reduce_pieces(part_output, part_lse, plan, group, blocks, v_scale, output)
