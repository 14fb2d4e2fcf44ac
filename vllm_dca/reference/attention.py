"""What DCA is: the specification that every fast path is tested against.

Straight from the table in An et al. 2024 (clamped at c, as the authors' code does; the
paper's text clamps at c - 1), in fp64, on dense unrotated tensors, with a full score matrix.
It shares no code with the fast paths, and they none with it.
"""

from collections.abc import Iterator, Sequence

import torch


def query_positions(
    i: torch.Tensor,
    j: torch.Tensor,
    chunk_size: int,
    local_size: int,
    continuous: bool = False,
) -> torch.Tensor:
    """Rotary position of the queries at absolute positions i towards the keys at j <= i.

    Args:
        i: integer positions of queries; broadcasts with j.
        j: integer positions of keys.
        chunk_size: c.
        local_size: w.
        continuous: without DCA's clamps, so that they grow with the query's offset in every
            region; Qwen's checkpoints select keys so, and never attend so.
    """
    chunk_len = chunk_size - local_size
    chunks_back = i // chunk_len - j // chunk_len
    intra = i % chunk_len
    succ = intra + chunk_len
    inter = intra + chunk_size
    if not continuous:
        succ = succ.clamp(max=chunk_size)
        inter = torch.full_like(inter, min(2 * chunk_len - 1, chunk_size))
    return torch.where(chunks_back == 0, intra, torch.where(chunks_back == 1, succ, inter))


def key_positions(j: torch.Tensor, chunk_size: int, local_size: int) -> torch.Tensor:
    """Rotary position of the keys at absolute positions j."""
    return j % (chunk_size - local_size)


def temperature(i: torch.Tensor, original_max_position_embeddings: int | None) -> torch.Tensor:
    """Factor on the scores of the queries at absolute positions i (Qwen-1M checkpoints)."""
    if original_max_position_embeddings is None:
        return torch.ones(i.shape, dtype=torch.float64)
    growth = torch.log((i.double() + 1) / original_max_position_embeddings)
    return (0.1 * growth + 1).clamp(min=1) ** 2


def rotate(
    x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, is_neox: bool = True
) -> torch.Tensor:
    """Rotary embedding of the leading 2 * len(inv_freq) entries of the last axis.

    Angles are fp64's; the products are in x's dtype, or in fp32 if that is lower.

    Args:
        x: [num_tokens, num_heads, head_size].
        positions: [num_tokens], integer.
        inv_freq: [rotary_dim / 2], radians a position.
        is_neox: pairs are (k, k + rotary_dim / 2) if true, else (2k, 2k + 1).
    """
    half = len(inv_freq)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    angle = (positions[:, None] * inv_freq)[:, None, :]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = (
        (slice(0, half), slice(half, 2 * half))
        if is_neox
        else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    )
    rotated = x.clone()
    rotated[..., first] = x[..., first] * cos - x[..., second] * sin
    rotated[..., second] = x[..., second] * cos + x[..., first] * sin
    return rotated


def scores(
    query: torch.Tensor,
    key: torch.Tensor,
    i: torch.Tensor,
    *,
    chunk_size: int,
    local_size: int,
    inv_freq: torch.Tensor,
    is_neox: bool = True,
    scale: float,
    original_max_position_embeddings: int | None = None,
    soft_cap: float | None = None,
    continuous: bool = False,
) -> Iterator[torch.Tensor]:
    """Scaled scores, head after head: [num_queries, i[-1] + 1] each, -inf for later keys.

    Args:
        query: [num_queries, num_heads, head_size], unrotated.
        key: [seq_len, num_kv_heads, head_size], rotated to `key_positions`, of query's dtype.
        i: [num_queries] absolute positions of the queries, ascending.
        continuous: see `query_positions`; the others as of `dual_chunk_attention`.
    """
    chunk_len = chunk_size - local_size
    # A query stands at its intra, its succ or its inter position, whatever the key.
    standing = [
        query_positions(
            i, i - i % chunk_len - back * chunk_len, chunk_size, local_size, continuous
        )
        for back in (0, 1, 2)
    ]
    turned = [rotate(query, p, inv_freq.double(), is_neox).to(query.dtype) for p in standing]
    factor = scale * temperature(i, original_max_position_embeddings)
    yield from turned_scores(
        turned, key, i, chunk_len=chunk_len, factor=factor, soft_cap=soft_cap
    )


