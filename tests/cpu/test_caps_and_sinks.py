"""Soft caps and attention sinks far beyond what models have; random batches have others."""

from collections.abc import Callable

import pytest
import torch

from tests.helpers.caps_and_sinks import (
    EXTREME,
    assert_keep_their_digits,
    beside_large_sinks,
    extreme,
)
from tests.helpers.paged import Batch

PATHS = pytest.mark.parametrize("path", [Batch.compiled, Batch.prefill, Batch.decode])


@PATHS
@EXTREME
def test_extreme_caps_and_sinks(
    sinks_at: float,
    soft_cap: float | None,
    dtype: torch.dtype,
    path: Callable[[Batch], torch.Tensor],
) -> None:
    batch = extreme(sinks_at, soft_cap, dtype)
    batch.assert_close(path(batch))


@PATHS
def test_keys_beside_a_large_sink_keep_their_digits(
    path: Callable[[Batch], torch.Tensor],
) -> None:
    batch, tolerance = beside_large_sinks()
    assert_keep_their_digits(batch, tolerance, [path(batch)])
