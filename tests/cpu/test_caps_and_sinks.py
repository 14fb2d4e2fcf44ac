"""Soft caps and attention sinks far beyond what models have; random batches have others."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from tests.helpers.paged import Batch, Shape

PATHS = pytest.mark.parametrize("path", [Batch.compiled, Batch.prefill, Batch.decode])


@PATHS
@pytest.mark.parametrize(
    ("sinks_at", "soft_cap", "dtype"),
    [
        (-1e4, 1e-3, torch.float16),
        (-100.0, None, torch.float32),
        (30.0, None, torch.float16),
        (100.0, 1e4, torch.float32),
        (1e4, 1e-3, torch.bfloat16),
    ],
)
def test_extreme_caps_and_sinks(
    sinks_at: float,
    soft_cap: float | None,
    dtype: torch.dtype,
    path: Callable[[Batch], torch.Tensor],
) -> None:
    """Sinks that count for nothing and for all; a row of one key, and many rows."""
    lengths = [(1, 0), (35, 31), (17, 15), (40, 4)]
    softmax = {"soft_cap": soft_cap, "has_sinks": True, "sinks_at": sinks_at}
    batch = Batch.random(Shape(lengths, dtype=dtype, **softmax))
    batch.assert_close(path(batch))


@PATHS
def test_keys_beside_a_large_sink_keep_their_digits(
    path: Callable[[Batch], torch.Tensor],
) -> None:
    """Hundreds of keys, each of a weight that half precision would round beside the sink's."""
    sizes = {"chunk_len": 256, "local_size": 128, "block_size": 64, "num_kv_heads": 1}
    shape = Shape([(600, 599)], dtype=torch.float16, **sizes)
    without = Batch.random(shape)
    batch = Batch.random(dataclasses.replace(shape, has_sinks=True, sinks_at=14.0))
    # All that a sink does is to leave the keys of its head a share, rounded to what fp16 has.
    share = batch.exact.norm(dim=-1) / without.exact.norm(dim=-1)
    assert share.min() < 1e-5 < 1e-3 < share.max()
    limits = torch.finfo(torch.float16)
    tolerance = without.tolerance * share + limits.smallest_normal * limits.eps
    error = (path(batch).double() - batch.exact).abs().amax(-1)
    assert (error <= tolerance).all()
