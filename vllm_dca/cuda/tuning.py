"""How a program of each kernel is laid out, for each head size and dtype."""

from typing import NamedTuple

import torch
import triton

from vllm_dca.cuda.plan_decode import MAX_QUERIES

# Of any side of a product by tensor cores; in fp32 only of the side that is summed.
MIN_DOT_SIZE = 16
MAX_TILE = 64
# Bytes of keys and values that a program has on their way while it multiplies others. Bandwidth
# times latency asks for 13 to 27 KiB a multiprocessor, by the bandwidths of data sheets and an
# assumed latency of 1,000 cycles; docs/gpu-kernels.md has the sum.
IN_FLIGHT = 32 << 10
# The tile that is multiplied, and those on their way: small heads would have dozens, each with
# code of its own before the loop.
MAX_STAGES = 6


class Tuning(NamedTuple):
    """How a program is laid out. scripts/bench/compile_kernels.py shows that none spills."""

    queries: int  # rows times heads
    tile: int  # keys read at a time
    num_warps: int
    num_stages: int
    registers: int  # a thread; left to itself, the compiler spills to fit a program more


# fp32, heads over 256: sixteen queries would spill, and a third stage would want 146 KiB of
# shared memory, of which some cards have 99.
SINGLE_LARGE = Tuning(8, 16, 8, 2, 255)


def padded(head_size: int) -> int:
    """Entries of a head as a program has them."""
    return max(MIN_DOT_SIZE, triton.next_power_of_2(head_size))


def decode_tuning(
    head_size: int, dtype: torch.dtype, cache_dtype: torch.dtype, queries: int
) -> Tuning:
    """Each program with IN_FLIGHT bytes on their way; docs/gpu-kernels.md says where two fit.

    Args:
        head_size: entries of a head.
        dtype: of the queries.
        cache_dtype: of keys and values.
        queries: rows times heads that want to stand in one tile.
    """
    head_padded = padded(head_size)
    large, is_fp8 = head_padded >= 256, cache_dtype != dtype
    largest = MAX_QUERIES // 2 if large else MAX_QUERIES
    # Registers hold a tile in the queries' dtype, shared memory in the cache's.
    tile = max(MIN_DOT_SIZE, min(IN_FLIGHT // (4 * head_padded), MAX_TILE))
    registers = 255
    if dtype == torch.float32:
        if head_padded > 256:
            return SINGLE_LARGE
        # Multiplied without tensor cores, in loops that the compiler unrolls.
        largest = tile = MIN_DOT_SIZE
        registers = 128
    elif is_fp8 and head_padded > 256:
        largest = MIN_DOT_SIZE
    queries = min(max(triton.next_power_of_2(queries), MIN_DOT_SIZE), largest)
    in_flight = IN_FLIGHT // (2 * tile * head_padded * cache_dtype.itemsize)
    wide = dtype == torch.float32 or (is_fp8 and head_padded > 256)
    wide |= queries > (16 if large or is_fp8 else 32)
    stages = min(max(3, 2 + in_flight), MAX_STAGES)
    return Tuning(queries, tile, 8 if wide else 4, stages, registers)


def prefill_tuning(head_size: int, dtype: torch.dtype) -> Tuning:
    """The tuning of every prefill: in one launch, by passes, and along lines."""
    head_padded, stages, registers = padded(head_size), 3, 255
    if dtype == torch.float32 and head_padded > 256:
        return SINGLE_LARGE
    if dtype == torch.float32:
        queries, num_warps = (32 if head_padded < 256 else 16), (4 if head_padded <= 64 else 8)
        return Tuning(queries, 16, num_warps, stages, registers)
    if head_padded > 256:
        # Some cards have 99 KiB of shared memory, and tiles of 32 keys want 162.
        return Tuning(32, 16, 8, stages, registers)
    return Tuning(64 if head_padded < 256 else 32, 32, 4, stages, registers)
