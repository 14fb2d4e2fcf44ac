"""Attention along the lines of sparse segments, one launch for all tiles of all heads.

A tile's keys are those at its head's distances from the tile's end, and then those of its
verticals that are at none of them. Both come from lists, so that a program reads only keys that
it needs, each from its page; queries change where the keys' region does.
"""

import torch
import triton
import triton.language as tl

from vllm_dca.cuda.sparse_keys import keys_of, segment_of, turned_rows
from vllm_dca.cuda.sparse_lists import Lists, Marks
from vllm_dca.cuda.sparse_plan import COLUMNS, Round
from vllm_dca.cuda.tiles import LOG2_E
from vllm_dca.cuda.tuning import padded, prefill_tuning
from vllm_dca.cuda.turn import turn_queries
from vllm_dca.method.rotary import QueryRotation
from vllm_dca.method.sparse_config import TILE


@triton.jit
def _places_below(numbers, count, x):
    """How many of the ascending numbers are below each x, [4]."""
    lo = tl.zeros_like(x)
    hi = tl.zeros_like(x) + count
    while tl.max(hi - lo, 0) > 0:
        middle = (lo + hi) // 2
        open_ = lo < hi
        below = open_ & (tl.load(numbers + middle, mask=open_, other=0) < x)
        hi = tl.where(open_ & (below == 0), middle, hi)
        lo = tl.where(below, middle + 1, lo)
    return lo


@triton.jit
def _at(values, which):
    """One of four numbers."""
    return tl.sum(tl.where(tl.arange(0, 4) == which, values, 0), 0)


