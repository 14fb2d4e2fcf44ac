"""Sparse prefill of a step: each segment's lines are weighed and selected, then attended.

A device does it segment by segment, as `sparse_attention` here, or all at once.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.lines import Lines, Rule
from vllm_dca.method.rotary import QueryRotation
from vllm_dca.method.sparse_config import TILE
from vllm_dca.method.sparse_planning import Segment


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


class SparsePrefill(NamedTuple):
    """How a device does it.

    Attributes:
        plan: what `attend` wants to know of a step, made once for all layers.
        attend: `sparse_attention` without its operations, or a function like it.
        room: as `vllm_dca.method.device.Prefill` has it, with a step's dense rest.
    """

    plan: Callable[[SparsePlan], Any]
    attend: Callable[..., None]
    room: int = 0


@dataclass(frozen=True)
class Attended:
    """A segment that was attended along lines, to ask how much of its attention that was.

    Attributes:
        query: [num_rows, num_heads, head_size], of the segment.
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
        segment: which.
        lines: those that it was attended along.
        weigh_lines: the device's, as `SparseOperations.weigh`.
        select: likewise.
        given: what the former wants to know beside it.
    """

    query: torch.Tensor
    kv_cache: torch.Tensor
    segment: Segment
    lines: Lines
    weigh_lines: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    select: Callable[[torch.Tensor, torch.Tensor, Rule], Lines]
    given: Mapping[str, Any]

    def weigh(self, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of lines, from the segment's last rows, in the form that a rule wants."""
        return self.weigh_lines(
            self.query, self.kv_cache, segment=self.segment, rule=rule, **self.given
        )

    @functools.cached_property
    def probed(self) -> torch.Tensor:
        """[num_heads, end] attention to each key, summed over the tile in the segment's middle.

        Its lines were selected from other rows.
        """
        begin, end = self.segment.begin, self.segment.end
        tile_end = (begin + end) // 2 // TILE * TILE
        vertical, _ = self.weigh_lines(
            self.query[: tile_end - begin],
            self.kv_cache,
            segment=self.segment._replace(end=tile_end),
            rule=Rule(None, None, 1.0, 0),  # with the positions that attention has
            **self.given,
        )
        return vertical

    def kept(self, lines: Lines) -> tuple[torch.Tensor, torch.Tensor]:
        """What lines keep of that tile's attention, and of its keys: [num_heads] each."""
        end = self.probed.shape[1]
        seen = lines.verticals[:, :end] | lines.distances[:, 1 : end + 1].flip(1)
        return (self.probed * seen).sum(1) / TILE, seen.mean(1, dtype=torch.float32)


Watch = Callable[[Attended], None]


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
        watch: is shown each segment.
    """
    given = {"plan": plan, "rotation": rotation, "softmax_scale": softmax_scale}
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
