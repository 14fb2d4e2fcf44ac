"""Merging attention over parts of the keys into attention over all of them."""

from typing import NamedTuple

import torch


class Partial(NamedTuple):
    """Attention over some of the keys.

    Attributes:
        output: [num_queries, num_heads, head_size].
        lse: [num_heads, num_queries] fp32, natural-log log-sum-exp of the scaled scores.
        tokens: [num_queries] int64, which queries these are; None for all, in order.
    """

    output: torch.Tensor
    lse: torch.Tensor
    tokens: torch.Tensor | None = None


def merge_partials(partials: list[Partial]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of disjoint sets of keys.

    Args:
        partials: the first has all queries, each at least one key.

    Returns:
        Output, in the dtype of the first partial's, and log-sum-exp over all keys.
    """
    first, *rest = partials
    if not rest:
        return first.output, first.lse
    total = first.lse.clone()
    for part in rest:
        tokens = slice(None) if part.tokens is None else part.tokens
        total[:, tokens] = torch.logaddexp(total[:, tokens], part.lse)

    def weighted(part: Partial, total: torch.Tensor) -> torch.Tensor:
        return part.output.float() * (part.lse - total).exp().T[..., None]

    merged = weighted(first, total)
    for part in rest:
        if part.tokens is None:
            merged += weighted(part, total)
        else:
            merged.index_add_(0, part.tokens, weighted(part, total[:, part.tokens]))
    return merged.to(first.output.dtype), total
