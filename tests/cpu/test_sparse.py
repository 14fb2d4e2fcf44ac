"""Sparse prefill on the CPU against its two specifications, each apart from the other."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.helpers import sparse as helper
from tests.helpers.cases import cases
from tests.helpers.paged import Batch, Shape
from tests.helpers.shapes import DTYPES
from tests.helpers.sparse_checks import (
    BY_BUDGETS,
    BY_COVERAGE,
    assert_attends,
    assert_weights,
    shapes,
)
from vllm_dca.cpu import compiled, compiled_sparse, sparse
from vllm_dca.method.sparse_operations import SparseOperations, SparsePlan
from vllm_dca.method.sparse_planning import Segment
from vllm_dca.method.sparse_recall import Attended
from vllm_dca.method.vertical_slash import Lines, Rule, select
from vllm_dca.reference import sparse as reference

OPERATIONS = {
    "torch": SparseOperations(sparse.weigh, select, sparse.attend),
    "compiled": SparseOperations(
        compiled_sparse.weigh, compiled_sparse.select, compiled_sparse.attend
    ),
}
PATHS = pytest.mark.parametrize("path", OPERATIONS)


def poisoned(batch: Batch, segment: Segment) -> torch.Tensor:
    """The cache without what the segment must not read: later tokens and other requests."""
    kept = torch.full_like(batch.kv_cache, torch.nan)
    size = batch.shape.block_size
    for page, block in enumerate(batch.block_table[segment.request].tolist()):
        tokens = min(size, segment.end - page * size)
        if tokens > 0:
            kept[block, :, :tokens] = batch.kv_cache[block, :, :tokens]
    return kept


def attend(
    batch: Batch, segment: Segment, plan: SparsePlan, lines: Lines, path: str
) -> torch.Tensor:
    query = batch.rotated_query()[segment.rows]
    output = torch.full_like(query, torch.nan)
    OPERATIONS[path].attend(
        query,
        poisoned(batch, segment),
        output,
        segment=segment,
        plan=plan,
        lines=lines,
        rotation=batch.rotation(),
        softmax_scale=batch.shape.scale,
    )
    return output


# Gemma's heads have 256 entries.
SHAPES = shapes(head_sizes=(8, 16, 40, 256))
# Of its two segments one begins with a tile of one row, and the other ends with such a tile.
ONE_ROW_TILES = Shape([(577, 63)], 320, 60, block_size=16, num_kv_heads=1, group=1)
# The compiled kernel joins six tiles to a run, which goes on in turns of some 2,048 keys here,
# and weighs a region in spans of as many. Of these segments one begins inside a tile and both
# have two runs; some of their regions have one turn and one span, some several.
LONG = Shape([(9000, 7900)], 2112, 60, block_size=16, num_kv_heads=1, group=2)


@settings(max_examples=cases(25), deadline=None)
@given(SHAPES, st.sampled_from([0, 70, 300]), st.sampled_from([0.0, 0.02, 0.5, 1.0]))
@example(ONE_ROW_TILES, 0, 0.02)
@example(LONG, 0, 0.02)
@example(dataclasses.replace(LONG, head_size=128, dtype=torch.bfloat16), 0, 0.5)
def test_attends_to_given_lines(shape: Shape, threshold: int, share: float) -> None:
    batch = Batch.random(shape)
    plan = helper.plan(batch, threshold)
    assume(plan.segments)
    for segment in plan.segments:
        lines = helper.random_lines(batch, segment, share, shape.seed)
        outputs = [attend(batch, segment, plan, lines, path) for path in OPERATIONS]
        assert_attends(batch, segment, lines, *outputs)


@PATHS
def test_all_lines_are_dense_attention(path: str) -> None:
    """A row's verticals twice over, as distances too."""
    batch = Batch.random(Shape([(600, 0)], 320, 64, block_size=16))
    plan, dense = helper.plan(batch), batch.exact
    for segment in plan.segments:
        every = helper.random_lines(batch, segment, 1.0)
        found = attend(batch, segment, plan, every, path).double()
        assert (found - dense[segment.rows]).abs().max() <= batch.tolerance


