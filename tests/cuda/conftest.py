"""What tests of Triton's kernels share."""

from collections.abc import Iterator

import pytest
import torch

from tests.helpers.paged import DEVICE
from vllm_dca.cuda import plan_decode, reduce, tuning


@pytest.fixture(scope="module")
def short_shares() -> Iterator[None]:
    """The interpreter is slow: let several programs share a context of a hundred tokens.

    And let a few requests, rows, packs and pieces be three blocks or more: what a loop carries
    shows no earlier.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_decode, "MIN_SHARE", 1)
        patch.setattr(plan_decode, "PACK_COST", 1)
        patch.setattr(plan_decode, "BLOCK", 2)
        patch.setattr(plan_decode, "SEARCH", 2)
        patch.setattr(reduce, "PIECES_PER_STEP", 2)
        patch.setattr(tuning, "MAX_TILE", 16)
        yield


@pytest.fixture(autouse=True, scope="module")
def _nan_in_new_memory() -> Iterator[None]:
    """Scratch that is read before it is written shows in the answers; torch fills it so."""
    torch.use_deterministic_algorithms(DEVICE.type == "cpu", warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
