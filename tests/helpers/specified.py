"""What the reference says of one request."""

import math
from typing import Any

import torch

from tests.helpers.shapes import Shape
from vllm_dca.reference.attention import dual_chunk_attention, key_positions, rotate, scores


def answer(
    shape: Shape,
    request: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    inv_freq: torch.Tensor,
    sinks: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """To unrotated queries, keys and values, computed in `dtype`."""
    query, key, value = request
    return dual_chunk_attention(
        _lengthened(shape, query, dtype),
        _lengthened(shape, key, dtype),
        value,
        sinks=sinks,
        dtype=dtype,
        **_settings(shape, inv_freq),
    )


def largest_log_sum_exp(
    shape: Shape, query: torch.Tensor, key: torch.Tensor, inv_freq: torch.Tensor
) -> float:
    """Of any part of a row's keys: at most its largest score and the logarithm of the keys."""
    query, key = (_lengthened(shape, x, torch.float64) for x in (query, key))
    every = torch.arange(len(key))
    stand = key_positions(every, shape.geometry.chunk_size, shape.local_size)
    key = rotate(key, stand, inv_freq.double(), shape.is_neox)
    new = every[len(key) - len(query) :]
    largest = max(
        head[head.isfinite()].abs().max().item()
        # Some rows at a time, which bounds the memory.
        for queries, i in zip(query.split(1024), new.split(1024), strict=True)
        for head in scores(queries, key, i, **_settings(shape, inv_freq))
    )
    return largest + math.log(len(key))


def _settings(shape: Shape, inv_freq: torch.Tensor) -> dict[str, Any]:
    return {
        "chunk_size": shape.geometry.chunk_size,
        "local_size": shape.local_size,
        "inv_freq": inv_freq,
        "is_neox": shape.is_neox,
        "scale": shape.scale,
        "original_max_position_embeddings": shape.original_max_position_embeddings,
        "soft_cap": shape.soft_cap,
    }


def _lengthened(shape: Shape, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As a YaRN table lengthens what it rotates."""
    lengthen = torch.ones(shape.head_size)
    lengthen[: shape.rotary_dim] = shape.mscale
    return x.to(dtype) * lengthen.to(dtype)
