"""Sparse prefill against its two specifications, whoever computes it."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from hypothesis import assume
from hypothesis import strategies as st

from tests.helpers import sparse as helper
from tests.helpers.paged import Batch, Shape
from tests.helpers.shapes import DTYPES
from vllm_dca.method.sparse_config import TILE
from vllm_dca.method.sparse_planning import Segment, sparse_segments
from vllm_dca.method.vertical_slash import Lines, Rule
from vllm_dca.reference import sparse as reference
from vllm_dca.reference.attention import dual_chunk_attention

BY_BUDGETS = Rule(torch.tensor([60] * 6), torch.tensor([200] * 6), 1.0, 0)
BY_COVERAGE = Rule(None, None, 0.6, 70)


@st.composite
def shapes(draw: st.DrawFn, head_sizes: Sequence[int] = (8, 16, 40)) -> Shape:
    """Segments of 256 rows and more, at least one, of few heads: chunks of 256 to 640."""
    block_size = draw(st.sampled_from([16, 48, 64, 80]))
    # Whole pages, and whole tiles: sparse prefill refuses others.
    whole = math.lcm(block_size, TILE)
    chunk_len = -(-draw(st.sampled_from([256, 320, 512])) // whole) * whole
    total = draw(st.integers(400, 1100))
    cached = max(0, total - draw(st.integers(400, 600)))
    assume(sparse_segments([0, total - cached], [total], chunk_len, 0))
    head_size = draw(st.sampled_from(head_sizes))
    return Shape(
        lengths=[
            (total, cached),
            # A neighbour without segments.
            *draw(st.sampled_from([[], [(70, 3)], [(300, 299)]])),
        ],
        chunk_len=chunk_len,
        local_size=draw(st.sampled_from([1, 60, 300])),
        block_size=block_size,
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        head_size=head_size,
        rotary_dim=draw(st.sampled_from([head_size, head_size // 2])),
        is_neox=draw(st.booleans()),
        original_max_position_embeddings=draw(st.sampled_from([None, 100])),
        dtype=draw(st.sampled_from(DTYPES)),
        mscale=draw(st.sampled_from([1.0, 1.2])),
        tokens_first=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


def weights_of(
    batch: Batch, segment: Segment, rule: Rule, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Along the lines, by the specification."""
    query, key, _ = helper.unrotated(batch, segment)
    weights = reference.probe_weights(
        query[-64:], key, helper.reference_rule(rule), dtype=dtype, **helper.options(batch)
    ).double()
    i = torch.arange(segment.end - 64, segment.end)[:, None]
    line = i // rule.line_width - torch.arange(segment.end) // rule.line_width
    slash = torch.zeros(len(weights), int(line.max()) + 1, dtype=torch.float64)
    slash.index_add_(1, line.clamp(min=0).flatten(), weights.flatten(1))
    return weights.sum(1), slash


def specified(
    batch: Batch, segment: Segment, lines: Lines, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    rows = torch.arange(segment.begin, segment.end)
    seen = reference.seen_keys(rows, reference.Lines(*lines))
    query, key, value = helper.unrotated(batch, segment)
    given = helper.options(batch)
    return dual_chunk_attention(query, key, value, seen=seen, dtype=dtype, **given).double()


def assert_attends(
    batch: Batch, segment: Segment, lines: Lines, *outputs: torch.Tensor
) -> None:
    """Each as far from fp64 as the specification is in the batch's dtype, see Batch.tolerance.

    Asked of a few batches, since the largest error hangs on the few rows of largest scores.
    """
    exact = specified(batch, segment, lines)
    ordinary = largest = 0.0
    for sample in range(4):
        seed = batch.shape.seed + 1000 * sample
        other = Batch.random(dataclasses.replace(batch.shape, seed=seed)) if sample else batch
        rounded = specified(other, segment, lines, batch.shape.dtype)
        right = specified(other, segment, lines) if sample else exact
        ordinary = max(ordinary, (rounded - right).abs().max().item())
        largest = max(largest, *(value.abs().max().item() for value in other.values))
    eps = torch.finfo(batch.shape.dtype).eps
    errors = [(output.double() - exact).abs().max().item() for output in outputs]
    allowed = 2 * ordinary + 2 * eps * largest
    assert all(error <= allowed for error in errors), errors  # of NaN `max` says nothing


def assert_weights(
    batch: Batch,
    rule: Rule,
    segments: list[Segment],
    *weights: list[tuple[torch.Tensor, ...]],
) -> None:
    """Each path's, of each segment, of which there is one."""
    assert segments
    for segment, *by_path in zip(segments, *weights, strict=True):
        exact = weights_of(batch, segment, rule, torch.float64)
        ordinary = weights_of(batch, segment, rule, batch.shape.dtype)
        for right, rounded, *found in zip(exact, ordinary, *by_path, strict=True):
            # A line's weight is a sum of 64 rows'.
            least = 64 * torch.finfo(torch.float32).eps
            allowed = 2 * (rounded - right).abs().max() + least * right.max()
            errors = [(fast.double() - right).abs().max().item() for fast in found]
            assert all(error <= allowed for error in errors), errors
