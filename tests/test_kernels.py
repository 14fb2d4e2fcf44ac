"""The Triton kernels, under Triton's interpreter, against the reference."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import interpreter  # noqa: F401, before Triton
from tests.paged import SCALE, Batch, Shape, query_start_loc
from tests.test_attention import shapes
from vllm_dca.kernels.attention import attention
from vllm_dca.kernels.decode import decode_attention
from vllm_dca.kernels.merge import merge_parts
from vllm_dca.kernels.plan_decode import DecodePlanner
from vllm_dca.kernels.turn import turn_queries
from vllm_dca.prefill import PrefillOperations
from vllm_dca.providers import torch_cpu

TRITON = PrefillOperations(turn_queries, attention, merge_parts)
OPERATIONS = PrefillOperations(turn_queries, torch_cpu.attention, merge_parts)


def decode(batch: Batch, spare_slots: int = 4, padding: int = 0) -> torch.Tensor:
    shape = batch.shape
    query = batch.rotated_query()
    num_rows = len(query) + padding
    query = torch.cat(
        [query, torch.full((padding, *query.shape[1:]), torch.nan, dtype=query.dtype)]
    )
    planner = DecodePlanner(
        shape.geometry,
        shape.original_max_position_embeddings,
        num_rows,
        spare_slots,
        query.device,
    )
    output = torch.full_like(query, torch.nan)
    decode_attention(
        query,
        batch.kv_cache,
        output,
        plan=planner.plan(
            query_start_loc(shape.lengths),
            torch.tensor([total for total, _ in shape.lengths], dtype=torch.int32),
            batch.block_table,
            num_rows,
        ),
        rotation=batch.rotation(),
        softmax_scale=SCALE,
    )
    return output


@settings(max_examples=10, deadline=None)
@given(shapes(decode=True), st.integers(1, 9))
def test_decode_agrees_with_reference(shape: Shape, spare_slots: int) -> None:
    batch = Batch.random(shape)
    batch.assert_close(decode(batch, spare_slots))


@settings(max_examples=10, deadline=None)
@given(shapes(), st.sampled_from([OPERATIONS, TRITON]))
def test_prefill_agrees_with_reference(shape: Shape, operations: PrefillOperations) -> None:
    batch = Batch.random(shape)
    batch.assert_close(batch.prefill(operations=operations))
