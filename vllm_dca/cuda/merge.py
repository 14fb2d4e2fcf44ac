"""Merging the passes of a layer in one launch."""

import torch
import triton
import triton.language as tl

from vllm_dca.method.device import Partial

HEADS_PER_PROGRAM = 8


@triton.jit
def _weigh(best, total, acc, lse, output):
    """One more partial result, in the running form of a softmax."""
    new_best = tl.maximum(best, lse)
    keep = tl.exp(best - new_best)
    weight = tl.exp(lse - new_best)
    return new_best, total * keep + weight, acc * keep[:, None] + output * weight[:, None]


@triton.jit
def _add_part(
    best, total, acc, output, lse, lse_stride, rows, token, num_heads, head, d, inside,
    HEAD_SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.load(rows + token).to(tl.int64)
    if row >= 0:
        part_lse = tl.load(lse + head * lse_stride + row, mask=head < num_heads, other=0.0)
        source = output + (row * num_heads + head[:, None]) * HEAD_SIZE + d[None, :]
        part = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        best, total, acc = _weigh(best, total, acc, part_lse, part)
    return best, total, acc


# What changes from step to step must not make Triton compile the kernel again.
@triton.jit(do_not_specialize=["lse_stride", "lse_1_stride", "lse_2_stride"])
def _merge_kernel(
    output,  # [num_tokens, num_heads, HEAD_SIZE], read and written
    output_stride_token,
    output_stride_head,
    lse,  # [num_heads, num_tokens] fp32
    lse_stride,
    output_1,  # [rows of part 1, num_heads, HEAD_SIZE], dense
    lse_1,  # [num_heads, rows of part 1] fp32
    lse_1_stride,
    rows_1,  # [num_tokens] int32, -1 for none
    output_2,
    lse_2,
    lse_2_stride,
    rows_2,
    sinks,  # [num_heads]; None for none
    num_heads,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HEAD_PADDED)
    inside = (head < num_heads)[:, None] & (d < HEAD_SIZE)[None, :]

    target = (
        output + token * output_stride_token + head[:, None] * output_stride_head + d[None, :]
    )
    best = tl.load(lse + head * lse_stride + token, mask=head < num_heads, other=0.0)
    acc = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    total = tl.full([HEADS], 1.0, tl.float32)
    if PARTS > 0:
        best, total, acc = _add_part(
            best, total, acc, output_1, lse_1, lse_1_stride, rows_1, token, num_heads, head, d,
            inside, HEAD_SIZE,
        )  # fmt: skip
    if PARTS > 1:
        best, total, acc = _add_part(
            best, total, acc, output_2, lse_2, lse_2_stride, rows_2, token, num_heads, head, d,
            inside, HEAD_SIZE,
        )  # fmt: skip
    if sinks is not None:
        sink = tl.load(sinks + head, mask=head < num_heads, other=0.0).to(tl.float32)
        best, total, acc = _weigh(best, total, acc, sink, 0.0)
    merged = acc / total[:, None]
    tl.store(target, merged.to(output.dtype.element_ty), mask=inside)


def merge_parts(
    output: torch.Tensor,
    lse: torch.Tensor,
    parts: list[Partial],
    sinks: torch.Tensor | None = None,
) -> None:
    """See `vllm_dca.method.device.MergeParts`; one launch, at most two parts.

    Needs the last axes dense, and each part's output dense as a whole.
    """
    if not parts and sinks is None:
        return
    # Of a part that is not there nothing is read.
    read = parts or [Partial(output, lse, lse, lse)]
    first, second = read[0], read[-1]
    num_tokens, num_heads, head_size = output.shape
    _merge_kernel[(num_tokens, triton.cdiv(num_heads, HEADS_PER_PROGRAM))](
        output,
        output.stride(0),
        output.stride(1),
        lse,
        lse.stride(0),
        first.output,
        first.lse,
        first.lse.stride(0),
        first.rows,
        second.output,
        second.lse,
        second.lse.stride(0),
        second.rows,
        sinks,
        num_heads,
        HEAD_SIZE=head_size,
        HEAD_PADDED=triton.next_power_of_2(head_size),
        PARTS=len(parts),
        HEADS=HEADS_PER_PROGRAM,
    )
