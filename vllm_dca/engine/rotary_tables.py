"""The tables of vLLM's rotary modules: with a period, and with more rows."""

import copy
from typing import Any

import torch
from vllm.model_executor.layers.rotary_embedding import (
    DynamicNTKAlphaRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    Gemma4RotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    MRotaryEmbedding,
    NTKScalingRotaryEmbedding,
    Phi3LongRoPEScaledRotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)

from vllm_dca.method.rotary import QueryRotation, longer_table, periodic_table, unit_table

# Exactly these: a subclass may give its table another meaning. The three axes of M-RoPE's
# positions are equal where there is only text.
SUPPORTED = (
    RotaryEmbedding,
    DynamicNTKAlphaRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    Gemma4RotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    MRotaryEmbedding,
    NTKScalingRotaryEmbedding,
    Phi3LongRoPEScaledRotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)
# Where vLLM's modules keep their table; the second is LongRoPE's.
TABLES = ("cos_sin_cache", "long_short_cos_sin_cache")


def has_table(rotary: torch.nn.Module) -> bool:
    """Whether it is vLLM's own, and not transformers'."""
    return any(hasattr(rotary, name) for name in TABLES)


def periodic(
    rotary: Any, chunk_size: int, chunk_len: int, max_model_len: int
) -> tuple[torch.nn.Module, QueryRotation]:
    """A copy of the module with a periodic table, and the rotation that goes with it.

    Args:
        rotary: one of `SUPPORTED`; it stays as it is.
        chunk_size: c, the largest position that a query takes.
        chunk_len: s, the table's period.
        max_model_len: rows of the table, those of all positions.

    Raises:
        ValueError: its positions cannot be remapped; completes "it cannot, because".
    """
    exact = longer_table(_table(rotary), chunk_size)
    is_neox = getattr(rotary, "is_neox_style", True)
    rotation = QueryRotation(unit_table(exact, chunk_size), is_neox)
    table = periodic_table(exact.to(_dtype(rotary)), chunk_len, max_model_len)
    return _with_table(rotary, table), rotation


def lengthened(rotary: Any, max_model_len: int) -> torch.nn.Module:
    """The module, or a copy with rows for every position that a request can reach.

    Raises:
        ValueError: as of `periodic`.
    """
    table = _table(rotary)
    if len(table) >= max_model_len:
        return rotary
    return _with_table(rotary, longer_table(table, max_model_len).to(_dtype(rotary)))


def _table(rotary: Any) -> torch.Tensor:
    """[positions, rotary_dim] fp32, where the module's own may be bf16."""
    if type(rotary) not in SUPPORTED:
        raise ValueError(f"its rotary embedding is a {type(rotary).__name__}")
    if type(rotary) is not Phi3LongRoPEScaledRotaryEmbedding:
        return rotary._compute_cos_sin_cache()
    # It decides by the longest request which of its two it uses for all.
    if rotary.use_long_rope:
        return rotary._compute_cos_sin_cache(
            rotary.max_position_embeddings, rotary.long_factor, rotary.long_mscale
        )
    return rotary._compute_cos_sin_cache(
        rotary.original_max_position_embeddings, rotary.short_factor, rotary.short_mscale
    )


def _dtype(rotary: Any) -> torch.dtype:
    return next(getattr(rotary, name) for name in TABLES if hasattr(rotary, name)).dtype


def _with_table(rotary: Any, table: torch.Tensor) -> torch.nn.Module:
    # deepcopy also rebinds CustomOp's bound forward method; copy.copy would leave the copy
    # calling the original, with the original's table.
    replacement = copy.deepcopy(rotary)
    replacement.max_position_embeddings = len(table)
    usual, long_and_short = TABLES
    if hasattr(rotary, long_and_short):
        replacement.use_long_rope = False  # The first rows are the ones to use now.
        setattr(replacement, long_and_short, table)
    else:
        setattr(replacement, usual, table)
    return replacement
