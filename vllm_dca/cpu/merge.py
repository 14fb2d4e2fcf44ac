"""Merging attention over parts of the keys into attention over all of them."""

import torch

from vllm_dca.method.device import Partial


def merge_parts(
    output: torch.Tensor,
    lse: torch.Tensor,
    parts: list[Partial],
    sinks: torch.Tensor | None = None,
) -> None:
    """See `vllm_dca.method.device.MergeParts`."""
    if not parts and sinks is None:
        return
    total = lse.clone()
    for part in parts:
        total[:, part.tokens] = torch.logaddexp(total[:, part.tokens], part.lse)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.float()[:, None])
    merged = share(output, lse, total)
    for part in parts:
        part_share = share(part.output, part.lse, total[:, part.tokens])
        merged.index_add_(0, part.tokens, part_share)
    output.copy_(merged)


def share(output: torch.Tensor, lse: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """What attention over some keys, of LSE `lse`, adds to that over all, of LSE `total`."""
    return output.float() * (lse - total).exp().T[..., None]
