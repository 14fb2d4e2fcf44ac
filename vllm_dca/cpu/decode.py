"""Paged decode on the CPU by torch: a few new tokens a request, one query a region.

The chunk length is a multiple of the page size, so a page lies in one region, and a batch's
pages, whosever they are, go through one matrix product with the query of their region.
"""

import torch

from vllm_dca.cpu.plan_decode import DecodePlan
from vllm_dca.method.rotary import QueryRotation, turn_queries


def decode_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    *,
    plan: DecodePlan,
    rotation: QueryRotation,
    softmax_scale: float,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """See `vllm_dca.method.device.DecodeAttention`, for a cache that is not quantised.

    In fp32. Every page gives a partial result of its own; these are merged at the end.
    """
    assert k_scale is None
    assert v_scale is None
    _, num_kv_heads, block_size, width = kv_cache.shape
    heads = (num_kv_heads, query.shape[1] // num_kv_heads)
    turned = turn_queries(query.float(), rotation, plan.tokens, plan.turn, plan.temperature)
    turned = (turned * softmax_scale).unflatten(1, heads)  # [3 * rows, kv, group, size]

    partials = []
    for part, unseen in plan.parts(num_kv_heads * block_size * width):
        pages = kv_cache.index_select(0, plan.pages[part]).float()
        key, value = pages.chunk(2, dim=-1)  # [pages, kv, block, size]
        scores = turned[plan.copies[part]] @ key.transpose(-1, -2)
        if soft_cap is not None:
            scores = (scores / soft_cap).tanh_().mul_(soft_cap)
        if unseen is not None:
            scores = scores.masked_fill(unseen[:, None, None], -torch.inf)
            # Those slots may hold anything, NaN included, which 0 * NaN would spread.
            value.masked_fill_(unseen[:, None, :, None], 0.0)
        best = scores.amax(-1, keepdim=True)
        weights = (scores - best).exp_()
        partials.append((best, weights.sum(-1, keepdim=True), weights @ value))

    # [pages, kv, group, 1 or size]
    best, total, acc = (torch.cat(column) for column in zip(*partials, strict=True))
    index = plan.rows[:, None, None, None].expand_as(best)
    row_best = torch.full((plan.num_rows, *best.shape[1:]), -torch.inf)
    row_best.scatter_reduce_(0, index, best, "amax")
    weight = (best - row_best[plan.rows]).exp_()
    row_total = torch.zeros_like(row_best).index_add_(0, plan.rows, total * weight)
    if sinks is not None:
        row_total += (sinks.float().view(*heads, 1) - row_best).exp_()
    row_acc = acc.new_zeros(plan.num_rows, *acc.shape[1:])
    row_acc.index_add_(0, plan.rows, acc * weight)
    output.copy_((row_acc / row_total).flatten(1, 2))
