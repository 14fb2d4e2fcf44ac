"""What the lines of sparse segments weigh, by the attention of each segment's last rows.

Two launches for all heads of all segments: the rows' log-sum-exps, each from several spans of
keys, and then the weights, span by span. A line's weight comes from two blocks of keys at most;
each has an array of its own to write to, so that nothing is added in memory and the same
segment weighs the same, to the bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_dca.cuda.sparse_keys import (
    MAX_HEAD,
    keys_of,
    pages_of,
    probe_scores,
    segment_of,
    span_of,
    turned_rows,
)
from vllm_dca.cuda.sparse_plan import COLUMNS, Probe
from vllm_dca.cuda.tiles import LOG2_E
from vllm_dca.cuda.tuning import padded
from vllm_dca.cuda.turn import turn_queries
from vllm_dca.method.rotary import QueryRotation
from vllm_dca.method.sparse_config import TILE
from vllm_dca.method.vertical_slash import PROBE

KEYS = TILE  # of a block, which lies in one region
SPLITS = 32  # spans that the keys of a head are cut into for its log-sum-exps, at most
LEAST_SPAN = 512  # keys
SPAN = 512  # keys that a program weighs


class Weights(NamedTuple):
    """The weights of the lines of each segment, at its places.

    Attributes:
        vertical: [num_heads, places] fp32, by key.
        slash: [2, num_heads, places] fp32, by diagonal or by block of them; their sum.
    """

    vertical: torch.Tensor
    slash: torch.Tensor


# What changes from step to step must not make Triton compile the kernels again.
@triton.jit(do_not_specialize=["block_table_stride"])
def _normalise_kernel(
    turned,  # [num_segments, 3, PROBE, num_heads, HEAD_SIZE]
    segments,  # [num_segments, COLUMNS]
    kv_cache,  # [num_pages, num_kv_heads, PAGE_SIZE, 2 * HEAD_SIZE], any strides but the last
    cache_stride_page,
    cache_stride_head,
    cache_stride_slot,
    block_table,
    block_table_stride,
    k_scale,
    best_of,  # [num_segments, num_heads, SPLITS, PROBE] fp32, the largest score, base 2
    total_of,  # likewise, the sum of powers of two, relative to it
    scale_log2,
    num_heads,
    chunk_len,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PROBE: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    head, split = tl.program_id(0), tl.program_id(1)
    segment = tl.program_id(2).to(tl.int64)
    end, cache, table, factor = segment_of(
        segments, segment, head, kv_cache, cache_stride_head, block_table, block_table_stride,
        k_scale, scale_log2, GROUP, COLUMNS, HAS_SCALE,
    )  # fmt: skip
    span = span_of(end, SPLITS, LEAST, KEYS)
    if split * span >= end:
        return
    m, d = tl.arange(0, PROBE), tl.arange(0, HEAD_PADDED)
    sees = end - PROBE + m + 1
    best = tl.full([PROBE], float("-inf"), tl.float32)
    total = tl.zeros([PROBE], tl.float32)
    for region in range(3):
        first, last = keys_of(region, end, chunk_len)
        lo = tl.maximum(first, split * span)
        hi = tl.minimum(last, (split + 1) * span)
        if lo < hi:
            row = (segment * 3 + region) * PROBE + m
            q = turned_rows(turned, row, head, num_heads, m >= 0, d, HEAD_SIZE)
            page = pages_of(table, lo, hi, PAGE_SIZE, KEYS)
            for base in range(lo, hi, KEYS):
                scores = probe_scores(
                    q, turned, row, head, num_heads, page, factor, cache, cache_stride_page,
                    cache_stride_slot, base, hi, sees, d, HEAD_SIZE, PAGE_SIZE, KEYS,
                )  # fmt: skip
                page = pages_of(table, base + KEYS, hi, PAGE_SIZE, KEYS)
                above = tl.maximum(best, tl.max(scores, 1))
                origin = tl.where(above == float("-inf"), 0.0, above)
                total = total * tl.exp2(best - origin)
                total += tl.sum(tl.exp2(scores - origin[:, None]), 1)
                best = above
    at = ((segment * num_heads + head) * SPLITS + split) * PROBE + m
    tl.store(best_of + at, best)
    tl.store(total_of + at, total)


@triton.jit(do_not_specialize=["block_table_stride", "places"])
def _weigh_kernel(
    turned,
    segments,
    kv_cache,
    cache_stride_page,
    cache_stride_head,
    cache_stride_slot,
    block_table,
    block_table_stride,
    k_scale,
    best_of,
    total_of,
    vertical,  # [num_heads, places] fp32
    slash,  # [2, num_heads, places] fp32, zeros
    places,
    scale_log2,
    num_heads,
    chunk_len,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PROBE: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    head, begin = tl.program_id(0), tl.program_id(1) * SPAN
    segment = tl.program_id(2).to(tl.int64)
    end, cache, table, factor = segment_of(
        segments, segment, head, kv_cache, cache_stride_head, block_table, block_table_stride,
        k_scale, scale_log2, GROUP, COLUMNS, HAS_SCALE,
    )  # fmt: skip
    place = tl.load(segments + segment * COLUMNS + 2)
    if begin >= end:
        return
    m, d = tl.arange(0, PROBE), tl.arange(0, HEAD_PADDED)
    sees = end - PROBE + m + 1

    split = tl.arange(0, SPLITS)
    used = (split * span_of(end, SPLITS, LEAST, KEYS) < end)[:, None]
    at = ((segment * num_heads + head) * SPLITS + split)[:, None] * PROBE + m[None, :]
    best = tl.load(best_of + at, mask=used, other=float("-inf"))
    total = tl.load(total_of + at, mask=used, other=0.0)
    # The first key is seen by every row.
    highest = tl.max(best, 0)
    lse = highest + tl.log2(tl.sum(total * tl.exp2(best - highest[None, :]), 0))

    vertical += tl.cast(head, tl.int64) * places + place
    ahead = slash + tl.cast(head, tl.int64) * places + place
    behind = ahead + tl.cast(num_heads, tl.int64) * places
    n = tl.arange(0, KEYS)
    # Rows from `cut` on stand in the next tile.
    tile = (end - PROBE) // KEYS
    cut = KEYS - end % KEYS
    lines = (end - 1) // WIDTH + 1
    for region in range(3):
        first, last = keys_of(region, end, chunk_len)
        lo, hi = tl.maximum(first, begin), tl.minimum(last, begin + SPAN)
        if lo < hi:
            row = (segment * 3 + region) * PROBE + m
            q = turned_rows(turned, row, head, num_heads, m >= 0, d, HEAD_SIZE)
            page = pages_of(table, lo, hi, PAGE_SIZE, KEYS)
            # What stays the same, hoisted, would take more registers than there are.
            for base in tl.range(lo, hi, KEYS, disable_licm=True):
                scores = probe_scores(
                    q, turned, row, head, num_heads, page, factor, cache, cache_stride_page,
                    cache_stride_slot, base, hi, sees, d, HEAD_SIZE, PAGE_SIZE, KEYS,
                )  # fmt: skip
                page = pages_of(table, base + KEYS, hi, PAGE_SIZE, KEYS)
                weights = tl.exp2(scores - lse[:, None])
                tl.store(vertical + base + n, tl.sum(weights, 0), mask=base + n < hi)
                if WIDTH == 1:
                    # Each row shifted by its own place: what stood on a diagonal is a column,
                    # and 64 diagonals on come round from the other end.
                    shifted = tl.gather(weights, (m[:, None] - n[None, :]) & (KEYS - 1), 1)
                    near = n[None, :] <= m[:, None]
                    line = end - PROBE - base + n
                    tl.store(
                        ahead + line, tl.sum(tl.where(near, shifted, 0.0), 0), mask=line >= 0
                    )
                    line -= KEYS
                    tl.store(
                        behind + line, tl.sum(tl.where(near, 0.0, shifted), 0), mask=line >= 0
                    )
                else:
                    of_row = tl.sum(weights, 1)
                    line = tile - base // KEYS
                    first_rows = tl.sum(tl.where(m < cut, of_row, 0.0), 0)
                    tl.store(ahead + line, first_rows, mask=line >= 0)
                    last_rows = tl.sum(tl.where(m < cut, 0.0, of_row), 0)
                    tl.store(
                        behind + line + 1, last_rows, mask=(line >= -1) & (line + 1 < lines)
                    )


def weigh(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: Weights,
    *,
    probe: Probe,
    block_table: torch.Tensor,
    chunk_len: int,
    line_width: int,
    rotation: QueryRotation,
    softmax_scale: float,
    k_scale: torch.Tensor | None = None,
) -> None:
    """Attention from the probes' rows, summed along the lines of each segment.

    Args:
        query: [num_tokens, num_heads, head_size], rotated to their offsets.
        kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_size], any physical order.
        weights: written.
        probe: which rows.
        block_table: [num_requests, max_pages] int32.
        chunk_len: s.
        line_width: 1 for diagonals, 64 for blocks.
        rotation: how this layer turns queries.
        softmax_scale: factor on the dot products.
        k_scale: [1] fp32, what FP8 keys are multiplied by; None for a cache that is not FP8.
    """
    num_heads, head_size = query.shape[1:]
    num_kv_heads, page_size = kv_cache.shape[1:3]
    num_segments, longest = len(probe.ends), max(probe.ends)
    turned = turn_queries(query, rotation, *probe.queries)
    best, total = query.new_empty(
        2, num_segments, num_heads, SPLITS, PROBE, dtype=torch.float32
    )
    weights.slash.zero_()
    shared = (
        turned,
        probe.segments,
        kv_cache,
        *kv_cache.stride()[:3],
        block_table,
        block_table.stride(0),
        k_scale,
        best,
        total,
    )
    sizes = {
        "GROUP": num_heads // num_kv_heads,
        "HEAD_SIZE": head_size,
        "HEAD_PADDED": padded(head_size),
        "PAGE_SIZE": page_size,
        "PROBE": PROBE,
        "COLUMNS": COLUMNS,
        "KEYS": KEYS,
        "SPLITS": SPLITS,
        "LEAST": LEAST_SPAN,
        "HAS_SCALE": k_scale is not None,
        # Of large heads more would spill, and not fit where shared memory is 99 KiB.
        "num_warps": 8 if head_size > 128 or query.dtype == torch.float32 else 4,
        "num_stages": 1 if head_size > MAX_HEAD.value else 2 if head_size > 128 else 3,
        "maxnreg": 255,
    }
    splits = min(SPLITS, triton.cdiv(longest, LEAST_SPAN))
    scale_log2 = softmax_scale * LOG2_E.value
    _normalise_kernel[(num_heads, splits, num_segments)](
        *shared, scale_log2, num_heads, chunk_len, **sizes
    )
    _weigh_kernel[(num_heads, triton.cdiv(longest, SPAN), num_segments)](
        *shared,
        *weights,
        weights.vertical.stride(0),
        scale_log2,
        num_heads,
        chunk_len,
        SPAN=SPAN,
        WIDTH=line_width,
        **sizes,
    )
