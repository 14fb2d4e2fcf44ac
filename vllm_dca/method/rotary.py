"""The two rotary tables of DCA, and turning a query that is rotated already.

Rotations compose: a query that the model rotated to offset r stands at position p after a
turn by p - r, which is never more than c. So the model keeps its own rotary embedding and
only reads a periodic table, and the attention layer turns queries further where it must.
"""

import math
from dataclasses import dataclass

import torch


@dataclass
class QueryRotation:
    """How to turn the queries of a layer.

    Attributes:
        cos_sin: [max_turn + 1, rotary_dim] fp32, row d holds cos and sin of d positions, of
            unit length (a YaRN table's mscale is in the query already).
        is_neox: pairs are (k, k + rotary_dim / 2) if true, else (2k, 2k + 1).
    """

    cos_sin: torch.Tensor
    is_neox: bool


def turn_queries(
    query: torch.Tensor,
    rotation: QueryRotation,
    tokens: torch.Tensor,
    turn: torch.Tensor,
    temperature: torch.Tensor | None = None,
) -> torch.Tensor:
    """Copies of some queries, turned further, by torch on any device.

    Args:
        query: [num_tokens, num_heads, head_size], rotated to their offsets.
        rotation: the layer's.
        tokens: [num_turned] integer, which of them to copy.
        turn: [num_turned] integer, positions to turn each, 0 .. max_turn.
        temperature: [num_turned] fp32, factor to scale each by.

    Returns:
        [num_turned, num_heads, head_size] in the query's dtype; rotated in fp32.
    """
    turned = query[tokens].float()
    cos, sin = rotation.cos_sin[turn][:, None, :].chunk(2, dim=-1)
    rotary_dim = rotation.cos_sin.shape[-1]
    rotary = turned[..., :rotary_dim]
    if rotation.is_neox:
        first, second = rotary.chunk(2, dim=-1)
    else:
        first, second = rotary[..., ::2], rotary[..., 1::2]
    rotated_first = first * cos - second * sin
    rotated_second = second * cos + first * sin
    first.copy_(rotated_first)
    second.copy_(rotated_second)
    if temperature is not None:
        turned *= temperature[:, None, None]
    return turned.to(query.dtype)


def periodic_table(cos_sin: torch.Tensor, chunk_len: int, max_model_len: int) -> torch.Tensor:
    """A rotary table whose row p is the model's own row p mod chunk_len.

    Args:
        cos_sin: [num_positions, rotary_dim], the model's table; num_positions >= chunk_len.
        chunk_len: s, the period.
        max_model_len: rows of the result.
    """
    if chunk_len > len(cos_sin):
        raise ValueError(
            f"The rotary table has {len(cos_sin)} positions, fewer than the chunk length "
            f"{chunk_len}. Choose chunk_size - local_size <= {len(cos_sin)}."
        )
    repeats = -(-max_model_len // chunk_len)
    return cos_sin[:chunk_len].repeat(repeats, 1)[:max_model_len].contiguous()


def unit_table(cos_sin: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Rows 0 .. chunk_size of a rotary table, without the length that YaRN gives it.

    Args:
        cos_sin: [num_positions, rotary_dim] fp32, rows of m * (cos, sin) for a constant m.
        chunk_size: c, the furthest turn; row c is worked out if the table ends before it.
    """
    table = cos_sin[: chunk_size + 1].float()
    cos, sin = table.chunk(2, dim=-1)
    mscale = cos[:1]  # row 0 has sin 0
    cos, sin = cos / mscale, sin / mscale
    if len(table) == chunk_size:
        # One position past the table: the last row turned once more.
        last = (cos[-1:] * cos[1] - sin[-1:] * sin[1], sin[-1:] * cos[1] + cos[-1:] * sin[1])
        cos, sin = torch.cat([cos, last[0]]), torch.cat([sin, last[1]])
    if len(cos) != chunk_size + 1:
        raise ValueError(
            f"The rotary table has {len(cos_sin)} positions, fewer than chunk_size="
            f"{chunk_size}. Choose a chunk_size up to {len(cos_sin)}."
        )
    return torch.cat([cos, sin], dim=-1)


def longer_table(cos_sin: torch.Tensor, num_positions: int) -> torch.Tensor:
    """A rotary table with at least so many rows; new ones go on with its frequencies.

    The frequencies are read off the table: row 1 tells them, and rows twice as far, in turn,
    tell them twice as exactly.

    Args:
        cos_sin: [rows, rotary_dim] fp32, rows of m * (cos, sin) for a constant m.
        num_positions: rows of the result, if the table has fewer.

    Raises:
        ValueError: its rows are not turns by frequencies of its own.
    """
    rows = len(cos_sin)
    if rows >= num_positions:
        return cos_sin
    if cos_sin.is_meta:
        return cos_sin.new_empty(num_positions, cos_sin.shape[1])
    cos, sin = cos_sin.double().chunk(2, dim=-1)
    phase = torch.atan2(sin, cos)
    frequency, row = phase[1], 1
    while 2 * row < rows:
        row *= 2
        turns = ((frequency * row - phase[row]) / (2 * math.pi)).round()
        frequency = (phase[row] + 2 * math.pi * turns) / row
    position = torch.arange(num_positions, dtype=torch.float64, device=cos_sin.device)
    angle = position[:, None] * frequency
    longer = (torch.cat([angle.cos(), angle.sin()], dim=-1) * cos[0, 0]).float()
    # The table's own angles are products in fp32.
    tolerance = 1e-5 + rows * torch.finfo(torch.float32).eps
    if not torch.allclose(longer[:rows], cos_sin, rtol=0, atol=tolerance * float(cos[0, 0])):
        raise ValueError("its rotary table is not one of constant frequencies")
    return torch.cat([cos_sin, longer[rows:]])
