"""Sparse prefill's Triton kernels, in the interpreter, against its two specifications."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.helpers import interpreter
from tests.helpers import sparse as helper
from tests.helpers.caches import fp8_dtypes
from tests.helpers.cases import cases
from tests.helpers.kernels import NeverWaits
from tests.helpers.paged import DEVICE, Batch, Shape
from tests.helpers.sparse_checks import (
    BY_BUDGETS,
    BY_COVERAGE,
    assert_attends,
    assert_weights,
    shapes,
    weights_of,
)
from vllm_dca.cpu import sparse as cpu_sparse
from vllm_dca.cuda import sparse_attend, sparse_lists, sparse_plan, sparse_probe, sparse_select
from vllm_dca.cuda.sparse_prefill import Buffers, Sparse
from vllm_dca.cuda.sparse_probe import Weights
from vllm_dca.cuda.tuning import Tuning
from vllm_dca.method.planning import QueryTurns
from vllm_dca.method.rotary import turn_queries
from vllm_dca.method.sparse_operations import SparsePlan
from vllm_dca.method.sparse_prefill import SparseSizes
from vllm_dca.method.sparse_recall import Attended
from vllm_dca.method.vertical_slash import Lines, Rule

interpreter.repair()


@pytest.fixture(
    autouse=True,
    scope="module",
    params=["small blocks"] if DEVICE.type == "cpu" else ["small blocks", "as served"],
)
def _blocks(request: pytest.FixtureRequest) -> Iterator[None]:
    """A few hundred keys shall be several blocks and spans; a GPU also runs its own sizes.

    The interpreter takes its time by the program, and the kernel that turns queries has tests
    of its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "small blocks":
            patch.setattr(sparse_select, "BLOCK", 256)
            patch.setattr(sparse_lists, "BLOCK", 256)
            patch.setattr(sparse_probe, "SPAN", 256)
            patch.setattr(sparse_probe, "LEAST_SPAN", 320)
        if DEVICE.type == "cpu":
            patch.setattr(sparse_attend, "prefill_tuning", lambda *_: Tuning(32, 64, 4, 3, 255))
            for module in (sparse_attend, sparse_probe):
                patch.setattr(module, "turn_queries", turn_queries)
        yield


def sizes_of(batch: Batch, continuous: bool = False) -> SparseSizes:
    shape = batch.shape
    tokens = sum(total - cached for total, cached in shape.lengths)
    longest = max(total for total, _ in shape.lengths)
    heads = shape.num_kv_heads * shape.group
    return SparseSizes(heads, tokens, longest, shape.chunk_len, continuous)


def on_device(plan: SparsePlan) -> SparsePlan:
    return plan._replace(block_table=plan.block_table.to(DEVICE))


def cache_of(batch: Batch, plan: SparsePlan) -> torch.Tensor:
    """Without what no segment may read: later tokens, and requests without segments."""
    kept, size = torch.full_like(batch.kv_cache, torch.nan), batch.shape.block_size
    for segment in plan.segments:
        for page, block in enumerate(batch.block_table[segment.request].tolist()):
            tokens = max(min(size, segment.end - page * size), 0)
            kept[block, :, :tokens] = batch.kv_cache[block, :, :tokens]
    return kept.to(DEVICE)


def place(buffers: Buffers, round_: sparse_plan.Round, taken: list[Lines]) -> None:
    for index, lines in enumerate(taken):
        for there, here in zip(buffers.lines_of(round_, index), lines, strict=True):
            there.copy_(here)


