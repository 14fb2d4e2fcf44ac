"""The Triton kernels, under Triton's interpreter, against the reference."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import interpreter
from tests.paged import CPU_PREFILL, Batch, Shape, query_start_loc
from tests.test_attention import shapes
from vllm_dca.kernels import decode as decode_module
from vllm_dca.kernels import plan_decode
from vllm_dca.kernels.attention import attention
from vllm_dca.kernels.decode import decode_attention
from vllm_dca.kernels.merge import merge_parts
from vllm_dca.kernels.plan_decode import DecodePlan, DecodePlanner
from vllm_dca.kernels.turn import turn_queries
from vllm_dca.prefill import PrefillOperations

TRITON = PrefillOperations(turn_queries, attention, merge_parts)


interpreter.repair()


@pytest.fixture(autouse=True, scope="module")
def _short_splits() -> Iterator[None]:
    """The interpreter is slow: let contexts of a hundred tokens have several splits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_decode, "MIN_SPLIT", 16)
        patch.setattr(plan_decode, "MAX_TILE", 16)
        patch.setattr(decode_module, "MAX_TILE", 16)
        yield


def planner(shape: Shape, max_rows: int, spare_slots: int) -> DecodePlanner:
    return DecodePlanner(
        shape.geometry,
        shape.original_max_position_embeddings,
        max_rows,
        spare_slots,
        torch.device("cpu"),
    )


def plan(batch: Batch, planner: DecodePlanner, num_rows: int) -> DecodePlan:
    lengths = batch.shape.lengths
    return planner.plan(
        query_start_loc(lengths),
        torch.tensor([total for total, _ in lengths], dtype=torch.int32),
        batch.block_table,
        num_rows,
    )


def decode(batch: Batch, spare_slots: int = 4) -> torch.Tensor:
    query = batch.rotated_query()
    output = torch.full_like(query, torch.nan)
    decode_attention(
        query,
        batch.kv_cache,
        output,
        plan=plan(batch, planner(batch.shape, len(query), spare_slots), len(query)),
        rotation=batch.rotation(),
        softmax_scale=batch.shape.scale,
        **batch.scales,
    )
    return output


@st.composite
def cached_shapes(draw: st.DrawFn, decode: bool = False) -> Shape:
    """Shapes with every kind of cache: FP8, and either order in memory."""
    shape = draw(shapes(decode))
    kinds = [None, torch.float8_e4m3fn, torch.float8_e5m2]
    return dataclasses.replace(
        shape, cache_dtype=draw(st.sampled_from(kinds)), tokens_first=draw(st.booleans())
    )


@settings(max_examples=40, deadline=None)
@given(cached_shapes(decode=True), st.integers(1, 9))
def test_decode_agrees_with_reference(shape: Shape, spare_slots: int) -> None:
    batch = Batch.random(shape)
    batch.assert_close(decode(batch, spare_slots))


@settings(max_examples=40, deadline=None)
@given(cached_shapes())
def test_prefill_agrees_with_reference(shape: Shape) -> None:
    batch = Batch.random(shape)
    batch.assert_close(batch.prefill(operations=TRITON))


@settings(max_examples=30, deadline=None)
@given(shapes())
def test_turn_and_merge_go_with_any_provider(shape: Shape) -> None:
    """With torch's passes only turning and merging are Triton's; all copies are the same."""
    batch = Batch.random(shape)
    batch.assert_close(batch.prefill(operations=TRITON._replace(attend=CPU_PREFILL.attend)))


@pytest.mark.parametrize("head_size", [32, 64, 72, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("group", [1, 7, 71])
def test_head_sizes_and_groups(head_size: int, group: int) -> None:
    shape = Shape([(50, 49), (20, 17)], head_size=head_size, rotary_dim=32, group=group)
    shape = dataclasses.replace(shape, num_kv_heads=1, seed=head_size)
    batch = Batch.random(shape)
    batch.assert_close(decode(batch))
    if group < 71:
        batch.assert_close(batch.prefill(operations=TRITON))


@pytest.mark.parametrize("temperature", [None, 20])
def test_decode_row_equals_prefill_row(temperature: int | None) -> None:
    """One request at every length around three chunks, and all of its rows at once."""
    shape = Shape([(70, 30)], original_max_position_embeddings=temperature)
    batch = Batch.random(shape)
    assert (decode(batch) - batch.prefill(operations=TRITON)).abs().max() <= batch.tolerance()


LENGTHS = [(70, 69), (1, 0), (17, 15), (40, 37), (33, 32)]


def test_plan_covers_every_key_once() -> None:
    for spare_slots in (1, 2, 5, 50):
        batch = Batch.random(Shape(LENGTHS))
        found = plan(batch, planner(batch.shape, 9, spare_slots), 8)
        length = int(found.split_len)
        keys = [
            total - back for total, cached in LENGTHS for back in range(total - cached)[::-1]
        ]
        keys = [k - 0 for k in keys]
        assert found.row_keys.tolist() == keys
        assert length % plan_decode.MAX_TILE == 0
        splits = found.first_slot.diff()
        assert splits.tolist() == [-(-k // length) for k in keys]
        used = [row for row, n in enumerate(splits.tolist()) for _ in range(n)]
        assert len(used) <= len(found.slot_row)
        assert found.slot_row.tolist() == used + [-1] * (len(found.slot_row) - len(used))


def test_buffers_stay_and_rows_that_pad_are_zero() -> None:
    """As a captured graph replays: the same addresses, whatever the lengths, and padding."""
    shape = Shape([(1, 0)] * 3)
    steps = planner(shape, 4, 6)
    addresses = set()
    for lengths in ([(1, 0)] * 3, [(16, 15), (70, 69), (33, 32)], [(17, 16), (15, 14)]):
        batch = Batch.random(dataclasses.replace(shape, lengths=lengths))
        query = batch.rotated_query()
        padding = torch.full((4 - len(query), *query.shape[1:]), torch.nan)
        output = torch.full_like(torch.cat([query, padding]), torch.nan)
        found = plan(batch, steps, 4)
        addresses.add(
            tuple(
                getattr(found, name).data_ptr()
                for name in ("row_request", "row_keys", "first_slot", "slot_row", "split_len")
            )
        )
        decode_attention(
            torch.cat([query, padding]),
            batch.kv_cache,
            output,
            plan=found,
            rotation=batch.rotation(),
            softmax_scale=batch.shape.scale,
        )
        batch.assert_close(output[: len(query)])
        assert (output[len(query) :] == 0).all()
    assert len(addresses) == 1


def test_tolerance_would_catch_a_wrong_region() -> None:
    """The check can fail: one position too few towards the previous chunk is seen."""
    batch = Batch.random(Shape([(70, 69)]))
    wrong = dataclasses.replace(
        batch, shape=dataclasses.replace(batch.shape, local_size=batch.shape.local_size - 1)
    )
    error = (decode(wrong).double() - batch.reference()).abs().max()
    assert error > 100 * batch.tolerance()
