"""Soft caps and sinks far beyond what models have, for whatever computes them."""

import dataclasses
from collections.abc import Iterable

import pytest
import torch

from tests.helpers.paged import Batch, Shape

EXTREME = pytest.mark.parametrize(
    ("sinks_at", "soft_cap", "dtype"),
    [
        (-1e4, 1e-3, torch.float16),
        (-100.0, None, torch.float32),
        (30.0, None, torch.float16),
        (100.0, 1e4, torch.float32),
        (1e4, 1e-3, torch.float32),
        (1e4, 1e-3, torch.bfloat16),
    ],
)


def extreme(sinks_at: float, soft_cap: float | None, dtype: torch.dtype) -> Batch:
    """Sinks that count for nothing or for all; a row of one key, and many rows."""
    lengths = [(1, 0), (35, 31), (17, 15), (40, 4)]
    softmax = {"soft_cap": soft_cap, "has_sinks": True, "sinks_at": sinks_at}
    return Batch.random(Shape(lengths, dtype=dtype, **softmax))


def beside_large_sinks() -> tuple[Batch, torch.Tensor]:
    """A decode row of hundreds of keys, whose weights half precision would round beside sinks.

    Returns:
        The batch, and how far off each head may be: [1, num_heads].
    """
    sizes = {"chunk_len": 256, "local_size": 128, "block_size": 64, "num_kv_heads": 1}
    shape = Shape([(600, 599)], dtype=torch.float16, **sizes)
    without = Batch.random(shape)
    batch = Batch.random(dataclasses.replace(shape, has_sinks=True, sinks_at=14.0))
    # All that a sink does is to leave the keys of its head a share, rounded to what fp16 has.
    share = batch.exact.norm(dim=-1) / without.exact.norm(dim=-1)
    assert share.min() < 1e-5 < 1e-3 < share.max()
    limits = torch.finfo(torch.float16)
    return batch, without.tolerance * share + limits.smallest_normal * limits.eps


def assert_keep_their_digits(
    batch: Batch, tolerance: torch.Tensor, outputs: Iterable[torch.Tensor]
) -> None:
    for output in outputs:
        error = (output.double() - batch.exact).abs().amax(-1)
        assert (error <= tolerance).all()
