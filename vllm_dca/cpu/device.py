"""The CPU as a device of DCA: the compiled kernel, or the same by torch."""

import sys
from collections.abc import Callable
from typing import Any

import torch

from vllm_dca.cpu import compiled, compiled_sparse, decode, sparse
from vllm_dca.cpu.merge import merge_parts
from vllm_dca.cpu.paged_pass import attention
from vllm_dca.cpu.plan_decode import DecodePlan
from vllm_dca.method import kv_cache
from vllm_dca.method.config import DcaSettings
from vllm_dca.method.device import Device, PlanDecode, PrefillOperations
from vllm_dca.method.prefill import by_passes
from vllm_dca.method.rotary import turn_queries
from vllm_dca.method.sparse_operations import SparseOperations
from vllm_dca.method.sparse_prefill import by_segment
from vllm_dca.method.vertical_slash import select


def by_kernel() -> Device:
    """The compiled kernel, which takes prefills as it takes decodes."""
    operations = SparseOperations(
        compiled_sparse.weigh, compiled_sparse.select, compiled_sparse.attend
    )
    return Device(
        provider=f"compiled, {compiled.instructions()}",
        prefill=None,
        write_kv=kv_cache.without_scales(compiled.write_kv),
        decode_planner=_planner_of(compiled.CompiledPlan),
        decode=compiled.attention,
        decode_rows=lambda group: sys.maxsize,
        sparse=by_segment(operations),
    )


def by_torch() -> Device:
    """Three passes and a merge for prefills, one matrix product over pages for decodes."""
    return Device(
        provider="torch",
        prefill=by_passes(PrefillOperations(turn_queries, attention, merge_parts)),
        write_kv=kv_cache.without_scales(kv_cache.write_kv),
        decode_planner=_planner_of(DecodePlan),
        decode=decode.decode_attention,
        decode_rows=lambda group: 1,
        sparse=by_segment(SparseOperations(sparse.weigh, select, sparse.attend)),
    )


def _planner_of(
    plan_of: Callable[..., Any],
) -> Callable[[DcaSettings, int, int, int], PlanDecode]:
    def decode_planner(
        settings: DcaSettings, block_size: int, max_rows: int, group: int
    ) -> PlanDecode:
        geometry, length = settings.geometry, settings.original_max_position_embeddings

        def plan(
            query_start_loc: torch.Tensor,
            seq_lens: torch.Tensor,
            block_table: torch.Tensor,
            num_rows: int,
            max_query_len: int | None = None,
        ) -> Any:
            return plan_of(query_start_loc, seq_lens, block_table, block_size, geometry, length)

        return plan

    return decode_planner
