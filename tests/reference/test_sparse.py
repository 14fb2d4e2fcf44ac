"""The specification of sparse prefill, against its definition written out key by key."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dca.reference.attention import dual_chunk_attention, query_positions
from vllm_dca.reference.sparse import (
    FIRST_KEYS,
    NEAR_DIAGONALS,
    Lines,
    Rule,
    is_sparse,
    probe_weights,
    seen_keys,
    segments,
    select,
    sparse_attention,
)

SIZES: dict[str, Any] = {
    "chunk_size": 320,
    "local_size": 64,
    "inv_freq": 100.0 ** -(torch.arange(0, 16, 2).double() / 16),
    "scale": 0.3,
}
LENGTH = 900
# Products of other shapes add up in another order.
ATOL = 1e-13


@pytest.fixture(scope="module")
def sequence() -> list[torch.Tensor]:
    """Query, key and value: four heads, two of keys."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(LENGTH, heads, 16, dtype=torch.float64, generator=generator)
        for heads in (4, 2, 2)
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 9))
def test_a_row_sees_verticals_and_what_is_at_a_distance_from_its_tile_s_end(
    end: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lines = Lines(
        torch.rand(2, end, generator=generator) < 0.1,
        torch.rand(2, end + 65, generator=generator) < 0.1,
    )
    rows = torch.arange(end // 2, end)
    seen = seen_keys(rows, lines)
    for head in range(2):
        for row, i in enumerate(rows.tolist()):
            tile_end = 64 * (i // 64 + 1)
            expected = {
                j
                for j in range(i + 1)
                if lines.verticals[head, j] or lines.distances[head, tile_end - j]
            }
            assert set(seen[head, row].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("d", [0, 1, 63, 64, 100, 200])
def test_slash_selects_the_whole_diagonal_of_a_tile(d: int) -> None:
    end = 320
    weights = torch.zeros(1, 64, end, dtype=torch.float64)
    rows = torch.arange(end - 64, end)
    weights[0, torch.arange(64), rows - d] = 1
    lines = select(weights, rows, Rule(verticals=[0], slashes=[NEAR_DIAGONALS + 1]))
    tile = set((rows - d).tolist())  # the last rows are a whole tile
    seen = seen_keys(rows, lines)[0]
    for row, i in enumerate(rows.tolist()):
        own = {j for j in tile if j <= i}
        assert own <= set(seen[row].nonzero().flatten().tolist())
        assert i - d in own


def by_hand(weights: torch.Tensor, rows: torch.Tensor, rule: Rule) -> tuple[set, set]:
    """Verticals and distances of one head, line by line."""
    end = weights.shape[-1]
    tile = 1 if rule.verticals is not None else 64
    vertical = {j: math.fsum(weights[:, j].tolist()) for j in range(end)}
    slash: dict[int, list[float]] = {}
    for row, i in enumerate(rows.tolist()):
        for j in range(i + 1):
            slash.setdefault(i // tile - j // tile, []).append(weights[row, j].item())
    of_line = {line: math.fsum(parts) for line, parts in slash.items()}
    sinks = set(range(min(FIRST_KEYS, end)))
    # A block holds a diagonal below 100 if its nearest one is.
    near = {m for m in of_line if tile * m - (tile - 1) < NEAR_DIAGONALS}

    def largest(weight: dict[int, float], always: set[int], count: int | None) -> set[int]:
        rest = sorted(weight.keys() - always, key=lambda line: (-weight[line], line))
        order = [*sorted(always), *rest]
        if count is not None:
            return always | set(order[:count])
        count = -(-rule.min_keys // (tile if weight is of_line else 1))
        needed = rule.coverage * math.fsum(weight.values())
        while count < len(order) and math.fsum(weight[x] for x in order[:count]) < needed:
            count += 1
        return always | set(order[:count])

    verticals = largest(vertical, sinks, rule.verticals and rule.verticals[0])
    lines = largest(of_line, near, rule.slashes and rule.slashes[0])
    distances = {tile * m + 1 + step for m in lines for step in range(64)}
    return verticals, distances


@settings(max_examples=40, deadline=None)
@given(
    st.integers(64, 400),
    st.one_of(
        st.builds(
            lambda v, s: Rule(verticals=[v], slashes=[s]),
            st.integers(1, 450),
            st.integers(1, 450),
        ),
        st.builds(
            lambda share, least: Rule(coverage=share, min_keys=least),
            st.floats(0.1, 0.99),
            st.sampled_from([0, 100, 200]),
        ),
    ),
    st.integers(0, 99),
)
def test_the_heaviest_lines_are_selected(end: int, rule: Rule, seed: int) -> None:
    """Whole numbers of 2^-20 add up exactly; few different ones, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(end - 64, end)
    steps = torch.randint(0, 1 << (1 + seed % 12), (64, end), generator=generator)
    weights = (steps.double() * 2.0**-20).masked_fill(torch.arange(end) > rows[:, None], 0.0)
    lines = select(weights[None], rows, rule)
    verticals, distances = by_hand(weights, rows, rule)
    assert set(lines.verticals[0].nonzero().flatten().tolist()) == verticals
    assert set(lines.distances[0].nonzero().flatten().tolist()) == distances


def test_every_line_is_dense_attention(sequence: list[torch.Tensor]) -> None:
    dense = dual_chunk_attention(*sequence, **SIZES)
    for rule in (
        Rule(verticals=[1] * 4, slashes=[LENGTH] * 4),
        Rule(verticals=[LENGTH] * 4, slashes=[1] * 4),
        Rule(min_keys=LENGTH),
    ):
        every = sparse_attention(*sequence, steps=[LENGTH], threshold=0, rule=rule, **SIZES)
        torch.testing.assert_close(every, dense, rtol=0, atol=ATOL)


def test_dense_below_the_threshold_and_in_short_segments(sequence: list[torch.Tensor]) -> None:
    """Chunks of 256, threshold 300: rows 300 to 511 are too few, 512 to 767 are enough."""
    rule = Rule(verticals=[40] * 4, slashes=[110] * 4)
    dense = dual_chunk_attention(*sequence, **SIZES)
    found = sparse_attention(*sequence, steps=[LENGTH], threshold=300, rule=rule, **SIZES)
    same = ((found - dense).abs() <= ATOL).flatten(1).all(1)
    assert same[:512].all()
    # Those near a tile's start may see all that there is, but most do not.
    assert not same[512:768].any()
    assert same[768:].all()


def test_where_a_sequence_is_cut() -> None:
    assert segments([100, 500, 300], 256, 400) == [
        *((0, 100), (100, 256), (256, 400), (400, 512), (512, 600), (600, 768), (768, 900))
    ]
    assert segments([256], 256, 256) == [(0, 256)]
    assert is_sparse(512, 768, 512)
    assert not is_sparse(512, 767, 512)
    assert not is_sparse(511, 768, 512)


def test_a_segment_s_lines_follow_from_what_is_up_to_its_end(
    sequence: list[torch.Tensor],
) -> None:
    """Later tokens change nothing before them."""
    rule = Rule(coverage=0.5)
    options = {**SIZES, "threshold": 256, "rule": rule}
    whole = sparse_attention(*sequence, steps=[768, LENGTH - 768], **options)
    head = sparse_attention(*(t[:768] for t in sequence), steps=[768], **options)
    torch.testing.assert_close(whole[:768], head, rtol=0, atol=ATOL)


@pytest.mark.parametrize("continuous", [False, True])
def test_weights_are_a_softmax_over_all_regions(
    sequence: list[torch.Tensor], continuous: bool
) -> None:
    query, key, value = sequence
    rule = Rule(continuous=continuous)
    weights = probe_weights(query[-64:], key, rule, **SIZES)
    attended = torch.stack([weights[head] @ value[:, head // 2] for head in range(4)], 1)
    dense = dual_chunk_attention(query[-64:], key, value, **SIZES)
    # Own positions are those of attention, continuous ones are not.
    assert torch.allclose(attended, dense, rtol=0, atol=ATOL) == (not continuous)


def test_continuous_positions_are_not_clamped() -> None:
    i, j = torch.tensor(767), torch.tensor([600, 300, 100])
    assert query_positions(i, j, 320, 64).tolist() == [255, 320, 320]
    assert query_positions(i, j, 320, 64, continuous=True).tolist() == [255, 511, 575]
