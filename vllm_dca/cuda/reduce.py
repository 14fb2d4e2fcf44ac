"""The splits of each decode row into its answer, in one launch."""

import torch
import triton
import triton.language as tl

SPLITS_PER_STEP = 8


@triton.jit
def _reduce_kernel(
    part_output,  # [num_slots, num_heads, HEAD_SIZE] fp32
    part_lse,  # [num_slots, num_heads] fp32, base 2
    first_slot,  # [num_rows + 1] int32
    v_scale,  # [1] fp32, of an FP8 cache
    output,  # [num_rows, num_heads, HEAD_SIZE]
    output_stride_row,
    output_stride_head,
    num_heads,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, HEAD_PADDED)
    end = tl.load(first_slot + row + 1)
    best = float("-inf")
    total = 0.0
    acc = tl.zeros([HEAD_PADDED], tl.float32)
    for base in range(tl.load(first_slot + row), end, SPLITS):
        slot = (base + tl.arange(0, SPLITS)).to(tl.int64)
        valid = slot < end
        lse = tl.load(part_lse + slot * num_heads + head, mask=valid, other=float("-inf"))
        source = part_output + (slot * num_heads + head)[:, None] * HEAD_SIZE + d[None, :]
        part_inside = valid[:, None] & (d < HEAD_SIZE)[None, :]
        part = tl.load(source, mask=part_inside, other=0.0)
        new_best = tl.maximum(best, tl.max(lse, 0))
        keep = tl.exp2(best - new_best)
        weights = tl.exp2(lse - new_best)
        total = total * keep + tl.sum(weights, 0)
        acc = acc * keep + tl.sum(part * weights[:, None], 0)
        best = new_best
    # A row that pads a CUDA graph's batch has no split.
    merged = tl.where(total > 0, acc / total, 0.0)
    if HAS_SCALE:
        merged *= tl.load(v_scale)
    target = output + row.to(tl.int64) * output_stride_row + head * output_stride_head + d
    tl.store(target, merged.to(output.dtype.element_ty), mask=d < HEAD_SIZE)


def reduce_splits(
    part_output: torch.Tensor,
    part_lse: torch.Tensor,
    first_slot: torch.Tensor,
    v_scale: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Merge the splits of every row; a row without any gets zeros.

    Args:
        part_output: [num_slots, num_heads, head_size] fp32, each split's own attention.
        part_lse: [num_slots, num_heads] fp32, base-2 log-sum-exp of its scores.
        first_slot: [num_rows + 1] int32, see `vllm_dca.cuda.plan_decode.DecodePlan`.
        v_scale: [1] fp32, what FP8 values are multiplied by; None for a cache that is not FP8.
        output: [num_rows, num_heads, head_size], written; last axis dense.
    """
    num_rows, num_heads, head_size = output.shape
    _reduce_kernel[(num_rows, num_heads)](
        part_output,
        part_lse,
        first_slot,
        v_scale,
        output,
        output.stride(0),
        output.stride(1),
        num_heads,
        HEAD_SIZE=head_size,
        HEAD_PADDED=triton.next_power_of_2(head_size),
        HAS_SCALE=v_scale is not None,
        SPLITS=SPLITS_PER_STEP,
        num_warps=4,
    )