@triton.jit
def _key_and_page(
    numbers, at, stop, sign, origin, end, table, PAGE_SIZE: tl.constexpr
):  # fmt: skip
    """Keys of a list's next places, and their pages; -1 where there is none."""
    key = origin + sign * tl.load(numbers + at, mask=at < stop, other=0)
    key = tl.where((at < stop) & (key < end), key, -1)
    return key, tl.load(table + key // PAGE_SIZE, mask=key >= 0, other=0)


@triton.jit
def _attend_listed(
    best, total, acc, query, factor, i,
    numbers, start, stop, sign, origin,  # keys are origin + sign * numbers[start .. stop - 1]
    hidden,  # whether each distance is taken; keys at these are left out
    tile_end, end, cache, stride_page, stride_slot, table, d,
    HIDES: tl.constexpr, HEAD_SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Pages are known an iteration ahead: only so does the compiler fetch keys and values before
    # they are used.
    at = start + tl.arange(0, KEYS)
    key, page = _key_and_page(numbers, at, stop, sign, origin, end, table, PAGE_SIZE)
    for _ in range(start, stop, KEYS):
        real = key >= 0
        place = cache + page.to(tl.int64) * stride_page + key % PAGE_SIZE * stride_slot
        seen = real
        if HIDES:
            apart = tile_end - key
            known = real & (apart >= 1)
            seen = real & (tl.load(hidden + apart, mask=known, other=0) == 0)
        mask = real[:, None] & (d < HEAD_SIZE)[None, :]
        k = tl.load(place[:, None] + d[None, :], mask=mask, other=0.0)
        v = tl.load(place[:, None] + HEAD_SIZE + d[None, :], mask=mask, other=0.0)
        visible = seen[None, :] & (key[None, :] <= i[:, None])
        at += KEYS
        key, page = _key_and_page(numbers, at, stop, sign, origin, end, table, PAGE_SIZE)
        scores = tl.dot(query, tl.trans(k.to(query.dtype)), input_precision="ieee") * factor
        scores = tl.where(visible, scores, float("-inf"))
        above = tl.maximum(best, tl.max(scores, 1))
        ground = tl.where(above == float("-inf"), 0.0, above)
        keep = tl.exp2(best - ground)
        weights = tl.exp2(scores - ground[:, None])
        acc = acc * keep[:, None]
        acc += tl.dot(weights.to(query.dtype), v.to(query.dtype), input_precision="ieee")
        total = total * keep + tl.sum(weights, 1)
        best = above
    return best, total, acc


# What changes from step to step must not make Triton compile the kernel again.
@triton.jit(do_not_specialize=["block_table_stride", "places", "num_rows", "num_segments"])
def _attend_kernel(
    turned,  # [3, num_rows, num_heads, HEAD_SIZE]
    tokens,  # [num_rows] int32, of each row
    segments,  # [num_segments, COLUMNS]
    tiles,  # [num_tiles, 2]
    kv_cache,  # [num_pages, num_kv_heads, PAGE_SIZE, 2 * HEAD_SIZE], any strides but the last
    cache_stride_page,
    cache_stride_head,
    cache_stride_slot,
    block_table,
    block_table_stride,
    distance_marks,  # [num_heads, places] uint8
    vertical_list,  # [num_heads, places] int32
    distance_list,
    counts,  # [2, num_segments, num_heads] int32
    places,
    k_scale,
    v_scale,
    output,  # [num_tokens, num_heads, HEAD_SIZE]
    output_stride_token,
    output_stride_head,
    scale_log2,
    num_rows,
    num_segments,
    num_heads,
    chunk_len,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    head = tl.program_id(0)
    PARTS: tl.constexpr = TILE // ROWS
    # The last tiles have the most keys.
    number = tl.num_programs(1) - 1 - tl.program_id(1)
    segment = tl.load(tiles + number // PARTS * 2)
    tile = tl.load(tiles + number // PARTS * 2 + 1)
    end, cache, table, factor = segment_of(
        segments, segment, head, kv_cache, cache_stride_head, block_table, block_table_stride,
        k_scale, scale_log2, GROUP, COLUMNS, HAS_SCALE,
    )  # fmt: skip
    place = tl.load(segments + segment * COLUMNS + 2)
    begin = tl.load(segments + segment * COLUMNS + 3)
    first_row = tl.load(segments + segment * COLUMNS + 4)
    tile_end = tile + TILE
    i = tile + number % PARTS * ROWS + tl.arange(0, ROWS)
    real = (i >= begin) & (i < end)
    row = (first_row + i - begin).to(tl.int64)

    at = tl.cast(head, tl.int64) * places + place
    verticals, distances, marks = vertical_list + at, distance_list + at, distance_marks + at
    num_verticals = tl.load(counts + segment * num_heads + head)
    num_distances = tl.load(counts + (num_segments + segment) * num_heads + head)
    # Borders of the regions, from the tile's end back: intra, succ, inter.
    own, _ = keys_of(0, end, chunk_len)
    before, _ = keys_of(1, end, chunk_len)
    which = tl.arange(0, 4)
    border = tl.where(which == 0, tile_end, tl.where(which == 1, own, before))
    border = tl.where(which == 3, 0, border)
    at_distance = _places_below(distances, num_distances, tile_end - border + 1)
    at_vertical = _places_below(verticals, num_verticals, border)

    d = tl.arange(0, HEAD_PADDED)
    inside = real[:, None] & (d < HEAD_SIZE)[None, :]
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    for region in range(3):
        of_region = region * num_rows + row
        q = turned_rows(turned, of_region, head, num_heads, real, d, HEAD_SIZE)
        best, total, acc = _attend_listed(
            best, total, acc, q, factor, i, distances, _at(at_distance, region),
            _at(at_distance, region + 1), -1, tile_end, marks, tile_end, end, cache,
            cache_stride_page, cache_stride_slot, table, d, False, HEAD_SIZE, PAGE_SIZE, KEYS,
        )  # fmt: skip
        best, total, acc = _attend_listed(
            best, total, acc, q, factor, i, verticals, _at(at_vertical, region + 1),
            _at(at_vertical, region), 1, 0, marks, tile_end, end, cache,
            cache_stride_page, cache_stride_slot, table, d, True, HEAD_SIZE, PAGE_SIZE, KEYS,
        )  # fmt: skip

    result = acc / total[:, None]
    if HAS_SCALE:
        result *= tl.load(v_scale)
    token = tl.load(tokens + row, mask=real, other=0).to(tl.int64)
    goal = (
        output + token[:, None] * output_stride_token + head * output_stride_head + d[None, :]
    )
    tl.store(goal, result.to(output.dtype.element_ty), mask=inside)


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    marks: Marks,
    lists: Lists,
    *,
    plan: Round,
    block_table: torch.Tensor,
    chunk_len: int,
    rotation: QueryRotation,
    softmax_scale: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Attend from a round's rows; the others' output is left alone.

    Args:
        query: [num_tokens, num_heads, head_size], rotated to their offsets.
        kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_size], any physical order.
        output: [num_tokens, num_heads, head_size].
        marks: of each segment; the nearest 64 distances are taken to be there.
        lists: the same.
        plan: which rows.
        block_table: [num_requests, max_pages] int32.
        chunk_len: s.
        rotation: how this layer turns queries.
        softmax_scale: factor on the dot products.
        k_scale: [1] fp32, what FP8 keys are multiplied by; None for a cache that is not FP8.
        v_scale: like k_scale, for the values.
    """
    num_heads, head_size = query.shape[1:]
    num_kv_heads, page_size = kv_cache.shape[1:3]
    turned = turn_queries(query, rotation, *plan.queries)
    tuning = prefill_tuning(head_size, query.dtype)
    _attend_kernel[(num_heads, len(plan.tiles) * (TILE // tuning.queries))](
        turned,
        plan.queries.tokens,
        plan.probe.segments,
        plan.tiles,
        kv_cache,
        *kv_cache.stride()[:3],
        block_table,
        block_table.stride(0),
        marks.distances.view(torch.uint8),
        *lists,
        marks.distances.stride(0),
        k_scale,
        v_scale,
        output,
        *output.stride()[:2],
        softmax_scale * LOG2_E.value,
        plan.num_rows,
        len(plan.probe.ends),
        num_heads,
        chunk_len,
        GROUP=num_heads // num_kv_heads,
        HEAD_SIZE=head_size,
        HEAD_PADDED=padded(head_size),
        PAGE_SIZE=page_size,
        TILE=TILE,
        ROWS=tuning.queries,
        KEYS=tuning.tile,
        COLUMNS=COLUMNS,
        HAS_SCALE=k_scale is not None,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        maxnreg=tuning.registers,
    )
