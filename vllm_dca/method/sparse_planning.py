"""From a batch's lengths to its sparse segments, and to what is left dense."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_dca.method.geometry import ranges, split_at_chunk_borders
from vllm_dca.method.sparse_config import TILE
from vllm_dca.method.vertical_slash import PROBE

LEAST_ROWS = 256  # segments with fewer rows are dense
# A whole tile and a probe before it lie in a segment's first half, and its own probe after it.
assert 2 * (PROBE + TILE - 1) <= LEAST_ROWS


class Segment(NamedTuple):
    """New tokens of one request, inside one chunk and past the threshold.

    Attributes:
        first: index of the first one among the batch's tokens.
        begin: its absolute position.
        end: the position after the last one.
        request: whose it is, a row of the block table.
    """

    first: int
    begin: int
    end: int
    request: int

    @property
    def rows(self) -> slice:
        """Its tokens among the batch's."""
        return slice(self.first, self.first + self.end - self.begin)


class Dense(NamedTuple):
    """What is left, as a batch of its own: pieces of requests, each with all keys before it.

    Attributes:
        tokens: [num_tokens] int64, which of the batch's tokens these are.
        query_start_loc: [num_pieces + 1] int32, first of them in each piece.
        seq_lens: [num_pieces] int32, tokens of its request up to the piece's end.
        request: [num_pieces] int64, its row of the block table.
    """

    tokens: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    request: torch.Tensor


def sparse_segments(
    query_start_loc: npt.ArrayLike, seq_lens: npt.ArrayLike, chunk_len: int, threshold: int
) -> list[Segment]:
    """The sparse segments of a batch, in its order.

    Args:
        query_start_loc: [num_requests + 1], first new token of each request.
        seq_lens: [num_requests], tokens of each request, cached and new.
        chunk_len: s, in tokens.
        threshold: the first position that is sparse.
    """
    runs = split_at_chunk_borders(query_start_loc, seq_lens, chunk_len)
    before = np.clip(threshold - runs.position, 0, runs.length)
    kept = (runs.length - before >= LEAST_ROWS).nonzero()[0]
    columns = (
        (runs.token + before)[kept],
        (runs.position + before)[kept],
        (runs.position + runs.length)[kept],
        runs.request[kept],
    )
    return [Segment(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


def dense_rest(
    segments: list[Segment], query_start_loc: npt.ArrayLike, seq_lens: npt.ArrayLike
) -> Dense:
    """What `sparse_segments` leaves of a batch; a request without segments stays whole.

    Args:
        segments: the batch's.
        query_start_loc: as of `sparse_segments`.
        seq_lens: likewise.
    """
    starts, ends = (np.asarray(each, dtype=np.int64) for each in (query_start_loc, seq_lens))
    sparse = np.array([(each.first, each.rows.stop) for each in segments], dtype=np.int64)
    sparse = sparse.reshape(-1, 2)
    # Between two borders all tokens are of one request, and in one segment or in none.
    borders = np.unique(np.concatenate([starts, sparse.ravel()]))
    kept = ~np.isin(borders[:-1], sparse[:, 0])
    first, stop = borders[:-1][kept], borders[1:][kept]
    # Of requests that begin at the same token, the last one has any.
    request = np.searchsorted(starts, first, side="right") - 1
    length = stop - first
    return Dense(
        torch.from_numpy(np.repeat(first, length) + ranges(length)),
        torch.from_numpy(np.append(0, length.cumsum()).astype(np.int32)),
        torch.from_numpy((ends[request] - (starts[request + 1] - stop)).astype(np.int32)),
        torch.from_numpy(request),
    )
