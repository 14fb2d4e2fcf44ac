"""Sparse prefill of a step: each segment's lines are weighed and selected, then attended.

A device does it segment by segment, as `sparse_attention` here, or all at once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from vllm_dca.method.rotary import QueryRotation
from vllm_dca.method.sparse_operations import SparseOperations, SparsePlan
from vllm_dca.method.sparse_recall import Attended, Watch
from vllm_dca.method.vertical_slash import Rule


class SparseSizes(NamedTuple):
    """What buffers of sparse prefill are made for.

    Attributes:
        num_heads: query heads of a layer.
        max_tokens: new tokens of a step, at most.
        max_model_len: tokens of a request, at most.
        chunk_len: s.
        continuous: whether weights have positions without DCA's clamps.
    """

    num_heads: int
    max_tokens: int
    max_model_len: int
    chunk_len: int
    continuous: bool


class SparseAttention(Protocol):
    """Attends from all segments of a step."""

    def __call__(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        *,
        plan: Any,
        rule: Rule,
        rotation: QueryRotation,
        softmax_scale: float,
        watch: Watch | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ) -> None:
        """Attend from the segments' tokens; the others' output is left alone.

        Args:
            query: [num_tokens, num_heads, head_size], rotated to their offsets.
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], any physical order.
            output: [num_tokens, num_heads, head_size], written at the segments' tokens.
            plan: made by `SparsePrefill.plan`.
            rule: how this layer's lines are selected.
            rotation: how this layer turns queries.
            softmax_scale: factor on the dot products.
            watch: is shown segments and what was selected for them.
            k_scale: [1] fp32, what FP8 keys are multiplied by; None for a cache of the query's
                dtype.
            v_scale: like k_scale, for the values.
        """


class SparsePrefill(NamedTuple):
    """How a device does it.

    Attributes:
        plan: what `attend` wants to know of a step, made once for all layers.
        attend: one layer.
        room: as `vllm_dca.method.device.Prefill` has it.
    """

    plan: Callable[[SparsePlan], Any]
    attend: SparseAttention
    room: int = 0


def by_segment(operations: SparseOperations) -> Callable[[SparseSizes], SparsePrefill]:
    """For a device that has operations on single segments, and needs no buffers."""

    def prefill(sizes: SparseSizes) -> SparsePrefill:
        return SparsePrefill(
            lambda plan: plan, functools.partial(sparse_attention, operations=operations)
        )

    return prefill


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
    watch: Watch | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """See `SparseAttention`, for a cache that is not quantised; `operations` are the device's.

    `watch` is shown each segment.
    """
    assert k_scale is None
    assert v_scale is None
    given: dict[str, Any] = {
        "plan": plan,
        "rotation": rotation,
        "softmax_scale": softmax_scale,
    }
    for segment in plan.segments:
        rows = query[segment.rows]
        weights = operations.weigh(rows, kv_cache, segment=segment, rule=rule, **given)
        lines = operations.select(*weights, rule)
        operations.attend(
            rows, kv_cache, output[segment.rows], segment=segment, lines=lines, **given
        )
        if watch is not None:
            own = operations.weigh, operations.select
            watch(Attended(rows, kv_cache, segment, lines, *own, given))
