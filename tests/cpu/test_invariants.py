"""What does not change a row's answer: how its request is cut, and what it is batched with."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from tests.helpers.paged import Batch, Shape
from tests.helpers.shapes import DTYPES

# Into the first chunk at every token, and around every later border of a chunk of 16.
CUTS = [*range(1, 21), *(border + near for border in range(32, 100, 16) for near in (-1, 0, 1))]

PREFILLS = pytest.mark.parametrize("prefill", [Batch.prefill, Batch.compiled])


@PREFILLS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [None, 20])
def test_any_split_of_a_prefill_equals_the_whole(
    dtype: torch.dtype, temperature: int | None, prefill: Callable[..., torch.Tensor]
) -> None:
    shape = Shape([(100, 0)], dtype=dtype, original_max_position_embeddings=temperature)
    batch = Batch.random(shape)
    whole = prefill(batch)
    for cut in CUTS:
        tail = dataclasses.replace(
            batch, shape=dataclasses.replace(shape, lengths=[(100, cut)])
        )
        tail.queries = [batch.queries[0][cut:]]
        head = dataclasses.replace(batch, shape=dataclasses.replace(shape, lengths=[(cut, 0)]))
        head.queries, head.keys, head.values = (
            [t[0][:cut]] for t in (batch.queries, batch.keys, batch.values)
        )
        split = torch.cat([prefill(head), prefill(tail)])
        assert (split - whole).abs().max() <= batch.tolerance, cut


def assert_batched_equals_single(
    batch: Batch, path: Callable[..., torch.Tensor], allowed: float
) -> None:
    query = batch.rotated_query()
    together, start = path(batch), 0
    for row, (total, cached) in enumerate(batch.shape.lengths):
        rows = slice(start, start + total - cached)
        alone = path(batch, query[rows], rows=slice(row, row + 1))
        torch.testing.assert_close(together[rows], alone, rtol=0, atol=allowed)
        start = rows.stop


@PREFILLS
@pytest.mark.parametrize("dtype", DTYPES)
def test_batched_prompts_equal_single_ones(
    dtype: torch.dtype, prefill: Callable[..., torch.Tensor]
) -> None:
    """Requests are computed one by one, so not a bit may differ."""
    lengths = [(100, 0), (7, 0), (33, 0), (16, 0), (17, 0)]
    assert_batched_equals_single(Batch.random(Shape(lengths, dtype=dtype)), prefill, 0.0)


@pytest.mark.parametrize("path", [Batch.prefill, Batch.decode, Batch.compiled])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_sinks", [False, True])
def test_batched_equals_single(
    dtype: torch.dtype, has_sinks: bool, path: Callable[..., torch.Tensor]
) -> None:
    """Whole prompts and their ends; decodes, of which the longest has two splits."""
    lengths = [(100, 0), (90, 37), (1100, 1099), (7, 0), (33, 30), (16, 0), (70, 69), (17, 0)]
    batch = Batch.random(Shape(lengths, dtype=dtype, has_sinks=has_sinks))
    # What torch computes of all at once may be rounded otherwise at the end of a vector than
    # inside it.
    allowed = 0.0 if path is Batch.compiled else batch.tolerance
    assert_batched_equals_single(batch, path, allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [None, 20])
def test_decode_row_equals_prefill_row(dtype: torch.dtype, temperature: int | None) -> None:
    lengths = [(total, total - 1) for total in range(1, 101)]
    shape = Shape(lengths, dtype=dtype, original_max_position_embeddings=temperature)
    batch = Batch.random(shape)
    prefill = batch.prefill()
    for decode in (batch.decode(), batch.compiled()):
        assert (decode - prefill).abs().max() <= batch.tolerance
