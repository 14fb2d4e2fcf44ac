"""The two rotary tables of DCA, and turning a query that is rotated already.

Rotations compose: a query that the model rotated to offset r stands at position p after a
turn by p - r, which is never more than c. So the model keeps its own rotary embedding and
only reads a periodic table, and the attention layer turns queries further where it must.
"""

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
