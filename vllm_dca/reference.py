"""What DCA is: the specification that every fast path is tested against.

Straight from the table in An et al. 2024 (clamped at c, as the authors' code does; the
paper's text clamps at c - 1), one position at a time, in fp64, on dense tensors. It shares
no code with the fast paths, and they none with it.
"""

import math

import torch


def query_position(i: int, j: int, chunk_size: int, local_size: int) -> int:
    """Rotary position of the query at absolute position i towards the key at j <= i."""
    chunk_len = chunk_size - local_size
    own, other = i // chunk_len, j // chunk_len
    offset = i % chunk_len
    if other == own:
        return offset
    if other == own - 1:
        return min(offset + chunk_len, chunk_size)
    return min(2 * chunk_len - 1, chunk_size)


def key_position(j: int, chunk_size: int, local_size: int) -> int:
    """Rotary position of the key at absolute position j."""
    return j % (chunk_size - local_size)


def temperature(i: int, original_max_position_embeddings: int | None) -> float:
    """Factor on the scores of the query at absolute position i (Qwen-1M checkpoints)."""
    if original_max_position_embeddings is None:
        return 1.0
    return max(1.0, 0.1 * math.log((i + 1) / original_max_position_embeddings) + 1.0) ** 2


def rotate(x: torch.Tensor, position: int, inv_freq: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """Rotate the leading 2 * len(inv_freq) entries of the last axis by a position.

    Args:
        x: [..., head_size], fp64.
        position: rotary position.
        inv_freq: [rotary_dim / 2], radians a position, fp64.
        is_neox: pairs are (k, k + rotary_dim / 2) if true, else (2k, 2k + 1).
    """
    half = len(inv_freq)
    cos, sin = torch.cos(position * inv_freq), torch.sin(position * inv_freq)
    rotated = x.clone()
    first, second = (
        (slice(0, half), slice(half, 2 * half))
        if is_neox
        else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    )
    rotated[..., first] = x[..., first] * cos - x[..., second] * sin
    rotated[..., second] = x[..., second] * cos + x[..., first] * sin
    return rotated


def dual_chunk_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    chunk_size: int,
    local_size: int,
    inv_freq: torch.Tensor,
    is_neox: bool = True,
    scale: float,
    original_max_position_embeddings: int | None = None,
) -> torch.Tensor:
    """Causal dual chunk attention of one sequence, in fp64.

    Args:
        query: [num_queries, num_heads, head_size], the sequence's last positions, unrotated.
        key: [seq_len, num_kv_heads, head_size], unrotated.
        value: [seq_len, num_kv_heads, head_size].
        chunk_size: c.
        local_size: w.
        inv_freq: [rotary_dim / 2], radians a position.
        is_neox: which entries make a rotary pair, see `rotate`.
        scale: factor on the dot products.
        original_max_position_embeddings: switches the temperature on, see `temperature`.

    Returns:
        [num_queries, num_heads, head_size], fp64.
    """
    query, key, value, inv_freq = (t.double() for t in (query, key, value, inv_freq))
    num_queries, seq_len = len(query), len(key)
    group = query.shape[1] // key.shape[1]
    value = value.repeat_interleave(group, dim=1)
    rotated_key = torch.stack(
        [rotate(key[j], key_position(j, chunk_size, local_size), inv_freq, is_neox) for j in range(seq_len)]
    ).repeat_interleave(group, dim=1)

    output = torch.empty_like(query)
    for row in range(num_queries):
        i = seq_len - num_queries + row
        positions = [query_position(i, j, chunk_size, local_size) for j in range(i + 1)]
        # Few positions differ: rotate the query once for each.
        turned = {p: rotate(query[row], p, inv_freq, is_neox) for p in set(positions)}
        per_key = torch.stack([turned[p] for p in positions])
        scores = scale * (per_key * rotated_key[: i + 1]).sum(-1)
        scores = scores * temperature(i, original_max_position_embeddings)
        output[row] = torch.einsum("jh,jhd->hd", scores.softmax(0), value[: i + 1])
    return output
