"""Which of a step's tokens are sparse, and that nothing is lost or answered twice."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_dca.method.sparse_planning import dense_rest, sparse_segments
from vllm_dca.reference import sparse as reference


@given(
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 1500)), min_size=1, max_size=4),
    st.sampled_from([256, 320, 1024]),
    st.integers(0, 1500),
)
def test_a_batch_is_cut_as_specified(
    requests: list[tuple[int, int]], chunk_len: int, threshold: int
) -> None:
    """Requests of (cached, new) tokens: each row is in one segment, or in the rest."""
    starts = torch.tensor([0] + [new for _, new in requests]).cumsum(0)
    ends = [cached + new for cached, new in requests]
    segments = sparse_segments(starts.numpy(), ends, chunk_len, threshold)
    rest = dense_rest(segments, starts.numpy(), ends)
    for request, (cached, new) in enumerate(requests):
        expected = [
            (begin, end)
            for begin, end in reference.segments([cached, new], chunk_len, threshold)
            if begin >= cached and reference.is_sparse(begin, end, threshold)
        ]
        own = [segment for segment in segments if segment.request == request]
        assert [(segment.begin, segment.end) for segment in own] == expected
        for segment in own:
            assert segment.first - int(starts[request]) == segment.begin - cached
    answered = [torch.arange(s.rows.start, s.rows.stop) for s in segments]
    every = torch.cat([*answered, rest.tokens]).sort().values
    assert torch.equal(every, torch.arange(int(starts[-1])))
    # Its pieces' rows stand where they stood.
    positions = torch.cat([torch.arange(cached, cached + new) for cached, new in requests])[
        rest.tokens
    ]
    lengths = rest.query_start_loc.diff()
    found = [
        torch.arange(end - length, end)
        for end, length in zip(rest.seq_lens.tolist(), lengths.tolist(), strict=True)
    ]
    assert torch.equal(torch.cat([*found, torch.empty(0, dtype=torch.int64)]), positions)
    of_row = torch.repeat_interleave(torch.arange(len(requests)), starts.diff())[rest.tokens]
    assert torch.equal(rest.request.repeat_interleave(lengths), of_row)
    # One piece, where nothing is cut out.
    whole = {s.request for s in segments}
    for request, (_, new) in enumerate(requests):
        if request not in whole and new:
            assert (rest.request == request).sum() == 1
