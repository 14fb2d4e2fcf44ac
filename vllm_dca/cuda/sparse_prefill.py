"""Sparse prefill on a GPU: a step's segments together, in eight launches a layer.

Two turn queries, two weigh the lines, one selects and one lists them, one attends, and torch
fills with zeros. A step whose segments the buffers do not hold together takes them in rounds.
"""

import functools
from typing import Any

import torch

from vllm_dca.cuda import sparse_probe
from vllm_dca.cuda.sparse_attend import attend
from vllm_dca.cuda.sparse_lists import Lists, Marks, list_lines
from vllm_dca.cuda.sparse_plan import (
    DevicePlan,
    Probe,
    Round,
    places_of,
    plan_probe,
    plan_step,
)
from vllm_dca.cuda.sparse_probe import Weights
from vllm_dca.cuda.sparse_select import choose
from vllm_dca.method import vertical_slash
from vllm_dca.method.rotary import QueryRotation
from vllm_dca.method.sparse_config import TILE
from vllm_dca.method.sparse_operations import SparsePlan
from vllm_dca.method.sparse_planning import LEAST_ROWS, Segment
from vllm_dca.method.sparse_prefill import SparsePrefill, SparseSizes
from vllm_dca.method.sparse_recall import Attended, Watch
from vllm_dca.method.vertical_slash import Lines, Rule


class Buffers:
    """What segments are worked on in, allocated once for all layers.

    Attributes:
        capacity: places; what a step has of one request always fits.
        weights: of the lines.
        marks: which of them are taken.
        lists: the same, in the memory of the weights.
    """

    def __init__(self, sizes: SparseSizes, device: torch.device) -> None:
        segments = -(-sizes.max_tokens // sizes.chunk_len) + 1
        self.capacity = segments * places_of(sizes.max_model_len)
        shape = sizes.num_heads, self.capacity
        self.weights = Weights(
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(2, *shape, dtype=torch.float32, device=device),
        )
        self.marks = Marks(*torch.zeros(2, *shape, dtype=torch.bool, device=device))
        vertical, (slash, _) = self.weights
        # At least so many rows has a segment.
        most = max(sizes.max_tokens // LEAST_ROWS, 1)
        counts = torch.empty(2 * most * sizes.num_heads, dtype=torch.int32, device=device)
        self.lists = Lists(vertical.view(torch.int32), slash.view(torch.int32), counts)

    def weights_of(self, probe: Probe) -> Weights:
        """The weights at these segments' places, which come first."""
        used = sum(map(places_of, probe.ends))
        vertical, slash = self.weights
        return Weights(vertical[:, :used], slash[..., :used])

    def lines_of(self, plan: Round, index: int) -> Lines:
        """The lines that were selected for one segment of a round."""
        first, end = sum(map(places_of, plan.probe.ends[:index])), plan.probe.ends[index]
        verticals, distances = self.marks
        return Lines(
            verticals[:, first : first + end], distances[:, first : first + end + TILE + 1]
        )


class Sparse:
    """How layers of the same sizes prefill sparsely."""

    def __init__(self, sizes: SparseSizes, device: torch.device) -> None:
        self.sizes = sizes
        self.buffers = Buffers(sizes, device)

    def plan(self, plan: SparsePlan) -> DevicePlan:
        """A step, once for all layers."""
        return plan_step(plan, self.buffers.capacity, self.sizes.continuous)

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        *,
        plan: DevicePlan,
        rule: Rule,
        rotation: QueryRotation,
        softmax_scale: float,
        watch: Watch | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ) -> None:
        """See `vllm_dca.method.sparse_prefill.SparseAttention`.

        `watch` is shown the step's last segment only, and reads nothing back: it is told on the
        device.
        """
        given: dict[str, Any] = {"rotation": rotation, "softmax_scale": softmax_scale}
        placed: dict[str, Any] = {
            "block_table": plan.block_table,
            "chunk_len": plan.geometry.chunk_len,
        }
        buffers = self.buffers
        for each in plan.rounds:
            weights = buffers.weights_of(each.probe)
            sparse_probe.weigh(
                query,
                kv_cache,
                weights,
                probe=each.probe,
                line_width=rule.line_width,
                k_scale=k_scale,
                **placed,
                **given,
            )
            choose(weights, buffers.marks, each.probe, rule)
            list_lines(buffers.marks, buffers.lists, each.probe)
            attend(
                query,
                kv_cache,
                output,
                buffers.marks,
                buffers.lists,
                plan=each,
                k_scale=k_scale,
                v_scale=v_scale,
                **placed,
                **given,
            )
        if watch is not None:
            segment = plan.host.segments[-1]
            taken = buffers.lines_of(each, len(each.probe.ends) - 1)
            given |= {"plan": plan.host, "k_scale": k_scale}
            of_segment = functools.partial(weigh, buffers)
            rows = query[segment.rows]
            watch(
                Attended(
                    rows, kv_cache, segment, taken, of_segment, vertical_slash.select, given
                )
            )


def with_buffers(sizes: SparseSizes, device: torch.device) -> SparsePrefill:
    """Allocate the buffers; the functions are bound to them."""
    sparse = Sparse(sizes, device)
    # Queries turned three ways.
    return SparsePrefill(sparse.plan, sparse.attend, room=3)


def weigh(
    buffers: Buffers,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    *,
    segment: Segment,
    plan: SparsePlan,
    rule: Rule,
    rotation: QueryRotation,
    softmax_scale: float,
    k_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `vllm_dca.method.sparse_operations.WeighLines` of one segment, for a watch.

    What it returns is in the buffers, which nobody needs between two layers: it is good until
    the next call. As much memory for its own would come on top of what vLLM counted.
    """
    # The query's first row is this segment's, wherever that has its end.
    probe = plan_probe(plan, segment, rule.continuous)
    weights = buffers.weights_of(probe)
    sparse_probe.weigh(
        query,
        kv_cache,
        weights,
        probe=probe,
        block_table=plan.block_table,
        chunk_len=plan.geometry.chunk_len,
        line_width=rule.line_width,
        rotation=rotation,
        softmax_scale=softmax_scale,
        k_scale=k_scale,
    )
    slash, more = weights.slash
    slash += more
    last = segment.end - 1
    return weights.vertical[:, : last + 1], slash[:, : last // rule.line_width + 1]
