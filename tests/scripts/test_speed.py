"""A twofold loss of the CPU's speed does not pass unseen: ratios to vLLM's own, in one run."""

from collections.abc import Iterator

import pytest
import torch

from scripts.bench.cpu import measure

pytestmark = pytest.mark.alone
# The record, docs/results/cpu.json, has 0.9 to 1.1 for this shape: what a kernel half as fast
# would have is above the limit, and a busy machine's noise is below it.
LIMIT = 1.7
# vLLM's own has half precision's tiles where the processor has them; DCA's kernel has not.
DTYPES = ["float32"] if torch.cpu._is_amx_tile_supported() else ["float32", "bfloat16"]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("step", ["prefill", "decode"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_keeps_up_with_vllms(step: str, dtype: str) -> None:
    row = measure(step, "SmolLM2-135M", dtype, batch=1, context=8192, repeats=9)
    assert row["ratio"] <= LIMIT, row
