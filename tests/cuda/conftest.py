"""What tests of Triton's kernels share."""

from collections.abc import Iterator

import pytest

from vllm_dca.cuda import plan_decode, tuning


@pytest.fixture(scope="module")
def short_shares() -> Iterator[None]:
    """The interpreter is slow: let several programs share a context of a hundred tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_decode, "MIN_SHARE", 1)
        patch.setattr(plan_decode, "PACK_COST", 1)
        patch.setattr(tuning, "MAX_TILE", 16)
        yield
