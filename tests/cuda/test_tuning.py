"""How many tiles are on their way to a multiprocessor."""

import itertools

import pytest
import torch

from tests.helpers.shapes import DTYPES
from vllm_dca.cuda import tuning

E5M2 = torch.float8_e5m2
# As the kernels in docs/results/ were compiled: by head size, dtype and KV cache.
SERVED_STAGES = {
    (64, torch.bfloat16, torch.bfloat16): 4,
    (64, torch.bfloat16, E5M2): 6,
    (64, torch.float32, torch.float32): 6,
    (128, torch.bfloat16, torch.bfloat16): 3,
    (128, torch.bfloat16, E5M2): 4,
    (128, torch.float32, torch.float32): 4,
    (256, torch.bfloat16, torch.bfloat16): 3,
    (256, torch.bfloat16, E5M2): 4,
    (256, torch.float32, torch.float32): 3,
}


@pytest.mark.parametrize("largest_tile", [16, 64])
def test_every_kernel_has_few_stages(
    largest_tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of heads of any size, with the tiles of these tests too: a GPU compiles each stage."""
    monkeypatch.setattr(tuning, "MAX_TILE", largest_tile)
    for size, dtype, queries in itertools.product(range(8, 520, 8), DTYPES, (1, 16, 64)):
        for cache in (dtype, E5M2):
            stages = tuning.decode_tuning(size, dtype, cache, queries).num_stages
            assert stages <= 6, (size, dtype, cache)


@pytest.mark.parametrize(("kernel", "stages"), SERVED_STAGES.items())
def test_stages_are_those_that_are_on_record(
    kernel: tuple[int, torch.dtype, torch.dtype], stages: int
) -> None:
    for queries in (1, 16, 64):
        assert tuning.decode_tuning(*kernel, queries).num_stages == stages
