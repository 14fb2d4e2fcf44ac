"""The relative positions that DCA gives a sequence, as a matrix and as a picture of it."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.reference.attention import key_positions, query_positions

CHUNKS = 4
# Rows and columns of the picture's matrix, at most.
SIDE = 1024


def relative_positions(
    geometry: ChunkGeometry, length: int, side: int = SIDE
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Query position minus key position, as the reference has them, at evenly spaced tokens.

    Args:
        geometry: the chunk sizes.
        length: tokens of the sequence.
        side: how many tokens are taken, at most.

    Returns:
        The absolute positions that were taken, [n] with n = min(length, side), and the matrix,
        [n, n], queries in rows, keys in columns, NaN for keys after their query.
    """
    taken = torch.linspace(0, length - 1, min(length, side), dtype=torch.float64).long()
    sizes = geometry.chunk_size, geometry.local_size
    queries = query_positions(taken[:, None], taken[None, :], *sizes)
    matrix = (queries - key_positions(taken, *sizes)).double()
    matrix[taken[None, :] > taken[:, None]] = torch.nan
    return taken.numpy(), matrix.numpy()


def draw(geometry: ChunkGeometry, max_model_len: int, file: Path) -> None:
    """Write the picture of the first CHUNKS chunks, or of max_model_len tokens if that is less.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the file's name ends in no format of pictures.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    chunk_len = geometry.chunk_len
    length = min(CHUNKS * chunk_len, max_model_len)
    _, matrix = relative_positions(geometry, length)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, extent=(0, length, length, 0), vmin=0, interpolation="nearest")
    borders = range(0, length + 1, chunk_len)
    axes.set_xticks(borders)
    axes.set_yticks(borders)
    axes.grid(color="white", linewidth=0.5)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(
        f"DCA with chunk_size {geometry.chunk_size}, local_size {geometry.local_size}: "
        f"first {length} tokens",
        fontsize="medium",
    )
    figure.colorbar(image, label="relative position: query - key")
    figure.savefig(file, dpi=150)
