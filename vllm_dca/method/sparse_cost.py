"""What can be known of sparse prefill before it runs: bounds on its keys, and on its time."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_dca.method.sparse_config import TILE, SparseSettings
from vllm_dca.method.sparse_planning import sparse_segments
from vllm_dca.method.vertical_slash import FIRST_KEYS, NEAR_DIAGONALS, PROBE

# As measured on a CPU (docs/sparse.md), in shares of dense attention's time: attending takes
# so many times its share of the keys, selecting so many times the probe's share of the rows.
ATTENDING = 1.2
SELECTING = 1.3

Numbers = npt.NDArray[np.float64]


class Bounds(NamedTuple):
    """What one prompt keeps and takes: the mean of all heads, its dense rows included.

    Attributes:
        keys: the least and the largest share of the keys before a row.
        time: the least and the longest time of attention, as shares of dense attention's.
    """

    keys: tuple[float, float]
    time: tuple[float, float]


def bounds(settings: SparseSettings, length: int, step: int, chunk_len: int) -> Bounds:
    """The fewest and the most keys that the settings may keep, and the time of both.

    A head's verticals may be among the keys of its diagonals or not, and a tile has 64 keys of
    a diagonal, which it shares with the diagonals beside it. By coverage only the least number
    is known: the rest is the text's. What a step leaves of a chunk is dense if it is short.

    Args:
        settings: of sparse prefill.
        length: of the prompt, in tokens.
        step: tokens of each step that the prompt is cut into.
        chunk_len: s, in tokens.
    """
    tile_end = TILE * np.arange(1.0, -(-length // TILE) + 1)
    # In its own tile a row sees half on average.
    pairs = tile_end - TILE / 2
    rows = _rows_of_segments(settings.threshold, length, step, chunk_len)
    is_sparse = rows > 0
    sparse = float(pairs[is_sparse].sum() / pairs.sum())
    kept = [
        float((np.minimum(count[:, None], tile_end) - TILE / 2)[:, is_sparse].sum())
        / (len(count) * pairs.sum())
        for count in _counts(settings)
    ]
    least, most = (1 - sparse + share for share in kept)
    probes = PROBE / rows[is_sparse]
    selecting = SELECTING * float((pairs[is_sparse] * probes).sum() / pairs.sum())
    fastest, slowest = (1 - sparse + ATTENDING * share + selecting for share in kept)
    return Bounds((least, most), (fastest, slowest))


def _rows_of_segments(threshold: int, length: int, step: int, chunk_len: int) -> Numbers:
    """[num_tiles] rows of the sparse segment that a tile lies in; 0 where it is dense."""
    starts = np.arange(0, length, step)
    ends = np.minimum(starts + step, length)
    tile = np.arange(TILE // 2, TILE * -(-length // TILE), TILE)
    rows = np.zeros(len(tile))
    # As if each step were a request of its own.
    loc = np.append(0, (ends - starts).cumsum())
    for segment in sparse_segments(loc, ends, chunk_len, threshold):
        rows[(segment.begin <= tile) & (tile < segment.end)] = segment.end - segment.begin
    return rows


def _counts(settings: SparseSettings) -> tuple[Numbers, ...]:
    """[num_heads] keys of a head at least, and at most."""
    if settings.budgets is None:
        blocks = TILE * -(-settings.min_keys // TILE)
        return np.array([float(max(blocks, NEAR_DIAGONALS))]), np.array([np.inf])
    heads = [head for layer in settings.budgets for head in layer]
    verticals, slashes = np.maximum(
        np.array(heads, dtype=float), [FIRST_KEYS, NEAR_DIAGONALS]
    ).T
    # The nearest diagonals lie side by side in any case.
    apart = NEAR_DIAGONALS + TILE - 1 + TILE * (slashes - NEAR_DIAGONALS)
    return np.maximum(verticals, slashes + TILE - 1), verticals + apart
