"""The CPU's attention provider, on torch's flash attention with log-sum-exp.

torch has no paged or variable-length attention on the CPU, so pages are gathered and the
segments taken one by one; each call runs over all heads and threads. It is a third slower in
half precision than in fp32 but for processors that multiply in half precision by tiles (AMX),
so elsewhere it is given fp32.
"""

import functools
from collections.abc import Callable

import torch

from vllm_dca.cpu.merge import share
from vllm_dca.method.provider import PagedSegments

_KEYS = 1024  # that capped scores are worked out for at a time


def attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    *,
    segments: PagedSegments,
    softmax_scale: float,
    soft_cap: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `vllm_dca.method.provider.AttentionProvider`, for a cache that is not quantised."""
    assert k_scale is None
    assert v_scale is None
    block_size = key_cache.shape[1]
    lse = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32)
    dtype = query.dtype if torch.cpu._is_amx_tile_supported() else torch.float32
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    if soft_cap is not None:
        attend = functools.partial(_capped, soft_cap, segments.causal)
    else:
        attend = _causal if segments.causal else _full
    end = 0
    lengths = zip(segments.query_lens.tolist(), segments.key_lens.tolist(), strict=True)
    for segment, (num_queries, num_keys) in enumerate(lengths):
        rows, end = slice(end, end + num_queries), end + num_queries
        pages = segments.block_table[segment, : -(-num_keys // block_size)]
        # [1, num_kv_heads, num_keys, head_size]
        key, value = (
            cache.index_select(0, pages)
            .flatten(0, 1)[:num_keys]
            .transpose(0, 1)[None]
            .to(dtype)
            for cache in (key_cache, value_cache)
        )
        output[rows], lse[:, rows] = attend(query[rows].to(dtype), key, value, softmax_scale)
    return lse


def _capped(
    soft_cap: float,
    causal: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's flash attention has no cap: some keys at a time, in fp32."""
    num_queries, num_heads, _ = query.shape
    key, value = key[0].float(), value[0].float()  # [kv, keys, size]
    group = num_heads // len(key)
    turned = query.float().unflatten(1, (len(key), group)).permute(1, 2, 0, 3) * scale
    total = torch.full((len(key), group, num_queries), -torch.inf)
    output = torch.zeros_like(turned)
    last = torch.arange(num_queries) + key.shape[1] - num_queries
    for keys in torch.arange(key.shape[1]).split(_KEYS):
        scores = turned @ key[:, None, keys].transpose(-1, -2)
        scores = (scores / soft_cap).tanh_().mul_(soft_cap)
        if causal:
            scores.masked_fill_(keys > last[:, None], -torch.inf)
        lse = scores.logsumexp(-1)
        new_total = torch.logaddexp(total, lse)
        output *= (total - new_total).exp_()[..., None]
        output += (scores - new_total[..., None]).exp_() @ value[:, None, keys]
        total = new_total
    return output.permute(2, 0, 1, 3).flatten(1, 2), total.flatten(0, 1)


def _full(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(0, 1)[None], key, value, 0.0, causal, scale=scale
    )
    return output[0].transpose(0, 1), lse[0]


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    # torch aligns the mask to the first key, so what every query sees goes first.
    seen = key.shape[2] - query.shape[0]
    new, new_lse = _full(query, key[:, :, seen:], value[:, :, seen:], scale, causal=True)
    if seen == 0:
        return new, new_lse
    cached, cached_lse = _full(query, key[:, :, :seen], value[:, :, :seen], scale)
    lse = torch.logaddexp(new_lse, cached_lse)
    return share(new, new_lse, lse) + share(cached, cached_lse, lse), lse
