"""A segment's keys and queries, and scores with them; kernels of sparse prefill share it."""

import triton
import triton.language as tl

# Entries of a head that are multiplied at once, at most; of a larger one so many.
MAX_HEAD, PART = tl.constexpr(256), tl.constexpr(128)


@triton.jit
def segment_of(
    segments, segment, head,
    kv_cache, cache_stride_head, block_table, block_table_stride, k_scale, scale_log2,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Where its keys end, its head's keys, its pages, and the factor on its dot products."""
    columns = segments + segment * COLUMNS
    request = tl.load(columns + 1).to(tl.int64)
    cache = kv_cache + (head // GROUP).to(tl.int64) * cache_stride_head
    factor = scale_log2
    if HAS_SCALE:
        factor *= tl.load(k_scale)
    return tl.load(columns), cache, block_table + request * block_table_stride, factor


@triton.jit
def turned_rows(turned, row, head, num_heads, real, d, HEAD_SIZE: tl.constexpr):
    """[ROWS, HEAD_PADDED] of a head; zeros where a row is not real."""
    source = turned + (row * num_heads + head)[:, None] * HEAD_SIZE + d[None, :]
    return tl.load(source, mask=real[:, None] & (d < HEAD_SIZE)[None, :], other=0.0)


@triton.jit
def keys_of(region, end, chunk_len):
    """The first and the last key, exclusive, of a region: intra, succ, inter."""
    own = (end - 1) // chunk_len * chunk_len
    before = tl.maximum(own - chunk_len, 0)
    first = tl.where(region == 0, own, tl.where(region == 1, before, 0))
    last = tl.where(region == 0, end, tl.where(region == 1, own, before))
    return first, last


@triton.jit
def pages_of(table, base, end, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """The pages of the keys from `base` on.

    Wanted an iteration ahead: only so does the compiler fetch keys before they are used.
    """
    key = base + tl.arange(0, KEYS)
    return tl.load(table + key // PAGE_SIZE, mask=key < end, other=0)


@triton.jit
def probe_scores(
    query,  # [PROBE, HEAD_PADDED]
    turned, row, head, num_heads,  # where it is from, see turned_rows
    page,  # [KEYS], of the keys
    factor, cache, cache_stride_page, cache_stride_slot, base, end, sees, d,
    HEAD_SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """[PROBE, KEYS] with the keys from `base` on; -inf for those that a row does not see."""
    key = base + tl.arange(0, KEYS)
    place = cache + page.to(tl.int64) * cache_stride_page + key % PAGE_SIZE * cache_stride_slot
    if HEAD_SIZE <= MAX_HEAD:
        inside = (key < end)[:, None] & (d < HEAD_SIZE)[None, :]
        k = tl.load(place[:, None] + d[None, :], mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(k.to(query.dtype)), input_precision="ieee")
    else:
        # Whole, queries and keys would want 128 KiB of shared memory; some cards have 99.
        scores = tl.zeros([sees.shape[0], KEYS], tl.float32)
        for first in range(0, d.shape[0], PART):
            part = first + tl.arange(0, PART)
            q = turned_rows(turned, row, head, num_heads, row >= 0, part, HEAD_SIZE)
            inside = (key < end)[:, None] & (part < HEAD_SIZE)[None, :]
            k = tl.load(place[:, None] + part[None, :], mask=inside, other=0.0)
            scores = tl.dot(q, tl.trans(k.to(q.dtype)), scores, input_precision="ieee")
    return tl.where(key[None, :] < sees[:, None], scores * factor, float("-inf"))


@triton.jit
def span_of(end, SPLITS: tl.constexpr, LEAST: tl.constexpr, KEYS: tl.constexpr):
    """Keys of each split."""
    return tl.maximum((end + SPLITS * KEYS - 1) // (SPLITS * KEYS) * KEYS, LEAST)
