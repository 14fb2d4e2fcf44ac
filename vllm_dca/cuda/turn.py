"""Turned copies of queries, all passes of a layer in one launch."""

import torch
import triton
import triton.language as tl

from vllm_dca.method.rotary import QueryRotation

HEADS_PER_PROGRAM = 8


@triton.jit
def rotary_pairs(d, ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr):
    """Where each entry's partner stands, which row of the table it reads, and its sign.

    turned[d] = x[d] * cos[column] + sign * x[partner] * sin[column]
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    if IS_NEOX:
        first = d < HALF
        partner = tl.where(first, d + HALF, d - HALF)
        column = tl.where(first, d, d - HALF)
    else:
        first = d % 2 == 0
        partner = tl.where(first, d + 1, d - 1)
        column = d // 2
    rotates = d < ROTARY_DIM
    return (
        tl.where(rotates, partner, d),
        tl.where(rotates, column, 0),
        tl.where(first, -1.0, 1.0),
        rotates,
    )


@triton.jit
def turned_by(
    x,  # [..., d] fp32
    paired,  # [..., d] fp32, x of the partners
    cos_sin,  # [rows, ROTARY_DIM] fp32
    turn,  # [..., 1] or a number, which row
    column,  # [1, d]
    sign,  # [1, d]
    rotates,  # [1, d]
    ROTARY_DIM: tl.constexpr,
):
    """Rotate by a row of the table; entries past ROTARY_DIM stay."""
    row = cos_sin + turn * ROTARY_DIM + column
    cos = tl.load(row, mask=rotates, other=1.0)
    sin = tl.load(row + ROTARY_DIM // 2, mask=rotates, other=0.0) * sign
    return x * cos + paired * sin


@triton.jit
def turn_into(
    turned,  # [QUERIES, 1] where each goes; entries past HEAD_SIZE, up to STORED, are zeros
    query,  # [QUERIES, 1] where each begins
    real,  # [QUERIES] whether it is one; others are zeros
    cos_sin,
    turn,  # [QUERIES] positions
    STORED: tl.constexpr,
    HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr,
):  # fmt: skip
    """Turn a tile's queries by way of memory, a few columns at a time.

    Whole queries would want all registers.
    """
    COLUMNS: tl.constexpr = 32 if HEAD_PADDED > 32 else HEAD_PADDED
    for first in range(0, HEAD_PADDED, COLUMNS):
        d = first + tl.arange(0, COLUMNS)
        partner, column, sign, rotates = rotary_pairs(d, ROTARY_DIM, IS_NEOX)
        inside = real[:, None] & (d < HEAD_SIZE)[None, :]
        q = tl.load(query + d[None, :], mask=inside, other=0.0)
        paired = tl.load(query + partner[None, :], mask=inside, other=0.0)
        result = turned_by(
            q.to(tl.float32), paired.to(tl.float32), cos_sin, turn[:, None], column[None, :],
            sign[None, :], rotates[None, :], ROTARY_DIM,
        ).to(q.dtype)  # fmt: skip
        if STORED < HEAD_PADDED:
            tl.store(turned + d[None, :], result, mask=(d < STORED)[None, :])
        else:
            tl.store(turned + d[None, :], result)


@triton.jit
def _turn_kernel(
    query,  # [num_tokens, num_heads, HEAD_SIZE]
    query_stride_token,
    query_stride_head,
    tokens,  # [num_turned] int32
    turns,  # [num_turned] int32
    temperatures,  # [num_turned] fp32
    cos_sin,  # [rows, ROTARY_DIM] fp32
    turned,  # [num_turned, num_heads, HEAD_SIZE], dense
    num_heads,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX: tl.constexpr,
    SCALES: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HEAD_PADDED)
    inside = (head < num_heads)[:, None] & (d < HEAD_SIZE)[None, :]

    token = tl.load(tokens + row).to(tl.int64)
    source = query + token * query_stride_token + head[:, None] * query_stride_head
    partner, column, sign, rotates = rotary_pairs(d, ROTARY_DIM, IS_NEOX)
    x = tl.load(source + d[None, :], mask=inside, other=0.0).to(tl.float32)
    paired = tl.load(source + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    turn = tl.load(turns + row)
    result = turned_by(
        x, paired, cos_sin, turn, column[None, :], sign[None, :], rotates[None, :], ROTARY_DIM
    )
    if SCALES:
        result *= tl.load(temperatures + row)
    target = turned + (row.to(tl.int64) * num_heads + head[:, None]) * HEAD_SIZE + d[None, :]
    tl.store(target, result.to(turned.dtype.element_ty), mask=inside)


def turn_queries(
    query: torch.Tensor,
    rotation: QueryRotation,
    tokens: torch.Tensor,
    turn: torch.Tensor,
    temperature: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `vllm_dca.method.rotary` has it, in one launch; needs query's last axis dense."""
    num_heads, head_size = query.shape[1:]
    turned = query.new_empty(len(tokens), num_heads, head_size)
    if len(tokens):
        _turn_kernel[(len(tokens), triton.cdiv(num_heads, HEADS_PER_PROGRAM))](
            query,
            query.stride(0),
            query.stride(1),
            tokens,
            turn,
            temperature,
            rotation.cos_sin,
            turned,
            num_heads,
            HEAD_SIZE=head_size,
            HEAD_PADDED=triton.next_power_of_2(head_size),
            ROTARY_DIM=rotation.cos_sin.shape[-1],
            IS_NEOX=rotation.is_neox,
            SCALES=temperature is not None,
            HEADS=HEADS_PER_PROGRAM,
        )
    return turned
