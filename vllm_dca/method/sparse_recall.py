"""How much of its attention a segment keeps along the lines that were selected for it."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dca.method.sparse_config import TILE
from vllm_dca.method.sparse_operations import SelectLines, WeighLines
from vllm_dca.method.sparse_planning import Segment
from vllm_dca.method.vertical_slash import Lines, Rule


@dataclass(frozen=True)
class Attended:
    """A segment that was attended along lines, to ask how much of its attention that was.

    Attributes:
        query: [num_rows, num_heads, head_size], of the segment.
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
        segment: which.
        lines: those that it was attended along.
        weigh_lines: the device's.
        select: likewise.
        given: what the former wants to know beside it.
    """

    query: torch.Tensor
    kv_cache: torch.Tensor
    segment: Segment
    lines: Lines
    weigh_lines: WeighLines
    select: SelectLines
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
        # Not of TILE, which the weights add up to but for rounding: where all is seen it is 1.
        recall = (self.probed * seen).sum(1) / self.probed.sum(1)
        return recall, seen.mean(1, dtype=torch.float32)


Watch = Callable[[Attended], None]
