"""Turned copies of queries, by torch."""

import torch

from vllm_dca.method.rotary import QueryRotation


def turn_queries(
    query: torch.Tensor,
    rotation: QueryRotation,
    tokens: torch.Tensor,
    turn: torch.Tensor,
    temperature: torch.Tensor | None = None,
) -> torch.Tensor:
    """Copies of some queries, turned further.

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