def turned_scores(
    turned: Sequence[torch.Tensor],
    key: torch.Tensor,
    i: torch.Tensor,
    *,
    chunk_len: int,
    factor: torch.Tensor,
    soft_cap: float | None = None,
) -> Iterator[torch.Tensor]:
    """`scores` of queries that are rotated already, to the position that each region wants.

    Args:
        turned: for keys of the query's own chunk, of the one before it, and of earlier ones;
            each [num_queries, num_heads, head_size].
        key: as of `scores`.
        i: as of `scores`.
        chunk_len: s.
        factor: [num_queries], on the dot products.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
    """
    num_heads, num_kv_heads = turned[0].shape[1], key.shape[1]
    j = torch.arange(int(i[-1]) + 1)
    chunks_back = (i[:, None] // chunk_len - j // chunk_len).clamp(max=2)
    chunks_back = chunks_back.masked_fill(j > i[:, None], -1)
    factor = factor[:, None].to(key.dtype)
    for head in range(num_heads):
        kv_head = head * num_kv_heads // num_heads
        found = torch.full((len(i), len(j)), -torch.inf, dtype=key.dtype)
        for back, query in enumerate(turned):
            dots = (factor * query[:, head]) @ key[: len(j), kv_head].T
            if soft_cap is not None:
                dots = soft_cap * (dots / soft_cap).tanh()
            found = torch.where(chunks_back == back, dots, found)
        yield found


def weigh(
    scores: torch.Tensor, value: torch.Tensor, sink: torch.Tensor | None = None
) -> torch.Tensor:
    """One head's softmax over its scores, and the sum of the values that it weighs.

    Args:
        scores: [num_queries, num_keys].
        value: [num_keys, value_size].
        sink: [], one more logit of the softmax, whose value is 0.
    """
    if sink is not None:
        column = sink.to(scores.dtype).expand(len(scores), 1)
        scores = torch.cat([scores, column], dim=-1)
    return scores.softmax(-1)[:, : len(value)].to(value.dtype) @ value


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
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Causal dual chunk attention of one sequence.

    Args:
        query: [num_queries, num_heads, head_size], the sequence's last positions, unrotated.
        key: [seq_len, num_kv_heads, head_size], unrotated.
        value: [seq_len, num_kv_heads, head_size].
        chunk_size: c.
        local_size: w.
        inv_freq: [rotary_dim / 2], radians a position.
        is_neox: which entries make a rotary pair, see `rotate`.
        scale: factor on the dot products, any mscale of the rotary table included.
        original_max_position_embeddings: switches the temperature on, see `temperature`.
        soft_cap: see `turned_scores`.
        sinks: [num_heads], see `weigh`.
        seen: [num_heads, num_queries, seq_len] bool, which keys each query attends to, at least
            one; None for all up to its own.
        dtype: of the arithmetic; whole models may have to settle for fp32.

    Returns:
        [num_queries, num_heads, head_size] in `dtype`.
    """
    num_kv_heads, num_heads = key.shape[1], query.shape[1]
    seq_len, num_queries = len(key), len(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    positions = key_positions(torch.arange(seq_len), chunk_size, local_size)
    key = rotate(key, positions, inv_freq.double(), is_neox).to(dtype)
    output = torch.empty(num_queries, num_heads, value.shape[-1], dtype=dtype)
    # Some rows at a time, which bounds the memory and spares most of the future.
    for rows in torch.arange(num_queries).split(1024):
        i = rows + seq_len - num_queries
        found = scores(
            query[rows],
            key,
            i,
            chunk_size=chunk_size,
            local_size=local_size,
            inv_freq=inv_freq,
            is_neox=is_neox,
            scale=scale,
            original_max_position_embeddings=original_max_position_embeddings,
            soft_cap=soft_cap,
        )
        for head, of_head in enumerate(found):
            kv_head, num_keys = head * num_kv_heads // num_heads, of_head.shape[1]
            if seen is not None:
                of_head = of_head.masked_fill(~seen[head, rows, :num_keys], -torch.inf)
            sink = None if sinks is None else sinks[head]
            output[rows, head] = weigh(of_head, value[:num_keys, kv_head], sink)
    return output


def turned_attention(
    turned: Sequence[torch.Tensor],
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    chunk_len: int,
    factor: torch.Tensor,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`dual_chunk_attention` of a whole sequence whose queries and keys are rotated already.

    Args:
        turned: see `turned_scores`.
        key: [seq_len, num_kv_heads, head_size].
        value: [seq_len, num_kv_heads, value_size].
        chunk_len: s.
        factor: see `turned_scores`.
        soft_cap: see `turned_scores`.
        sinks: [num_heads], see `weigh`.

    Returns:
        [seq_len, num_heads, value_size] in value's dtype.
    """
    seq_len, num_heads = turned[0].shape[:2]
    output = torch.empty(seq_len, num_heads, value.shape[-1], dtype=value.dtype)
    for i in torch.arange(seq_len).split(1024):
        found = turned_scores(
            [query[i] for query in turned],
            key,
            i,
            chunk_len=chunk_len,
            factor=factor[i],
            soft_cap=soft_cap,
        )
        for head, of_head in enumerate(found):
            kv_head = head * key.shape[1] // num_heads
            sink = None if sinks is None else sinks[head]
            output[i, head] = weigh(of_head, value[: of_head.shape[1], kv_head], sink)
    return output
