"""Which keys a region has, and scores with them; shared by the kernels of sparse prefill."""

import triton
import triton.language as tl


@triton.jit
def keys_of(region, end, chunk_len):
    """The first and the last key, exclusive, of a region: intra, succ, inter."""
    own = (end - 1) // chunk_len * chunk_len
    before = tl.maximum(own - chunk_len, 0)
    first = tl.where(region == 0, own, tl.where(region == 1, before, 0))
    last = tl.where(region == 0, end, tl.where(region == 1, own, before))
    return first, last


@triton.jit
def probe_scores(
    query,  # [PROBE, HEAD_PADDED]
    factor, cache, cache_stride_page, cache_stride_slot, table, base, end, sees, d,
    HEAD_SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """[PROBE, KEYS] with the keys from `base` on; -inf for those that a row does not see."""
    key = base + tl.arange(0, KEYS)
    page = tl.load(table + key // PAGE_SIZE, mask=key < end, other=0).to(tl.int64)
    place = cache + page * cache_stride_page + key % PAGE_SIZE * cache_stride_slot
    inside = (key < end)[:, None] & (d < HEAD_SIZE)[None, :]
    k = tl.load(place[:, None] + d[None, :], mask=inside, other=0.0)
    scores = tl.dot(query, tl.trans(k.to(query.dtype)), input_precision="ieee") * factor
    return tl.where(key[None, :] < sees[:, None], scores, float("-inf"))


@triton.jit
def span_of(end, SPLITS: tl.constexpr, LEAST: tl.constexpr, KEYS: tl.constexpr):
    """Keys of each split."""
    return tl.maximum((end + SPLITS * KEYS - 1) // (SPLITS * KEYS) * KEYS, LEAST)
