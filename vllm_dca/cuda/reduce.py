"""The pieces of each pack that programs share, into its rows' answers; in one launch."""

import torch
import triton
import triton.language as tl

from vllm_dca.cuda import plan_decode
from vllm_dca.cuda.plan_decode import DecodePlan, pack_at, share_of

# Of pieces' answers that a program adds up at once, as many as registers hold.
PIECES_PER_STEP, ENTRIES_PER_STEP = 32, 8192


@triton.jit
def _piece(part_lse, program, piece, pieces, QUERIES: tl.constexpr):
    """Where a sequence's pieces lie, and their log-sum-exps."""
    # The first is its program's last.
    slot = 2 * (program + piece).to(tl.int64) + tl.where(piece == 0, 1, 0)
    at = slot * QUERIES
    return at, tl.load(part_lse + at, mask=piece < pieces, other=float("-inf"))


# What changes from step to step must not make Triton compile the kernel again.
@triton.jit(do_not_specialize=["num_packs", "sequences", "blocks"])
def _reduce_kernel(
    part_output,  # [2 * num_programs, QUERIES, HEAD_SIZE] fp32
    part_lse,  # [2 * num_programs, QUERIES] fp32, base 2
    packs,  # [num_packs, 4] int32, see DecodePlan
    first_unit,  # [num_packs + 1] int32, likewise
    v_scale,  # [1] fp32, of an FP8 cache
    output,  # [num_rows, num_heads, HEAD_SIZE]
    output_stride_row,
    output_stride_head,
    num_packs,
    num_programs,
    sequences,
    blocks,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PACK_COST: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SEARCH: tl.constexpr,
    ALL_PIECES: tl.constexpr,
    PIECES: tl.constexpr,
):
    # Program p merges the sequence that decode program p began and later ones finished.
    program = tl.program_id(0)
    units, share = share_of(first_unit, num_packs, sequences, num_programs, MIN_SHARE)
    unit = (program + 1) * share
    if unit >= units:
        return
    pack = pack_at(first_unit, num_packs, sequences, unit, SEARCH)
    first = tl.load(first_unit + pack)
    length = tl.load(first_unit + pack + 1) - first
    begins = first.to(tl.int64) * sequences
    sequence = ((unit - begins) // length).to(tl.int32)
    begins += sequence * length.to(tl.int64)
    last = (begins + length - 1) // share
    # Its first keys come after what it costs to begin.
    if ((begins + PACK_COST) // share != program) | (last == program):
        return
    m = tl.program_id(1)
    place = sequence % blocks * QUERIES + m
    row_in_pack = place // GROUP
    if row_in_pack >= tl.load(packs + 4 * pack + 2):
        return

    d = tl.arange(0, HEAD_PADDED)
    pieces = (last - program + 1).to(tl.int32)
    every = tl.arange(0, ALL_PIECES)
    _, lse = _piece(part_lse + m, program, every, pieces, QUERIES)
    best = tl.max(lse, 0)
    best = tl.where(best == float("-inf"), 0.0, best)
    total = tl.sum(tl.exp2(lse - best), 0)
    acc = tl.zeros([HEAD_PADDED], tl.float32)
    for base in range(0, pieces, PIECES):
        piece = base + tl.arange(0, PIECES)
        at, piece_lse = _piece(part_lse + m, program, piece, pieces, QUERIES)
        weight = tl.exp2(piece_lse - best)
        source = part_output + (at + m)[:, None] * HEAD_SIZE + d[None, :]
        inside = (piece < pieces)[:, None] & (d < HEAD_SIZE)[None, :]
        acc += tl.sum(tl.load(source, mask=inside, other=0.0) * weight[:, None], 0)
    merged = acc / tl.where(total > 0, total, 1.0)
    if HAS_SCALE:
        merged *= tl.load(v_scale)
    row = (tl.load(packs + 4 * pack + 1) + row_in_pack).to(tl.int64)
    head = sequence // blocks * GROUP + place % GROUP
    target = output + row * output_stride_row + head * output_stride_head + d
    tl.store(target, merged.to(output.dtype.element_ty), mask=d < HEAD_SIZE)


def reduce_pieces(
    part_output: torch.Tensor,
    part_lse: torch.Tensor,
    plan: DecodePlan,
    group: int,
    blocks: int,
    v_scale: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Merge what several programs made of one pack and KV head; others are finished.

    Args:
        part_output: [2 * num_programs, queries, head_size] fp32, each piece's own attention: of
            a pack that the program did not begin, then of one that it began.
        part_lse: [2 * num_programs, queries] fp32, base-2 log-sum-exp of its scores.
        plan: the step's.
        group: query heads that share a KV head.
        blocks: parts of `queries` into which a pack's rows times `group` are cut.
        v_scale: [1] fp32, what FP8 values are multiplied by; None for a cache that is not FP8.
        output: [num_rows, num_heads, head_size], written; last axis dense.
    """
    num_heads, head_size = output.shape[1:]
    queries = part_lse.shape[1]
    used = min(queries, plan.pack_rows * group)
    head_padded = triton.next_power_of_2(head_size)
    if plan.num_programs == 1:
        return
    _reduce_kernel[(plan.num_programs - 1, used)](
        part_output,
        part_lse,
        plan.packs,
        plan.first_unit,
        v_scale,
        output,
        output.stride(0),
        output.stride(1),
        len(plan.packs),
        plan.num_programs,
        num_heads // group * blocks,
        blocks,
        GROUP=group,
        QUERIES=queries,
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        PACK_COST=plan_decode.PACK_COST,
        MIN_SHARE=plan_decode.MIN_SHARE,
        HAS_SCALE=v_scale is not None,
        SEARCH=plan_decode.SEARCH,
        ALL_PIECES=triton.next_power_of_2(plan.num_programs),
        PIECES=min(PIECES_PER_STEP, ENTRIES_PER_STEP // head_padded),
        num_warps=4,
        # Left to itself, the compiler spills to fit a program more.
        maxnreg=255,
    )
