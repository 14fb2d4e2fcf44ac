"""Sparse prefill on the CPU by torch: right, and no faster than dense.

Scores are computed with every key, and masked.
"""

import numpy as np
import torch

from vllm_dca.method.planning import turns_of
from vllm_dca.method.rotary import QueryRotation, turn_queries
from vllm_dca.method.sparse_config import TILE
from vllm_dca.method.sparse_operations import SparsePlan
from vllm_dca.method.sparse_planning import Segment
from vllm_dca.method.vertical_slash import PROBE, Lines, Rule


def weigh(
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
    """See `vllm_dca.method.sparse_operations.WeighLines`, for a cache that is not quantised."""
    assert k_scale is None
    end, width = segment.end, rule.line_width
    scores = _Scores(kv_cache, segment, plan, rotation, softmax_scale, rule.continuous)
    weights = scores.of(query[-PROBE:], end - PROBE, end).softmax(-1)
    i = torch.arange(end - PROBE, end)[:, None]
    line = (i // width - torch.arange(end) // width).clamp(min=0)
    slash = torch.zeros(len(weights), (end - 1) // width + 1)
    slash.index_add_(1, line.flatten(), weights.flatten(1))
    return weights.sum(1), slash


def attend(
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
    """See `vllm_dca.method.sparse_operations.AttendLines`; in fp32."""
    scores = _Scores(kv_cache, segment, plan, rotation, softmax_scale)
    begin = segment.begin
    for start in range(begin // TILE * TILE, segment.end, TILE):
        first, end = max(start, begin), min(start + TILE, segment.end)
        rows = slice(first - begin, end - begin)
        j = torch.arange(end)
        seen = lines.verticals[:, :end] | lines.distances[:, start + TILE - j]
        found = scores.of(query[rows], first, end)
        weights = found.masked_fill_(~seen[:, None], -torch.inf).softmax(-1)
        value = scores.value[:, :end]
        attended = weights.unflatten(0, (len(value), -1)) @ value[:, None]
        output[rows] = attended.flatten(0, 1).transpose(0, 1)


class _Scores:
    """Scaled scores with a segment's keys, gathered from their pages."""

    def __init__(
        self,
        kv_cache: torch.Tensor,
        segment: Segment,
        plan: SparsePlan,
        rotation: QueryRotation,
        softmax_scale: float,
        continuous: bool = False,
    ) -> None:
        pages = -(-segment.end // kv_cache.shape[2])
        table = plan.block_table[segment.request, :pages]
        gathered = kv_cache.index_select(0, table).transpose(0, 1).flatten(1, 2)
        # [num_kv_heads, end, head_size]
        self.key, self.value = gathered[:, : segment.end].float().chunk(2, dim=-1)
        self.plan, self.rotation, self.scale = plan, rotation, softmax_scale
        self.continuous = continuous
        chunk_len = plan.geometry.chunk_len
        own = segment.begin // chunk_len * chunk_len
        self.borders = max(own - chunk_len, 0), own

    def of(self, query: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """[num_heads, end - begin, end] fp32 for the rows there, -inf for later keys."""
        length = self.plan.original_max_position_embeddings
        turns = turns_of(np.arange(begin, end), self.plan.geometry, length, self.continuous)
        tokens = torch.arange(end - begin)
        grouped = (len(self.key), -1)
        inter_end, succ_end = self.borders
        parts = []
        for region, keys in enumerate(
            (slice(succ_end, end), slice(inter_end, succ_end), slice(0, inter_end))
        ):
            turned = turn_queries(
                query.float(), self.rotation, tokens, turns.turn[region], turns.temperature
            ).transpose(0, 1)
            scores = (turned * self.scale).unflatten(0, grouped) @ self.key[:, None, keys].mT
            parts.append(scores.flatten(0, 1))
        future = torch.arange(end) > torch.arange(begin, end)[:, None]
        return torch.cat(parts[::-1], dim=-1).masked_fill_(future, -torch.inf)
