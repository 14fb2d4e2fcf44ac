"""The Triton kernels, under Triton's interpreter, against the reference."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cpu.test_attention import shapes
from tests.helpers import interpreter
from tests.helpers.paged import CPU_PREFILL, DEVICE, Batch, Shape, query_start_loc
from vllm_dca.cuda import decode as decode_module
from vllm_dca.cuda import plan_decode
from vllm_dca.cuda.decode import decode_attention
from vllm_dca.cuda.merge import merge_parts
from vllm_dca.cuda.paged_pass import attention
from vllm_dca.cuda.plan_decode import DecodePlan, DecodePlanner
from vllm_dca.cuda.turn import turn_queries
from vllm_dca.method.device import PrefillOperations
from vllm_dca.method.kv_cache import split_kv
from vllm_dca.method.planning import plan_prefill
from vllm_dca.method.prefill import prefill_attention

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
        DEVICE,
    )


def plan(batch: Batch, planner: DecodePlanner, num_rows: int) -> DecodePlan:
    lengths = batch.shape.lengths
    return planner.plan(
        query_start_loc(lengths).to(DEVICE),
        torch.tensor([total for total, _ in lengths], dtype=torch.int32, device=DEVICE),
        batch.block_table.to(DEVICE),
        num_rows,
    )


def attend(batch: Batch, query: torch.Tensor, plan: DecodePlan) -> torch.Tensor:
    query = query.to(DEVICE)
    output = torch.full_like(query, torch.nan)
    decode_attention(
        query,
        batch.kv_cache.to(DEVICE),
        output,
        plan=plan,
        rotation=batch.rotation(DEVICE),
        softmax_scale=batch.shape.scale,
        **batch.scales(DEVICE),
    )
    return output.cpu()


def decode(batch: Batch, spare_slots: int = 4) -> torch.Tensor:
    query = batch.rotated_query()
    steps = planner(batch.shape, len(query), spare_slots)
    return attend(batch, query, plan(batch, steps, len(query)))


def prefill(batch: Batch, operations: PrefillOperations = TRITON) -> torch.Tensor:
    return batch.prefill(operations=operations, device=DEVICE)


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
    batch.assert_close(prefill(batch))


@pytest.mark.parametrize("head_size", [32, 64, 72, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("group", [1, 7, 71])
def test_head_sizes_and_groups(head_size: int, group: int) -> None:
    shape = Shape([(50, 49), (20, 17)], head_size=head_size, rotary_dim=32, group=group)
    shape = dataclasses.replace(shape, num_kv_heads=1, seed=head_size)
    batch = Batch.random(shape)
    batch.assert_close(decode(batch))
    if group < 71:
        batch.assert_close(prefill(batch))


@pytest.mark.parametrize("temperature", [None, 20])
def test_decode_row_equals_prefill_row(temperature: int | None) -> None:
    """One request at every length around three chunks, and all of its rows at once."""
    shape = Shape([(70, 30)], original_max_position_embeddings=temperature)
    batch = Batch.random(shape)
    assert (decode(batch) - prefill(batch)).abs().max() <= batch.tolerance()


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
        found = plan(batch, steps, 4)
        addresses.add(
            tuple(
                getattr(found, name).data_ptr()
                for name in ("row_request", "row_keys", "first_slot", "slot_row", "split_len")
            )
        )
        output = attend(batch, torch.cat([query, padding]), found)
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


class NeverWaits(TorchDispatchMode):
    """Refuses torch's operations that read something back from the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in self.WAITING, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def prefill_launches(lengths: list[tuple[int, int]]) -> Counter[str]:
    """How often one layer runs each operation, and that none waits."""
    batch = Batch.random(Shape(lengths, num_kv_heads=1, group=1))
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return getattr(CPU_PREFILL, name)(*args, **kwargs)

        return call

    batch.prefill(operations=PrefillOperations(*map(counted, PrefillOperations._fields)))
    return calls


@pytest.mark.parametrize(
    "lengths",
    [[(70, 40)], [(1700, 0)], [(70, 40)] * 32],
    ids=["1 request", "100 chunks", "32 requests"],
)
def test_launches_of_a_layer_are_a_constant(lengths: list[tuple[int, int]]) -> None:
    assert prefill_launches(lengths) == {"turn": 1, "attend": 3, "merge": 1}


def test_passes_that_no_token_needs_are_not_launched() -> None:
    assert prefill_launches([(16, 0)]) == {"attend": 1, "merge": 1}
    assert prefill_launches([(32, 0)]) == {"turn": 1, "attend": 2, "merge": 1}


def test_nothing_waits_for_the_device() -> None:
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
        found = plan_prefill([0, 30, 50], [70, 20], block_table, 4, batch.shape.geometry)
        prefill_attention(
            query,
            *split_kv(kv_cache),
            torch.empty_like(query),
            plan=found,
            rotation=rotation,
            softmax_scale=1.0,
            operations=TRITON,
        )
        steps.plan(starts, seq_lens, block_table, 2)
    with NeverWaits(), pytest.raises(AssertionError, match="waits for the device"):
        seq_lens.max().item()
