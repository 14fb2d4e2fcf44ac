"""Positions and segments against the table, written out one token at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_dca.method.geometry import ChunkGeometry, split_at_chunk_borders
from vllm_dca.reference.attention import key_positions, query_positions

sizes = st.tuples(st.integers(1, 40), st.integers(1, 60))


@given(sizes, st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=5))
def test_segments_cover_the_new_tokens_in_order(
    size: tuple[int, int], requests: list[tuple[int, int]]
) -> None:
    chunk_len = size[0]
    new, cached = (np.array([r[k] for r in requests], dtype=np.int64) for k in (0, 1))
    starts = np.append(0, new.cumsum())
    segments = split_at_chunk_borders(starts, new + cached, chunk_len)
    expected = [
        (row, position // chunk_len, position % chunk_len)
        for row, (fresh, old) in enumerate(requests)
        for position in range(old, old + fresh)
    ]
    tokens = [
        (int(row), int(chunk), int(offset) + k)
        for row, length, chunk, offset in zip(
            segments.request, segments.length, segments.chunk, segments.offset, strict=True
        )
        for k in range(length)
    ]
    assert tokens == expected
    assert segments.token_indices().tolist() == list(range(len(expected)))
    # As few as the chunks demand: no two segments of a request lie in one chunk.
    pairs = list(zip(segments.request.tolist(), segments.chunk.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)


def test_a_request_shorter_than_its_new_tokens_is_noticed() -> None:
    """Its first chunk would be number -1, and its queries would be turned as if by others."""
    with pytest.raises(AssertionError, match="fewer tokens than are new: -2 cached"):
        split_at_chunk_borders([0, 5, 9], [5, 2], 16)


@given(sizes)
def test_turns_lead_to_the_positions_of_the_table(size: tuple[int, int]) -> None:
    chunk_len, local_size = size
    geometry = ChunkGeometry(chunk_len + local_size, local_size)
    offset = np.arange(chunk_len)
    i = torch.arange(2 * chunk_len, 3 * chunk_len)
    for back, turn in ((1, geometry.succ_turn(offset)), (2, geometry.inter_turn(offset))):
        expected = query_positions(i, i - back * chunk_len, geometry.chunk_size, local_size)
        assert (offset + turn).tolist() == expected.tolist()
        assert turn.min() >= 1
        assert turn.max() <= geometry.chunk_size


def test_the_paper_s_example() -> None:
    """An et al. 2024, section 3: chunk length 6, pretraining length 10, local window 4.

    With the clamp at c = 10 where the paper's text has c - 1 = 9.
    """
    i, j = torch.arange(12)[:, None], torch.arange(12)
    assert key_positions(j, 10, 4).tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    positions = query_positions(i, j, 10, 4)
    assert positions[5, :6].tolist() == [5] * 6
    assert positions[6, :7].tolist() == [6] * 6 + [0]
    assert positions[11, :12].tolist() == [10] * 6 + [5] * 6
    # Neighbours keep their distance across the border, as far as local_size reaches.
    distance = positions - key_positions(j, 10, 4)
    assert all(distance[6 + r, 6 + r - d] == d for r in range(5) for d in range(5))


@pytest.mark.parametrize(("chunk_size", "local_size"), [(10, 10), (10, 11), (10, 0), (0, -1)])
def test_impossible_sizes_are_refused(chunk_size: int, local_size: int) -> None:
    with pytest.raises(ValueError, match="local_size"):
        ChunkGeometry(chunk_size, local_size)
