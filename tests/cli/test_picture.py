"""`vllm-dca explain --plot`: the relative positions, by hand and as a file."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.command_line import BLOCK, explained, run
from vllm_dca.cli.picture import relative_positions
from vllm_dca.method.geometry import ChunkGeometry


def test_the_matrix_of_a_small_geometry() -> None:
    # By hand from the paper's table: chunks of 4, two local tokens, c = 6.
    expected = [
        [0],
        [1, 0],
        [2, 1, 0],
        [3, 2, 1, 0],
        [4, 3, 2, 1, 0],
        [5, 4, 3, 2, 1, 0],
        [6, 5, 4, 3, 2, 1, 0],
        [6, 5, 4, 3, 3, 2, 1, 0],
        [6, 5, 4, 3, 4, 3, 2, 1, 0],
        [6, 5, 4, 3, 5, 4, 3, 2, 1, 0],
        [6, 5, 4, 3, 6, 5, 4, 3, 2, 1, 0],
    ]
    length = len(expected)
    taken, matrix = relative_positions(ChunkGeometry(6, 2), length)
    assert taken.tolist() == list(range(length))
    padded = [row + [np.nan] * (length - len(row)) for row in expected]
    np.testing.assert_array_equal(matrix, np.array(padded))


def test_the_matrix_of_a_long_sequence_is_a_sample() -> None:
    geometry = ChunkGeometry(6144, 1024)
    taken, matrix = relative_positions(geometry, 20480, side=100)
    assert (taken[0], taken[-1], len(taken)) == (0, 20479, 100)
    assert matrix.shape == (100, 100)
    assert np.nanmax(matrix) <= 6144
    assert np.nanmin(matrix) == 0
    close = np.flatnonzero(taken < geometry.chunk_len)
    np.testing.assert_array_equal(
        np.tril(matrix[np.ix_(close, close)]),
        np.tril(taken[close][:, None] - taken[close][None, :]),
    )


def test_a_picture(llama: str, tmp_path: Path) -> None:
    file = tmp_path / "dca.png"
    explained(llama, "--max-model-len", "1024", *BLOCK, "--plot", str(file))
    assert file.read_bytes().startswith(b"\x89PNG\r\n")
    result = run("explain", llama, *BLOCK, "--plot", str(tmp_path / "dca.txt"))
    assert result.exit_code == 1
    assert "Format 'txt' is not supported" in result.stderr


def test_a_picture_without_matplotlib(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run("explain", llama, "--plot", str(tmp_path / "dca.png"))
    assert result.exit_code == 1
    assert "pip install matplotlib" in result.stderr
