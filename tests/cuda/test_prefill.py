"""Prefill by Triton's kernels against the reference, and decode beside it."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.bench import moves
from tests.helpers import interpreter
from tests.helpers.cases import cases
from tests.helpers.kernels import (
    BOTH,
    PREFILLS,
    SOFTMAX,
    NeverWaits,
    cached_shapes,
    decode,
    planner,
    prefill,
)
from tests.helpers.paged import DEVICE, Batch, Shape, query_start_loc
from vllm_dca.method.kv_cache import split_kv

interpreter.repair()
pytestmark = pytest.mark.usefixtures("short_shares")


@settings(max_examples=cases(50), deadline=None)
@given(cached_shapes(), st.sampled_from(list(PREFILLS)))
def test_prefill_agrees_with_reference(shape: Shape, name: str) -> None:
    """In one launch, and by three passes and a merge."""
    batch = Batch.random(shape)
    batch.assert_close(prefill(batch, PREFILLS[name]))


# Every size with one query a key; with more, what has other tiles.
HEAD_SIZES = {
    1: (32, 64, 72, 80, 96, 128, 160, 256, 320),
    7: (64, 72, 128, 320),
    71: (32, 80, 320),
}


@pytest.mark.parametrize(
    ("group", "head_size"),
    [(group, size) for group, sizes in HEAD_SIZES.items() for size in sizes],
)
def test_head_sizes_and_groups(group: int, head_size: int) -> None:
    shape = Shape([(50, 49), (20, 17)], head_size=head_size, rotary_dim=32, group=group)
    shape = dataclasses.replace(shape, num_kv_heads=1, seed=head_size)
    batch = Batch.random(shape)
    batch.assert_close(decode(batch))
    # A tile of queries is then less than a token's.
    if group < 71 or head_size == 32:
        batch.assert_close(prefill(batch))
    if group < 71:
        batch.assert_close(prefill(batch, PREFILLS["triton_passes"]))


@pytest.mark.parametrize(("temperature", "softmax"), [(None, {}), (20, {}), (20, BOTH)])
def test_decode_row_equals_prefill_row(
    temperature: int | None, softmax: dict[str, Any]
) -> None:
    """One request at every length around three chunks, and all of its rows at once."""
    shape = Shape([(70, 30)], original_max_position_embeddings=temperature, **softmax)
    batch = Batch.random(shape)
    assert (decode(batch) - prefill(batch)).abs().max() <= batch.tolerance


@pytest.mark.parametrize("cached", range(20, 36, 3))
def test_rows_that_cross_every_border(cached: int) -> None:
    """A short prefill whose tile holds rows of three chunks, over keys of five."""
    # In fp32 a tile holds fewer rows.
    dtype = torch.bfloat16 if cached % 2 else torch.float32
    lengths = [(cached + 15, cached), (50, 49)]
    shape = Shape(lengths, chunk_len=8, block_size=4, local_size=6, dtype=dtype)
    batch = Batch.random(shape)
    together = decode(batch, 5)
    batch.assert_close(together)
    assert (together - prefill(batch)).abs().max() <= batch.tolerance


@SOFTMAX
def test_one_launch_crosses_every_border(softmax: dict[str, Any]) -> None:
    """Rows of five chunks, in tiles of one; as passes have them, and however they are cut."""
    lengths = [(40, 0), (33, 9), (24, 23), (8, 0)]
    shape = Shape(lengths, chunk_len=8, block_size=4, local_size=6, group=7, **softmax)
    batch = Batch.random(shape)
    together = prefill(batch)
    batch.assert_close(together)
    by_passes = prefill(batch, PREFILLS["triton_passes"])
    assert (together - by_passes).abs().max() <= batch.tolerance


@pytest.mark.parametrize(
    ("lengths", "regions"),
    [
        ([(16, 0)], 1),
        ([(32, 30)], 2),
        ([(70, 60)], 3),
        ([(1700, 1690)], 3),
        ([(70, 66)] * 9, 3),
    ],
)
def test_launches_are_as_many_as_the_benchmark_says(
    lengths: list[tuple[int, int]], regions: int
) -> None:
    batch = Batch.random(Shape(lengths, num_kv_heads=1, group=1))
    for name, launches in (("triton", moves.by_one_launch), ("triton_passes", moves.by_passes)):
        with interpreter.launches() as launched:
            prefill(batch, PREFILLS[name])
        assert sum(launched.values()) == launches(regions).launches


@pytest.mark.parametrize("name", PREFILLS)
def test_nothing_waits_for_the_device(name: str) -> None:
    """Neither planning a step nor a layer's own work reads anything back."""
    batch = Batch.random(Shape([(70, 40), (20, 0)]))
    query, kv_cache, block_table, starts = (
        tensor.to(DEVICE)
        for tensor in (
            batch.rotated_query(),
            batch.kv_cache,
            batch.block_table,
            query_start_loc([(70, 69), (20, 19)]),
        )
    )
    rotation = batch.rotation(DEVICE)
    steps = planner(batch.shape, 4, 4)
    seq_lens = torch.tensor([70, 20], dtype=torch.int32, device=DEVICE)
    with NeverWaits():
        by = PREFILLS[name]
        found = by.plan([0, 30, 50], [70, 20], block_table, 4, batch.shape.geometry)
        by.attend(
            query,
            *split_kv(kv_cache),
            torch.empty_like(query),
            plan=found,
            rotation=rotation,
            softmax_scale=1.0,
        )
        steps.plan(starts, seq_lens, block_table, 2)
    with NeverWaits(), pytest.raises(AssertionError, match="waits for the device"):
        seq_lens.max().item()
