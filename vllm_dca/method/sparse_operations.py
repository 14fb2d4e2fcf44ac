"""What a device does of sparse prefill: it weighs, selects and attends along lines."""

from typing import NamedTuple, Protocol

import torch

from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.rotary import QueryRotation
from vllm_dca.method.sparse_planning import Segment
from vllm_dca.method.vertical_slash import Lines, Rule


class SparsePlan(NamedTuple):
    """A step's sparse segments, for all layers.

    Attributes:
        segments: at least one.
        block_table: [num_requests, max_blocks] int32.
        geometry: the chunk sizes.
        original_max_position_embeddings: switches the temperature on.
    """

    segments: list[Segment]
    block_table: torch.Tensor
    geometry: ChunkGeometry
    original_max_position_embeddings: int | None


class WeighLines(Protocol):
    """Says how much of a segment's attention each line has."""

    def __call__(
        self,
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
        """Attention from a segment's last rows, summed along the lines.

        Args:
            query: [num_rows, num_heads, head_size], the segment's, rotated to their offsets.
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
            segment: which.
            plan: of the step.
            rule: says what lines are, and with which positions scores are computed.
            rotation: how this layer turns queries.
            softmax_scale: factor on the dot products.
            k_scale: [1] fp32, what FP8 keys are multiplied by; None for a cache of the query's
                dtype.

        Returns:
            [num_heads, end] fp32 of each key, and [num_heads, num_lines] of each diagonal or
            block of them.
        """
        ...


class SelectLines(Protocol):
    """`vllm_dca.method.vertical_slash.select`, or a function like it."""

    def __call__(self, vertical: torch.Tensor, slash: torch.Tensor, rule: Rule) -> Lines:
        """The lines of the largest weight."""
        ...


class AttendLines(Protocol):
    """Attends along the lines that were selected, tile by tile."""

    def __call__(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        *,
        segment: Segment,
        plan: SparsePlan,
        lines: Lines,
        rotation: QueryRotation,
        softmax_scale: float,
    ) -> None:
        """Attend.

        Args:
            query, kv_cache, segment, plan, rotation, softmax_scale: as `WeighLines` has them.
            output: [num_rows, num_heads, head_size], written.
            lines: of each head; the nearest 64 distances are among them.
        """


class SparseOperations(NamedTuple):
    """What a device does to a single segment.

    Attributes:
        weigh: the lines.
        select: the heaviest.
        attend: along these.
    """

    weigh: WeighLines
    select: SelectLines
    attend: AttendLines
