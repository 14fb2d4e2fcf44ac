"""DCA's Triton kernels on batches: on a GPU, or in Triton's interpreter."""

import dataclasses

import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.caches import fp8_dtypes
from tests.helpers.graphs import WAITING
from tests.helpers.paged import DEVICE, Batch, Shape, query_start_loc
from tests.helpers.shapes import shapes
from vllm_dca.cuda.decode import decode_attention
from vllm_dca.cuda.device import WALK, prefill_by
from vllm_dca.cuda.paged_pass import attention
from vllm_dca.cuda.plan_decode import DecodePlan, DecodePlanner
from vllm_dca.method.device import Prefill

# What few models have.
CAPPED, SUNK = {"soft_cap": 2.0}, {"has_sinks": True}
BOTH = {**CAPPED, **SUNK}
SOFTMAX = pytest.mark.parametrize("softmax", [{}, BOTH], ids=["plain", "cap and sinks"])

PREFILLS = {"triton": WALK, "triton_passes": prefill_by(attention)}


def planner(shape: Shape, max_rows: int, num_programs: int) -> DecodePlanner:
    return DecodePlanner(
        shape.geometry,
        shape.original_max_position_embeddings,
        max_rows,
        shape.group,
        num_programs,
        DEVICE,
    )


def plan(batch: Batch, planner: DecodePlanner, num_rows: int) -> DecodePlan:
    lengths = batch.shape.lengths
    return planner.plan(
        query_start_loc(lengths).to(DEVICE),
        torch.tensor([total for total, _ in lengths], dtype=torch.int32, device=DEVICE),
        batch.block_table.to(DEVICE),
        num_rows,
        max(total - cached for total, cached in lengths),
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
        **batch.softmax(DEVICE),
        **batch.scales(DEVICE),
    )
    return output.cpu()


def decode(batch: Batch, num_programs: int = 7) -> torch.Tensor:
    query = batch.rotated_query()
    steps = planner(batch.shape, len(query), num_programs)
    return attend(batch, query, plan(batch, steps, len(query)))


def prefill(batch: Batch, by: Prefill = WALK) -> torch.Tensor:
    return batch.prefill(by=by, device=DEVICE)


@st.composite
def cached_shapes(draw: st.DrawFn, decode: bool = False) -> Shape:
    """Shapes with every kind of cache: FP8, and either order in memory; capped, with sinks."""
    shape = draw(shapes(decode, softmax=True))
    kinds = st.sampled_from([None, *fp8_dtypes()])
    return dataclasses.replace(shape, cache_dtype=draw(kinds), tokens_first=draw(st.booleans()))


class NeverWaits(TorchDispatchMode):
    """Refuses torch's operations that read something back from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in WAITING, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))
