"""What `explain` says of sparse prefill, against what the reference keeps and records took."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from vllm_dca.method.sparse_config import SparseSettings
from vllm_dca.method.sparse_cost import ATTENDING, SELECTING, bounds
from vllm_dca.reference import sparse as reference

LENGTH, THRESHOLD, STEP, CHUNK_LEN = 4096, 1024, 512, 2048
RESULTS = Path(__file__).resolve().parents[2] / "docs/results"


def kept(verticals: torch.Tensor, diagonals: torch.Tensor, rule: reference.Rule) -> float:
    """The share of the keys before a row, where these weigh most for every segment."""
    seen = torch.arange(1, THRESHOLD + 1).sum().item()
    for end in range(THRESHOLD + STEP, LENGTH + 1, STEP):
        i = torch.arange(end - 64, end)
        weights = torch.full((1, 64, end), 1e-9, dtype=torch.float64)
        weights[..., verticals[verticals < end]] += 0.01
        # More on diagonals: a row has a key of each vertical, so these are on diagonals too.
        for row, position in enumerate(i.tolist()):
            keys = position - diagonals
            weights[0, row, keys[keys >= 0]] += 1.0
        lines = reference.select(weights, i, rule)
        seen += reference.seen_keys(torch.arange(end - STEP, end), lines).sum().item()
    return seen / torch.arange(1, LENGTH + 1).sum().item()


def by_budget(verticals: int, slashes: int) -> tuple[SparseSettings, reference.Rule]:
    settings = SparseSettings(THRESHOLD, 1.0, 0, (((verticals, slashes),),))
    return settings, reference.Rule([verticals], [slashes])


def test_budgets_keep_the_least_side_by_side_and_the_most_apart() -> None:
    settings, rule = by_budget(30, 400)
    (least, _), _ = bounds(settings, LENGTH, STEP, CHUNK_LEN)
    assert kept(torch.arange(30), torch.arange(400), rule) == pytest.approx(least, rel=0.1)
    settings, rule = by_budget(60, 110)
    (_, most), _ = bounds(settings, LENGTH, STEP, CHUNK_LEN)
    diagonals = torch.cat([torch.arange(100), torch.arange(200, 1000, 80)])
    assert kept(torch.arange(60), diagonals, rule) == pytest.approx(most, rel=0.1)


@pytest.mark.parametrize("budgets", [None, (((5000, 5000),),)])
def test_all_is_kept_below_the_threshold(budgets: object) -> None:
    settings = SparseSettings(LENGTH, 0.95, 64, budgets)  # type: ignore[arg-type]
    assert bounds(settings, LENGTH, STEP, CHUNK_LEN) == ((1.0, 1.0), (1.0, 1.0))


def test_by_coverage_the_least_is_known() -> None:
    """With weight on the nearest keys alone, no more than sparse_min_keys are kept."""
    settings = SparseSettings(THRESHOLD, 0.5, 640, None)
    (least, most), (fastest, slowest) = bounds(settings, LENGTH, STEP, CHUNK_LEN)
    rule = reference.Rule(coverage=0.5, min_keys=640)
    # Blocks of equal weight are taken from the nearest on; so are keys.
    found = kept(torch.arange(3000, 3640), torch.arange(640), rule)
    assert least <= found < most == 1.0
    assert fastest < 1 < slowest
    # Blocks are whole: of 577 keys and more there are as many.
    other = SparseSettings(THRESHOLD, 0.5, 577, None)
    assert bounds(other, LENGTH, STEP, CHUNK_LEN).keys[0] == least


def test_what_a_step_leaves_of_a_chunk_is_dense_if_it_is_short() -> None:
    chunk_len, (verticals, slashes) = 448, (30, 100)
    settings, _ = by_budget(verticals, slashes)
    cuts = {*range(0, LENGTH, STEP), *range(0, LENGTH, chunk_len), THRESHOLD, LENGTH}
    seen = 0
    for begin, end in itertools.pairwise(sorted(cuts)):
        is_sparse = begin >= THRESHOLD and end - begin >= 256
        # The diagonals side by side, from the end of a row's tile on.
        most = slashes if is_sparse else LENGTH
        seen += sum(min(i + 1, most + i % 64) for i in range(begin, end))
    (least, _), (fastest, _) = bounds(settings, LENGTH, STEP, chunk_len)
    assert least == pytest.approx(seen / (LENGTH * (LENGTH + 1) / 2), rel=0.02)
    # Beside chunks that steps divide.
    (even, _), (quick, _) = bounds(settings, LENGTH, STEP, CHUNK_LEN)
    assert (least > 2 * even, fastest > quick) == (True, True)


def test_time_is_as_measured() -> None:
    rows = [
        row
        for name in ("sparse-32k", "sparse-128k")
        for row in json.loads((RESULTS / f"{name}.json").read_text())["results"]
    ]
    slopes = [
        took / float(share)
        for row in rows
        for share, took in row["attend"].items()
        if float(share) > 0.05
    ]
    assert sum(slopes) / len(slopes) == pytest.approx(ATTENDING, rel=0.1)
    selecting = [row["select"]["auto"] * row["new"] / 64 for row in rows]
    assert sum(selecting) / len(selecting) == pytest.approx(SELECTING, rel=0.1)
