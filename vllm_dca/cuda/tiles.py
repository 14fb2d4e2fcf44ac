"""What kernels share: which tile a program has, and the running softmax over paged keys."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


def tiles_of(num_tokens: int, num_segments: int, group: int, queries: int) -> int:
    """How many tiles all segments have; at most one of each has nothing to do."""
    return num_tokens * group // queries + num_segments


@triton.jit
def place_in(cu_seqlens_q, segment, tile, GROUP: tl.constexpr, QUERIES: tl.constexpr):
    """A segment's first token, its tokens times GROUP, and which of them begin the tile.

    Tiles of QUERIES follow one another, and with each segment comes one to spare: segment i
    starts at tile cu_seqlens_q[i] * GROUP // QUERIES + i.
    """
    first_token = tl.load(cu_seqlens_q + segment)
    num_queries = (tl.load(cu_seqlens_q + segment + 1) - first_token) * GROUP
    return first_token, num_queries, (tile - first_token * GROUP // QUERIES - segment) * QUERIES


@triton.jit
def segment_at(
    cu_seqlens_q, num_segments, search_steps, tile, GROUP: tl.constexpr, QUERIES: tl.constexpr
):  # fmt: skip
    """The segment that a tile belongs to, and as `place_in`; a binary search.

    The tile has nothing to do where it would begin past its segment's queries.
    """
    segment, last = 0, num_segments - 1
    for _ in range(search_steps):
        middle = (segment + last + 1) // 2
        starts = tl.load(cu_seqlens_q + middle) * GROUP // QUERIES + middle <= tile
        segment = tl.where(starts, middle, segment)
        last = tl.where(starts, last, middle - 1)
    first_token, num_queries, first = place_in(cu_seqlens_q, segment, tile, GROUP, QUERIES)
    return segment, first_token, num_queries, first


@triton.jit
def soft_capped(x, cap):
    """cap * tanh(x / cap), to 4e-7 of itself: a quotient of polynomials, and +-cap past them.

    Triton's own tanh is libdevice's, which its interpreter has not.
    """
    y = tl.minimum(tl.maximum(x / cap, -7.90531111), 7.90531111)
    q = y * y
    p = -2.76076848e-16 * q + 2.00018790e-13
    p = (p * q - 8.60467152e-11) * q + 5.12229710e-08
    p = (p * q + 1.48572236e-05) * q + 6.37261929e-04
    p = (p * q + 4.89352456e-03) * y
    divisor = (1.19825839e-06 * q + 1.18534706e-04) * q + 2.26843463e-03
    return p / (divisor * q + 4.89352519e-03) * cap


@triton.jit
def add_sink(best, total, acc, sink):
    """One more logit, whose value is 0; none where it is -inf."""
    new_best = tl.maximum(best, sink)
    origin = tl.where(new_best == float("-inf"), 0.0, new_best)
    keep = tl.exp2(best - origin)
    return new_best, total * keep + tl.exp2(sink - origin), acc * keep[:, None]


@triton.jit
def attend_keys(
    best, total, acc,  # [ROWS], [ROWS], [ROWS, HEAD_PADDED] fp32
    query,  # [ROWS, HEAD_PADDED]
    factor,  # on the dot products, log2(e) included
    soft_cap,  # of the scores, log2(e) included; None for none
    sees,  # [ROWS], keys that each row sees
    lo, hi,  # keys
    key_cache, key_stride_page, key_stride_slot,  # of this KV head
    value_cache, value_stride_page, value_stride_slot,
    table,  # [pages] of this request
    d,  # [HEAD_PADDED]
    HEAD_SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Take keys lo .. hi - 1 into a softmax that may have seen others, or nothing yet."""
    sees = tl.minimum(sees, hi)
    # Pages are known an iteration ahead: only so does the compiler fetch keys and values before
    # they are used, several tiles at a time.
    ahead = lo + tl.arange(0, TILE)
    page = tl.load(table + ahead // PAGE_SIZE, mask=ahead < hi, other=0)
    for base in range(lo, hi, TILE):
        key = base + tl.arange(0, TILE)
        slot = key % PAGE_SIZE
        k_slot = key_cache + page.to(tl.int64) * key_stride_page + slot * key_stride_slot
        v_slot = value_cache + page.to(tl.int64) * value_stride_page + slot * value_stride_slot
        ahead = key + TILE
        page = tl.load(table + ahead // PAGE_SIZE, mask=ahead < hi, other=0)
        inside = (key < hi)[:, None] & (d < HEAD_SIZE)[None, :]
        k = tl.load(k_slot[:, None] + d[None, :], mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(k.to(query.dtype)), input_precision="ieee") * factor
        if soft_cap is not None:
            scores = soft_capped(scores, soft_cap)
        scores = tl.where(key[None, :] < sees[:, None], scores, float("-inf"))

        new_best = tl.maximum(best, tl.max(scores, 1))
        origin = tl.where(new_best == float("-inf"), 0.0, new_best)
        keep = tl.exp2(best - origin)
        weights = tl.exp2(scores - origin[:, None])
        v = tl.load(v_slot[:, None] + d[None, :], mask=inside, other=0.0)
        acc = acc * keep[:, None]
        acc += tl.dot(weights.to(query.dtype), v.to(query.dtype), input_precision="ieee")
        total = total * keep + tl.sum(weights, 1)
        best = new_best
    return best, total, acc