def weigh(batch: Batch, rule: Rule, path: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    plan = helper.plan(batch)
    return [
        OPERATIONS[path].weigh(
            batch.rotated_query()[segment.rows],
            poisoned(batch, segment),
            segment=segment,
            plan=plan,
            rule=rule,
            rotation=batch.rotation(),
            softmax_scale=batch.shape.scale,
        )
        for segment in plan.segments
    ]


def assert_weighed(batch: Batch, rule: Rule, *paths: str) -> None:
    weights = [weigh(batch, rule, path) for path in paths]
    assert_weights(batch, rule, helper.plan(batch).segments, *weights)


@settings(max_examples=cases(15), deadline=None)
@given(SHAPES, st.sampled_from([BY_BUDGETS, BY_COVERAGE]))
@example(LONG, BY_BUDGETS)
@example(LONG, BY_COVERAGE)
def test_weighs_lines(shape: Shape, rule: Rule) -> None:
    assert_weighed(Batch.random(shape), rule, *OPERATIONS)


@PATHS
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_weights_add_up_to_one(dtype: torch.dtype, path: str) -> None:
    """Also where scores rise slowly: what was summed before is scaled over and over."""
    length, rotated = 4000, 8
    lengths = [(length, length - 300)]
    batch = Batch.random(
        Shape(lengths, 4096, 60, block_size=16, rotary_dim=rotated, dtype=dtype)
    )
    slow = 4 * torch.arange(length)[:, None, None] / length + torch.rand(16 - rotated) / 8
    batch.keys[0][:] = torch.cat([torch.zeros(length, 1, rotated), slow], -1)
    batch.queries[0][:] = 1.0
    [(vertical, slash)] = weigh(
        Batch(batch.shape, batch.queries, batch.keys, batch.values, batch.inv_freq),
        BY_COVERAGE,
        path,
    )
    # A power of two is right to 8e-5, in a sum as in what is divided by it.
    for line in (vertical, slash):
        assert (line.sum(1) / 64 - 1).abs().max() <= 2 * 8e-5


@settings(max_examples=cases(60), deadline=None)
@given(st.integers(64, 500), helper.RULES, st.integers(0, 99))
def test_selects_as_specified(end: int, rule: Rule, seed: int) -> None:
    weights, right = helper.tied_weights(end, rule, seed)
    for path, operations in OPERATIONS.items():
        found = operations.select(*weights, rule)
        assert torch.equal(found.verticals, right.verticals), path
        assert torch.equal(found.distances, right.distances), path


@PATHS
def test_what_lines_keep_of_a_tile_between(path: str) -> None:
    """Of attention: the ratio of what is under the softmax, along the lines and in all."""
    batch = Batch.random(Shape([(700, 0)], 320, 64, block_size=16))
    plan, given = helper.plan(batch), helper.options(batch)
    for segment in plan.segments:
        lines = helper.random_lines(batch, segment, 0.1)
        attended = Attended(
            batch.rotated_query()[segment.rows],
            poisoned(batch, segment),
            segment,
            lines,
            OPERATIONS[path].weigh,
            OPERATIONS[path].select,
            {"plan": plan, "rotation": batch.rotation(), "softmax_scale": batch.shape.scale},
        )
        end = (segment.begin + segment.end) // 2 // 64 * 64
        rows = torch.arange(end - 64, end)
        query, key, _ = helper.unrotated(batch, segment)
        weights = reference.probe_weights(
            query[rows - segment.begin], key[:end], reference.Rule(), **given
        )
        seen = reference.seen_keys(rows, reference.Lines(*lines))[:, :, :end]
        recall, keys = attended.kept(lines)
        right = (weights * seen).sum(-1).mean(-1)
        torch.testing.assert_close(recall.double(), right, rtol=1e-5, atol=0)
        # Later rows' keys too.
        of_last = reference.seen_keys(rows[-1:], reference.Lines(*lines))[:, 0, :end]
        torch.testing.assert_close(keys, of_last.float().mean(-1))
        assert 0 < recall.min() < recall.max() < 1


@pytest.mark.parametrize("rule", [BY_BUDGETS, BY_COVERAGE])
@pytest.mark.parametrize("operations", OPERATIONS.values(), ids=OPERATIONS)
def test_batched_equals_single(rule: Rule, operations: SparseOperations) -> None:
    """Not a bit may differ: a segment's lines and answers are its request's own."""
    from vllm_dca.method.sparse_prefill import sparse_attention

    lengths = [(700, 0), (40, 0), (900, 300)]
    batch = Batch.random(Shape(lengths, 320, 64, block_size=16))

    def answers(batch: Batch, query: torch.Tensor, plan: SparsePlan) -> torch.Tensor:
        output = torch.full_like(query, torch.nan)
        given: dict[str, Any] = {"rotation": batch.rotation(), "rule": rule}
        sparse_attention(
            query,
            batch.kv_cache,
            output,
            plan=plan,
            softmax_scale=batch.shape.scale,
            operations=operations,
            **given,
        )
        return output

    query, plan = batch.rotated_query(), helper.plan(batch)
    together = answers(batch, query, plan)
    # The others' rows are left alone.
    assert together[helper.rest(batch, plan)].isnan().all()
    assert (
        not together[torch.cat([torch.arange(700)[s.rows] for s in plan.segments[:2]])]
        .isnan()
        .any()
    )
    assert {segment.request for segment in plan.segments} == {0, 2}
    start = 0
    for request, (total, cached) in enumerate(lengths):
        rows = slice(start, start + total - cached)
        alone = helper.plan(
            dataclasses.replace(
                batch, shape=dataclasses.replace(batch.shape, lengths=[(total, cached)])
            )
        )._replace(block_table=batch.block_table[request : request + 1])
        torch.testing.assert_close(
            answers(batch, query[rows], alone), together[rows], rtol=0, atol=0, equal_nan=True
        )
        start = rows.stop


@pytest.mark.parametrize("instructions", compiled.WITHOUT_BEYOND)
def test_for_each_instruction_set(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if instructions not in compiled.instruction_sets():
        pytest.skip(f"this processor has no {instructions}")
    library = compiled.library(instructions)
    monkeypatch.setattr(compiled_sparse, "library", lambda: library)
    for dtype in DTYPES:
        batch = Batch.random(Shape([(700, 0)], 320, 64, block_size=16, dtype=dtype))
        plan = helper.plan(batch)
        for segment in plan.segments:
            lines = helper.random_lines(batch, segment, 0.1)
            assert_attends(
                batch, segment, lines, attend(batch, segment, plan, lines, "compiled")
            )
        for rule in (BY_BUDGETS, BY_COVERAGE):
            assert_weighed(batch, rule, "compiled")
