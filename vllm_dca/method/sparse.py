"""Sparse prefill of a step: each segment's lines are weighed and selected, then attended."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.lines import Lines, Rule
from vllm_dca.method.rotary import QueryRotation
from vllm_dca.method.sparse_planning import Segment


class SparsePlan(NamedTuple):
    """A step's sparse segments, for all layers.

    Attributes:
        segments: at least one.
        rest: [num_tokens] int64, the batch's other tokens.
        block_table: [num_requests, max_blocks] int32.
        geometry: the chunk sizes.
        original_max_position_embeddings: switches the temperature on.
    """

    segments: list[Segment]
    rest: torch.Tensor
    block_table: torch.Tensor
    geometry: ChunkGeometry
    original_max_position_embeddings: int | None


class SparseOperations(NamedTuple):
    """What a device does of it; `vllm_dca.cpu.sparse` says what each is given.

    Attributes:
        weigh: how much of a segment's attention each line has.
        select: the lines of the largest weight.
        attend: along the lines that were selected.
    """

    weigh: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    select: Callable[[torch.Tensor, torch.Tensor, Rule], Lines]
    attend: Callable[..., None]


def sparse_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    *,
    plan: SparsePlan,
    rule: Rule,
    rotation: QueryRotation,
    softmax_scale: float,
    operations: SparseOperations,
) -> None:
    """Attend from the segments' tokens; the others' output is left alone.

    Args:
        query: [num_tokens, num_heads, head_size], rotated to their offsets.
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], any physical order.
        output: [num_tokens, num_heads, head_size], written at the segments' tokens.
        plan: of the step.
        rule: how this layer's lines are selected.
        rotation: how this layer turns queries.
        softmax_scale: factor on the dot products.
        operations: the device's.
    """
    for segment in plan.segments:
        of_segment = {
            "segment": segment,
            "plan": plan,
            "rotation": rotation,
            "softmax_scale": softmax_scale,
        }
        rows = query[segment.rows]
        weights = operations.weigh(rows, kv_cache, rule=rule, **of_segment)
        lines = operations.select(*weights, rule)
        operations.attend(rows, kv_cache, output[segment.rows], lines=lines, **of_segment)