def attend(batch: Batch, plan: SparsePlan, taken: list[Lines]) -> torch.Tensor:
    """All segments at once, along given lines."""
    sparse = Sparse(sizes_of(batch), DEVICE)
    [round_] = sparse.plan(on_device(plan)).rounds
    buffers = sparse.buffers
    for weights in buffers.weights:
        weights.fill_(torch.nan)
    place(buffers, round_, taken)
    sparse_lists.list_lines(buffers.marks, buffers.lists, round_.probe)
    query = batch.rotated_query().to(DEVICE)
    output = torch.full_like(query, torch.nan)
    sparse_attend.attend(
        query,
        cache_of(batch, plan),
        output,
        buffers.marks,
        buffers.lists,
        plan=round_,
        block_table=plan.block_table.to(DEVICE),
        chunk_len=batch.shape.chunk_len,
        rotation=batch.rotation(DEVICE),
        softmax_scale=batch.shape.scale,
        **batch.scales(DEVICE),
    )
    return output.cpu()


# Of its two segments one begins with a tile of one row, and the other ends with such a tile.
ONE_ROW_TILES = Shape([(577, 63)], 320, 60, block_size=16, num_kv_heads=1, group=1)


@settings(max_examples=cases(4), deadline=None)
@given(
    shapes(),
    st.sampled_from([0, 70, 300]),
    st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
@example(ONE_ROW_TILES, 0, 0.02)
def test_attends_to_given_lines(shape: Shape, threshold: int, share: float) -> None:
    batch = Batch.random(shape)
    plan = helper.plan(batch, threshold)
    assume(plan.segments)
    taken = [helper.random_lines(batch, each, share, shape.seed) for each in plan.segments]
    output = attend(batch, plan, taken)
    assert output[helper.rest(batch, plan)].isnan().all()
    for segment, lines in zip(plan.segments, taken, strict=True):
        assert_attends(batch, segment, lines, output[segment.rows])


def test_all_lines_are_dense_attention() -> None:
    """A row's verticals twice over, as distances too."""
    batch = Batch.random(Shape([(600, 0)], 320, 64, block_size=16))
    plan, dense = helper.plan(batch), batch.exact
    output = attend(
        batch, plan, [helper.random_lines(batch, each, 1.0) for each in plan.segments]
    )
    for segment in plan.segments:
        error = output[segment.rows].double() - dense[segment.rows]
        assert error.abs().max() <= batch.tolerance


@pytest.mark.parametrize("cache_dtype", fp8_dtypes())
def test_reads_fp8_caches(cache_dtype: torch.dtype) -> None:
    shape = Shape([(600, 300)], 320, 64, block_size=16, group=1, dtype=torch.bfloat16)
    batch = Batch.random(dataclasses.replace(shape, cache_dtype=cache_dtype))
    plan = helper.plan(batch)
    [segment] = plan.segments
    lines = helper.random_lines(batch, segment, 0.1)
    output = attend(batch, plan, [lines])
    assert_attends(batch, segment, lines, output[segment.rows])
    rule = Rule(None, None, 0.6, 70)
    assert_weights(batch, rule, [segment], weigh(batch, rule))


def weigh(batch: Batch, rule: Rule) -> list[tuple[torch.Tensor, ...]]:
    """All segments at once."""
    plan = helper.plan(batch)
    sparse = Sparse(sizes_of(batch, rule.continuous), DEVICE)
    planned = sparse.plan(on_device(plan))
    [round_] = planned.rounds
    weights = sparse.buffers.weights_of(round_.probe)
    for each in sparse.buffers.weights:
        each.fill_(torch.nan)
    sparse_probe.weigh(
        batch.rotated_query().to(DEVICE),
        cache_of(batch, plan),
        weights,
        probe=round_.probe,
        block_table=planned.block_table,
        chunk_len=batch.shape.chunk_len,
        line_width=rule.line_width,
        rotation=batch.rotation(DEVICE),
        softmax_scale=batch.shape.scale,
        k_scale=batch.scales(DEVICE).get("k_scale"),
    )
    found: list[tuple[torch.Tensor, ...]] = []
    first = 0
    for segment in plan.segments:
        lines = (segment.end - 1) // rule.line_width + 1
        found.append(
            (
                weights.vertical[:, first : first + segment.end].cpu(),
                weights.slash.sum(0)[:, first : first + lines].cpu(),
            )
        )
        first += sparse_plan.places_of(segment.end)
    return found


@settings(max_examples=cases(4), deadline=None)
@given(shapes(), st.sampled_from([BY_BUDGETS, BY_COVERAGE]))
def test_weighs_lines(shape: Shape, rule: Rule) -> None:
    batch = Batch.random(shape)
    segments = helper.plan(batch).segments
    assume(segments)
    assert_weights(batch, rule, segments, weigh(batch, rule))


@pytest.mark.parametrize("rule", [BY_BUDGETS, BY_COVERAGE], ids=["budgets", "coverage"])
def test_weighs_lines_of_heads_in_two_parts(rule: Rule) -> None:
    batch = Batch.random(Shape([(600, 300)], 320, 64, block_size=16, head_size=264))
    assert_weights(batch, rule, helper.plan(batch).segments, weigh(batch, rule))


def choose(weights: list[tuple[torch.Tensor, torch.Tensor]], rule: Rule) -> list[Lines]:
    """Of segments of these weights, each diagonal's cut in two somewhere."""
    heads = len(weights[0][0])
    ends = [vertical.shape[1] for vertical, _ in weights]
    buffers = Buffers(SparseSizes(heads, 1024, sum(ends) + 2048, 1024, False), DEVICE)
    table = torch.zeros(len(ends), sparse_plan.COLUMNS, dtype=torch.int32)
    first = 0
    for index, (vertical, slash) in enumerate(weights):
        table[index, 0], table[index, 2] = ends[index], first
        buffers.weights.vertical[:, first : first + ends[index]] = vertical
        part = (slash * 2**20 / 3).floor() * 2**-20
        lines = slice(first, first + slash.shape[1])
        buffers.weights.slash[0][:, lines] = part
        buffers.weights.slash[1][:, lines] = slash - part
        first += sparse_plan.places_of(ends[index])
    nothing = torch.empty(0)
    probe = sparse_plan.Probe(QueryTurns(nothing, nothing), table.to(DEVICE), ends)
    for marks in buffers.marks:
        marks.fill_(True)
    sparse_select.choose(Weights(*buffers.weights), buffers.marks, probe, rule.to(DEVICE))
    round_ = sparse_plan.Round(probe, probe.queries, 0, nothing)
    return [
        Lines(*(each.cpu() for each in buffers.lines_of(round_, index)))
        for index in range(len(ends))
    ]


@settings(max_examples=cases(12), deadline=None)
@given(st.lists(st.integers(64, 500), min_size=1, max_size=2), helper.RULES, st.integers(0, 99))
def test_selects_as_specified(ends: list[int], rule: Rule, seed: int) -> None:
    weights, right = zip(*(helper.tied_weights(end, rule, seed) for end in ends), strict=True)
    for found, expected in zip(choose([*weights], rule), right, strict=True):
        assert torch.equal(found.verticals, expected.verticals)
        assert torch.equal(found.distances, expected.distances)


SEVERAL = Shape(
    [(512, 0), (20, 0), (768, 512)], 256, 64, block_size=16, num_kv_heads=1, group=2
)


def attended(
    batch: Batch, rule: Rule, capacity: int | None = None, watch: Any = None
) -> tuple[torch.Tensor, SparsePlan]:
    """A step as a layer runs it; nothing may wait for the device."""
    plan = helper.plan(batch)
    sparse = Sparse(sizes_of(batch, rule.continuous), DEVICE)
    if capacity is not None:
        sparse.buffers.capacity = capacity
    planned, query = sparse.plan(on_device(plan)), batch.rotated_query().to(DEVICE)
    output = torch.full_like(query, torch.nan)
    given: dict[str, Any] = {"rotation": batch.rotation(DEVICE), "rule": rule.to(DEVICE)}
    with NeverWaits():
        sparse.attend(
            query,
            batch.kv_cache.to(DEVICE),
            output,
            plan=planned,
            softmax_scale=batch.shape.scale,
            watch=watch,
            **given,
        )
    return output.cpu(), plan


def test_together_is_as_alone() -> None:
    """Not a bit may differ, in one round or in several; launches are as many for any batch."""
    assert BY_BUDGETS.verticals is not None
    assert BY_BUDGETS.slashes is not None
    rule = BY_BUDGETS._replace(
        verticals=BY_BUDGETS.verticals[:2], slashes=BY_BUDGETS.slashes[:2]
    )
    batch = Batch.random(SEVERAL)
    with interpreter.launches() as of_all:
        together, plan = attended(batch, rule)
    assert [segment.request for segment in plan.segments] == [0, 0, 2]
    assert together[helper.rest(batch, plan)].isnan().all()
    for segment in plan.segments:
        assert together[segment.rows].isfinite().all()
    with interpreter.launches() as of_rounds:
        apart, _ = attended(batch, rule, capacity=1)
    assert torch.equal(together.nan_to_num(), apart.nan_to_num())
    # What the compiler would specialise kernels for is the same, and so is how many there are.
    assert of_all
    assert set(of_all) == set(of_rounds)
    assert 3 * of_all.total() == of_rounds.total()


@pytest.mark.parametrize("by_budgets", [False, True])
def test_a_watch_is_told_what_the_last_segment_kept(by_budgets: bool) -> None:
    """Of a tile's rows in the segment's middle, by the specification's weights."""
    rule = BY_COVERAGE
    if by_budgets:  # hardly more than what is kept in any case
        rule = Rule(torch.tensor([31, 40]), torch.tensor([101, 110]), 1.0, 0)
    batch, shown = Batch.random(SEVERAL), []

    def watch(seen: Attended) -> None:
        figures = seen.kept(seen.lines)
        shown.append((seen.segment, Lines(*(each.clone() for each in seen.lines)), figures))

    _, plan = attended(batch, rule, watch=watch)
    [(segment, lines, (recall, keys))] = shown
    assert segment == plan.segments[-1]
    end = (segment.begin + segment.end) // 2 // 64 * 64
    there = lines.verticals[:, :end] | lines.distances[:, 1 : end + 1].flip(1)
    there = there.cpu()
    right, rounded = (
        (weights_of(batch, segment._replace(end=end), BY_COVERAGE, dtype)[0] * there)
        .sum(1)
        .double()
        / 64
        for dtype in (torch.float64, batch.shape.dtype)
    )
    allowed = 2 * (rounded - right).abs().max() + 64 * torch.finfo(torch.float32).eps
    assert (recall.cpu().double() - right).abs().max() <= allowed
    assert torch.allclose(keys.cpu().double(), there.double().mean(1), atol=1e-6)
    assert right.min() > 0
    assert right.max() < 1


def test_a_grid_selects_by_the_last_rows_whatever_is_weighed_between() -> None:
    """The tile in the segment's middle is weighed in the same memory; the CPU has its own."""
    from vllm_dca.engine.calibrate import Grid

    batch = Batch.random(Shape([(512, 256)], 256, 64, block_size=16, num_kv_heads=1, group=2))
    grid, right = Grid(512), Grid(512)
    # Hardly more than what is kept in any case: all keys of a grid's would be.
    grid.pairs = right.pairs = [(31, 101), (60, 105), (90, 101)]
    own = {"plan": helper.plan(batch), "rotation": batch.rotation()}

    def watch(seen: Attended) -> None:
        grid(seen)
        there = {"query": seen.query.cpu(), "kv_cache": batch.kv_cache}
        given = {"weigh_lines": cpu_sparse.weigh, "given": {**seen.given, **own}}
        right(dataclasses.replace(seen, **there, **given))

    attended(batch, BY_COVERAGE, watch=watch)
    for (recall, keys), (expected, share) in zip(grid.totals, right.totals, strict=True):
        assert torch.equal(keys.cpu(), share)
        assert share.max() < 1
        assert (recall.cpu() - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps
