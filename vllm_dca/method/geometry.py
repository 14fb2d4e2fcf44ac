"""Where tokens stand in their chunks, and which query position each region uses.

Pure functions over integers and numpy arrays. Symbols follow An et al. 2024,
"Training-Free Long-Context Scaling of Large Language Models": a key at absolute position j
carries the rotary position j mod s, and the query at absolute position i, in chunk n = i // s
at offset r = i mod s, is rotated for each region of keys anew:

    region   keys of chunk   query position    mask
    intra    n               r                 causal
    succ     n - 1           min(r + s, c)     none
    inter    0 .. n - 2      min(2s - 1, c)    none
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ChunkGeometry:
    """The two sizes that define DCA, in tokens.

    Attributes:
        chunk_size: c, the largest rotary position a query ever takes.
        local_size: w, the tokens around a chunk border that keep their exact distance.
    """

    chunk_size: int
    local_size: int

    def __post_init__(self) -> None:
        if not 0 < self.local_size < self.chunk_size:
            raise ValueError(
                f"DCA needs 0 < local_size < chunk_size, but local_size={self.local_size} and "
                f"chunk_size={self.chunk_size}. The authors use local_size = chunk_size / 6."
            )

    @property
    def chunk_len(self) -> int:
        """s = c - w, the period of the key positions."""
        return self.chunk_size - self.local_size

    @property
    def inter_position(self) -> int:
        """The one position that queries take towards all chunks before the previous one."""
        return min(2 * self.chunk_len - 1, self.chunk_size)

    def succ_turn(self, offset: IntArray) -> IntArray:
        """How many positions further than its own offset a query stands in succ, 1 .. c."""
        return np.minimum(offset + self.chunk_len, self.chunk_size) - offset

    def inter_turn(self, offset: IntArray) -> IntArray:
        """How many positions further than its own offset a query stands in inter, 1 .. c."""
        return self.inter_position - offset


class Segments(NamedTuple):
    """Runs of new tokens of one request inside one chunk, in batch order; int64 arrays."""

    request: IntArray  # index of the request in the batch
    token: IntArray  # index of the run's first token among the batch's tokens
    length: IntArray  # tokens in the run, at least 1
    chunk: IntArray  # chunk number n
    position: IntArray  # absolute position i of the run's first token
    offset: IntArray  # its offset r in its chunk

    def take(self, mask: npt.NDArray[np.bool_]) -> "Segments":
        """The segments that the mask selects, in order."""
        return Segments(*(column[mask] for column in self))

    def token_indices(self) -> IntArray:
        """Batch index of every token, segment after segment."""
        return np.repeat(self.token, self.length) + ranges(self.length)

    def token_positions(self) -> IntArray:
        """Absolute position i of every token, segment after segment."""
        return np.repeat(self.position, self.length) + ranges(self.length)

    def token_offsets(self) -> IntArray:
        """Offset r in its chunk of every token, segment after segment."""
        return np.repeat(self.offset, self.length) + ranges(self.length)


def ranges(lengths: IntArray) -> IntArray:
    """0 .. l - 1 for each l of lengths, one after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) - np.repeat(ends - lengths, lengths)


def split_at_chunk_borders(
    query_start_loc: npt.ArrayLike, seq_lens: npt.ArrayLike, chunk_len: int
) -> Segments:
    """Split every request's new tokens where a chunk ends.

    Args:
        query_start_loc: [num_requests + 1], first new token of each request in the batch.
        seq_lens: [num_requests], tokens of each request, cached and new.
        chunk_len: s, in tokens.

    Returns:
        The segments, ordered by request and position; a request without new tokens has none.

    Raises:
        AssertionError: a request is shorter than its new tokens.
    """
    starts = np.asarray(query_start_loc, dtype=np.int64)
    ends = np.asarray(seq_lens, dtype=np.int64)
    query_lens = np.diff(starts)
    cached = ends - query_lens
    assert (cached >= 0).all(), (
        f"A request has fewer tokens than are new: {cached.min()} cached."
    )
    first = cached // chunk_len
    last = (ends - 1) // chunk_len
    pieces = np.where(query_lens > 0, last - first + 1, 0)

    request = np.repeat(np.arange(len(ends)), pieces)
    chunk = first[request] + ranges(pieces)
    position = np.maximum(chunk * chunk_len, cached[request])
    end = np.minimum((chunk + 1) * chunk_len, ends[request])
    return Segments(
        request=request,
        token=starts[:-1][request] + position - cached[request],
        length=end - position,
        chunk=chunk,
        position=position,
        offset=position - chunk * chunk_len,
    )
